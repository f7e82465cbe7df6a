# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""IA3 on a whole model."""

import copy
import math
from typing import Any

import torch
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ...utils.warning import warn
from .config import IA3Config
from .layer import IA3, IA3Layer


class IA3Model(IA3.Model):
    """
    A model with IA3 layers in it (Liu et al. 2022, arXiv:2205.05638).

    Args:
        model: the base model; it is changed in place.
        peft_config: an `IA3Config`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the factors on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import IA3Config, IA3Model
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = IA3Model(net, IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]), "default")
        >>> [tuple(net[i].ia3_l["default"].shape) for i in (0, 2)]
        [(8, 1), (1, 8)]
    """

    def _resolve_targets(self, model: nn.Module, config: IA3Config) -> None:
        super()._resolve_targets(model, config)
        if config.feedforward_modules is None:
            model_type = self.get_model_config(model).get("model_type")
            if model_type not in TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING:
                raise PeftValueError(
                    f"feedforward_modules was left out, and there is no default for model type {model_type!r}; name "
                    "the targets whose inputs are to be scaled, or give an empty list to scale outputs only"
                )
            config.feedforward_modules = set(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[model_type])

    @torch.no_grad()
    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """
        Combine adapters into a new one, whose factors are the weighted sums of theirs. It is not active at first.

        A layer that lacks one of the adapters counts as having factors of 1 for it, since that is what it computes.

        Args:
            adapters: names of the adapters.
            weights: one number per adapter; with a sum of 1, what all adapters agree on stays as it is.
            adapter_name: name of the new adapter; if there is one of that name, nothing is done.

        Raises:
            PeftValueError: if an adapter does not exist, the numbers do not fit, or the adapters scale different sides
                of a layer; the model stays as it was.

        Example:

            >>> import torch
            >>> from peft import IA3Config, get_peft_model
            >>> config = IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
            >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config, adapter_name="one")
            >>> model.add_adapter("two", config)
            >>> model.add_weighted_adapter(["one", "two"], [0.3, 0.7], "both")
            >>> factors = model.get_base_model()[0].ia3_l
            >>> torch.allclose(factors["both"], 0.3 * factors["one"] + 0.7 * factors["two"])
            True
        """
        if adapter_name in self.peft_config:
            warn(f"there is an adapter named {adapter_name!r} already; it is left as it is, and nothing was combined")
            return
        configs = [self._config_of(name) for name in adapters]
        if not adapters or len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
            raise PeftValueError(f"weights must be finite numbers, one per adapter, found {weights} for {adapters}")
        config = copy.copy(configs[0])
        for field in ("target_modules", "feedforward_modules"):
            setattr(config, field, _joined([getattr(other, field) for other in configs], field))
        combined = {layer: self._combine(layer, adapters, weights) for layer in self._layers()}
        self.add_adapter(adapter_name, config)
        for layer, factors in combined.items():
            if adapter_name in layer.ia3_l:
                layer.ia3_l[adapter_name].copy_(factors)

    def _combine(self, layer: IA3Layer, adapters: list[str], weights: list[float]) -> torch.Tensor | None:
        """Compute the weighted sum of a layer's factors, None for a layer that has no adapter of its own to sum."""
        present = [name for name in adapters if name in layer.ia3_l]
        if len({layer.is_feedforward[name] for name in present}) > 1:
            raise PeftValueError(
                f"adapters {', '.join(present)} cannot be combined: of one layer some scale the inputs and others the "
                "outputs; give all of them the same feedforward_modules"
            )
        parts = (
            w * (layer.ia3_l[name] if name in present else 1.0) for name, w in zip(adapters, weights, strict=True)
        )
        return sum(parts) if present else None


def _joined(values: list[Any], field: str) -> Any:
    """Join what several configs target: sets of names, or one and the same regular expression."""
    if all(isinstance(value, (set, frozenset)) for value in values):
        return set().union(*values)
    if any(value != values[0] for value in values):
        raise PeftValueError(
            f"the adapters' {field} are {', '.join(map(repr, values))}; only lists of names, or equal regular "
            "expressions, can be combined"
        )
    return values[0]


__getattr__ = old_names(__name__)
