# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA's variants: DoRA and aLoRA.

What a layer should compute is written out here from the papers: with DoRA the base layer has the dense weight
m * (W + s B A) / ||W + s B A||, with aLoRA each sequence is computed on its own, position by position.
"""

import copy
import gc
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
    llama,
    logits,
    randomise,
    refused,
    token_ids,
    trainable,
    warned,
)
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import DoraCaching
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.lora.variants import calculate_alora_offsets


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

# kind -> base layer, its input, axes of the weight over which the norm of an output feature goes
KINDS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(4, 6), (1,)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(2, 3, 6), (1,)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(2, 3, 6), (0,)),
    "embedding": (lambda: nn.Embedding(7, 4), lambda: torch.tensor([[0, 3, 6], [2, 2, 5]]), (0,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 5), (1, 2)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2), lambda: torch.randn(2, 4, 5, 6), (1, 2, 3)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: torch.randn(2, 4, 3, 3), (1, 2, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), lambda: torch.randn(1, 2, 3, 3, 3), (1, 2, 3, 4)),
}
TOKENS = [5, 6]


def config(**changes: Any) -> LoraConfig:
    """DoRA on a model, of one layer if nothing else is said."""
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0"], "use_dora": True, **changes})


def adapted(kind: str, adapters: tuple[str, ...] = ("default",), **changes: Any) -> tuple[PeftModel, torch.Tensor]:
    """A model of one layer with trained adapters, and an input."""
    torch.manual_seed(3)
    build, make_input, _ = KINDS[kind]
    net = nn.Sequential(build())
    if net[0].weight.dim() > 1:
        nn.init.normal_(net[0].weight)
    changes["fan_in_fan_out"] = kind == "Conv1D"
    model = get_peft_model(net, config(**changes), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config(**changes))
    randomise(model)
    return model.eval(), make_input()


def dense(model: PeftModel, kind: str, adapter: str = "default", weight: torch.Tensor | None = None) -> torch.Tensor:
    """The adapted weight, by the paper; `weight` is what the delta is added to, the norm is the base weight's."""
    layer, axes = model.get_base_model()[0], KINDS[kind][2]
    base = layer.get_base_weight()
    delta = layer.get_delta_weight(adapter)
    norm = (base + delta).pow(2).sum(axes, keepdim=True).sqrt().detach()
    magnitude = layer.lora_magnitude_vector[adapter].weight
    return magnitude.reshape(norm.shape) / norm * ((base if weight is None else weight) + delta)


def by_hand(model: PeftModel, kind: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The base layer with another weight."""
    return functional_call(model.get_base_model()[0].get_base_layer(), {"weight": weight}, (x,))


# ------------------------------------------------------------------------------------------ DoRA on one layer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_dora_computes_the_papers_weight(kind: str, training: bool) -> None:
    model, x = adapted(kind)
    model.train(training)
    assert_close(model(x), by_hand(model, kind, x, dense(model, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_take_the_norm_for_a_constant(kind: str) -> None:
    model, x = adapted(kind)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    assert any("lora_magnitude_vector" in name for name in names)
    assert all("lora_" in name for name in names)
    actual = torch.autograd.grad(model(x).pow(2).sum(), parameters)
    expected = torch.autograd.grad(by_hand(model, kind, x, dense(model, kind)).pow(2).sum(), parameters)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", [True, False])
def test_a_fresh_adapter_is_lora_with_the_norm_as_magnitude(kind: str, init: bool) -> None:
    torch.manual_seed(0)
    build, make_input, axes = KINDS[kind]
    net, x = nn.Sequential(build()), make_input()
    plain = net(x)
    model = get_peft_model(net, config(init_lora_weights=init, fan_in_fan_out=kind == "Conv1D"))
    layer = net[0]
    if init:
        assert_close(model(x), plain)
    total = layer.get_base_weight() + layer.get_delta_weight("default")
    assert_close(layer.lora_magnitude_vector["default"].weight.flatten(), total.pow(2).sum(axes).sqrt())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changes_the_base_weight_keeps_the_output(init: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    plain = net(x)
    assert_close(get_peft_model(net, config(init_lora_weights=init))(x), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_what_the_adapter_computes_and_unmerging_the_very_weight(kind: str) -> None:
    model, x = adapted(kind)
    expected, weight = model(x), model.get_base_model()[0].get_base_weight().clone()
    model.merge_adapter()
    assert_close(model.get_base_model()[0].get_base_layer()(x), expected)
    model.unmerge_adapter()
    assert_equal(model.get_base_model()[0].get_base_weight(), weight)
    assert_close(model(x), expected)
    with model.disable_adapter():
        assert_equal(model(x), by_hand(model, kind, x, weight))
    assert_close(model.merge_and_unload(safe_merge=True)(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["merge_adapter", "one by one", "merge_and_unload"])
def test_two_adapters_follow_each_other(kind: str, how: str) -> None:
    model, x = adapted(kind, ("a", "b"))
    model.base_model.set_adapter(["a", "b"])
    weight = model.get_base_model()[0].get_base_weight().clone()
    expected = by_hand(model, kind, x, dense(model, kind, "b", dense(model, kind, "a"))).detach()
    assert_close(model(x), expected)
    if how == "merge_and_unload":
        assert_close(model.merge_and_unload()(x), expected)
        return
    for names in [["a"], ["b"]] if how == "one by one" else [["a", "b"]]:
        model.merge_adapter(names)
    assert_close(model(x), expected)
    model.unmerge_adapter()
    assert_equal(model.get_base_model()[0].get_base_weight(), weight)


@pytest.mark.parametrize("order", [["plain", "default"], ["default", "plain"]])
@pytest.mark.parametrize("merge_first", [False, True])
def test_beside_a_plain_adapter(order: list[str], merge_first: bool) -> None:
    model, x = adapted("linear")
    model.add_adapter("plain", config(use_dora=False, lora_bias=True))
    randomise(model)
    model.eval().base_model.set_adapter(order)
    expected = model(x)
    if merge_first:
        model.merge_adapter(order[:1])
    merged = model.merge_and_unload(adapter_names=order[1:] if merge_first else order)
    assert_close(merged(x), expected)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_half_precision(kind: str) -> None:
    model, x = adapted(kind)
    expected = model(x)
    half = copy.deepcopy(model)
    half.get_base_model()[0].base_layer.to(torch.bfloat16)
    result = half(x if kind == "embedding" else x.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=4e-2, atol=4e-2 * expected.abs().max().item())
    half.merge_adapter()
    merged = half(x if kind == "embedding" else x.bfloat16())
    torch.testing.assert_close(merged.float(), expected, rtol=4e-2, atol=4e-2 * expected.abs().max().item())


def test_autocast_keeps_the_norm_in_full_precision() -> None:
    model, x = adapted("linear")
    expected = model(x)
    model.get_base_model()[0].variants["default"].forget()
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=4e-2, atol=4e-2 * expected.abs().max().item())
    assert_close(model(x), expected)  # nothing in half precision was kept


def test_a_row_of_zeros_stays_finite() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(net[0].weight)
    model = get_peft_model(net, config())
    model(torch.ones(2, 4)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert_equal(model(torch.ones(1, 4))[0], net[0].bias)


# ------------------------------------------------------------------------------------------ what is kept in evaluation
def _change_in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2)


def _change_data(layer: nn.Module) -> None:
    layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data * 2


def _change_base(layer: nn.Module) -> None:
    layer.set_base_weight(layer.get_base_weight().detach() + 1)


def _change_scaling(layer: nn.Module) -> None:
    layer.scale_layer(3.0)


def _change_magnitude(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.add_(1)


def _replace_parameter(layer: nn.Module) -> None:
    layer.lora_B["default"].weight = nn.Parameter(layer.lora_B["default"].weight.detach() * 2)


def _train_with_data(layer: nn.Module) -> None:
    layer.train()
    layer.lora_B["default"].weight.data.mul_(2)
    layer.eval()


def _load(layer: nn.Module) -> None:
    layer.load_state_dict({key: tensor * 1.5 for key, tensor in layer.state_dict().items()})


CHANGES = (
    _change_in_place, _change_data, _change_base, _change_scaling, _change_magnitude, _replace_parameter,
    _train_with_data, _load,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_kept_norm_is_dropped_when_something_changes(change: Any, grad: bool) -> None:
    model, x = adapted("linear")
    with DoraCaching(), torch.set_grad_enabled(grad):
        before = model(x).detach()
        change(model.get_base_model()[0])
        after = model(x)
    assert differs(after, before)
    assert_close(after, by_hand(model, "linear", x, dense(model, "linear")))


@pytest.mark.parametrize("training", [False, True])
def test_writes_that_torch_does_not_count_are_seen(training: bool) -> None:
    """By default, that is; who asks for norms to be kept is told not to write like that."""
    model, x = adapted("linear")
    model.train(training)
    layer = model.get_base_model()[0]
    for tensor in (layer.lora_B["default"].weight, layer.get_base_weight(), layer.lora_A["default"].weight):
        before = model(x)
        tensor.data.mul_(3)
        assert differs(model(x), before)
        assert_close(model(x), by_hand(model, "linear", x, dense(model, "linear")))


def test_nothing_is_kept_from_one_context_to_the_next() -> None:
    model, x = adapted("linear")
    with DoraCaching():
        before = model(x)
    model.get_base_model()[0].lora_B["default"].weight.data.mul_(3)
    with DoraCaching():
        assert differs(model(x), before)
        assert_close(model(x), by_hand(model, "linear", x, dense(model, "linear")))


@pytest.mark.parametrize("keeping", [False, True])
def test_inference_first_and_gradients_then(keeping: bool) -> None:
    model, x = adapted("linear")
    with DoraCaching(enabled=keeping):
        with torch.inference_mode():
            before = model(x).clone()
        after = model(x)
        after.sum().backward()
    assert_close(after.detach(), before)
    assert model.get_base_model()[0].lora_A["default"].weight.grad.any()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_norms_that_are_kept_are_none_of_a_transform(transform: Any) -> None:
    model, x = adapted("linear")
    name = next(name for name, _ in model.named_parameters() if "lora_B" in name)
    weight = dict(model.named_parameters())[name].detach()
    inputs = weight if transform is torch.func.grad else torch.stack([2 * weight, weight])
    with DoraCaching():
        expected = model(x).detach()
        transform(lambda tensor: torch.func.functional_call(model, {name: tensor}, (x,)).sum())(inputs)
        assert_close(model(x).detach(), expected)


@pytest.fixture
def norms_are_kept() -> Iterator[None]:
    with DoraCaching():
        yield


def test_a_norm_is_kept_between_calls_and_not_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import dora

    calls = []
    compute = dora.weight_norm
    monkeypatch.setattr(dora, "weight_norm", lambda *args, **kwargs: calls.append(1) or compute(*args, **kwargs))
    model, x = adapted("linear")
    calls.clear()
    for _ in range(3):
        model(x)
    assert len(calls) == 3
    with DoraCaching():
        for _ in range(3):
            model(x)
        assert len(calls) == 4
        model.train()
        for _ in range(3):
            model(x)
        assert len(calls) == 7


@pytest.mark.usefixtures("norms_are_kept")
def test_what_is_kept_is_neither_copied_nor_keeps_memory() -> None:
    model, x = adapted("linear")
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(twin.get_base_model()[0].variants["default"]) == {}
        assert_equal(twin(x), expected)
        _change_in_place(twin.get_base_model()[0])
        assert differs(twin(x), expected)
    assert_equal(model(x), expected)
    kept = model.get_base_model()[0].variants["default"]._norm
    old = model.get_base_model()[0].get_base_weight().data
    _change_base(model.get_base_model()[0])
    del old
    gc.collect()
    assert any(storage.expired() for storage, _ in kept._seen)


@pytest.mark.usefixtures("norms_are_kept")
def test_weights_that_count_no_changes() -> None:
    with torch.inference_mode():
        model, x = adapted("linear")
        before = model(x).clone()
        _change_in_place(model.get_base_model()[0])
        assert differs(model(x), before)


# ------------------------------------------------------------------------------------------ DoRA in files and models
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model, x = adapted("conv2d")
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert "base_model.model.0.lora_magnitude_vector" in get_peft_model_state_dict(model)
    torch.manual_seed(3)
    base = nn.Sequential(KINDS["conv2d"][0]())
    base.load_state_dict({k.replace("base_layer.", ""): v for k, v in model.get_base_model().state_dict().items()
                          if "lora_" not in k})  # fmt: skip
    again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_close(again(x), expected)


def test_magnitudes_that_a_checkpoint_lacks_are_those_of_the_start() -> None:
    net = nn.Sequential(nn.Linear(6, 5))
    norm = net[0].weight.norm(dim=1)
    model = inject_adapter_in_model(config(), net, low_cpu_mem_usage=True)
    tensors = {"0.lora_A.weight": torch.ones(2, 6), "0.lora_B.weight": torch.zeros(5, 2)}
    result = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    assert "0.lora_magnitude_vector.default.weight" in result.missing_keys
    net[0].fill_missing("default", model.peft_config["default"])
    assert_close(net[0].lora_magnitude_vector["default"].weight, norm)


def test_switched_off_deleted_and_added_again() -> None:
    model, x = adapted("linear", ("a", "b"))
    plain = model.get_base_model()[0].base_layer(x)
    with model.disable_adapter():
        assert_equal(model(x), plain)
    model.set_adapter("b")
    assert trainable(model) and all(".b." in name for name in trainable(model))
    model.delete_adapter("a")
    assert set(model.get_base_model()[0].variants) == {"b"}
    assert not any(".a." in name for name in model.state_dict())
    assert_equal(model.unload()(x), plain)


def test_rslora_scales_the_delta() -> None:
    model, x = adapted("linear", use_rslora=True)
    assert model.get_base_model()[0].scaling["default"] == 6 / 2**0.5
    assert_close(model(x), by_hand(model, "linear", x, dense(model, "linear")))


def test_dropout_meets_the_delta_only() -> None:
    model, x = adapted("linear", lora_dropout=0.999999)
    layer = model.train().get_base_model()[0]
    scale = layer.lora_magnitude_vector["default"].weight / (layer.weight + layer.get_delta_weight("default")).norm(
        dim=1
    )
    assert_close(model(x), (x @ layer.weight.T) * scale + layer.bias)


# ------------------------------------------------------------------------------------------ ties
TIED = {"embedding": lambda: nn.Embedding(9, 4), "head": lambda: nn.Linear(4, 9), "Conv1D": lambda: Conv1D(4, 9)}


@pytest.mark.parametrize("owner", TIED)
@pytest.mark.parametrize("follower", TIED)
@pytest.mark.parametrize("adapters", [["default"], ["plain", "default"], ["default", "plain"]])
@pytest.mark.parametrize("training", [False, True])
def test_a_follower_of_any_kind_has_the_owners_weight(
    owner: str, follower: str, adapters: list[str], training: bool
) -> None:
    torch.manual_seed(0)
    bases = {"owner": TIED[owner](), "follower": TIED[follower]()}
    nn.init.normal_(bases["owner"].weight)
    bases["follower"].weight = bases["owner"].weight
    classes = {"embedding": Embedding, "head": Linear, "Conv1D": Linear}
    plain = LoraConfig(r=2, lora_alpha=6)
    first = classes[owner](bases["owner"], "default", config(), r=2, lora_alpha=6)
    first.update_layer("plain", r=2, lora_alpha=6, config=plain)
    second = classes[follower](bases["follower"], "default", config(), owner=first)
    second.update_layer("plain", r=2, lora_alpha=6, config=plain, owner=first)
    randomise(first)
    assert [name for name, _ in second.named_parameters()] == [
        f"base_layer.{n}" for n, _ in second.base_layer.named_parameters()
    ]
    base = first.get_base_weight()
    delta = first.get_delta_weight("default")
    norm = (base + delta).norm(dim=1 if owner == "head" else 0, keepdim=True)
    scale = first.lora_magnitude_vector["default"].weight.view_as(norm) / norm
    weight = base
    for name in adapters:
        weight = scale * (weight + delta) if name == "default" else weight + first.get_delta_weight(name)
    x = torch.tensor([[0, 3, 8]]) if follower == "embedding" else torch.randn(2, 3, second.in_features)
    expected = functional_call(bases["follower"], {"weight": weight}, (x,))
    for layer in (first, second):
        layer.train(training)
        layer.set_adapter(adapters)
    assert_close(second(x), expected)
    second.merge()
    assert_close(second(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_tied_members_have_one_adapted_weight(training: bool) -> None:
    """The embedding owns the tie; its magnitudes count the width, which is the head's input."""
    ids = token_ids()
    net = llama(tied=True)
    targets = ["embed_tokens", "lm_head"]
    model = get_peft_model(net, config(target_modules=targets, ensure_weight_tying=True)).train(training)
    randomise(model)
    assert len([name for name in trainable(model) if "magnitude" in name]) == 1
    embedding, head = net.model.embed_tokens, net.lm_head
    total = embedding.get_base_weight() + embedding.get_delta_weight("default")
    norm = total.norm(dim=0, keepdim=True)
    weight = (total / norm * embedding.lora_magnitude_vector["default"].weight).detach()
    by_hand = llama(tied=True)
    by_hand.lm_head.weight.data.copy_(weight)
    expected = logits(by_hand, ids)
    assert_close(logits(model, ids), expected)
    model.merge_adapter()
    assert head.get_base_weight() is embedding.get_base_weight()
    assert_close(head.get_base_weight(), weight)
    assert_close(logits(model, ids), expected)
    model.unmerge_adapter()
    assert_close(logits(model, ids), expected)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, ids), expected)


def test_a_tied_adapter_of_a_language_model_is_saved_and_loaded(tmp_path: Path) -> None:
    changes = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"}
    model = get_peft_model(llama(tied=True), config(**changes)).eval()
    randomise(model)
    ids = token_ids()
    expected = logits(model, ids)
    keys = [key for key in get_peft_model_state_dict(model) if "magnitude" in key]
    assert keys == ["base_model.model.model.embed_tokens.lora_magnitude_vector"]
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(llama(tied=True), tmp_path).eval(), ids), expected)
    assert_close(logits(copy.deepcopy(model), ids), expected)
    model.add_adapter("other", config(**changes))
    model.delete_adapter("other")
    assert_close(logits(model, ids), expected)
    assert_close(logits(model.merge_and_unload(), ids), expected)


# ------------------------------------------------------------------------------------------ aLoRA
def activated(**changes: Any) -> LoraConfig:
    """Active from the invocation tokens on."""
    fields = {"r": 2, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**fields, "alora_invocation_tokens": TOKENS, "init_lora_weights": False, **changes})


IDS = torch.tensor([[1, 2, 5, 6, 3, 4], [5, 6, 1, 5, 6, 2], [1, 2, 3, 4, 5, 7]])
ACTIVE = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()


def changed(model: nn.Module, **inputs: Any) -> torch.Tensor:
    """Where the adapters change the logits."""
    with torch.no_grad():
        return (logits(model, IDS, **inputs) - logits(llama(), IDS)).abs().amax(-1) > 1e-6


def test_active_from_the_last_invocation_on() -> None:
    model = get_peft_model(llama(), activated()).eval()
    assert_equal(changed(model), ACTIVE)
    assert calculate_alora_offsets(model.peft_config, "default", IDS) == [4, 3, None]
    with model.disable_adapter():
        assert not changed(model).any()


def test_the_active_part_is_lora() -> None:
    """A sequence that starts with the invocation is computed as by plain LoRA."""
    model = get_peft_model(llama(), activated()).eval()
    plain = get_peft_model(llama(), activated(alora_invocation_tokens=None)).eval()
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    ids = torch.tensor([[5, 6, 9, 3, 2]])
    assert_close(logits(model, ids), logits(plain, ids))


def test_offsets_can_be_given() -> None:
    model = get_peft_model(llama(), activated()).eval()
    active = changed(model, alora_offsets=[2, None, 6])
    assert_equal(active.sum(1), torch.tensor([2, 0, 6]))


def test_embeddings_as_inputs_are_computed_by_the_base_model() -> None:
    model = get_peft_model(llama(), activated()).eval()
    embeddings = model.get_input_embeddings()(IDS)
    with torch.no_grad(), warned("token ids", "alora_offsets"):
        result = model(inputs_embeds=embeddings).logits
    assert_close(result, logits(llama(), IDS))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("cut", [2, 3, 5])
def test_generating_with_and_without_a_cache_is_the_same(beams: int, cut: int) -> None:
    model = get_peft_model(llama(), activated()).eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    cached, whole = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert_equal(cached, whole)
    # and by hand: the first part of the sequences into a cache, the rest after it
    with torch.no_grad():
        first = model(input_ids=IDS[:, :cut], use_cache=True)
        rest = model(input_ids=IDS[:, cut:], past_key_values=first.past_key_values)
        one_by_one = logits(model, IDS)[:, cut:]
    rows = [0, 2] if cut == 2 else [2] if cut == 3 else [1, 2]  # those in which no invocation is cut or overruled
    assert_close(rest.logits[rows], one_by_one[rows])


def test_a_cache_of_the_base_model_is_continued() -> None:
    """What the method is for: the context was computed before anybody thought of the adapter."""
    model = get_peft_model(llama(), activated()).eval()
    ids = torch.tensor([[1, 2, 3, 5, 6, 4]])
    with torch.no_grad():
        expected = logits(model, ids)[:, 3:]
        with model.disable_adapter():
            cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
        assert_close(model(input_ids=ids[:, 3:], past_key_values=cache).logits, expected)


def test_an_adapter_per_sample() -> None:
    model = get_peft_model(llama(), activated()).eval()
    model.add_adapter("seven", activated(alora_invocation_tokens=[7]))
    model.add_adapter("plain", activated(alora_invocation_tokens=None))
    model.eval()
    last = torch.tensor([0, 0, 0, 0, 0, 1]).bool()
    nowhere, everywhere = torch.zeros(6).bool(), torch.ones(6).bool()
    assert_equal(changed(model, adapter_names=["default", "seven", "seven"]), torch.stack([ACTIVE[0], nowhere, last]))
    assert_equal(
        changed(model, adapter_names=["default", "plain", "__base__"]), torch.stack([ACTIVE[0], everywhere, nowhere])
    )
    with torch.no_grad():
        alone = logits(model, IDS[1:2])
        assert_close(logits(model, IDS, adapter_names=["seven", "default", "plain"])[1:2], alone)


def test_checkpointed_layers_are_computed_again_with_the_same_invocations() -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(llama(), activated())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert_close(a, b)


def test_copies_and_unloading_leave_no_hook_behind() -> None:
    model = get_peft_model(llama(), activated()).eval()
    expected = logits(model, IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(logits(twin, IDS), expected)
        tracker = twin.get_base_model().model.layers[0].self_attn.q_proj.variants["default"].invocations
        assert tracker is not model.get_base_model().model.layers[0].self_attn.q_proj.variants["default"].invocations
        base = twin.unload()
        assert not base._forward_pre_hooks and not base._forward_hooks
        assert_equal(logits(base, IDS), logits(llama(), IDS))
    assert_equal(logits(model, IDS), expected)
    model.add_adapter("seven", activated(alora_invocation_tokens=[7]))
    model.delete_adapter("seven")
    assert_equal(logits(model, IDS), expected)


def test_scaling_beyond_all_measure_overflows_as_tensors_do() -> None:
    """A config can hold any number; Python's own powers would raise where tensors give infinity."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config(target_modules=["0"], lora_alpha=10**160))
    randomise(model)
    assert not model.eval()(torch.ones(1, 4)).isfinite().all()


# ------------------------------------------------------------------------------------------ what is refused
def test_what_is_refused() -> None:
    net = llama()
    both = config(target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    with refused(net, ValueError, "use_dora", "alora_invocation_tokens"):
        get_peft_model(net, both)
    with refused(net, ValueError, "aLoRA", "Embedding"):
        get_peft_model(net, activated(target_modules=["embed_tokens", "q_proj"]))
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    with refused(attention, ValueError, "DoRA", "MultiheadAttention"):
        get_peft_model(attention, config())
    model = get_peft_model(llama(), activated())
    with refused(model, NotImplementedError, "aLoRA"):
        model.merge_adapter()
    model = get_peft_model(llama(), config(target_modules=["q_proj"])).eval()
    with refused(model, ValueError, "DoRA", "default"):
        model(IDS, adapter_names=["default"] * 3)
    assert_equal(logits(model, IDS, adapter_names=["__base__"] * 3), logits(llama(), IDS))
