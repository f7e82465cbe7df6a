# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of GraLoRA."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class GraloraConfig(TyingConfig):
    """
    Config of GraLoRA (Jung et al. 2025, arXiv:2505.20355): W + k x k blocks of low rank each.

    Args:
        r: rank of all blocks together, a multiple of `gralora_k`; it trains as many numbers as LoRA of that rank.
        hybrid_r: rank of plain LoRA beside the blocks; 0 for none.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        alpha: the updates are scaled by alpha / (r + hybrid_r).
        gralora_dropout: probability with which inputs of the updates are dropped while training.
        gralora_k: number of blocks along inputs and outputs; 1 is LoRA.
        fan_in_fan_out: whether the layers keep their weights as (in, out); corrected, with a warning, if not.
        bias: which of the base model's biases to train: "none", "all" or "gralora_only".
        modules_to_save: names of modules that are trained and saved in full.
        init_weights: True starts with B of zero, which changes nothing; False with a random one.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import GraloraConfig
        >>> GraloraConfig(r=16, gralora_k=4, target_modules=["q_proj", "v_proj"]).alpha
        64
    """

    r: int = option(32, "Rank of all blocks together.")
    hybrid_r: int = option(0, "Rank of plain LoRA beside the blocks.")
    target_modules: Names = shared_field("target_modules")
    alpha: int = option(64, "Updates are scaled by alpha / (r + hybrid_r).")
    gralora_dropout: float = option(0.0, "Dropout of the inputs of the updates.")
    gralora_k: int = option(2, "Number of blocks along inputs and outputs.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_weights: bool = option(True, "Start with updates of zero.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.GRALORA
        if self.gralora_k <= 0:
            raise ValueError(f"gralora_k must be positive, found {self.gralora_k}")
        if self.r % self.gralora_k:
            raise ValueError(f"r must be a multiple of gralora_k, found r={self.r} and gralora_k={self.gralora_k}")
        check_layer_selection(self, (), pattern_needs_indices=False)


__getattr__ = old_names(__name__)
