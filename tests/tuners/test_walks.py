# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""An adapter is put in by few walks through the model, however many questions are asked about it."""

import traceback
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from support.tied_models import llama
from torch import nn

from peft import IA3Config, LoHaConfig, LoraConfig, LoraModel, OFTConfig, PeftConfig, get_peft_model
from peft.tuners.placement import Placement


# to note what was there before, to see what there is, to set up what was put in
WALKS = 3

CONFIGS = {
    "LoRA, saved head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    "LoRA, adapted head": LoraConfig(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    "LoRA, tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1], ensure_weight_tying=True),
    "LoRA, all linear": LoraConfig(target_modules="all-linear", ensure_weight_tying=True),
    "IA3, saved head": IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        modules_to_save=["lm_head"],
        ensure_weight_tying=True,
    ),
    "IA3, adapted head": IA3Config(
        target_modules=["k_proj", "lm_head"], feedforward_modules=[], ensure_weight_tying=True
    ),
    "LoHa, saved head": LoHaConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    "LoHa, adapted head": LoHaConfig(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
}


def readers() -> tuple[str, ...]:
    """Name the functions on the stack, the innermost first."""
    frames = reversed(traceback.extract_stack()[:-2])
    return tuple(f"{frame.name} ({frame.filename.rpartition('/')[2]}:{frame.lineno})" for frame in frames)


def watch(modules: list[nn.Module]) -> dict[nn.Module, list[tuple[str, ...]]]:
    """
    Note who asks modules for the modules inside of them, as every way to walk a model has to.

    Args:
        modules: some that an adapter neither wraps nor calls. Their classes are changed.

    Returns:
        For each of them: the stack of every reader so far.
    """
    read: dict[nn.Module, list[tuple[str, ...]]] = {module: [] for module in modules}

    def get_modules(module: nn.Module) -> dict[str, nn.Module]:
        read[module].append(readers())
        return module.__dict__["_modules"]

    for module in modules:
        watched = {"_modules": property(get_modules), "__module__": __name__}
        module.__class__ = type(type(module).__name__, (type(module),), watched)
    return read


def walks_of(model: nn.Module, function: Callable, *args) -> list[tuple[str, ...]]:
    """
    Call a function, and list the walks through a model that reach some norm, by the stacks of those who walk.

    The norm that is reached most often counts: a walk that stops early does not reach the others.
    """
    read = watch([module for module in model.modules() if "Norm" in type(module).__name__])
    function(*args)
    assert len(read) > 2
    return max(read.values(), key=len)


def explain(walks: list[tuple[str, ...]]) -> str:
    """Write the walks down for whoever has to find the one that is too many."""
    counted = Counter(" < ".join(stack[:7]) for stack in walks)
    return "\n".join(f"{number} x {stack}" for stack, number in counted.most_common())


@pytest.fixture(params=CONFIGS)
def config(request) -> PeftConfig:
    return CONFIGS[request.param]


def test_the_count_sees_every_way_to_walk():
    ways = [
        lambda model: list(model.modules()),
        lambda model: list(model.named_modules()),
        lambda model: list(model.parameters()),
        lambda model: list(model.named_parameters(remove_duplicate=False)),
        lambda model: list(model.buffers()),
        lambda model: model.state_dict(),
        lambda model: model.train(),
        lambda model: model.apply(id),
    ]
    model = llama()
    for way in ways:
        assert len(walks_of(model, way, model)) == 1


def test_first_adapter(config):
    model = llama()
    walks = walks_of(model, get_peft_model, model, config)
    assert len(walks) <= WALKS, explain(walks)


def test_second_adapter(config):
    base = llama()
    model = get_peft_model(base, config)
    walks = walks_of(base, model.add_adapter, "other", config)
    assert len(walks) <= WALKS, explain(walks)


def test_each_target_is_asked_about_once(monkeypatch):
    """Thousands of layers take long enough as it is: the kind of layer is found once, and the hook stays out of it."""
    found, hooked = [], []
    model, find = llama(), LoraModel._layer_class
    monkeypatch.setattr(LoraModel, "_layer_class", lambda self, target: found.append(target) or find(self, target))
    monkeypatch.setattr(Placement, "target_for", lambda self, *args: hooked.append(args))
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert len(found) == len(peft_model.base_model.targeted_module_names) and not hooked


def test_a_token_is_computed_without_a_look_at_the_kind_of_layer(monkeypatch):
    layer = get_peft_model(nn.Sequential(nn.Linear(4, 4)), OFTConfig(target_modules=["0"], oft_block_size=2, r=0))
    layer = layer.get_base_model()[0]
    assert layer.transforms_input and not layer.corrects_output
    looks = []
    monkeypatch.setattr(type(layer), "get_base_layer", lambda self: looks.append(self) or self.base_layer)
    layer(torch.ones(1, 1, 4))
    assert len(looks) <= 1  # for the sizes that its matrices have
