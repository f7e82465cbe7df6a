# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""BOFT: inputs are rotated by a product of sparse factors, and outputs are scaled."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...utils.constants import TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained
from ..families.rotations import ScaledRotationLayer, cayley, check_start, full_precision
from .config import BOFTConfig
from .maths import Butterfly, ReleasedFunctions, check_factors, drop_blocks, number_of_factors


class ButterflyLayer(ReleasedFunctions, ScaledRotationLayer):
    """A layer whose number of factors can be that of a checkpoint, with what the released package lets do with it."""

    def reset_boft_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """
        Start an adapter anew.

        Args:
            adapter_name: name.
            init_weights: True for the identity, False for a random rotation and scale.
        """
        self.restart(adapter_name, init_weights=init_weights)

    def prepare_to_load(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make as many factors as a checkpoint has, since their number depends on the machine that wrote it."""
        found = {len(tensor) for key, tensor in tensors.items() if key.endswith("boft_R") and tensor.dim() == 4}
        if adapter_name not in self.boft_R or len(found) != 1:
            return
        present, factors = self.boft_R[adapter_name], found.pop()
        if factors != len(present):
            check_factors(factors, self.rows_to_rotate(), present.shape[-1])
            self.resize(adapter_name, "R", factors, *present.shape[1:])
            self.settings[adapter_name].factors = factors


@method(
    "BOFT",
    BOFTConfig,
    kinds={nn.Conv2d: "Conv2d", Conv1D: "Linear", nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING,
    settings={"boft_block_size": "boft_block_size", "boft_block_num": "boft_block_num"},
    rule=ButterflyLayer,
)
class BOFT:
    """A layer whose inputs are rotated and whose outputs are scaled; of convolutions the rows of the weight are."""

    trained = ("R", "s")

    def values(c: BOFTConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Give the size and the number of the blocks of the layer, and that of the factors on this machine."""
        check_start(c)
        features, factors = shape[1], number_of_factors(c.boft_n_butterfly_factor)
        size = c.boft_block_size or features // c.boft_block_num
        count = features // max(size, 1)
        if size * count != features or c.boft_block_num not in (0, count):
            raise PeftValueError(
                f"boft_block_size={c.boft_block_size}, boft_block_num={c.boft_block_num} does not divide "
                f"the {features} features of a layer; choose one that does, or leave it out with exclude_modules"
            )
        check_factors(factors, features, size)
        return {"boft_block_size": size, "boft_block_num": count, "factors": factors}

    def tensors(shape: Shape, c: BOFTConfig) -> dict[str, Trained]:
        """Tell what the blocks are the skew-symmetric parts of, (factors, n, b, b), and the scale of each output."""
        std, size = 0.0 if c.init_weights else 0.1, c.boft_block_size
        scale = (1, shape[0]) if shape.kernel else (shape[0], 1)
        return {
            "R": Trained((c.factors, c.boft_block_num, size, size), lambda t: nn.init.normal_(t, std=std)),
            "s": Trained(scale, lambda t: nn.init.normal_(t, mean=1.0, std=std)),
        }

    def rotation(t: Tensors, shape: Shape, c: BOFTConfig, training: bool) -> Butterfly:
        """Compute the factors."""
        generators = full_precision(t.R)
        blocks = cayley((generators - generators.mT) / 2)
        return Butterfly(drop_blocks(blocks, c.boft_dropout) if training else blocks)


BOFTLayer, Linear, Conv2d = BOFT.Layer, BOFT.Linear, BOFT.Conv2d


__getattr__ = old_names(__name__)
