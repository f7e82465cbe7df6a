# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Uni-LoRA: W + B A, with B and A put together from the entries of one vector that all layers share."""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...layers.merging.changes import changes_adapter
from ...utils.constants import TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.layers import DeclaredAdditive
from ..declared.method import method
from ..declared.tensors import Frozen, Kept, Shape, Tensors, Trained
from .config import UniLoraConfig
from .maths import entries, scales, start_vector


class EntriesLayer(DeclaredAdditive):
    """A layer whose entries and their scales can be set. They are saved only with `save_indices`."""

    def reset_unilora_parameters(self, adapter_name: str, theta_d_length: int) -> None:
        """
        Draw for each place of this layer which entry of the vector it takes. Nothing is done without such an adapter.

        Args:
            adapter_name: name.
            theta_d_length: how many entries, from the first one on, there are to draw from.

        Raises:
            PeftValueError: if the vector has fewer entries.
        """
        if adapter_name not in self.settings:
            return
        length, t = self.settings[adapter_name].theta_d_length, self.tensors(adapter_name)
        if not 0 < theta_d_length <= length:
            raise PeftValueError(f"theta_d_length must be positive and at most {length}, found {theta_d_length}")
        drawn = {name: torch.randint(theta_d_length, getattr(t, name).shape) for name in ("indices_A", "indices_B")}
        self._set(adapter_name, drawn)

    def update_scaling(
        self, adapter_name: str, unilora_scales_A: torch.Tensor, unilora_scales_B: torch.Tensor
    ) -> None:
        """
        Set what the entries of the vector are multiplied by in this layer. Without such an adapter nothing is done.

        Args:
            adapter_name: name.
            unilora_scales_A: (r, in).
            unilora_scales_B: (out, r).

        Raises:
            PeftValueError: for tensors of another shape.
        """
        if adapter_name in self.settings:
            self._set(adapter_name, {"scales_A": unilora_scales_A, "scales_B": unilora_scales_B})

    @changes_adapter
    def _set(self, adapter: str, values: Mapping[str, torch.Tensor]) -> None:
        present = {name: getattr(self.tensors(adapter), name) for name in values}
        for name, value in values.items():
            wanted, found = tuple(present[name].shape), tuple(value.shape)
            if found != wanted:
                raise PeftValueError(f"{name} must have shape {wanted}, found {found}")
        for name, value in values.items():
            present[name].copy_(value.detach())


@method(
    "UNILORA",
    UniLoraConfig,
    kinds={nn.Linear: "Linear", Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING,
    dropout="unilora_dropout",
    settings={"r": "r"},
    rule=EntriesLayer,
)
class UniLora:
    """A layer with factors out of one vector added to its weight."""

    trained, shared = ("theta_d",), ("theta_d",)
    kept = ("indices_A", "indices_B", "scales_A", "scales_B")

    def values_of_all(targets: Mapping[str, Shape], c: UniLoraConfig) -> dict[str, dict[str, int]]:
        """Give each target its part of all places, from `offset` on."""
        ends = list(accumulate((c.r * sum(shape) for shape in targets.values()), initial=0))
        return {name: {"offset": end, "places": ends[-1]} for name, end in zip(targets, ends, strict=False)}

    def shared_tensors(targets: Mapping[str, Shape], c: UniLoraConfig) -> dict[str, Trained]:
        """Tell the vector, (theta_d_length,)."""
        dtype = next(iter(targets.values())).dtype
        return {"theta_d": Trained((c.theta_d_length,), partial(start_vector, c), dtype)}

    def tensors(shape: Shape, c: UniLoraConfig) -> dict[str, Any]:
        """Tell which entries go to A (r, in) and B (out, r), and what they are multiplied by there."""
        spec, tensors, first = Kept if c.save_indices else Frozen, {}, c.offset
        for name, size in (("A", (c.r, shape[1])), ("B", (shape[0], c.r))):
            where = c.places, c.theta_d_length, c.proj_seed, first, size
            tensors[f"indices_{name}"] = spec(partial(entries, *where), size)
            tensors[f"scales_{name}"] = spec(partial(scales, *where), size)
            first += c.r * shape[1]
        return tensors

    def low_rank(t: Tensors, shape: Shape, c: UniLoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Put B (out, r) and A (r, in) together."""
        theta = t.theta_d.to(t.scales_A.device)
        b = theta.take(t.indices_B) * t.scales_B.to(theta.dtype)
        return b, theta.take(t.indices_A) * t.scales_A.to(theta.dtype)


UniLoraLayer, Linear = UniLora.Layer, UniLora.Linear


__getattr__ = old_names(__name__)
