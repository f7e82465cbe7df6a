# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a config asks for and a layer cannot have is refused while the plan is made: placing is never begun."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.helpers import kinds, refused, snapshot
from support.method_options import OPTIONS, REQUIRED, layered_methods
from torch import nn

from peft import (
    FrodConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    ShiraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.planning import plan_adapter
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import loha, lora, oft
from peft.tuners.placing import Placing
from peft.tuners.shira.mask_functions import random_mask
from peft.utils.error import PeftError


pytestmark = pytest.mark.filterwarnings("ignore")

# nothing, less, much more than any layer has, what divides no layer, and other types
BAD = (0, -1, 10**9, 7, 1.5, "nonsense", (1, 2))
# what all configs have: targets, saved modules, ties and facts about the file; they have tests of their own
SHARED = {field.name for field in dataclasses.fields(LoraConfig)} & {
    field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING["OFT"])
}


@pytest.fixture(autouse=True)
def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the adapters that were placed, or were about to be."""
    names: list[str] = []
    place = Placing.place

    def note(self: Placing, plan: Any, *args: Any, **kwargs: Any) -> None:
        names.append(plan.adapter_name)
        place(self, plan, *args, **kwargs)

    monkeypatch.setattr(Placing, "place", note)
    return names


def target_of(method: str) -> str:
    """Name the layer of `kinds` that a method can adapt."""
    classes = tuple(PEFT_TYPE_TO_TUNER_MAPPING[method].layer_classes)
    model = kinds()
    return next(n for n in ("lin", "emb", "conv", "norm") if isinstance(model.get_submodule(n), classes))


def bad_options(method: str) -> Iterator[dict[str, Any]]:
    """Yield options of a method of which one cannot be meant; most of them, since some values happen to work."""
    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[method]):
        if field.init and field.name not in SHARED - {"r", "init_weights", "bias"}:
            yield from ({**REQUIRED.get(method, {}), **OPTIONS.get(method, {}), field.name: value} for value in BAD)


@pytest.mark.parametrize("method", layered_methods())
def test_all_methods(method: str, entered: list[str]) -> None:
    """Whatever a field holds: the adapter is made, or the plan is refused and the model stays as it was."""
    config_cls, target = PEFT_TYPE_TO_CONFIG_MAPPING[method], target_of(method)
    base, refusals, wrong = kinds(), 0, []
    before = snapshot(base)
    for options in bad_options(method):
        entered.clear()
        try:
            config = config_cls(target_modules=[target], **options)
            model = get_peft_model(base, config)
        except (PeftError, TypeError, ValueError) as error:
            refusals += 1
            if entered or snapshot(base) != before:
                wrong.append((options, error))
        else:
            assert entered == [model.active_adapter]
            base = kinds()
            before = snapshot(base)
    assert wrong == []
    assert refusals > 0 or method in ("BEFT", "LN_TUNING")  # which have no sizes


# what depends on the layer, and is no field of a method's config alone
GROUPED = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 4))
REFUSED: dict[str, tuple[nn.Module, PeftConfig, type]] = {
    "rank for groups": (GROUPED, LoraConfig(r=3, target_modules=["0"]), ValueError),
    "start for groups": (GROUPED, LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal"), ValueError),
    "rotation of groups": (GROUPED, OFTConfig(r=2, oft_block_size=0, target_modules=["0"]), NotImplementedError),
    "odd rank": (kinds(), LoraConfig(r=3, target_modules=["lin"], init_lora_weights="orthogonal"), ValueError),
    "bias of an embedding": (kinds(), LoraConfig(r=2, target_modules=["emb"], lora_bias=True), ValueError),
    "variant": (kinds(), LoraConfig(r=2, target_modules=["emb"], alora_invocation_tokens=[1]), ValueError),
    "parameter": (kinds(), LoraConfig(r=2, target_parameters=["lin.weight"], lora_dropout=0.1), ValueError),
    "start of a parameter": (
        kinds(),
        LoraConfig(r=9, target_parameters=["lin.weight"], init_lora_weights="pissa"),
        ValueError,
    ),
    "size of a parameter": (kinds(), LoraConfig(r=10**9, target_parameters=["lin.weight"]), ValueError),
    "rank by pattern": (kinds(), LoHaConfig(r=2, rank_pattern={"lin": 10**9}, target_modules=["lin"]), ValueError),
    "attention": (
        nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3, vdim=5), nn.Linear(4, 4)),
        LoraConfig(r=2, target_modules=["0"]),
        ValueError,
    ),
    "roles of different widths": (
        nn.ModuleDict({name: nn.ModuleDict({"up": nn.Linear(width, 4)}) for name, width in (("0", 4), ("1", 6))}),
        FrodConfig(target_modules=["up"], progressbar=False),
        ValueError,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("entrance", ["get_peft_model", "add_adapter", "inject_adapter_in_model", "plan_adapter"])
def test_layers(case: str, entrance: str, entered: list[str]) -> None:
    base, config, kind = REFUSED[case]
    model = copy.deepcopy(base)
    if entrance == "add_adapter":
        works = next(name for name in ("0.up", "1", "lin") if name in dict(model.named_modules()))
        model = get_peft_model(model, type(config)(target_modules=[works]), "first")
        entered.clear()
    with refused(model, kind):
        if entrance == "plan_adapter":
            plan_adapter(model, config)
        elif entrance == "add_adapter":
            model.add_adapter("other", config)
        elif entrance == "get_peft_model":
            get_peft_model(model, config)
        else:
            inject_adapter_in_model(config, model)
    assert entered == []


def test_masks_of_users(entered: list[str]) -> None:
    """A function that chooses too few entries is asked once, before anything is placed."""
    calls = []

    def choose(layer: nn.Module, r: int) -> torch.Tensor:
        calls.append(layer)
        return torch.zeros_like(layer.weight, dtype=torch.bool)

    config, base = ShiraConfig(r=2, mask_type="mine", target_modules=["lin"]), kinds()
    config.mask_fn = choose
    with refused(base, ValueError, "a mask must have"):
        get_peft_model(base, config)
    assert (calls, entered) == ([base.lin], [])
    config.mask_fn = lambda layer, r: calls.append(layer) or random_mask(layer, r)
    layer = get_peft_model(base, config).base_model.model.lin
    assert len(calls) == 2
    assert layer.shira_indices["default"].shape[1] == layer.shira_weight["default"].numel()


def test_layers_that_are_made_by_hand_refuse_too() -> None:
    with pytest.raises(PeftError, match="r must be a positive integer"):
        lora.layer.Linear(nn.Linear(4, 4), "default", LoraConfig(), r=0)
    with pytest.raises(PeftError, match="groups=2"):
        oft.layer.Conv2d(nn.Conv2d(4, 4, 3, groups=2), "default", OFTConfig(r=2, oft_block_size=0))
    with pytest.raises(PeftError, match="check the config"):
        loha.layer.Linear(nn.Linear(4, 4), "default", LoHaConfig(r=10**9))
