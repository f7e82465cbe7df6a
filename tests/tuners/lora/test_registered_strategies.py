# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
A start and a variant of LoRA that are written outside of the package, and go through all that an adapter goes through.

The start fills factor A with a constant. The variant multiplies what the adapter adds by a trained number, its gate;
`init_lora_weights="gated"` asks for both.
"""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    features,
    llama,
    logits,
    randomise,
    refused,
    stack,
    token_ids,
    warned,
)
from support.registry import strategies_put_back
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.methods import LoraVariant, Start, register_start, register_variant
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.starts import find_start
from peft.utils.error import PeftValueError


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

KINDS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(4, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 4), lambda: torch.tensor([[0, 3, 6], [2, 2, 5]])),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2), lambda: torch.randn(2, 4, 5, 6)),
}


class Constant(Start):
    """A is 0.5 everywhere, and B 0.25, so that the adapter has an effect at once."""

    needs_matrix = False

    def refusal(self, base, rank, layer=None, adapter=None):
        if isinstance(base, nn.Conv1d):
            return PeftValueError(f"{self.name!r} has nothing to say about nn.Conv1d")
        return None

    def start(self, layer, adapter):
        into, out = layer.factor_weights(adapter)
        into.fill_(0.5)
        out.fill_(0.25)


class Gated(LoraVariant):
    """W + gate * scaling * B A."""

    name = "a gate"

    @classmethod
    def is_asked(cls, config):
        return config.init_lora_weights == "gated"

    @classmethod
    def supports(cls, layer):
        return not isinstance(layer.get_base_layer(), nn.Conv3d)

    def make(self, layer, adapter, config):
        layer.container("lora_gate", nn.ParameterDict)[adapter] = layer.new_parameter(1)

    def start(self, layer, adapter, start):
        super().start(layer, adapter, start)
        layer.lora_gate[adapter].fill_(1)

    def forward(self, layer, adapter, x, earlier, *args, **kwargs):
        result = layer.adapted(earlier, x, *args, **kwargs)
        gate = layer.source(adapter).lora_gate[adapter]
        return (result + gate * layer.delta_forward(adapter, x)).to(result.dtype)

    def merge_weight_(self, layer, adapter, weight):
        layer.add_delta_(adapter, weight, layer.lora_gate[adapter].item())

    def unmerge_weight_(self, layer, adapter, weight):
        layer.add_delta_(adapter, weight, -layer.lora_gate[adapter].item())


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Both are there during a test, and gone after it."""
    with strategies_put_back():
        register_start("constant")(Constant)
        register_start("Gated")(Constant)
        register_variant("gated")(Gated)
        yield


def adapted(kind: str, start: str, **changes: Any) -> tuple[PeftModel, nn.Module, torch.Tensor]:
    """A model of one layer with an adapter, its base model, and an input."""
    torch.manual_seed(3)
    build, make_input = KINDS[kind]
    base = nn.Sequential(build())
    nn.init.normal_(base[0].weight)
    x = make_input()
    settings = {"r": 2, "target_modules": ["0"], "fan_in_fan_out": kind == "Conv1D", **changes}
    return get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=start, **settings)), base, x


def train_step(model: nn.Module, *inputs: torch.Tensor) -> None:
    """One step that moves all that is trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = model(*inputs)
    (output.logits if hasattr(output, "logits") else output).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("start", ["constant", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_stages(kind: str, start: str, tmp_path: Path) -> None:
    model, base, x = adapted(kind, start)
    layer = model.get_base_model()[0]
    into, out = layer.factor_weights("default")
    assert (into == 0.5).all() and (out == 0.25).all()
    at_first = model(x)
    assert differs(at_first, base(x))
    train_step(model, x)
    trained = model(x).detach()
    assert differs(trained, at_first)
    if start == "gated":
        assert layer.lora_gate["default"].item() != 1
        with torch.no_grad():
            expected = copy.deepcopy(base)
            delta = layer.lora_gate["default"] * layer.get_delta_weight("default")
            expected[0].weight.add_(delta)
        assert_close(trained, expected(x))

    model.merge_adapter()
    assert_close(model(x), trained)
    model.unmerge_adapter()
    assert_close(layer.get_base_layer().weight, base[0].weight)
    with model.disable_adapter():
        assert_close(model(x), base(x))

    model.save_pretrained(tmp_path)
    keys = {key.rpartition(".0.")[2] for key in get_peft_model_state_dict(model)}
    assert ("lora_gate" in keys) == (start == "gated")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(again(x), trained)
    assert_equal(pickle.loads(pickle.dumps(again))(x), again(x))
    assert_close(again.merge_and_unload()(x), trained)


def test_a_second_adapter_and_its_end() -> None:
    model, base, x = adapted("linear", "gated")
    expected = model.eval()(x)
    model.add_adapter("plain", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    layer = model.get_base_model()[0]
    mixed = model(x, adapter_names=["default", "__base__", "plain", "default"])
    assert_close(mixed[0], expected[0])
    assert_close(mixed[1], base(x)[1])
    layer.set_adapter(["default", "plain"])
    assert_close(model(x), expected + layer.delta_forward("plain", x))
    with warned("'plain' is active now"):
        model.delete_adapter("default")
    assert "default" not in layer.lora_gate and not layer.variants


@pytest.mark.parametrize("start", ["constant", "gated"])
def test_tied_embedding(start: str, tmp_path: Path) -> None:
    ids = token_ids()
    settings = {"r": 2, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    model = get_peft_model(llama(tied=True), LoraConfig(init_lora_weights=start, **settings)).eval()
    train_step(model, ids)
    trained = logits(model, ids)
    inner = model.get_base_model()
    owner, follower = inner.model.embed_tokens, inner.lm_head
    assert follower.source("default") is owner
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == (3 if start == "gated" else 2)
    assert follower.lora_A["default"].weight.data_ptr() == owner.lora_embedding_B["default"].data_ptr()

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(tied=True), tmp_path).eval()
    assert_close(logits(again, ids), trained)
    model.merge_adapter()
    assert_close(logits(model, ids), trained)
    model.unmerge_adapter()
    assert_close(logits(model, ids), trained)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, ids), trained)


@pytest.mark.parametrize(
    ("layer", "start", "mention"),
    [(nn.Conv1d(2, 2, 1), "constant", "nothing to say"), (nn.Conv3d(2, 2, 1), "gated", "a gate")],
)
def test_what_they_refuse_is_refused_before_anything_is_changed(layer: nn.Module, start: str, mention: str) -> None:
    net = nn.Sequential(layer)
    with refused(net, ValueError, mention):
        get_peft_model(net, LoraConfig(r=1, target_modules=["0"], init_lora_weights=start))


def test_combinations_refuse_a_variant() -> None:
    model, _, _ = adapted("linear", "gated")
    with pytest.raises(ValueError, match="adapter 'default' uses gated"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_a_name_is_taken_once() -> None:
    for register, name in ((register_start, "Constant"), (register_start, "pissa"), (register_start, True)):
        with pytest.raises(ValueError, match="is registered already"):
            register(name)(Constant)
    for name in ("gated", "use_dora", "kasa_config"):
        with pytest.raises(ValueError, match="is registered already"):
            register_variant(name)(Gated)


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        ValueError, match="'nonsense' is not known; choose one of .*'constant', 'gated' or 'pissa_niter_N'"
    ):
        adapted("linear", "nonsense")
    assert type(find_start("CONSTANT")) is Constant


def test_two_variants_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        adapted("linear", "gated", use_dora=True)


class Halved(Linear):
    """A layer of one's own: half of what LoRA's gives."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.made_with = kwargs

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute it."""
        return super().forward(*args, **kwargs) / 2


def test_layers_of_ones_own(tmp_path: Path) -> None:
    def own() -> LoraConfig:
        config = LoraConfig(r=2, target_modules=["head"])
        config._register_custom_module({nn.Linear: Halved})
        return config

    config = own()
    model = get_peft_model(stack(), config).eval()
    layer = model.base_model.model.head
    assert type(layer) is Halved and layer.made_with["target_name"] == "head"
    assert {"config", "r", "lora_alpha", "target_name", "parameter_name"} <= set(layer.made_with)
    randomise(model)
    assert differs(logits(model, features()), logits(stack(), features()))
    model.save_pretrained(tmp_path)
    assert "custom" not in (tmp_path / "adapter_config.json").read_text() and config == LoraConfig(
        r=2, target_modules=["head"]
    )
    again = PeftModel.from_pretrained(stack(), tmp_path, config=own())
    assert_equal(logits(again, features()), logits(model, features()))
    model.add_adapter("other", own())
    assert type(model.base_model.model.head) is Halved and layer.available_adapters == {"default", "other"}
    assert not isinstance(PeftModel.from_pretrained(stack(), tmp_path).base_model.model.head, Halved)


class Bare(nn.Module, LoraLayer):
    """LoRA on a linear layer with nothing but what `LoraLayer` has, and a forward pass of its own."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **kwargs: object
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the parts of the active adapters, unless they are off or in the weight already."""
        result = self.base_layer(x)
        for name in () if self.disable_adapters or self.merged else self.active_adapters:
            result = result + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return result


def test_bare_layers_of_ones_own(tmp_path: Path) -> None:
    def own() -> LoraConfig:
        config = LoraConfig(r=2, target_modules=["head"])
        config._register_custom_module({nn.Linear: Bare})
        return config

    model = get_peft_model(stack(), own()).eval()
    assert type(model.base_model.model.head) is Bare
    randomise(model)
    expected = logits(model, features())
    assert differs(expected, logits(stack(), features()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(stack(), tmp_path, config=own())
    assert_equal(logits(again, features()), expected)
    with again.disable_adapter():
        assert_equal(logits(again, features()), logits(stack(), features()))
    assert_close(logits(again.merge_and_unload(), features()), expected)
