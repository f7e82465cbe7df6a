# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Targets chosen by the condition numbers of weights."""

import pytest
import torch
from support.helpers import seeded
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.helpers import KappaTuneSelector, find_kappa_target_modules


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


class Experts(nn.Module):
    """Linear layers with condition numbers 6, 100 and 1, a large one, and matrices of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.six = self._linear([1, 2, 3, 6])
        self.hundred = self._linear([1, 1, 1, 100])
        self.one = self._linear([5, 5, 5, 5])
        self.singular = self._linear([1, 1, 1, 0])
        self.embedding = nn.Embedding(4, 4)
        self.large = nn.Linear(40, 4)
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(torch.stack([torch.diag(torch.tensor([1.0, x])) for x in (2, 4)]))
        self.experts.up_proj = nn.Parameter(torch.stack([torch.diag(torch.tensor([1.0, x])) for x in (1, 2)]))

    @staticmethod
    def _linear(diagonal: list[float]) -> nn.Linear:
        layer = nn.Linear(4, 4)
        with torch.no_grad():
            layer.weight.copy_(torch.diag(torch.tensor(diagonal, dtype=torch.float32)))
        return layer


def selector(**options) -> KappaTuneSelector:
    return KappaTuneSelector(Experts(), **{"max_dim_size_to_analyze": 20, "show_progress": False, **options})


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["one", "six", "hundred", "singular"]),
        ({"top_p": 0.5}, ["one", "six"]),
        ({"top_p": 0.01}, ["one"]),
        ({"num_modules": 3}, ["one", "six", "hundred"]),
        ({"threshold": 10.0}, ["one", "six"]),
        ({"threshold": 0.5}, []),
    ],
    ids=str,
)
def test_small_condition_numbers_come_first(options: dict, names: list[str]) -> None:
    assert selector().get_best_targets(**options) == names


def test_experts_count_by_their_mean() -> None:
    chosen = selector()
    assert chosen.get_best_target_parameters() == ["experts.up_proj", "experts.down_proj"]
    assert chosen.get_best_target_parameters(threshold=1.6) == ["experts.up_proj"]
    assert selector(moe_param_suffixes=["down_proj"]).get_best_target_parameters() == ["experts.down_proj"]


def test_large_weights_are_passed_over() -> None:
    assert "large" not in selector().get_best_targets()
    assert "large" in selector(max_dim_size_to_analyze=40).get_best_targets()


def test_targets_for_a_config() -> None:
    assert find_kappa_target_modules(Experts(), top_p=0.5, max_dim_size_to_analyze=20, show_progress=False) == {
        "target_modules": ["one", "six"],
        "target_parameters": ["experts.up_proj"],
    }
    with seeded():
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    chosen = find_kappa_target_modules(net, show_progress=False)
    assert chosen["target_parameters"] is None
    config = LoraConfig(r=2, target_modules=chosen["target_modules"])
    assert get_peft_model(net, config).targeted_module_names == chosen["target_modules"]
