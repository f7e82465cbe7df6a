# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Fused layers: the outputs and gradients of the ordinary way, and that way wherever the difference could be seen."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, disable_fused, get_peft_model
from peft.layers.fused import linear
from peft.layers.fused.path import Path


# the processor, unless another default is set for the tests
DEVICE = torch.get_default_device().type

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "bias of B": {"lora_bias": True},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3},
    "DoRA": {"use_dora": True},
    "DoRA with dropout": {"use_dora": True, "lora_dropout": 0.3},
}


def adapted(bias: bool = True, adapters: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    with_magnitudes = options.get("use_dora") and adapters == 1
    config = LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=False, **options)
    base = nn.Sequential(nn.Linear(12, 20, bias=bias), nn.Tanh(), nn.Linear(20, 6, bias=bias)).to(dtype)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for number in range(1, adapters):
        model.add_adapter(f"other{number}", LoraConfig(**{**vars(config), "r": 4 + number}))
    model.base_model.set_adapter(["default", *(f"other{number}" for number in range(1, adapters))])
    if with_magnitudes:  # what has been trained, and not what they start with
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return model


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model[0]


@contextmanager
def ways_taken() -> Iterator[list[bool]]:
    """Note for each layer that is called in an order whether it was computed as one."""
    taken: list[bool] = []
    original = Path.compute

    def noting(self: Path, layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        output = original(self, layer, x)
        taken.append(output is not None)
        return output

    Path.compute = noting
    try:
        yield taken
    finally:
        Path.compute = original


def is_fused(compute: Callable[[], Any]) -> bool:
    with ways_taken() as taken:
        compute()
    return bool(taken) and all(taken)


def outcome(model: nn.Module, x: torch.Tensor, fused: bool) -> list[torch.Tensor]:
    """Compute outputs and all gradients, from the same random numbers."""
    torch.manual_seed(1)
    tensors = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> list[torch.Tensor]:
        y = model(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), tensors)]

    if fused:
        with ways_taken() as taken:
            found = run()
        assert taken and all(taken)
        return found
    with disable_fused(), ways_taken() as taken:
        found = run()
    assert not taken
    return found


# ------------------------------------------------------------------------------------------------ outputs, gradients
@pytest.mark.skipif(DEVICE != "cpu", reason="other devices may sum in other orders")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", ["plain", "dropout", "rank-stabilised"])
def test_float32_is_the_same_bit_by_bit_on_the_cpu(case: str, bias: bool) -> None:
    power_of_two = {"lora_alpha": 4 if case == "rank-stabilised" else 8}
    model = adapted(bias=bias, **{**CASES[case], **power_of_two})
    x = torch.randn(3, 5, 12, requires_grad=True)
    for fused, ordinary in zip(outcome(model, x, True), outcome(model, x, False), strict=True):
        assert torch.equal(fused, ordinary)


@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 3, 12), (1, 1, 12), (2, 2, 2, 12), (0, 12)])
@pytest.mark.parametrize("adapters", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_ordinary_way(case: str, adapters: int, shape: tuple[int, ...]) -> None:
    if adapters > 1 and "DoRA" in case:
        pytest.skip("which are computed in the ordinary way")
    model = adapted(adapters=adapters, **CASES[case])
    x = torch.randn(shape, requires_grad=True)
    for fused, ordinary in zip(outcome(model, x, True), outcome(model, x, False), strict=True):
        torch.testing.assert_close(fused, ordinary)


@pytest.mark.parametrize("case", CASES)
def test_layers_that_store_their_weight_transposed(case: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], r=4, init_lora_weights=False, fan_in_fan_out=True, **CASES[case])
    model = get_peft_model(nn.Sequential(Conv1D(8, 12)), config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x = torch.randn(3, 5, 12, requires_grad=True)
    for fused, ordinary in zip(outcome(model, x, True), outcome(model, x, False), strict=True):
        torch.testing.assert_close(fused, ordinary)


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12)])
@pytest.mark.parametrize(
    "base_dtype,autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_evaluation_gives_the_outputs_of_the_ordinary_way(
    base_dtype: torch.dtype, autocast: bool, shape: tuple[int, ...], adapters: int
) -> None:
    model, x = adapted(adapters=adapters, dtype=base_dtype).eval(), torch.randn(shape, dtype=base_dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        assert is_fused(lambda: model(x))
        found = model(x)
        with disable_fused():
            expected = model(x)
    close = {"rtol": 0.05, "atol": 0.05 * expected.float().abs().max().item()} if base_dtype != torch.float32 else {}
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("adapters_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_types_are_those_of_the_ordinary_way(
    case: str, autocast: bool, base_dtype: torch.dtype, adapters_dtype: torch.dtype
) -> None:
    if DEVICE != "cpu" and "dropout" in case and (autocast or base_dtype != adapters_dtype):
        pytest.skip("what a kernel draws there depends on the type, and so differs")
    model = adapted(adapters=1 if "DoRA" in case else 2, dtype=base_dtype, **CASES[case])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters_dtype)
    x = torch.randn(64, 12, dtype=base_dtype, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        found, expected = outcome(model, x, True), outcome(model, x, False)
    for fused, ordinary in zip(found, expected, strict=True):
        assert fused.dtype == ordinary.dtype
        scale = ordinary.float().abs().max().item()
        torch.testing.assert_close(fused, ordinary, rtol=0.05, atol=0.02 * scale)


@pytest.mark.parametrize("case", ["plain", "DoRA"])
def test_the_base_layer_can_be_trained_too(case: str) -> None:
    model = adapted(bias=True, adapters=1 if case == "DoRA" else 2, **CASES[case])
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x = torch.randn(5, 12, requires_grad=True)
    for fused, ordinary in zip(outcome(model, x, True), outcome(model, x, False), strict=True):
        torch.testing.assert_close(fused, ordinary)


@pytest.mark.parametrize("case", ["plain", "bias of B"])
def test_gradients_and_their_gradients_are_right(case: str) -> None:
    layer = layer_of(adapted(dtype=torch.float64, adapters=2, **CASES[case]))
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def compute(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return layer(x).sin()

    assert is_fused(lambda: compute(x))
    assert torch.autograd.gradcheck(compute, (x, *parameters))
    assert torch.autograd.gradgradcheck(compute, (x, *parameters))


def test_gradients_of_magnitudes_are_right() -> None:
    """The norm is a constant in them, so finite differences can only tell about what does not enter it."""
    layer = layer_of(adapted(dtype=torch.float64, use_dora=True))
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.lora_magnitude_vector["default"].weight)
    assert is_fused(lambda: layer(x))
    assert torch.autograd.gradcheck(lambda x, magnitude: layer(x).sin(), inputs)
    assert torch.autograd.gradgradcheck(lambda x, magnitude: layer(x).sin(), inputs)


def test_the_sum_is_computed_again_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(use_dora=True), torch.randn(3, 5, 12, requires_grad=True)
    expected = outcome(model, x, True)
    monkeypatch.setattr(linear, "keeps_sum", lambda x: False)
    for again, kept in zip(outcome(model, x, True), expected, strict=True):
        torch.testing.assert_close(again, kept)


@pytest.mark.parametrize("adapters", [1, 2])
def test_masks_are_drawn_again_where_memory_is_short(adapters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(lora_dropout=0.3, adapters=adapters)
    x = torch.randn(5, 3, 12).transpose(0, 1).requires_grad_()
    expected = outcome(model, x, True)
    monkeypatch.setattr(linear, "keeps_mask", lambda x: False)
    for again, kept in zip(outcome(model, x, True), expected, strict=True):
        assert torch.equal(again, kept)


def test_several_adapters_of_which_one_scales_take_the_ordinary_way() -> None:
    model, x = adapted(adapters=2, use_dora=True), torch.randn(3, 12)
    assert not is_fused(lambda: model(x))


def test_gradients_of_gradients_with_dropout_use_the_same_mask() -> None:
    model = adapted(lora_dropout=0.5)
    x = torch.randn(9, 12, requires_grad=True)

    def penalty() -> torch.Tensor:
        torch.manual_seed(4)
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [p for p in model.parameters() if p.requires_grad])

    assert is_fused(penalty)
    found = penalty()
    with disable_fused():
        expected = penalty()
    for fused, ordinary in zip(found, expected, strict=True):
        torch.testing.assert_close(fused, ordinary)


def test_dropout_draws_what_the_ordinary_way_draws_and_leaves_the_generator_where_it_would() -> None:
    model, x = adapted(lora_dropout=0.4), torch.randn(6, 12, requires_grad=True)
    torch.manual_seed(2)
    model(x).sum().backward()
    after = torch.rand(3)
    torch.manual_seed(2)
    with disable_fused():
        model(x).sum().backward()
    assert torch.equal(after, torch.rand(3))


def test_evaluation_drops_nothing() -> None:
    model, x = adapted(lora_dropout=0.9).eval(), torch.randn(6, 12)
    with disable_fused():
        expected = model(x)
    assert is_fused(lambda: model(x))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", ["plain", "dropout"])
def test_checkpointing(case: str, use_reentrant: bool) -> None:
    model, x = adapted(**CASES[case]), torch.randn(6, 12, requires_grad=True)

    def gradients(compute: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        x.grad = None
        compute(x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    expected = gradients(model)
    found = gradients(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_input_is_what_is_kept(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input once, in its own type; no copy in another type, no mask, no intermediate of full width."""
    monkeypatch.setattr(linear, "keeps_mask", lambda x: False)
    model = adapted(dtype=torch.bfloat16, lora_dropout=share, bias=False).train()
    layer = layer_of(model).float()
    layer.base_layer.to(torch.bfloat16)
    x, kept = torch.randn(50, 12, dtype=torch.bfloat16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.autocast(DEVICE, torch.bfloat16):
            layer(x)
    held = {t.data_ptr() for t in (x, *layer.parameters())}
    assert x.data_ptr() in {t.data_ptr() for t in kept}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in held] == [(50, 4)]


def test_an_output_can_be_changed_in_place() -> None:
    model = adapted(bias=True)
    x = torch.randn(2, 3, 12, requires_grad=True)
    layer = layer_of(model)
    expected = torch.autograd.grad((layer(x) * 2).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(layer(x).mul_(2).sum(), x)[0], expected)


# ------------------------------------------------------------------------------------------ what takes which way
def test_switching_off() -> None:
    model, x = adapted(), torch.randn(3, 12)
    assert is_fused(lambda: model(x))
    with disable_fused():
        assert not is_fused(lambda: model(x))
        with disable_fused():
            pass
        assert not is_fused(lambda: model(x))
    assert is_fused(lambda: model(x))


@pytest.mark.parametrize("said,expected", [("1", "True"), ("true", "True"), ("0", "False"), ("", "False")])
def test_the_environment_variable(said: str, expected: str) -> None:
    code = "from peft.layers.fused import switch; print(bool(switch.off))"
    env = {**os.environ, "PEFT_DISABLE_FUSED": said}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == expected


@pytest.mark.parametrize("place", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward_pre"])
def test_hooks_of_the_modules_inside_run(place: str, kind: str) -> None:
    model, x = adapted(lora_dropout=0.1), torch.randn(3, 12, requires_grad=True)
    module, calls = layer_of(model).get_submodule(place), []
    assert is_fused(lambda: model(x))
    register = {
        "forward": module.register_forward_hook,
        "pre": module.register_forward_pre_hook,
        "backward": module.register_full_backward_hook,
        "backward_pre": module.register_full_backward_pre_hook,
    }[kind]
    handle = register(lambda *args: calls.append(1))
    model(x).sum().backward()
    assert calls
    handle.remove()
    assert is_fused(lambda: model(x))


def test_hooks_of_all_modules_run() -> None:
    model, x, seen = adapted(), torch.randn(3, 12), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    model(x)
    handle.remove()
    assert layer_of(model).lora_A["default"] in seen
    assert is_fused(lambda: model(x))


def test_a_forward_that_somebody_has_put_on_a_module_is_called() -> None:
    model, x = adapted(), torch.randn(3, 12)
    model(x)
    base = layer_of(model).base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias) + 100
    assert layer_of(model)(x).mean() > 50


def test_a_replaced_factor_is_used() -> None:
    model, x = adapted(), torch.randn(3, 12)
    layer = layer_of(model)
    layer(x)
    layer.lora_B["default"] = nn.Linear(4, 20, bias=False)
    nn.init.zeros_(layer.lora_B["default"].weight)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_a_changed_scale_counts_at_once() -> None:
    model, x = adapted(), torch.randn(3, 12)
    layer = layer_of(model)
    layer(x)
    layer.scaling["default"] = 0.0
    torch.testing.assert_close(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("scale", [1e160, float("nan"), torch.tensor(2.0)])
def test_scales_that_are_no_ordinary_numbers_take_the_ordinary_way(scale: Any) -> None:
    model, x = adapted(), torch.randn(3, 12)
    layer_of(model).scaling["default"] = scale
    found = layer_of(model)(x)
    with disable_fused():
        torch.testing.assert_close(found, layer_of(model)(x), equal_nan=True)


def test_parametrised_tensors_are_computed_in_the_ordinary_way() -> None:
    model, x = adapted(), torch.randn(3, 12)
    layer = layer_of(model)
    layer(x)

    class Zero(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 0

    nn.utils.parametrize.register_parametrization(layer.lora_B["default"], "weight", Zero())
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_adapters_are_followed_wherever_they_change() -> None:
    model, x = adapted(adapters=2, lora_alpha=8), torch.randn(3, 12)
    tuner = model.base_model

    def agrees() -> bool:
        found = model(x)
        with disable_fused():
            return torch.allclose(found, model(x), atol=1e-5)

    tuner.set_adapter("other1")
    assert agrees() and is_fused(lambda: model(x))
    tuner.set_adapter(["other1", "default"])
    assert agrees() and is_fused(lambda: model(x))
    with model.disable_adapter():
        assert agrees() and not is_fused(lambda: model(x))
    model.merge_adapter()
    assert agrees() and not is_fused(lambda: model(x))
    model.unmerge_adapter()
    assert agrees() and is_fused(lambda: model(x))
    model.delete_adapter("other1")
    assert agrees() and is_fused(lambda: model(x))
    model.add_adapter("variant", LoraConfig(target_modules=["0"], use_dora=True))
    tuner.set_adapter(["default", "variant"])
    assert agrees()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_with_their_own_tensors(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = adapted(), torch.randn(3, 12)
    expected = model(x)
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(x).abs().max() == 0
    assert torch.equal(model(x), expected)


def test_functional_call_computes_with_what_it_is_given() -> None:
    model, x = adapted(), torch.randn(3, 12)
    values = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def compute() -> torch.Tensor:
        return torch.func.functional_call(model, values, (x,))

    assert is_fused(compute)
    found = compute()
    with disable_fused():
        torch.testing.assert_close(found, compute())


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "dual numbers"])
def test_transforms_take_the_ordinary_way(transform: str) -> None:
    model, x = adapted(), torch.randn(3, 12)

    def compute() -> torch.Tensor:
        if transform == "vmap":
            return torch.func.vmap(model)(x)
        if transform == "grad":
            return torch.func.grad(lambda x: model(x).sum())(x)
        if transform == "jvp":
            return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent

    assert not is_fused(compute)
    found = compute()
    with disable_fused():
        assert torch.equal(found, compute())


def test_subclasses_of_tensors_take_the_ordinary_way() -> None:
    class Own(torch.Tensor):
        pass

    model = adapted()
    assert not is_fused(lambda: model(torch.randn(3, 12).as_subclass(Own)))


def test_a_subclass_that_computes_otherwise_is_left_alone() -> None:
    model, x = adapted(), torch.randn(3, 12)
    layer = layer_of(model)

    class Other(type(layer)):
        def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
            return super().delta_forward(adapter, x) * 0

    layer.__class__ = Other
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_an_adapter_for_each_sample_takes_the_ordinary_way() -> None:
    model, x = adapted(adapters=2).eval(), torch.randn(3, 12)
    found = layer_of(model)(x, adapter_names=["default", "other1", "__base__"])
    assert torch.equal(found[2], layer_of(model).base_layer(x)[2])


def test_the_way_is_found_when_adapters_change_and_not_in_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    found, original = [], Path.__init__
    monkeypatch.setattr(Path, "__init__", lambda self, layer: found.append(1) or original(self, layer))
    model, x = adapted(adapters=2), torch.randn(3, 12)
    for _ in range(3):
        model.train()(x)
        model.eval()(x)
    assert len(found) == 2  # layers
    model.base_model.set_adapter("other1")
    model(x)
    assert len(found) == 4


def test_compiling_takes_the_ordinary_way_without_breaks() -> None:
    model, x = adapted(), torch.randn(3, 12)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_errors_are_those_of_the_ordinary_way() -> None:
    model = adapted()
    for x in (torch.randn(3, 12, dtype=torch.float64), torch.randn(3, 11), torch.randint(3, (2, 12))):
        with pytest.raises(RuntimeError) as found:
            model(x)
        with disable_fused(), pytest.raises(RuntimeError) as expected:
            model(x)
        assert str(found.value) == str(expected.value)
