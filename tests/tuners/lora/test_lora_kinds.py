# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA on convolutions, attention and bare parameters, against formulas that are written out here.

The reference is always the plain base model with other weights, or another plain layer beside it.
"""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    features,
    randomise,
    refused,
    seeded,
    trainable,
    warned,
)
from torch import nn

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, MultiheadAttention, OutputProjection, ParamWrapper
from peft.tying.groups import find_tied_groups


# what groups have warned about is tested once
pytestmark = pytest.mark.filterwarnings(
    "error::peft.utils.warning.PeftWarning", "ignore:an adapter on a convolution:peft.utils.warning.PeftWarning"
)

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def adapted(net: nn.Module, targets: list[str], seed: int = 2, **options: Any) -> PeftModel:
    """Give a model an adapter that has an effect, in evaluation mode."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **options})
    model = get_peft_model(net, config)
    randomise(model, seed=seed)
    return model.eval()


def assert_life_of_adapter(
    make: Callable[[], nn.Module], model: PeftModel, inputs: tuple, folder: Path, merges: bool = True
) -> None:
    """Disable, merge, unmerge, copy, save and load: the outputs are those of the adapter, or of the base model."""
    with torch.no_grad():
        # torch takes another path for attention with trainable weights
        base, expected = make().eval().requires_grad_(False)(*inputs), model(*inputs)
        assert differs(expected, base)
        with model.disable_adapter():
            assert_equal(model(*inputs), base)
        assert_equal(copy.deepcopy(model)(*inputs), expected)
        assert_equal(pickle.loads(pickle.dumps(model))(*inputs), expected)
        model.save_pretrained(folder)
        assert_equal(PeftModel.from_pretrained(make(), folder).eval()(*inputs), expected)
        if merges:
            model.merge_adapter(safe_merge=True)
            assert_close(model(*inputs), expected)
            model.unmerge_adapter()
            assert_close(model(*inputs), expected)
            merged = copy.deepcopy(model).merge_and_unload()
            assert {name: p.shape for name, p in merged.named_parameters()} == {
                name: p.shape for name, p in make().named_parameters()
            }
            assert_close(merged(*inputs), expected)
        assert_close(model.unload()(*inputs), base)


# ------------------------------------------------------------------------------------------ convolutions
GEOMETRIES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3}),
    "1d_dilated": (nn.Conv1d, {"kernel_size": 3, "dilation": 2, "padding": 2}),
    "1d_same": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    "1d_grouped": (nn.Conv1d, {"kernel_size": 3, "groups": 2, "dilation": 2}),
    "2d_stride": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1}),
    "2d_valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid", "bias": False}),
    "2d_same": (nn.Conv2d, {"kernel_size": (3, 4), "padding": "same", "dilation": (1, 2)}),
    "2d_reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}),
    "2d_replicate": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"}),
    "2d_grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 4, "stride": 2, "padding": 1, "padding_mode": "circular"}),
    "3d": (nn.Conv3d, {"kernel_size": (1, 2, 3), "padding": (0, 1, 1), "stride": 2}),
    "3d_grouped": (nn.Conv3d, {"kernel_size": 2, "groups": 2}),
}
CLASSES = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}


def conv_net(geometry: str) -> nn.Module:
    kind, arguments = GEOMETRIES[geometry]
    with seeded(0):
        return nn.Sequential(kind(8, 12, **arguments))


def conv_input(geometry: str) -> torch.Tensor:
    with seeded(1):
        return torch.randn(2, 8, *[7, 6, 5][: len(conv_net(geometry)[0].weight.shape) - 2])


def full_delta(layer: nn.Module, groups: int, scaling: float) -> torch.Tensor:
    """Write B out as a matrix with a block per group, and multiply it with A: a weight for one group."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    blocks = torch.block_diag(*b.flatten(1).chunk(groups))
    return scaling * (blocks @ a.flatten(1)).view(len(b), *a.shape[1:])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution(geometry: str, tmp_path: Path) -> None:
    """The output is the base layer's, and that of a plain convolution with B A as its weight."""
    net, x = conv_net(geometry), conv_input(geometry)
    kind, arguments = GEOMETRIES[geometry]
    groups = arguments.get("groups", 1)
    base = net(x)
    model = adapted(net, ["0"])
    assert type(net[0]) is CLASSES[kind]
    plain = kind(8, 12, **{**arguments, "groups": 1, "bias": False})
    plain.weight = nn.Parameter(full_delta(net[0], groups, 2.0))
    assert_close(model(x), base + plain(x))
    assert_life_of_adapter(lambda: conv_net(geometry), model, (x,), tmp_path, merges=groups == 1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if "grouped" not in name])
def test_convolution_merged_in_half_precision(geometry: str, dtype: torch.dtype) -> None:
    """Merging gives what the adapter does, for weights that are stored with channels last too."""
    net, x = conv_net(geometry).to(dtype), conv_input(geometry).to(dtype)
    if geometry.startswith("2d"):
        net = net.to(memory_format=torch.channels_last)
    model = adapted(net, ["0"])
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        assert_close(model(x) / expected.abs().max(), expected / expected.abs().max(), TOLERANCES[dtype])


def test_start_of_convolution() -> None:
    """A starts like the weight of a convolution of its size, B at zero."""
    net = conv_net("2d_stride")
    layer = get_peft_model(net, LoraConfig(r=64, target_modules=["0"])).get_base_model()[0]
    assert 0.9 < layer.lora_A["default"].weight.abs().max() * (8 * 3 * 2) ** 0.5 <= 1.0
    assert not layer.lora_B["default"].weight.any()


def test_convolution_with_bias() -> None:
    """A bias of B is scaled like the rest, and merged into the base layer's."""
    net, x = conv_net("2d_stride"), conv_input("2d_stride")
    base = net(x)
    model = adapted(net, ["0"], lora_bias=True)
    layer = net[0]
    weight, bias = full_delta(layer, 1, 2.0), 2.0 * layer.lora_B["default"].bias
    expected = base + F.conv2d(x, weight, bias, stride=(2, 1), padding=1)
    assert_close(model(x), expected)
    assert_close(model.merge_and_unload()(x), expected)


def test_convolution_refusals() -> None:
    """A rank that groups cannot share, and merging what has no place in a grouped weight."""
    net = conv_net("2d_grouped")
    with refused(net, ValueError, "4 groups", "r=6"):
        get_peft_model(net, LoraConfig(r=6, target_modules=["0"]))
    with warned("4 groups", "cannot be merged"):
        model = adapted(net, ["0"])
    with refused(model, NotImplementedError, "4 groups", "unmerged"):
        model.merge_adapter()


class TwoConvolutions(nn.Module):
    """Two convolutions with one weight, each with a geometry of its own."""

    def __init__(self, first: dict[str, Any], second: dict[str, Any]):
        super().__init__()
        with seeded(0):
            self.a, self.b = (
                nn.Conv2d(8, 8, 3, **first),
                nn.Conv2d(**{"in_channels": 8, **second}, out_channels=8, kernel_size=3),
            )
        self.b.weight = self.a.weight
        self.times = self.b.in_channels // 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.cat([self.a(x)] * self.times, 1))


TIES = {
    "same": ({"padding": 1}, {"padding": 1}),
    "geometry": ({"padding": "same", "padding_mode": "reflect"}, {"stride": 2, "dilation": 2}),
    "grouped": ({"padding": 1, "groups": 2}, {"groups": 2, "dilation": 2}),
    "follower_grouped": ({"padding": 1}, {"in_channels": 16, "groups": 2}),
}


@pytest.mark.parametrize("case", TIES)
def test_tied_convolutions(case: str, tmp_path: Path) -> None:
    """One set of factors serves both, its gradient is the sum, and a merge keeps the tie."""

    def make() -> nn.Module:
        return TwoConvolutions(*TIES[case])

    with seeded(1):
        x = torch.randn(2, 8, 9, 9)
    net = make()
    model = adapted(net, ["a"], ensure_weight_tying=True)
    assert trainable(model) == {f"base_model.model.a.lora_{side}.default.weight" for side in "AB"}
    groups = TIES[case][0].get("groups", 1)
    delta = full_delta(net.a, groups, 2.0)
    if groups == 1:
        reference = make()
        reference.a.weight = reference.b.weight = nn.Parameter((net.a.get_base_weight() + delta).detach())
        assert_close(model(x), reference(x))
        (gradient,) = torch.autograd.grad(reference(x).sum(), [reference.a.weight])
        model(x).sum().backward()
        a, b = net.a.factor_weights("default")
        assert_close(net.a.lora_B["default"].weight.grad.flatten(1), 2.0 * gradient.flatten(1) @ a.detach().T, 1e-3)
    assert_life_of_adapter(make, model, (x,), tmp_path, merges=groups == 1)
    if groups == 1:
        merged = adapted(make(), ["a"], ensure_weight_tying=True).merge_and_unload()
        assert merged.a.weight is merged.b.weight


def test_tied_convolutions_of_other_groups() -> None:
    """Factors of a grouped owner do not fit a follower with other groups."""
    net = TwoConvolutions({"groups": 2}, {"in_channels": 4})
    with refused(net, ValueError, "groups", "ensure_weight_tying=False"):
        get_peft_model(net, LoraConfig(r=4, target_modules=["a"], ensure_weight_tying=True))


# ------------------------------------------------------------------------------------------ attention
class Attention(nn.Module):
    """Attention of a sequence on another one, after a linear layer."""

    def __init__(self, **arguments: Any):
        super().__init__()
        with seeded(0):
            self.lin = nn.Linear(8, 8)
            self.mha = nn.MultiheadAttention(8, 2, **{"batch_first": True, **arguments})
            nn.init.normal_(self.mha.out_proj.weight)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        y = x if y is None else y
        output, weights = self.mha(self.lin(x), key=y, value=y, **options)
        return output if weights is None else torch.cat([output.flatten(), weights.flatten()])


def sequence(length: int = 5) -> torch.Tensor:
    with seeded(length):
        return torch.randn(3, length, 8)


def attention_with_deltas(
    net: Attention, in_delta: torch.Tensor | float, out_delta: torch.Tensor | float
) -> nn.Module:
    """Copy a plain attention layer with changed weights."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.mha.in_proj_weight += in_delta
        other.mha.out_proj.weight += out_delta
    return other


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_weights": {"need_weights": False},
    "weights_per_head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)},
    "causal": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention(option: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    """The weights are W + 2 B A for the inputs and W + 2 * 2 B A for the output, as release 0.21.2 has it."""
    net, plain, x, options = Attention(**arguments), Attention(**arguments), sequence(), OPTIONS[option]
    model = adapted(net, ["mha"])
    layer, out = net.mha, net.mha.base_layer.out_proj
    assert type(layer) is MultiheadAttention
    assert type(out) is OutputProjection

    def product(module: nn.Module) -> torch.Tensor:
        return module.lora_B["default"].weight @ module.lora_A["default"].weight

    reference = attention_with_deltas(plain, 2.0 * product(layer), 4.0 * product(out)).eval()
    versions = [layer.get_base_weight()._version, out.get_base_weight()._version]
    assert_close(model(x, **options), reference(x, **options))  # with gradients
    with torch.no_grad():  # torch has another path for these
        assert_close(model(x, **options), reference(x, **options))
    assert versions == [layer.get_base_weight()._version, out.get_base_weight()._version]
    if option == "plain":
        assert_life_of_adapter(lambda: Attention(**arguments), model, (x,), tmp_path)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_attention_merged(dtype: torch.dtype) -> None:
    """Merging gives what the adapter does; gradients reach the factors alone."""
    net, x = Attention().to(dtype), sequence().to(dtype)
    model = adapted(net, ["mha"])
    model(x).pow(2).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable(model)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        assert_close(model(x) / expected.abs().max(), expected / expected.abs().max(), TOLERANCES[dtype])


def test_output_projection_alone(tmp_path: Path) -> None:
    """A target that `nn.MultiheadAttention` reads and never calls has an effect all the same."""
    net, plain, x = Attention(), Attention(), sequence()
    model = adapted(net, ["out_proj"])
    out = net.mha.out_proj
    delta = 4.0 * out.lora_B["default"].weight @ out.lora_A["default"].weight
    assert_close(model(x), attention_with_deltas(plain, 0.0, delta)(x))
    assert_close(out(x), F.linear(x, plain.mha.out_proj.weight + delta, plain.mha.out_proj.bias))
    assert_life_of_adapter(Attention, model, (x,), tmp_path)


def test_the_fast_path_of_a_transformer_layer_has_the_adapter() -> None:
    """
    `nn.TransformerEncoderLayer` reads `out_proj.weight` of its attention where nothing is trained.

    So `out_proj` of an adapted layer is the adapted projection. The base module's own, which it is in the released
    package, would leave the adapter out there.
    """
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    model = adapted(net, ["self_attn"])
    x = torch.randn(2, 3, 8)
    expected = model.train()(x).detach()
    with torch.no_grad():
        assert_close(model.eval()(x), expected)
    layer = net[0].self_attn
    assert_close(
        layer.out_proj.weight, layer.base_layer.out_proj.base_layer.weight + layer.out_proj.get_delta_weight("default")
    )


def test_attention_with_biases() -> None:
    """Biases of the factors are added and merged."""
    net, x = Attention(), sequence()
    model = adapted(net, ["mha"], lora_bias=True)
    layer, plain = net.mha, Attention()
    with torch.no_grad():
        expected = model(x)
        plain.mha.in_proj_weight += layer.get_delta_weight("default")
        plain.mha.in_proj_bias += 2.0 * layer.lora_B["default"].bias
        plain.mha.out_proj.weight += layer.out_proj.get_delta_weight("default")
        plain.mha.out_proj.bias += 2.0 * layer.out_proj.lora_B["default"].bias
        assert_close(expected, plain(x))
        assert_close(model.merge_and_unload()(x), expected)


def test_two_adapters_on_attention(tmp_path: Path) -> None:
    """Each adapter is itself, and both together are the sum of their deltas."""
    net, x = Attention(), sequence()
    model = adapted(net, ["mha"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["mha", "lin"], rank_pattern={"mha": 3}))
    randomise(model, r"lora_.*other", seed=5)
    layer, plain = net.mha, Attention()
    assert layer.lora_A["other"].weight.shape == layer.out_proj.lora_A["other"].weight.shape == (3, 8)
    model.base_model.set_adapter(["default", "other"])
    deltas = [sum(part.get_delta_weight(n) for n in ("default", "other")) for part in (layer, layer.out_proj)]
    reference = attention_with_deltas(plain, *deltas)
    with torch.no_grad():
        reference.lin.weight += net.lin.get_delta_weight("other")
        assert_close(model(x), reference(x))
    model.set_adapter("other")
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    with torch.no_grad():
        expected = model(x)
        assert_equal(PeftModel.from_pretrained(Attention(), tmp_path / "other").eval()(x), expected)
        model.delete_adapter("default")
        assert_equal(model(x), expected)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_attention_in_encoder(with_gradients: bool) -> None:
    """`nn.TransformerEncoder` takes the weights past the layer's forward pass where it can."""

    def make() -> nn.Module:
        with seeded(0):
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    net, x, mask = make(), sequence(), torch.tensor([[False] * 4 + [True]] * 3)
    model = adapted(net, ["self_attn"])
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.set_grad_enabled(with_gradients):
        assert differs(model(x), make().eval()(x))
        assert_close(model(x), merged(x))
        assert_close(model(x, src_key_padding_mask=mask)[:, :4], merged(x, src_key_padding_mask=mask)[:, :4])


def test_attention_refusals() -> None:
    """What cannot be had is refused, and what has no effect is said."""
    net = Attention(kdim=4)
    with refused(net, ValueError, "kdim=4", "target_parameters"):
        get_peft_model(net, LoraConfig(target_modules=["mha"]))
    with refused(net, ValueError, "lora_bias"):
        get_peft_model(Attention(bias=False), LoraConfig(target_modules=["mha"], lora_bias=True))
    for target in ("mha", "out_proj"):
        model = adapted(Attention(), [target])
        with refused(model, TypeError, "adapter_names"):
            model(sequence(), adapter_names=["default", "__base__", "default"])
        with refused(None, ValueError, "DoRA"):
            get_peft_model(Attention(), LoraConfig(target_modules=[target], use_dora=True))
    with warned("lora_dropout", "no effect"):
        get_peft_model(Attention(), LoraConfig(target_modules=["out_proj"], lora_dropout=0.5))


# ------------------------------------------------------------------------------------------ parameters
class Experts(nn.Module):
    """A matrix per expert for each of two steps, and one for both; experts are averaged."""

    def __init__(self, experts: int = 3, width: int = 8, hidden: int = 6):
        super().__init__()
        self.scale = 0.5
        self.up = nn.Parameter(torch.randn(experts, width, hidden))
        self.gate = nn.Parameter(torch.randn(hidden, width))
        self.down = nn.Parameter(torch.randn(experts, hidden, width))
        self.mix = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, times: float = 1.0) -> torch.Tensor:
        h = torch.einsum("bi,eih->beh", self.mix(x), self.up) * torch.sigmoid(x @ self.gate.T).unsqueeze(1)
        return self.scale * times * torch.einsum("beh,ehi->bi", h, self.down)


class WithExperts(nn.Module):
    """Experts between linear layers, called with keywords."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.first, self.moe, self.last = nn.Linear(8, 8), Experts(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.moe(times=self.moe.scale, x=torch.relu(self.first(x))))


PARAMETERS = {
    "matrix": ["moe.gate"],
    "experts": ["moe.up"],
    "two": ["moe.down", "moe.up"],
    "all": ["up", "gate", "down"],
    "linear": ["last.weight"],
    "child": ["mix.weight", "moe.up"],
}


def expected_delta(wrapper: nn.Module, scaling: float = 2.0, adapter: str = "default") -> torch.Tensor:
    """Take the factors apart: A has the ranks of the first expert first, in B those of all experts take turns."""
    a, b = wrapper.lora_A[adapter].weight.detach(), wrapper.lora_B[adapter].weight.detach()
    shape = wrapper.get_param().shape
    experts = shape[0] if len(shape) == 3 else 1
    rank = len(a) // experts
    deltas = [b[:, e::experts] @ a[e * rank : (e + 1) * rank] for e in range(experts)]
    return scaling * torch.stack(deltas).view(shape)


def wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    return {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters(case: str, tmp_path: Path) -> None:
    """The model computes what the plain one does with W + delta for these parameters."""
    net, plain, x = WithExperts(), WithExperts(), features()
    model = adapted(net, [], target_parameters=PARAMETERS[case])
    assert set(model.targeted_parameter_names) == {
        name
        for name, _ in WithExperts().named_parameters()
        if any(name == entry or name.endswith(f".{entry}") for entry in PARAMETERS[case])
    }
    with torch.no_grad():
        for name in model.targeted_parameter_names:
            plain.get_parameter(name).add_(expected_delta(wrappers(model)[name.rpartition(".")[2]]))
    assert_close(model(x), plain(x), 1e-4)
    model(x).pow(2).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable(model)
    for wrapper in wrappers(model).values():
        assert_close(wrapper.get_delta_weight("default"), expected_delta(wrapper))
    assert_life_of_adapter(WithExperts, model, (x,), tmp_path)


def test_fresh_parameter_adapter_is_the_identity() -> None:
    """An adapter that was not trained changes nothing, with target modules beside it."""
    net, x = WithExperts(), features()
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["first"], target_parameters=["moe.up", "gate"]))
    assert_equal(model.eval()(x), WithExperts().eval()(x))
    assert model.targeted_module_names == ["first"]


def test_parameter_of_linear_layer_is_the_same_as_the_layer() -> None:
    """The weight of a linear layer as a parameter is what the layer as a module is."""
    whole = adapted(nn.Sequential(nn.Linear(8, 4)), ["0"])
    torch.manual_seed(0)
    single = adapted(nn.Sequential(nn.Linear(8, 4)), [], target_parameters=["0.weight"])
    single.load_state_dict(whole.state_dict())
    assert_close(single(features()), whole(features()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_merged(case: str, dtype: torch.dtype) -> None:
    """Merging gives what the adapter does."""
    net, x = WithExperts().to(dtype), features().to(dtype)
    model = adapted(net, [], target_parameters=PARAMETERS[case])
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        assert_close(model(x) / expected.abs().max(), expected / expected.abs().max(), TOLERANCES[dtype])


def test_nothing_is_kept_of_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base parameter is neither changed nor replaced, and W + delta is gone when the pass is over."""
    net = WithExperts()
    model = adapted(net, [], target_parameters=["moe.up", "moe.down"])
    inner = net.moe.get_base_layer()
    parameters, versions = dict(inner._parameters), [p._version for p in inner._parameters.values()]
    made: list[weakref.ref] = []
    compute = ParamWrapper.plus_delta

    def spy(self: ParamWrapper, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        result = compute(self, adapter, weight)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(ParamWrapper, "plus_delta", spy)
    with torch.no_grad():
        model(features())
    gc.collect()
    assert len(made) == 2
    assert [ref() for ref in made] == [None, None]
    assert all(parameters[key] is value for key, value in inner._parameters.items())
    assert versions == [p._version for p in inner._parameters.values()]
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))  # also after a pass that fails
    assert all(parameters[key] is value for key, value in inner._parameters.items())


def test_parameter_read_from_outside() -> None:
    """Who reads the parameter or another attribute from the module gets what the module itself computes with."""
    net = WithExperts()
    base = net.moe.up.detach().clone()
    model = adapted(net, [], target_parameters=["moe.up", "moe.gate"])
    delta = expected_delta(wrappers(model)["up"])
    assert_close(net.moe.up, base + delta)
    assert net.moe.scale == 0.5
    with model.disable_adapter():
        assert_equal(net.moe.up, base)
    with pytest.raises(AttributeError, match="nothing"):
        _ = net.moe.nothing


def test_two_adapters_on_parameters(tmp_path: Path) -> None:
    """Adapters on the same parameters stand in the same wrappers; both together are the sum of their deltas."""
    net, plain, x = WithExperts(), WithExperts(), features()
    model = adapted(net, [], target_parameters=["moe.up", "moe.down"])
    config = LoraConfig(r=2, lora_alpha=2, target_parameters=["down", "up"], alpha_pattern={"moe.up": 6})
    model.add_adapter("other", config)
    randomise(model, r"lora_.*other", seed=5)
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for name, wrapper in wrappers(model).items():
            scaling = 3.0 if name == "up" else 1.0
            delta = expected_delta(wrapper) + expected_delta(wrapper, scaling, "other")
            plain.get_parameter(f"moe.{name}").add_(delta)
    assert_close(model(x), plain(x), 1e-4)
    model.set_adapter("other")
    expected = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert_equal(PeftModel.from_pretrained(WithExperts(), tmp_path / "other").eval()(x), expected)
    model.delete_adapter("default")
    assert_equal(model(x), expected)


def test_parameters_from_state_dict() -> None:
    """Keys of a state dict name modules; which of their parameters are meant, the config says."""
    x, options = features(), {"target_modules": ["first"], "target_parameters": ["moe.up", "moe.down"]}
    model = adapted(WithExperts(), **{"targets": options.pop("target_modules"), **options})
    state = get_peft_model_state_dict(model)
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    net = WithExperts()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["first"], **options)
    inject_adapter_in_model(config, net, state_dict=state)
    set_peft_model_state_dict(net, state)
    assert_equal(net.eval()(x), model(x))


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        ({"target_parameters": ["moe.upp"]}, ["moe.upp", "near", "moe.up"]),
        ({"target_parameters": ["moe.up"], "lora_dropout": 0.1}, ["lora_dropout"]),
        ({"target_parameters": ["moe.up"], "lora_bias": True}, ["lora_bias"]),
        ({"target_parameters": ["moe.up"], "use_dora": True}, ["DoRA"]),
        ({"target_parameters": ["last.weight"], "fan_in_fan_out": True}, ["fan_in_fan_out"]),
        ({"target_parameters": ["last.bias"]}, ["bias", "modules_to_save"]),
        ({"target_parameters": ["moe.up"], "init_lora_weights": "pissa"}, ["pissa", "up"]),
        ({"target_parameters": ["last.weight"], "target_modules": ["last"]}, ["last.weight", "target_modules"]),
        ({"target_parameters": ["own"]}, ["own", "the model itself"]),
        ({"target_parameters": ["moe.up"], "r": 0}, ["rank"]),
    ],
)
def test_parameter_refusals(options: dict[str, Any], mentions: list[str]) -> None:
    """What cannot work is refused, and the model stays as it was."""
    net = WithExperts()
    net.own = nn.Parameter(torch.zeros(2, 2))
    with refused(net, ValueError, *mentions):
        get_peft_model(net, LoraConfig(**options))


def test_refused_beside_another_adapter() -> None:
    """All adapters of a module are on the same parameters; a batch has one adapter; broken weights are not merged."""
    model = adapted(WithExperts(), ["first"], target_parameters=["moe.up"])
    for options in (
        {"target_parameters": ["moe.up", "moe.down"]},
        {"target_parameters": ["moe.down"]},
        {"target_parameters": ["first.weight"]},
    ):
        with refused(model, ValueError):
            model.add_adapter("other", LoraConfig(**options))
    with refused(model, TypeError, "adapter_names", "ParamWrapper"):
        model(features(), adapter_names=["default", "__base__", "default"])
    with torch.no_grad():
        wrappers(model)["up"].lora_A["default"].weight[0, 0] = float("nan")
    with refused(model, ValueError, "not finite", "up"):
        model.merge_adapter(safe_merge=True)


def test_partly_unknown_parameters() -> None:
    """An entry that matches nothing beside others that do is said."""
    with warned("moe.upp", "moe.up"):
        get_peft_model(WithExperts(), LoraConfig(target_parameters=["moe.upp", "moe.down"]))
    with warned("nope"):
        get_peft_model(WithExperts(), LoraConfig(target_modules=["nope"], target_parameters=["moe.down"]))


class TiedParameters(nn.Module):
    """One parameter in two modules of experts, and another one twice in one of them."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.one, self.two = Experts(hidden=8), Experts(hidden=8)
        self.two.down = self.one.down
        self.two.gate = self.two.mix.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).tanh())


@pytest.mark.parametrize("named", ["one.down", "two.down", "down"])
def test_tied_parameters(named: str, tmp_path: Path) -> None:
    """A parameter that stands in two modules is adapted in both with one set of factors."""
    net, plain, x = TiedParameters(), TiedParameters(), features()
    model = adapted(net, [], target_parameters=[named], ensure_weight_tying=True)
    assert trainable(model) == {f"base_model.model.one.lora_{side}.default.weight" for side in "AB"}
    with torch.no_grad():
        plain.one.down += expected_delta(net.one)
    assert_close(model(x), plain(x), 1e-4)
    (gradient,) = torch.autograd.grad(plain(x).sum(), [plain.one.down])
    model(x).sum().backward()
    left, right = net.one.get_delta_factors("default")
    got = net.one.lora_A["default"].weight.grad.view(right.shape)
    assert_close(got / got.abs().max(), 2.0 * left.mT @ gradient / got.abs().max(), 1e-4)
    assert_life_of_adapter(TiedParameters, model, (x,), tmp_path)
    merged = adapted(TiedParameters(), [], target_parameters=[named], ensure_weight_tying=True).merge_and_unload()
    assert merged.one.down is merged.two.down


def test_tied_parameter_and_linear_layer() -> None:
    """A parameter that is a linear layer's weight too is adapted there as well."""
    net, plain, x = TiedParameters(), TiedParameters(), features()
    model = adapted(net, [], target_parameters=["two.gate"], ensure_weight_tying=True)
    found = wrappers(model)
    with torch.no_grad():
        owner = next(w for w in found.values() if w.source("default") is w)
        plain.two.gate += expected_delta(owner)
    assert_close(model(x), plain(x), 1e-4)
    merged = model.merge_and_unload()
    assert merged.two.gate is merged.two.mix.weight
    assert_close(merged(x), plain(x), 1e-4)


def test_tied_parameter_adapted_apart() -> None:
    """Without ensure_weight_tying a warning says so, and merging leaves the other module as it was."""
    net, x = TiedParameters(), features()
    before = net.two.down.detach().clone()
    with warned("one.down", "two.down", "ensure_weight_tying=True"):
        model = get_peft_model(net, LoraConfig(r=4, target_parameters=["one.down"]))
    randomise(model)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        with warned("no longer tied"):
            merged = model.merge_and_unload()
        assert_close(merged(x), expected)
    assert_equal(merged.two.down, before)
    assert [group.members for group in find_tied_groups(merged)] == [("two.gate", "two.mix.weight")]


def moe_models() -> Iterator[tuple[str, Callable[[], nn.Module], list[str]]]:
    """Yield tiny models of transformers with experts in one tensor."""
    import transformers

    size = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    yield "mixtral", lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**size)), targets
    llama4 = {**size, "intermediate_size_mlp": 24, "head_dim": 8, "num_experts_per_tok": 1, "attn_chunk_size": 8}
    yield "llama4", lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**llama4)), targets
    oss = {**size, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    yield "gpt_oss", lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**oss)), targets


@pytest.mark.parametrize(("make", "targets"), [pytest.param(m, t, id=name) for name, m, t in moe_models()])
def test_experts_of_transformers(make: Callable[[], nn.Module], targets: list[str], tmp_path: Path) -> None:
    """Fused experts and the router are adapted, merged, saved and loaded."""

    def seeded_make() -> nn.Module:
        with seeded(0):
            model = make()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            return model

    ids = torch.arange(10).view(2, 5) + 3
    model = adapted(seeded_make(), ["q_proj"], target_parameters=targets)
    with torch.no_grad():
        base, expected = seeded_make().eval()(ids).logits, model(ids).logits
        assert differs(expected, base)
        with model.disable_adapter():
            assert_equal(model(ids).logits, base)
        model.save_pretrained(tmp_path)
        assert_equal(PeftModel.from_pretrained(seeded_make(), tmp_path).eval()(ids).logits, expected)
        merged = model.merge_and_unload(safe_merge=True)(ids).logits
        assert_close(merged, expected, 1e-3)


class Tripled(nn.Module):
    """Three times a tensor."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 3 * weight


def test_a_parameter_that_is_computed_already_is_a_target() -> None:
    """The delta is added to what the parametrisation gives, which stays in its place."""
    with seeded(0):
        base, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(5, 6)
    nn.utils.parametrize.register_parametrization(base[0], "weight", Tripled())
    plain = base(x)
    model = get_peft_model(base, LoraConfig(r=3, target_parameters=["0.weight"], target_modules=[]))
    assert_equal(model(x), plain)
    randomise(model)
    layer = model.base_model.model[0]
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    for _ in range(2):
        assert_close(model(x), plain + x @ delta.T)
    with model.disable_adapter():
        assert_equal(model(x), plain)
    assert nn.utils.parametrize.is_parametrized(base[0], "weight")
    assert_equal(model.unload()(x), plain)


FSDP = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from peft import LoraConfig, get_peft_model

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=0, world_size=1)

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.mha = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x):
        x = self.lin(x)
        return self.mha(x, x, x)[0]

for options in ({"target_modules": ["mha"]}, {"target_modules": [], "target_parameters": ["lin.weight"]}):
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8)
    model = get_peft_model(Attention(), LoraConfig(init_lora_weights=False, **options)).eval()
    expected = model(x).detach()
    divided = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    torch.testing.assert_close(divided(x), expected)
"""


def test_whole_weights_have_their_adapters_under_fsdp(tmp_path: Path) -> None:
    """While FSDP computes, attributes stand before parameters, and would hide what replaces those."""
    done = subprocess.run([sys.executable, "-c", FSDP, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
