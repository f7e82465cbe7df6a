# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LayerNorm tuning: copies of layers of any class, with everything that belongs to them."""

import copy
from pathlib import Path

import pytest
import torch
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    llama,
    logits,
    randomise,
    refused,
    token_ids,
    trainable,
)
from torch import nn

from peft import LNTuningConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.ln_tuning import LNTuningLayer


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


class Scale(nn.Module):
    """A normalisation that no library knows, with a part that is a module of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.inner = nn.LayerNorm(width)
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and scale."""
        return self.inner(x) * self.gain + self.shift


def net() -> nn.Module:
    """One normalisation of each sort."""
    norms = [nn.LayerNorm(4), nn.RMSNorm(4), nn.BatchNorm1d(4), Scale(4)]
    return nn.Sequential(*[module for norm in norms for module in (nn.Linear(4, 4), norm)]).eval()


NORMS = ["1", "3", "5", "7"]


def tuned(base: nn.Module, **fields: object) -> PeftModel:
    """Tuned layers whose values differ from those of the base."""
    model = get_peft_model(base, LNTuningConfig(**{"target_modules": NORMS, **fields})).eval()
    randomise(model, "ln_tuning_")
    return model


def test_only_the_copies_are_trained() -> None:
    """The base layers stay as they are, and a fresh copy computes the same."""
    base = net()
    x = torch.randn(3, 4)
    expected = base(x)
    model = get_peft_model(base, LNTuningConfig(target_modules=NORMS)).eval()
    assert_equal(model(x), expected)
    assert trainable(model) == {
        f"base_model.model.{name}"
        for name in (
            "1.ln_tuning_layers.default.weight",
            "1.ln_tuning_layers.default.bias",
            "3.ln_tuning_layers.default.weight",
            "5.ln_tuning_layers.default.weight",
            "5.ln_tuning_layers.default.bias",
            "7.ln_tuning_layers.default.gain",
            "7.ln_tuning_layers.default.inner.weight",
            "7.ln_tuning_layers.default.inner.bias",
        )
    }


def test_computes_what_the_copies_do() -> None:
    """The same model with the trained layers in the places of the base's."""
    base = net()
    reference = copy.deepcopy(base)
    model = tuned(base)
    for name in NORMS:
        reference[int(name)] = copy.deepcopy(base[int(name)].ln_tuning_layers["default"])
    x = torch.randn(3, 4)
    assert_equal(model(x), reference(x))
    with model.disable_adapter():
        assert differs(model(x), reference(x))


def test_merge_and_back() -> None:
    """Parameters and buffers are replaced, also those of modules inside, and put back."""
    base = net()
    before = {name: (id(value), value.clone()) for name, value in base.state_dict(keep_vars=True).items()}
    model = tuned(base)
    base[5].ln_tuning_layers["default"].running_mean.add_(1)
    base[7].ln_tuning_layers["default"].shift.add_(1)
    x = torch.randn(3, 4)
    expected = model(x)
    model.merge_adapter(safe_merge=True)
    assert_equal(model(x), expected)
    assert_equal(base[7].base_layer.inner.weight, base[7].ln_tuning_layers["default"].inner.weight)
    model.unmerge_adapter()
    for name, value in model.unload().state_dict(keep_vars=True).items():
        assert id(value) == before[name][0]
        assert_equal(value, before[name][1])


def test_merge_and_unload() -> None:
    """A model of the base's classes, with the trained values."""
    model = tuned(net())
    x = torch.randn(3, 4)
    expected = model(x)
    merged = model.merge_and_unload()
    assert [type(module) for module in merged] == [type(module) for module in net()]
    assert_equal(merged(x), expected)


def test_running_statistics_belong_to_the_adapter(tmp_path: Path) -> None:
    """Training moves those of the copy, and they are saved."""
    base = net()
    model = tuned(base, target_modules=["5"])
    model.train()
    model(torch.randn(16, 4) * 3 + 1)
    model.eval()
    batch_norm = base[5]
    assert not batch_norm.base_layer.running_mean.any()
    assert batch_norm.ln_tuning_layers["default"].running_mean.any()
    assert batch_norm.ln_tuning_layers["default"].num_batches_tracked == 1
    keys = {f"base_model.model.5.ln_tuning_layers.{key}" for key in nn.BatchNorm1d(4).state_dict()}
    assert set(get_peft_model_state_dict(model)) == keys
    model.save_pretrained(tmp_path)
    untouched = net()
    untouched.load_state_dict(model.get_base_model().state_dict(), strict=False)
    untouched[5].load_state_dict(batch_norm.base_layer.state_dict())
    x = torch.randn(3, 4)
    for low in (False, True):
        again = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path, low_cpu_mem_usage=low)
        assert_equal(again(x), model(x))


def test_default_targets() -> None:
    """The model type decides, and RMSNorm of transformers is a class like any other."""
    model = get_peft_model(llama(), LNTuningConfig())
    assert len(model.targeted_module_names) == 5
    assert all(isinstance(model.get_base_model().get_submodule(n), LNTuningLayer) for n in model.targeted_module_names)


def test_adapters_beside_each_other() -> None:
    """Each has copies of its own; the last of several active ones counts; a deleted one is gone."""
    base = net()
    x = torch.randn(3, 4)
    model = tuned(base)
    first = model(x)
    model.add_adapter("other", LNTuningConfig(target_modules=["1"]))
    model.set_adapter("other")
    assert differs(model(x), first)
    model.base_model.set_adapter(["other", "default"])
    assert_equal(model(x), first)
    model.delete_adapter("default")
    assert base[1].available_adapters == {"other"}
    assert not base[3].available_adapters


def test_modules_without_parameters_are_refused() -> None:
    """There is nothing to train in them."""
    base = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4))
    with refused(base, ValueError, "'0' (LayerNorm)", "target_modules"):
        get_peft_model(base, LNTuningConfig(target_modules=["0"]))


def test_injection_without_storage() -> None:
    """Parameters of the copies can be made on the meta device."""
    base = inject_adapter_in_model(LNTuningConfig(target_modules=["1"]), net(), low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in base[1].ln_tuning_layers["default"].parameters())


def test_tied_layers() -> None:
    """A target that shares its weight with another module stays tied to it."""
    base = llama(tied=True)
    model = get_peft_model(base, LNTuningConfig(target_modules=["lm_head"], ensure_weight_tying=True)).eval()
    copies = [layer.ln_tuning_layers["default"] for layer in (base.lm_head, base.model.embed_tokens)]
    assert copies[0].weight is copies[1].weight
    randomise(model, "ln_tuning_")
    expected = logits(model, token_ids())
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, token_ids()), expected)
