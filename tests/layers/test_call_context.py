# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What applies to one call of a model stays with it: in threads, in tasks, and when layers are computed again."""

import asyncio
import contextvars
import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.helpers import assert_close, features, llama, logits, randomise, seeded, stack, token_ids
from support.method_options import OPTIONS
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from peft.layers import call_context as _call_context
from peft.layers.call_context import calling, current_call
from peft.models.per_sample import adapter_per_sample
from peft.prompts import inputs as prompt_inputs
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING


NAMES = ["a", "b", "__base__"]
THREADS, CALLS = 4, 12
# methods whose samples can have adapters of their own, each on a route of its own
ROUTES = ("IA3", "LOHA", "LORA", "OFT", "VERA", "modules_to_save", "tokens")


def config(route: str) -> Any:
    """Adapt a Llama by a method or a route."""
    if route == "tokens":
        return LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5, 7])
    if route == "modules_to_save":
        return LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    options = OPTIONS.get(route, {})
    return PEFT_TYPE_TO_CONFIG_MAPPING[route](target_modules=["q_proj", "down_proj"], **options)


def with_two(route: str = "LORA") -> PeftModel:
    """A model with two adapters that differ."""
    with seeded():
        model = get_peft_model(llama(), config(route), "a").eval()
        model.add_adapter("b", config(route))
    randomise(model, r"\.a(\.|$)", seed=1)
    randomise(model, r"\.b(\.|$)", seed=2)
    return model.eval()


def rows_alone(model: PeftModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each adapter gives, by itself."""
    return {name: logits(model, ids, adapter_names=[name] * len(ids)) for name in NAMES}


def at_the_same_time(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run jobs in threads that begin together."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


# ------------------------------------------------------------------------------------------ side by side
@pytest.mark.parametrize("route", ROUTES)
def test_threads_get_the_rows_that_they_asked_for(route: str) -> None:
    model, ids = with_two(route), token_ids(2)
    expected = rows_alone(model, ids)
    plain = logits(model, ids)
    assert not torch.equal(expected["a"], expected["b"])

    def job(name: str | None) -> Callable[[], list[torch.Tensor]]:
        options = {} if name is None else {"adapter_names": [name] * len(ids)}
        return lambda: [logits(model, ids, **options) for _ in range(CALLS)]

    names = [*NAMES, None]
    for name, outputs in zip(names, at_the_same_time([job(name) for name in names]), strict=True):
        for output in outputs:
            assert_close(output, plain if name is None else expected[name])
    assert not _call_context._running and current_call() is None


def test_calls_that_overlap_for_certain() -> None:
    """Each thread waits inside of its call until the other one is inside of its own."""
    model, ids = with_two(), token_ids(2)
    expected = rows_alone(model, ids)
    barrier = threading.Barrier(2, timeout=60)

    def wait(module: nn.Module, args: tuple) -> None:
        barrier.wait()

    model.get_base_model().model.layers[0].register_forward_pre_hook(wait)
    jobs = [lambda name=name: logits(model, ids, adapter_names=[name] * len(ids)) for name in ("a", "b")]
    for name, output in zip(("a", "b"), at_the_same_time(jobs), strict=True):
        assert_close(output, expected[name])


def test_tasks_get_the_rows_that_they_asked_for() -> None:
    """A task that waits inside of a call does not leave its names to the others."""
    model, ids = with_two(), token_ids(2)
    expected = rows_alone(model, ids)

    async def ask(name: str) -> torch.Tensor:
        with adapter_per_sample(model, [name] * len(ids)):
            await asyncio.sleep(0)
            with torch.no_grad():
                return model.base_model(ids).logits

    async def ask_in_thread(name: str) -> torch.Tensor:
        return await asyncio.to_thread(logits, model, ids, adapter_names=[name] * len(ids))

    async def everybody() -> list[torch.Tensor]:
        return await asyncio.gather(*(way(name) for way in (ask, ask_in_thread) for name in NAMES * 3))

    for name, output in zip(NAMES * 6, asyncio.run(everybody()), strict=True):
        assert_close(output, expected[name])


def test_threads_that_generate() -> None:
    model, ids = with_two(), token_ids(2)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    expected = {n: model.generate(adapter_names=[n] * 2, num_beams=2, **options) for n in NAMES}
    jobs = [lambda n=n: model.generate(adapter_names=[n] * 2, num_beams=2, **options) for n in NAMES]
    for name, output in zip(NAMES, at_the_same_time(jobs), strict=True):
        assert torch.equal(output, expected[name])


@pytest.mark.parametrize("method", [PromptTuningConfig, PrefixTuningConfig])
def test_threads_that_generate_with_a_prompt(method: type) -> None:
    """Each call of the model gets the prompt once."""
    model = get_peft_model(llama(), method(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    randomise(model, "prompt_encoder")
    batches = [token_ids(rows) for rows in (1, 2, 3)]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = [model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options) for ids in batches]
    jobs = [
        lambda ids=ids: [model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options) for _ in "123"]
        for ids in batches
    ]
    for alone, together in zip(expected, at_the_same_time(jobs), strict=True):
        assert all(torch.equal(output, alone) for output in together)


def test_a_hook_that_another_thread_is_just_adding_changes_nothing() -> None:
    """torch notes that a hook takes keywords after it has added it, so it may be called without them in between."""
    net = torch.nn.Linear(2, 2)
    with prompt_inputs._rewriting_inputs(net, lambda args, kwargs: (args, kwargs)):
        net._forward_pre_hooks_with_kwargs.clear()
        assert contextvars.Context().run(net, torch.ones(1, 2)).shape == (1, 2)


def invoked(**changes: Any) -> PeftModel:
    """A model with an adapter that token 5 invokes."""
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(llama(), LoraConfig(alora_invocation_tokens=[5], **settings))
    randomise(model)
    return model


def test_threads_that_invoke_an_adapter_at_other_places() -> None:
    model = invoked().eval()
    batches = [torch.tensor([[*[9] * before, 5, *[8] * (7 - before)]]) for before in range(THREADS)]
    expected = [logits(model, ids) for ids in batches]
    jobs = [lambda ids=ids: [logits(model, ids) for _ in range(CALLS)] for ids in batches]
    for alone, together in zip(expected, at_the_same_time(jobs), strict=True):
        for output in together:
            assert_close(output, alone)


class Attending(nn.Module):
    """A layer of attention, and one that holds its weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.lin = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the shape."""
        return self.lin(self.attention(x, x, x)[0])


@pytest.mark.parametrize("target", [{"target_modules": ["attention"]}, {"target_parameters": ["lin.weight"]}], ids=str)
def test_weights_that_stand_in_a_layer_for_one_call_are_not_seen_by_another(target: dict) -> None:
    """Threads that compute one such layer wait for each other; the base weight is there when all have gone."""
    with seeded():
        model = get_peft_model(Attending(), LoraConfig(r=2, **target)).eval()
    randomise(model)
    batches = [features(batch).unsqueeze(1) for batch in (2, 3)]
    expected = [logits(model, x) for x in batches]
    before = {name: p.clone() for name, p in model.named_parameters()}
    layer = next(m for m in model.modules() if getattr(m, "_is_adapter_module", False)).get_base_layer()
    inside, others = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: tuple) -> None:
        inside.set()
        others.wait(0.2)

    layer.register_forward_pre_hook(wait)

    def second() -> torch.Tensor:
        inside.wait(60)
        try:
            return logits(model, batches[1])
        finally:
            others.set()

    found = at_the_same_time([lambda: logits(model, batches[0]), second])
    for output, wanted in zip(found, expected, strict=True):
        assert_close(output, wanted)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter)


# ------------------------------------------------------------------------------------------ one inside of the other
def test_a_model_that_is_called_inside_of_a_call_has_its_own() -> None:
    """Be it another model, or the same one."""
    outer, other, ids = with_two(), with_two(), token_ids(2)
    inner = token_ids(3)
    plain, expected = logits(other, inner), rows_alone(outer, ids)
    own = logits(outer, inner)
    seen: list[torch.Tensor] = []

    def call_others(module: nn.Module, args: tuple) -> None:
        handle.remove()
        seen.extend([logits(other, inner), logits(other.get_base_model(), inner), logits(outer, inner)])

    handle = outer.get_base_model().model.layers[1].register_forward_pre_hook(call_others)
    assert_close(logits(outer, ids, adapter_names=["b"] * 2), expected["b"])
    for output, wanted in zip(seen, (plain, plain, own), strict=True):
        assert_close(output, wanted)


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    for model, options in ((with_two(), {"adapter_names": ["a", "b"]}), (invoked().eval(), {})):
        ids = token_ids(2)
        expected = logits(model, ids)

        def fail(module: nn.Module, args: tuple) -> None:
            raise KeyError("inside")

        handle = model.get_base_model().model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="inside"):
            model(ids, **options)
        handle.remove()
        assert current_call() is None and not _call_context._running
        assert_close(logits(model, ids), expected)


def test_a_layer_can_be_told_by_itself() -> None:
    model, x = get_peft_model(stack(), LoraConfig(r=2, target_modules=["head"]), "a").eval(), features(2)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["head"]))
    randomise(model)
    layer = model.get_base_model().head
    rows = [layer(x, adapter_names=[name] * 2) for name in ("a", "b")]
    assert_close(layer(x, adapter_names=["a", "b"]), torch.stack([rows[0][0], rows[1][1]]))
    with calling(adapter_names=["b", "b"], modules={id(layer)}):
        assert_close(layer(x), rows[1])
        assert_close(layer(x, adapter_names=["a", "a"]), rows[0])


def test_models_can_be_copied_and_pickled_between_calls_and_inside() -> None:
    model, ids = with_two(), token_ids(3)
    expected = logits(model, ids, adapter_names=NAMES)
    copies: list[PeftModel] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]

    def copy_inside(module: nn.Module, args: tuple) -> None:
        handle.remove()
        copies.append(copy.deepcopy(model))

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(copy_inside)
    assert_close(logits(model, ids, adapter_names=NAMES), expected)
    for twin in copies:
        assert_close(logits(twin, ids, adapter_names=NAMES), expected)


def test_compiled_models() -> None:
    """Without names as one graph; with names as before, in several."""
    config = LoraConfig(r=2, target_modules=["head"], modules_to_save=["layers.0.up"])
    model, x = get_peft_model(stack(1), config, "a").eval(), features(3)
    model.add_adapter("b", config)
    randomise(model, "lora_|modules_to_save")
    expected, mixed = logits(model, x), logits(model, x, adapter_names=NAMES)
    assert_close(logits(torch.compile(model, backend="eager", fullgraph=True), x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert_close(logits(compiled, x, adapter_names=NAMES), mixed)
    assert_close(logits(compiled, x), expected)


# ------------------------------------------------------------------------------------------ computed again
class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward pass, in one of torch's two ways or not at all."""

    def __init__(self, blocks: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks, self.reentrant = blocks, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, 8) to (batch, 4)."""
        for layer in self.blocks.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.blocks.head(x)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_find_the_names_of_their_call(reentrant: bool, together: bool) -> None:
    """Of each call its own, also where one backward pass is for several."""

    def gradients(way: bool | None) -> dict[str, torch.Tensor]:
        model = get_peft_model(Checkpointed(stack(), way), LoraConfig(r=2, target_modules=["up", "down"]), "a").eval()
        model.add_adapter("b", LoraConfig(r=2, target_modules=["up", "down"]))
        randomise(model)
        model.base_model.set_adapter(["a", "b"])
        x = features(3).requires_grad_()
        losses = [model(x, adapter_names=names).pow(2).sum() for names in (["a"] * 3, ["b", "a", "__base__"])]
        losses.append(model(x).pow(2).sum())
        for loss in [sum(losses)] if together else losses:
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(None), gradients(reentrant)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient)
    assert not _call_context._backward


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_find_the_invocations_of_their_call(reentrant: bool) -> None:
    batches = [torch.tensor([[9, 5, 8, 7, 6]]), torch.tensor([[9, 8, 7, 5, 6]])]

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = invoked().train()
        if checkpointing:
            model.get_base_model().enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses = [model(input_ids=ids, use_cache=False).logits.pow(2).sum() for ids in batches]
        for loss in losses:  # after both calls, so that the first one is not the last that there was
            loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert_close(one, other)


def test_tokens_of_tied_members_in_threads() -> None:
    tied = dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    model = get_peft_model(llama(tied=True), TrainableTokensConfig(token_indices=[3, 4], **tied), "a").eval()
    model.add_adapter("b", TrainableTokensConfig(token_indices=[4, 5], **tied))
    randomise(model, "trainable_tokens")
    ids = token_ids(2)
    expected = rows_alone(model, ids)
    jobs = [lambda n=n: [logits(model, ids, adapter_names=[n] * 2) for _ in range(CALLS)] for n in NAMES]
    for name, outputs in zip(NAMES, at_the_same_time(jobs), strict=True):
        for output in outputs:
            assert_close(output, expected[name])
