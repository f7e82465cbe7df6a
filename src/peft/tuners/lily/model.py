# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Lily on a whole model."""

from typing import Any

import torch
from torch import nn

from ...anatomy.matching import matching_entry
from ...utils.old_names import old_names
from ..plan import AdapterPlan
from .layer import Lily, LilyLayer


class LilyModel(Lily.Model):
    """
    A model with Lily layers in it (Zhong et al. 2024, arXiv:2407.09946).

    Args:
        model: the base model; it is changed in place.
        config: a `LilyConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make its tensors on the meta device, to be filled by loading a checkpoint.
        kwargs: `state_dict`: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import LilyConfig, LilyModel
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        >>> model = LilyModel(net, LilyConfig(r=2, stride_A=2, target_modules="[0-3]"), "default")
        >>> [len({id(getattr(layer, name)["default"]) for layer in net}) for name in ("lily_A", "lily_B")]
        [2, 1]
    """

    def __init__(
        self, model: nn.Module, config: Any, adapter_name: str, low_cpu_mem_usage: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(model, config, adapter_name, low_cpu_mem_usage, **kwargs)

    def _place_layers(self, plan: AdapterPlan) -> None:
        """Make the layers, then let them share: each of a group the first one's B, and A with its neighbours."""
        super()._place_layers(plan)
        made = {id(layer.get_base_layer()): layer for layer in self._layers() if layer.has_adapter(plan.adapter_name)}
        groups: dict[tuple[str | None, torch.Size], list[LilyLayer]] = {}
        for name, base in plan.own_layers.items():
            entry = matching_entry(plan.config.target_modules, name)
            if id(base) in made:
                groups.setdefault((entry, made[id(base)].shape), []).append(made[id(base)])
        for group in groups.values():
            for i, layer in enumerate(group):
                first_of_few = group[i - i % plan.config.stride_A]
                layer.lily_A[plan.adapter_name] = first_of_few.lily_A[plan.adapter_name]
                layer.lily_B[plan.adapter_name] = group[0].lily_B[plan.adapter_name]


__getattr__ = old_names(__name__)
