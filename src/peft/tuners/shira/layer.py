# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""SHiRA: W + a sparse matrix, whose entries at fixed places are trained."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ...layers.merging.changes import changes_adapter
from ...utils.constants import TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Kept, Shape, Tensors, Trained
from ..families.sparse import SparseLayer, add_entries
from .config import ShiraConfig
from .maths import places, random_mask


class ScaledSparseLayer(SparseLayer):
    """A layer with a sparse update, with what the released package lets do with it."""

    def reset_shira_parameters(self, adapter_name: str) -> None:
        """
        Start an adapter anew, with zeros.

        Args:
            adapter_name: name.
        """
        self.restart(adapter_name, init_weights=True)

    def set_scale(self, adapter: str, scale: float) -> None:
        """
        Say what the trained numbers of an adapter are multiplied by. Without such an adapter nothing is done.

        Args:
            adapter: name.
            scale: the factor, 1 at first.
        """
        if adapter in self.settings:
            self._set_scale(adapter, scale)

    @changes_adapter
    def _set_scale(self, adapter: str, scale: float) -> None:
        self.scaling[adapter] = scale


@method(
    "SHIRA",
    ShiraConfig,
    kinds={nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING,
    settings={"r": "r", "scaling": "scaling"},
    rule=ScaledSparseLayer,
    is_mixed_compatible=True,
)
class Shira:
    """A layer with a sparse update added to its weight."""

    trained, kept = ("weight",), ("indices",)

    def values(c: ShiraConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Start with a scale of one, and with the mask that a function of the user's gives."""
        given = None if c.mask_fn is None or c.r <= 0 else places(c.mask_fn, shape.layer, c.r)
        return {"scaling": 1.0, "given": given}

    def tensors(shape: Shape, c: ShiraConfig) -> dict[str, Any]:
        """Tell the numbers, (k,), and their rows and columns, (2, k)."""
        (out, inputs), count = shape, c.r * sum(shape)
        if not 0 < count <= out * inputs:
            raise PeftValueError(
                f"r must be positive, and r * (inputs + outputs) at most the {out * inputs} entries of a target's "
                f"weight, found {c.r}, which makes {count}"
            )
        if c.mask_fn is None and c.mask_type != "random" and not c.inference_mode:  # what is loaded brings positions
            raise PeftValueError(f"mask_type={c.mask_type!r} needs a function; set config.mask_fn before")

        def indices() -> torch.Tensor:
            given, c.given = c.given, None  # given away once, so that it is not kept twice
            choose = partial(random_mask, random_seed=c.random_seed) if c.mask_fn is None else c.mask_fn
            return places(choose, shape.layer, c.r) if given is None else given

        return {"weight": Trained((count,), 0.0 if c.init_weights else nn.init.normal_), "indices": Kept(indices)}

    def entries(t: Tensors, shape: Shape, c: ShiraConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the places of the numbers, and the scaled numbers."""
        rows, columns = t.indices.long()
        return rows * shape[1] + columns, t.weight * c.scaling

    def delta(t: Tensors, shape: Shape, c: ShiraConfig) -> torch.Tensor:
        """Put the numbers in their places, (out, in)."""
        return add_entries(t.weight.new_zeros(shape), *Shira.entries(t, shape, c))


ShiraLayer, Linear = Shira.Layer, Shira.Linear


__getattr__ = old_names(__name__)
