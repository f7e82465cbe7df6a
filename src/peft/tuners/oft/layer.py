# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""OFT: inputs are rotated in blocks of features."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...utils.constants import TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ...utils.warning import warn
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, TrainedModule
from ..families.rotations import BlockRotation, RotationLayer, check_start
from .config import OFTConfig
from .maths import OFTRotationModule, drop_blocks, nearest_divisor


class BlockRotatingLayer(RotationLayer):
    """A layer whose inputs are rotated in blocks, with what the released package lets do with it."""

    def reset_oft_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """
        Start an adapter anew.

        Args:
            adapter_name: name.
            init_weights: True for no turn, False for a random one.
        """
        self.restart(adapter_name, init_weights=init_weights)

    def adjust_oft_parameters(self, in_features: int, params: int) -> int:
        """
        Find a block size, or a number of blocks, that divides the features.

        Args:
            in_features: features that are rotated.
            params: what is wanted.

        Returns:
            The divisor nearest to what is wanted; of two, the smaller.
        """
        return nearest_divisor(in_features, params)


@method(
    "OFT",
    OFTConfig,
    kinds={nn.Embedding: "Embedding", nn.Conv2d: "Conv2d", Conv1D: "Linear", nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING,
    settings={"r": "r", "oft_block_size": "oft_block_size"},
    rule=BlockRotatingLayer,
)
class OFT:
    """A layer whose inputs are rotated in blocks; of embeddings the rows that are found."""

    modules = ("R", "embedding_R")

    def values(c: OFTConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Give the size and the number of the blocks that fit the layer."""
        check_start(c)
        features = shape[not isinstance(shape.layer, nn.Embedding)]
        name = "oft_block_size" if c.oft_block_size else "r"
        wanted = getattr(c, name)
        used = nearest_divisor(features, wanted)
        if wanted != used:
            warn(f"{name}={wanted} does not divide the {features} features of a layer; {used} is used there")
        blocks = {name: used, "oft_block_size" if name == "r" else "r": features // used}
        return {**blocks, "features": features}

    def tensors(shape: Shape, c: OFTConfig) -> dict[str, TrainedModule]:
        """Tell the module that holds what stands above the diagonals of the skew-symmetric matrices."""

        def make() -> OFTRotationModule:
            size = c.oft_block_size
            shared, kernel = c.block_share, shape.kernel or (0, 0)
            sizes = (1 if shared else c.r, size * (size - 1) // 2, size, c.features)
            series = (c.use_cayley_neumann, c.num_cayley_neumann_terms)
            return OFTRotationModule(*sizes, c.coft, c.eps, shared, kernel, *series)

        def start(module: OFTRotationModule) -> None:
            nn.init.zeros_(module.weight) if c.init_weights else nn.init.normal_(module.weight, std=0.1)

        return {"embedding_R" if isinstance(shape.layer, nn.Embedding) else "R": TrainedModule(make, start)}

    def rotation(t: Tensors, shape: Shape, c: OFTConfig, training: bool) -> BlockRotation:
        """Compute the blocks."""
        blocks = (t.R or t.embedding_R).blocks()
        return BlockRotation(drop_blocks(blocks, c.module_dropout) if training else blocks)


OFTLayer, Linear, Conv2d, Embedding = OFT.Layer, OFT.Linear, OFT.Conv2d, OFT.Embedding


__getattr__ = old_names(__name__)
