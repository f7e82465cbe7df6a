# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Bases that accelerate has offloaded: adapters compute, learn and merge as they do on those that are not."""

from collections.abc import Callable

import accelerate
import pytest
import torch
from support.helpers import assert_close, assert_equal, llama, randomise, refused
from support.method_options import OPTIONS, layered_methods
from torch import nn

from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import onload_layer


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

IDS = torch.tensor([[1, 5, 3, 7, 3]])


class Net(nn.Module):
    """One layer of each kind, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.norm = nn.Embedding(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.conv, self.head = nn.Conv1d(16, 16, 1), nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.hidden(self.words(ids))))
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


def make_base() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def of_method(name: str) -> Callable[[], PeftConfig]:
    targets = {"TRAINABLE_TOKENS": ["words"], "LN_TUNING": ["norm"]}.get(name, ["hidden", "head"])
    return lambda: PEFT_TYPE_TO_CONFIG_MAPPING[name](**OPTIONS.get(name, {}), target_modules=list(targets))


def lora(**options: object) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(**{"r": 2, "target_modules": ["hidden", "head"], **options})


CONFIGS = {name: of_method(name) for name in layered_methods() if name != "LN_TUNING"} | {
    "kinds": lora(target_modules=["words", "hidden", "conv", "head"]),
    "dora": lora(target_modules=["words", "hidden", "conv", "head"], use_dora=True),
    "lora_bias": lora(lora_bias=True),
    "parameters": lora(target_modules=["conv"], target_parameters=["hidden.weight"]),
    "tokens": lora(trainable_token_indices={"words": [3, 5]}),
    "tokens_of_head": lambda: TrainableTokensConfig(token_indices=[3], target_modules=["head"]),
}
OFFLOADS: dict[str, Callable] = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
}
offloads = pytest.mark.parametrize("offload", OFFLOADS)


def offloaded(offload: str, folder: object) -> nn.Module:
    base = make_base()
    return OFFLOADS[offload](base, str(folder)) or base


def adapted(base: nn.Module, *configs: PeftConfig) -> PeftModel:
    model = get_peft_model(base, configs[0], adapter_name="a").eval()
    for name, config in zip("bc", configs[1:], strict=False):
        model.add_adapter(name, config)
    randomise(model, "|".join([*PEFT_TYPE_TO_PREFIX_MAPPING.values(), "trainable_tokens_"]))
    return model


@offloads
@pytest.mark.parametrize("name", CONFIGS)
def test_offloaded_base_is_as_good_as_one_in_memory(name: str, offload: str, tmp_path: object) -> None:
    plain, model = adapted(make_base(), CONFIGS[name]()), adapted(offloaded(offload, tmp_path), CONFIGS[name]())
    base = model.get_base_model()
    with torch.no_grad():
        expected = plain(IDS)
    for either in (plain, model):
        either.train()
        torch.manual_seed(0)
        either(IDS).square().sum().backward()
        either.eval()
    wanted = {key: p.grad for key, p in plain.named_parameters() if p.requires_grad}
    found = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert wanted.keys() == found.keys()
    for key, gradient in wanted.items():
        assert_close(found[key], gradient)
    with torch.no_grad():
        assert_close(model(IDS), expected)
        with model.disable_adapter():
            assert_equal(model(IDS), make_base()(IDS))
        if not all(layer.is_mergeable for layer in model.base_model._layers()):
            return
        model.merge_adapter(safe_merge=True)
        assert_close(model(IDS), expected)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert_equal(model(IDS), make_base()(IDS))
        merged = model.merge_and_unload()
        assert merged is base and all(parameter.is_meta for parameter in base.parameters())
        assert_close(merged(IDS), expected)


@offloads
def test_adapters_merged_one_after_the_other(offload: str, tmp_path: object) -> None:
    configs = lora(), lora(target_modules=["head"])
    plain = adapted(make_base(), *(config() for config in configs))
    model = adapted(offloaded(offload, tmp_path), *(config() for config in configs))
    with torch.no_grad():
        for either in (plain, model):
            either.base_model.set_adapter(["a", "b"])
        expected = plain(IDS)
        model.merge_adapter(["a"])
        model.merge_adapter(["b"])
        assert_close(model(IDS), expected)
        model.unmerge_adapter()
        assert_close(model(IDS), expected)
        with model.disable_adapter():
            assert_equal(model(IDS), make_base()(IDS))


@offloads
def test_merged_weights_are_what_others_read(offload: str, tmp_path: object) -> None:
    """The hooks of accelerate give the merged weights, and its files stay as they were."""
    plain, model = adapted(make_base(), lora()()), adapted(offloaded(offload, tmp_path), lora()())
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    with accelerate.utils.align_module_device(merged.head):
        assert_close(merged.head.weight, expected.head.weight)
    if offload == "disk":
        again = offloaded(offload, tmp_path)
        assert_equal(again(IDS), make_base()(IDS))


@offloads
@pytest.mark.parametrize(
    ("config", "mentions"),
    [
        (of_method("LN_TUNING"), ("LayerNorm", "device_map")),
        (lora(modules_to_save=["head"]), ("modules_to_save", "'head'", "device_map")),
        (lora(bias="all"), ("bias='all'", "'hidden'", "device_map")),
        (lora(bias="lora_only"), ("bias='lora_only'", "'hidden'", "device_map")),
        (lora(init_lora_weights="pissa"), ("pissa", "'hidden'")),
    ],
)
def test_what_needs_the_weights_themselves_is_refused(
    config: Callable, mentions: tuple[str, ...], offload: str, tmp_path: object
) -> None:
    base = offloaded(offload, tmp_path)
    with refused(base, ValueError, *mentions):
        get_peft_model(base, config())


@offloads
@pytest.mark.parametrize("tokens", [[3], {"embed_tokens": [3]}, {"lm_head": [3]}], ids=["list", "embedding", "head"])
def test_tokens_of_a_tied_embedding_are_refused(tokens: object, offload: str, tmp_path: object) -> None:
    base = llama(tied=True)
    base = OFFLOADS[offload](base, str(tmp_path)) or base
    reached = "lm_head" if "lm_head" in tokens else "embed_tokens"
    with refused(base, ValueError, reached, "trainable_token_indices"):
        get_peft_model(base, lora(trainable_token_indices=tokens, target_modules=["q_proj"])())


@offloads
def test_a_layer_that_is_brought_here_is_merged_for_good(offload: str, tmp_path: object) -> None:
    plain, model = adapted(make_base(), lora()()), adapted(offloaded(offload, tmp_path), lora()())
    with torch.no_grad():
        expected = plain(IDS)
        for name in ("hidden", "head"):
            layer = getattr(model.get_base_model(), name)
            with onload_layer(layer):
                assert not layer.base_layer.weight.is_meta
                layer.merge(safe_merge=True)
                getattr(plain.get_base_model(), name).merge()
                assert_close(layer.base_layer.weight, getattr(plain.get_base_model(), name).base_layer.weight)
            assert layer.base_layer.weight.is_meta
        assert_close(model(IDS), expected)
        model.unmerge_adapter()
        assert_close(model(IDS), expected)
        with model.disable_adapter():
            assert_close(model(IDS), make_base()(IDS))
        with onload_layer(model.get_base_model().norm):  # changed by hand
            model.get_base_model().norm.weight.data += 1
            plain.get_base_model().norm.weight.data += 1
        assert_close(model(IDS), plain(IDS))
