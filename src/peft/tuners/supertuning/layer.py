# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Super-Tuning: W + a sparse matrix with entries where W is largest or smallest, and optionally LoRA beside."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Frozen, Kept, Shape, Tensors, Trained, trained_linear
from ..families.sparse import SparseLayer, add_entries
from . import maths
from .config import SupertuningConfig


class SupraLayer(SparseLayer):
    """A layer with a sparse update and LoRA, of which LoRA alone drops inputs."""

    supertuning_lora_dropout = property(lambda layer: layer.lora_dropout)

    def beside(self, adapter: str, x: torch.Tensor) -> torch.Tensor | None:
        """Compute the term of LoRA, if the adapter has it."""
        t, _, c = self.source(adapter).arguments(adapter)
        if t.lora_A is None:
            return None
        x = self.source(adapter).lora_dropout[adapter](x.to(t.lora_A.weight.dtype))
        return t.lora_B(t.lora_A(x)) * (c.lora_alpha / c.r)


@method(
    "SUPERTUNING",
    SupertuningConfig,
    kinds={nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING,
    dropout="lora_dropout",
    settings={"supertuning_rank": "rank", "supertuning_lora_alpha": "alpha"},
    in_common=("save_precomputed_indices",),
    rule=SupraLayer,
)
class Supertuning:
    """A layer of whose weight some entries are trained."""

    trained, kept, modules = ("values",), ("indices",), ("lora_A", "lora_B")

    def values(c: SupertuningConfig, names: Sequence[str], shape: Shape) -> dict[str, float]:
        """Say what LoRA is like where there is none."""
        return {"rank": c.r or 0, "alpha": c.lora_alpha or 0.0}

    def tensors(shape: Shape, c: SupertuningConfig) -> dict[str, Any]:
        """Tell the values, (k,), their places in the weight, row after row, (k,), and the factors of LoRA."""
        (out, inputs), count = shape, int(shape[0] * shape[1] * (1 - c.sparsity))
        if count < 1:
            raise PeftValueError(f"sparsity={c.sparsity} leaves none of {out * inputs} entries to train; lower it")

        def places() -> torch.Tensor:
            return maths.places_by_magnitude(shape.weight, count, bool(c.select_top))

        normal_, uniform_ = (maths.rounded(start, shape.dtype) for start in (nn.init.normal_, maths.uniform_))
        tensors = {
            "values": Trained((count,), 0.0 if c.init_weights else normal_),
            "indices": (Kept if c.save_precomputed_indices else Frozen)(places),
        }
        if c.r is not None:
            start_a = maths.after_layers(uniform_, (c.r, inputs), (out, c.r))
            tensors["lora_A"] = trained_linear(inputs, c.r, start_a)
            tensors["lora_B"] = trained_linear(c.r, out, nn.init.zeros_ if c.init_weights else uniform_)
        return tensors

    def entries(t: Tensors, shape: Shape, c: SupertuningConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the places of the values, and these."""
        return t.indices, t.values

    def delta(t: Tensors, shape: Shape, c: SupertuningConfig) -> torch.Tensor:
        """Put the values in their places, and add the product of LoRA's factors, (out, in)."""
        delta = add_entries(t.values.new_zeros(shape), t.indices, t.values)
        return delta if t.lora_A is None else delta + t.lora_B.weight @ t.lora_A.weight * (c.lora_alpha / c.r)


SupertuningLayer, Linear = Supertuning.Layer, Supertuning.Linear


__getattr__ = old_names(__name__)
