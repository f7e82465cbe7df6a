# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of C3A."""

from dataclasses import dataclass, field
from typing import Literal

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class C3AConfig(TyingConfig):
    """
    Config of C3A (Chen et al. 2024, arXiv:2407.19342): W + a matrix of circulant blocks.

    Args:
        block_size: size of the circulant blocks, a divisor of inputs and outputs; larger blocks train fewer numbers.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        bias: which of the base model's biases to train: "none", "all" or "c3a_only".
        modules_to_save: names of modules that are trained and saved in full.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        block_size_pattern: name (or regular expression) -> block size, where it differs.
        init_weights: what kernels start with: "xavier_uniform", which False stands for too, "kaiming_uniform",
            "gaussian", or True for zeros, the one start that changes nothing.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import C3AConfig
        >>> C3AConfig(block_size=64, target_modules=["q_proj", "v_proj"]).init_weights
        'xavier_uniform'
    """

    block_size: int = option(256, "Size of the circulant blocks.")
    target_modules: Names = shared_field("target_modules")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    block_size_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "Name or regular expression -> block size, where it differs."}
    )
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = option(
        "xavier_uniform", "What the kernels start with; True for zeros."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.C3A
        check_layer_selection(self, pattern_needs_indices=False)


__getattr__ = old_names(__name__)
