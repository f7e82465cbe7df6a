# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Modules that compute with the weight of an adapted layer, and never call it, get what the layer computes with."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.effects import move
from support.helpers import assert_close, differs, randomise, refused, seeded
from support.method_options import OPTIONS, mergeable_methods
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
)

from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from peft.models.mixed import PeftMixedModel
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import ReplacementLayer
from peft.utils.error import PeftError


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


class Kernel(torch.autograd.Function):
    """What a fused kernel looks like to autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


WAYS = {
    "product": lambda x, head: x @ head.weight.T + head.bias,
    "function": lambda x, head: nn.functional.linear(x, head.weight, head.bias),
    "kernel": lambda x, head: Kernel.apply(x, head.weight) + head.bias,
    "slices": lambda x, head: torch.cat([x @ head.weight[:8].T, x @ head.weight[8:].T], dim=-1) + head.bias,
    "call": lambda x, head: head(x),
}


class Reader(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.head, self.compute = nn.Linear(16, 16), nn.Linear(16, 24), WAYS[way]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(torch.tanh(self.body(x)), self.head)


def reader(way: str = "product") -> Reader:
    with seeded(0):
        return Reader(way)


def inputs() -> torch.Tensor:
    with seeded(3):
        return torch.randn(5, 16)


def config_of(method: str, targets: list[str], **kwargs: Any) -> Any:
    return PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=targets, **OPTIONS.get(method, {}), **kwargs)


def started(model: nn.Module, *arguments: Any) -> nn.Module:
    """Move what is trained away from where it started, so far that it matters."""
    arguments, training = arguments or (inputs(),), model.training
    move([p for p in model.parameters() if p.requires_grad], lambda: model.eval()(*arguments), seed=1)
    return model.train(training)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "call"])
@pytest.mark.parametrize("method", mergeable_methods())
def test_reading_is_calling(method: str, way: str) -> None:
    model = started(get_peft_model(reader(way), config_of(method, ["head"]))).eval()
    x, expected = inputs(), copy.deepcopy(model)
    expected.base_model.model.compute = WAYS["call"]
    with torch.no_grad():
        assert_close(model(x), expected(x))
        assert differs(model(x), reader()(x))
        assert_close(copy.deepcopy(model).merge_and_unload()(x), model(x))
    found, wanted = gradients(model, x), gradients(expected, x)
    assert found.keys() == wanted.keys() != set()
    for name in wanted:
        assert_close(found[name], wanted[name], atol=1e-3)


@pytest.mark.parametrize("kwargs", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_variants_of_lora_are_read_too(kwargs: dict[str, Any]) -> None:
    model = started(get_peft_model(reader("kernel"), LoraConfig(r=2, target_modules=["head"], **kwargs))).eval()
    expected = copy.deepcopy(model)
    expected.base_model.model.compute = WAYS["call"]
    assert_close(model(inputs()), expected(inputs()))
    found, wanted = gradients(model, inputs()), gradients(expected, inputs())
    assert found.keys() == wanted.keys()


def test_layers_of_several_methods_and_adapters_are_read_together() -> None:
    model = PeftMixedModel(reader(), LoraConfig(r=2, target_modules=["head"], init_lora_weights=False), "one")
    model.add_adapter("two", config_of("LOHA", ["head"], init_weights=False))
    model.add_adapter("three", LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    model.set_adapter(["one", "two", "three"])
    expected = copy.deepcopy(model)
    expected.base_model.model.compute = WAYS["call"]
    assert_close(model(inputs()), expected(inputs()), atol=1e-4)


@pytest.mark.parametrize("method", mergeable_methods())
def test_elsewhere_the_weight_is_the_stored_parameter(method: str) -> None:
    model = started(get_peft_model(reader(), config_of(method, ["head"])))
    head, base = model.base_model.model.head, model.base_model.model.head.get_base_layer()
    assert head.weight is base.weight and head.bias is base.bias
    seen = []
    model.base_model.model.compute = lambda x, head: (
        seen.append(head.weight is base.weight and head.bias is base.bias) or x
    )
    with model.disable_adapter():
        model(inputs())
    model.merge_adapter()
    model(inputs())
    assert seen == [True, True]


def test_asking_for_the_type_computes_nothing() -> None:
    model = get_peft_model(reader(), LoraConfig(r=2, target_modules=["head"]))
    head = model.base_model.model.head
    head.get_delta_weight = head.add_delta_ = lambda *args: pytest.fail("it was computed")

    def compute(x: torch.Tensor, head: nn.Module) -> torch.Tensor:
        weight = head.weight
        assert isinstance(weight, torch.Tensor) and weight.dtype == torch.float32 and weight.shape == (24, 16)
        assert weight.device == x.device and weight.dim() == 2 and weight.size(0) == 24 and not weight.is_meta
        assert torch.is_floating_point(weight) and weight.numel() == 24 * 16
        return head(x)

    model.base_model.model.compute = compute
    assert_close(model(inputs()), reader("call")(inputs()))


def test_compiled_models_read_too() -> None:
    model = started(get_peft_model(reader(), LoraConfig(r=2, target_modules=["head"])))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(inputs()), model(inputs()))


def test_an_adapter_that_no_weight_can_hold_is_told_once() -> None:
    config = LoraConfig(r=2, target_modules=["head"], alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    base = get_peft_model(reader(), config).base_model.model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_close(base(inputs()), reader()(inputs()))
    texts = [str(warning.message) for warning in caught if "computes with the weight" in str(warning.message)]
    assert len(texts) == 1 and "Linear" in texts[0] and "aLoRA" in texts[0]


# ------------------------------------------------------------------------------------------ fast paths of torch
class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        output = self.encoder(x, src_key_padding_mask=mask)
        return output if mask is None else output.masked_fill(mask.unsqueeze(-1), 0.0)


def encoder() -> Encoder:
    with seeded(0):
        return Encoder()


@contextmanager
def slow_path() -> Iterator[None]:
    """Let encoders call their layers, also in eval mode: in training mode some methods draw at random."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("targets", [["linear1"], ["linear1", "linear2"], ["out_proj"], ["norm1"], ["self_attn"]])
@pytest.mark.parametrize("method", mergeable_methods())
def test_fast_path_of_transformer_encoders(method: str, targets: list[str], masked: bool) -> None:
    try:
        model = get_peft_model(encoder(), config_of(method, targets))
    except PeftError:
        pytest.skip("the method does not adapt such layers")
    if targets == ["self_attn"] and any(isinstance(m, ReplacementLayer) for m in model.modules()):
        pytest.skip("no copy of a whole attention is made in practice")
    with seeded(3):
        x = torch.randn(2, 3, 16)
    mask = torch.tensor([[False, False, True], [False, False, False]]) if masked else None
    started(model, x, mask).eval()
    with torch.no_grad():
        with slow_path():
            expected = model(x, mask)
            assert differs(expected, encoder().eval()(x, mask))
        assert_close(model(x, mask), expected)
        assert_close(copy.deepcopy(model).merge_and_unload()(x, mask), expected)
        with model.disable_adapter():
            assert_close(model(x, mask), encoder().eval()(x, mask))
    assert_close(model(x, mask), expected)


def test_settings_of_the_base_layer_can_be_read() -> None:
    model = get_peft_model(encoder(), config_of("LN_TUNING", ["norm1"]))
    norm = model.base_model.model.encoder.layers[0].norm1
    assert norm.eps == 1e-5 and norm.normalized_shape == (16,)
    for name in ("no_such_thing", "_no_such_thing", "forward_hooks"):
        with pytest.raises(AttributeError, match=name):
            getattr(norm, name)
    assert not hasattr(norm, "reset_parameters")


# ------------------------------------------------------------------------------------------ models of transformers
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}
BOTTLENECK = {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8, "num_feedforward_networks": 1}
MODELS: dict[str, Any] = {
    "MobileBERT": (lambda: MobileBertForMaskedLM(MobileBertConfig(**SIZES, **BOTTLENECK)), ["decoder", "dense"]),
    "DeBERTa": (lambda: DebertaV2ForMaskedLM(DebertaV2Config(**SIZES, legacy=False)), ["word_embeddings"]),
    "Mamba": (lambda: MambaForCausalLM(MambaConfig(**MAMBA)), ["dt_proj", "x_proj"]),
}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 40, "state_size": 4}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [False, True])
def test_models_that_read_weights(name: str, tied: bool) -> None:
    build, targets = MODELS[name]
    with seeded(0):
        base = build().eval()
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, ensure_weight_tying=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ties that come apart, or none to be kept
        model = get_peft_model(base, config).eval()
    randomise(model)
    ids = torch.arange(1, 7).view(1, 6)
    adapted = model(ids).logits
    adapted.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        with model.disable_adapter():
            assert differs(model(ids).logits, adapted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = copy.deepcopy(model).merge_and_unload()
        assert_close(merged(ids).logits, adapted, atol=1e-4)


class Config(dict):
    def to_dict(self) -> dict[str, Any]:
        return dict(self)


def state_space_model(model_type: str) -> nn.Module:
    layers = {name: nn.Linear(4, 4) for name in ("in_proj", "x_proj", "out_proj")}
    model = nn.ModuleDict({"mixer": nn.ModuleDict({**layers, "conv1d": nn.Conv1d(4, 4, 1)})})
    model.config = Config(model_type=model_type)
    return model


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["in_proj", "out_proj"]},
        {"target_modules": ["conv1d"]},
        {"target_modules": r".*\.out_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["in_proj"], "target_parameters": ["out_proj.weight"]},
    ],
)
def test_lora_on_layers_that_fused_kernels_pass_by(model_type: str, kwargs: dict[str, Any]) -> None:
    model = state_space_model(model_type)
    with refused(model, ValueError, "mixer" if "target_parameters" not in kwargs else "out_proj", model_type):
        get_peft_model(model, LoraConfig(r=2, **kwargs))
    get_peft_model(state_space_model(model_type), LoraConfig(target_modules=["in_proj", "x_proj"]))


def test_other_methods_and_models_have_their_out_proj() -> None:
    with refused(model := state_space_model("mamba"), ValueError, "out_proj"):
        get_peft_model(model, AdaLoraConfig(target_modules=["out_proj"], total_step=10))
    get_peft_model(state_space_model("mamba"), IA3Config(target_modules=["out_proj"], feedforward_modules=[]))
    get_peft_model(state_space_model("opt"), LoraConfig(target_modules=["out_proj"]))


def test_what_a_copy_is_read_as() -> None:
    model = started(get_peft_model(reader(), LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])))
    expected = copy.deepcopy(model)
    expected.base_model.model.compute = WAYS["call"]
    assert_close(model(inputs()), expected(inputs()))
