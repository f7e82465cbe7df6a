# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Combining adapters of methods whose layers multiply features by factors."""

import copy
import math
from typing import Any, ClassVar

import torch

from ...config import PeftConfig
from ...utils.error import PeftValueError
from ...utils.warning import warn
from ..declared.layers import DeclaredActivation
from ..declared.method import DeclaredModel


class CombinableScales(DeclaredModel):
    """
    What the models of these methods share; the arguments are those of `BaseTuner`.

    Attributes:
        joined_fields: fields of the config that say which modules are scaled, and how; a combination joins them.
    """

    joined_fields: ClassVar[tuple[str, ...]] = ("target_modules",)

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
        config = self._joined_config(configs)
        combined = {layer: self._combine(layer, adapters, weights) for layer in self._layers()}
        self.add_adapter(adapter_name, config)
        for layer, tensors in combined.items():
            for name, tensor in tensors.items():
                container = layer._modules[name]
                if adapter_name in container:
                    container[adapter_name].copy_(tensor)

    def _joined_config(self, configs: list[PeftConfig]) -> PeftConfig:
        config = copy.copy(configs[0])
        for field in self.joined_fields:
            setattr(config, field, _joined([getattr(other, field) for other in configs], field))
        return config

    def _combine(
        self, layer: DeclaredActivation, adapters: list[str], weights: list[float]
    ) -> dict[str, torch.Tensor]:
        """Compute the weighted sums of a layer's factors, none for a layer that has no adapter of its own to sum."""
        present = [name for name in adapters if name in layer.settings]
        if len({layer.scales_input(name) for name in present}) > 1:
            raise PeftValueError(
                f"adapters {', '.join(present)} cannot be combined: of one layer some scale the inputs and others the "
                f"outputs; give all of them the same {' and '.join(self.joined_fields[1:])}"
            )
        return {
            name: sum(
                w * (layer._modules[name][adapter] if adapter in present else 1.0)
                for adapter, w in zip(adapters, weights, strict=True)
            )
            for name in (layer.adapter_layer_names if present else ())
        }


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
