# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Poly against mixtures that are written down sample by sample, and the ways on which tasks reach layers."""

import math
from typing import Any

import pytest
import torch
from support.helpers import refused
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from peft import PolyConfig, get_peft_model, inject_adapter_in_model
from peft.layers.call_context import calling, current_call
from peft.tuners.poly.layer import PolyLayer
from peft.tuners.poly.router import PolyRouter


def config(**fields: Any) -> PolyConfig:
    values = {"r": 2, "n_tasks": 3, "n_skills": 2, "target_modules": ["0"], "init_weights": False, **fields}
    return PolyConfig(**values)


def adapted(**fields: Any) -> PolyLayer:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12))
    get_peft_model(net, config(**fields))
    nn.init.normal_(net[0].poly_router["default"].module_logits)
    return net.eval()[0]


def by_hand(layer: PolyLayer, x: torch.Tensor, task: int, adapter: str = "default") -> torch.Tensor:
    """Compute one sample, (length, in), skill by skill and part by part."""
    a, b = layer.poly_lora_A[adapter], layer.poly_lora_B[adapter]
    splits, skills, _, r = a.shape
    logits = layer.poly_router[adapter].module_logits[task].view(splits, skills)
    parts_of_a, parts_of_b = [], []
    for q in range(splits):
        shares = [1 / (1 + math.exp(-float(logit.detach()))) for logit in logits[q]]
        parts_of_a.append(sum(share / sum(shares) * a[q, s] for s, share in enumerate(shares)))
        parts_of_b.append(sum(share / sum(shares) * b[q, s] for s, share in enumerate(shares)))
    return layer.base_layer(x) + x @ torch.cat(parts_of_a) @ torch.cat(parts_of_b, dim=1) / r


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_each_sample_has_the_mixture_of_its_task(splits: int) -> None:
    layer, x, tasks = adapted(n_splits=splits), torch.randn(4, 5, 8), [2, 0, -1, 1]
    expected = torch.stack([by_hand(layer, sample, task) for sample, task in zip(x, tasks, strict=True)])
    torch.testing.assert_close(layer(x, task_ids=tasks), expected)
    torch.testing.assert_close(layer(x.flatten(0, 1), task_ids=tasks), expected.flatten(0, 1))  # a flattened batch
    torch.testing.assert_close(layer(x[:, 0], task_ids=tasks), expected[:, 0])


def test_mixtures_are_drawn_while_training() -> None:
    layer, x = adapted(), torch.randn(2, 5, 8)
    router, tasks = layer.poly_router["default"], torch.tensor([1, 2])
    torch.manual_seed(3)
    drawn = torch.rand(2, 1, 2)
    noisy = torch.sigmoid(router.module_logits[tasks].view(2, 1, 2) + torch.log(drawn / (1 - drawn)))
    torch.manual_seed(3)
    torch.testing.assert_close(router.train()(tasks), noisy / noisy.sum(-1, keepdim=True))
    assert not torch.equal(layer(x, task_ids=tasks), layer(x, task_ids=tasks))
    layer(x, task_ids=tasks).sum().backward()
    assert router.module_logits.grad[1:].any() and not router.module_logits.grad[0].any()


@pytest.mark.parametrize("init_weights", [True, False])
def test_start(init_weights: bool) -> None:
    net = nn.Sequential(nn.Linear(8, 12))
    torch.manual_seed(5)
    get_peft_model(net, config(n_splits=2, init_weights=init_weights))
    layer, a, b = net[0], torch.empty(2, 2, 4, 2), torch.zeros(2, 2, 2, 6)
    torch.manual_seed(5)
    for s in range(2):
        for q in range(2):
            a[q, s] = torch.empty(2, 4).uniform_(-(4**-0.5), 4**-0.5).T
    for s in range(0 if init_weights else 2):
        for q in range(2):
            b[q, s] = torch.empty(6, 2).uniform_(-(2**-0.5), 2**-0.5).T
    logits = torch.empty(3, 4).uniform_(-1e-3, 1e-3)
    torch.testing.assert_close(layer.poly_lora_A["default"].data, a)
    torch.testing.assert_close(layer.poly_lora_B["default"].data, b)
    assert torch.equal(layer.poly_router["default"].module_logits, logits)


# ------------------------------------------------------------------------------------------ ways of task_ids
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def test_tasks_reach_layers_by_every_entrance() -> None:
    x, tasks = torch.randn(3, 5, 8), torch.tensor([2, 0, 1])
    torch.manual_seed(1)
    model = get_peft_model(net(), config(target_modules=["0", "2"])).eval()
    expected = model(x, task_ids=tasks)
    layers = model.get_base_model()
    by_layer = layers[2](torch.tanh(layers[0](x, task_ids=tasks)), task_ids=tasks)
    torch.manual_seed(1)
    bare = inject_adapter_in_model(config(target_modules=["0", "2"]), net()).eval()
    with calling(task_ids=tasks.tolist()):
        injected, inside = bare(x), model(x)
        other = model(x, task_ids=[0, 0, 0])  # said nearer by
    for outputs in (model.base_model(x, task_ids=tasks), by_layer, injected, inside):
        assert torch.equal(outputs, expected)
    assert torch.equal(other, model(x, task_ids=[0] * 3)) and not torch.equal(other, expected)
    assert current_call() is None
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_beams_and_returned_sequences_have_the_task_of_their_sample(task_type: str | None) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=24, initializer_range=0.5, **sizes))
    model = get_peft_model(base, config(task_type=task_type, target_modules=["q_proj", "v_proj"])).eval()
    for layer in model.base_model._layers():
        nn.init.normal_(layer.poly_lora_B["default"])
        nn.init.normal_(layer.poly_router["default"].module_logits, std=4)
    ids, options = torch.tensor([[3, 5, 7], [4, 6, 2]]), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": None}
    both = model.generate(input_ids=ids, task_ids=[2, 0], **options)
    each = [model.generate(input_ids=ids[i : i + 1], task_ids=[task], **options) for i, task in enumerate((2, 0))]
    assert torch.equal(both, torch.cat(each))
    swapped = model.generate(input_ids=ids, task_ids=[0, 2], **options)
    assert not torch.equal(swapped, both)


def test_encoder_and_decoder_have_the_tasks() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "decoder_start_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(vocab_size=24, **sizes))
    model = get_peft_model(base, config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])).eval()
    ids = torch.tensor([[3, 5, 7], [4, 6, 2]])
    both = model.generate(input_ids=ids, task_ids=[2, 0], num_beams=2, max_new_tokens=3)
    assert both.shape[0] == 2


def test_each_sample_has_its_adapter_and_its_task() -> None:
    torch.manual_seed(0)
    model = get_peft_model(net(), config())
    model.add_adapter("other", config(n_tasks=2, r=3))
    x, tasks, names = torch.randn(4, 5, 8), [1, 0, -1, 1], ["other", "default", "__base__", "default"]
    layer = model.eval().get_base_model()[0]
    mixed = layer(x, task_ids=tasks, adapter_names=names)
    with calling(task_ids=tasks):
        assert torch.equal(model(x, adapter_names=names), model.get_base_model()[1:](mixed))
    for row, (task, name) in enumerate(zip(tasks, names, strict=True)):
        wanted = layer.base_layer(x[row]) if name == "__base__" else by_hand(layer, x[row], task, name)
        torch.testing.assert_close(mixed[row], wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_find_the_tasks_of_their_call(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=24, **sizes))
        model = get_peft_model(base, config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        ids, first, second = torch.tensor([[3, 5], [4, 6]]), [2, 0], [1, 1]
        torch.manual_seed(1)
        outputs = [model(input_ids=ids, task_ids=tasks).logits for tasks in (first, second)]
        sum(logits.square().sum() for logits in outputs).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, wanted)


def test_one_task_need_not_be_said() -> None:
    layer, x = adapted(n_tasks=1), torch.randn(3, 5, 8)
    assert torch.equal(layer(x), layer(x, task_ids=[0, 0, 0]))


# ------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("task_ids", "classes", "mentions"),
    [
        (None, ValueError, ("3 tasks", "task_ids")),
        ([0, 3], ValueError, ("n_tasks=3", "3")),
        ([0, -4], ValueError, ("n_tasks=3", "-4")),
        ([0, 1, 2], ValueError, ("3 entries", "batch of 2")),
        ([0.5, 1.0], TypeError, ("integers", "float32")),
        ([True, False], TypeError, ("integers", "bool")),
        ([[0], [1]], TypeError, ("integers", "(2, 1)")),
        ([], TypeError, ("integers", "(0,)")),
    ],
)
def test_bad_tasks_are_refused(task_ids: Any, classes: type, mentions: tuple[str, ...]) -> None:
    model = get_peft_model(net(), config()).eval()
    with refused(model, classes, *mentions):
        model(torch.randn(2, 5, 8), task_ids=task_ids)
    assert current_call() is None


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"r": 0}, ("r ", "0")),
        ({"n_tasks": 0}, ("n_tasks", "0")),
        ({"n_skills": 0}, ("n_skills", "0")),
        ({"n_splits": 0}, ("n_splits", "0")),
        ({"n_splits": 3}, ("n_splits=3", "(8, 8)")),
        ({"poly_type": "other"}, ("poly_type", "'other'")),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, Any], mentions: tuple[str, ...]) -> None:
    base = net()
    with refused(base, ValueError, *mentions):
        get_peft_model(base, config(**fields))


def test_merging_is_refused() -> None:
    model = get_peft_model(net(), config()).eval()
    x, layer = torch.randn(2, 5, 8), model.get_base_model()[0]
    for merging in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with refused(model, NotImplementedError, "'default'", "keep it unmerged"):
            merging()
    with refused(model, NotImplementedError, "'default'"):
        layer.get_delta_weight("default")
    assert not layer.supports_lora_conversion()
    assert torch.equal(model.unload()(x), net()(x))


def test_several_active_adapters_add_up() -> None:
    torch.manual_seed(0)
    model = get_peft_model(net(), config()).eval()
    model.add_adapter("other", config())
    layer, x, tasks = model.get_base_model()[0], torch.randn(2, 5, 8), [0, 2]
    base, first = layer.base_layer(x), layer(x, task_ids=tasks)
    model.set_adapter("other")
    second = layer(x, task_ids=tasks)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x, task_ids=tasks) - base, first + second - 2 * base)
    model.delete_adapter("default")
    torch.testing.assert_close(layer(x, task_ids=tasks), second)


def test_router_tells_shares() -> None:
    router = PolyRouter(PolyConfig(n_tasks=2, n_skills=3, n_splits=2)).eval()
    shares = router(torch.tensor([1, 0, 1]))
    assert shares.shape == (3, 2, 3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 2))
