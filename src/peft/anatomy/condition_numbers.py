# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Choosing what to adapt by the condition numbers of weights: KappaTune."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from .walking import bare_modules


class KappaTuneSelector:
    """
    Chooses the layers to adapt by the condition numbers of their weights: KappaTune (arXiv:2506.16289).

    A weight with a small condition number, the ratio of its greatest to its smallest singular value, spreads over all
    directions; it is less specialised, and changing it costs less of what the model knows.

    Args:
        model: the base model.
        max_dim_size_to_analyze: weights with a greater side are passed over, since they take long.
        moe_param_suffixes: endings of names of parameters that hold the matrices of several experts, (experts, rows,
            columns); their condition number is the mean over the experts.
        show_progress: show a progress bar.

    Example:

        >>> import torch
        >>> from peft.helpers import KappaTuneSelector
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 100.0]]))
        >>> _ = net[1].weight.data.copy_(torch.eye(2))
        >>> KappaTuneSelector(net, show_progress=False).get_best_targets(num_modules=1)
        ['1']
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: Sequence[str] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = tuple(
            moe_param_suffixes or (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
        )
        self.show_progress = show_progress

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """
        Give names of linear layers, that with the smallest condition number first.

        Args:
            top_p: share of the layers, at least one layer.
            num_modules: number of layers, if `top_p` is left out.
            threshold: greatest condition number, if both are left out.
        """
        return _choose(self._module_numbers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """
        Give names of parameters with the matrices of experts, that with the smallest condition number first.

        Args:
            top_p: share of the parameters, at least one.
            num_modules: number of parameters, if `top_p` is left out.
            threshold: greatest condition number, if both are left out.
        """
        return _choose(self._parameter_numbers, top_p, num_modules, threshold)

    @functools.cached_property
    def _module_numbers(self) -> dict[str, float]:
        weights = {name: m.weight for name, m in bare_modules(self.model) if isinstance(m, nn.Linear)}
        return self._condition_numbers(weights, dimensions=2)

    @functools.cached_property
    def _parameter_numbers(self) -> dict[str, float]:
        parameters = {
            f"{name}.{key}": parameter
            for name, module in bare_modules(self.model)
            for key, parameter in module._parameters.items()
            if parameter is not None and f".{name}.{key}".endswith(self.moe_param_suffixes)
        }
        return self._condition_numbers(parameters, dimensions=3)

    @torch.no_grad()
    def _condition_numbers(self, weights: dict[str, torch.Tensor], dimensions: int) -> dict[str, float]:
        numbers = {}
        for name, weight in tqdm(weights.items(), desc="condition numbers", disable=not self.show_progress):
            fits = weight.dim() == dimensions and max(weight.shape[-2:]) <= self.max_dim_size_to_analyze
            if fits and weight.is_floating_point() and not weight.is_meta:
                matrices = weight.float().unsqueeze(0) if dimensions == 2 else weight
                numbers[name] = sum(map(_condition_number, matrices)) / len(matrices)
        return numbers


def _condition_number(matrix: torch.Tensor) -> float:
    singular = torch.linalg.svdvals(matrix.float())
    return (singular[0] / singular[-1]).item() if singular[-1] > 0 else math.inf


def _choose(
    numbers: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    names = sorted(numbers, key=numbers.__getitem__)
    if top_p is not None:
        return names[: max(1, int(top_p * len(names)))]
    if num_modules is not None:
        return names[:num_modules]
    return names if threshold is None else [name for name in names if numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """
    Choose targets for a LoRA config by condition numbers; see `KappaTuneSelector`.

    Args:
        model: the base model.
        top_p: share of the layers to adapt.
        max_dim_size_to_analyze: weights with a greater side are passed over.
        moe_param_suffixes: endings of names of parameters with the matrices of experts.
        show_progress: show a progress bar.

    Returns:
        `target_modules` and `target_parameters`, each a list of names, or None if there are none.

    Example:

        >>> import torch
        >>> from peft.helpers import find_kappa_target_modules
        >>> find_kappa_target_modules(torch.nn.Sequential(torch.nn.Linear(2, 2)), show_progress=False)
        {'target_modules': ['0'], 'target_parameters': None}
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p) or None,
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
