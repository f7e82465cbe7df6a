# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of HRA."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class HRAConfig(TyingConfig):
    """
    Config of HRA (Yuan et al. 2024, arXiv:2405.17484): W x is replaced by W H_1 ... H_r x, where H_i are reflections.

    Args:
        r: number of reflections; an even one lets a new adapter start as the identity.
        apply_GS: make the directions of the reflections orthogonal (Gram-Schmidt) before they are used.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        init_weights: True starts with pairs of equal reflections, which cancel; False at random.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        bias: which of the base model's biases to train: "none", "all" or "hra_only".
        modules_to_save: names of modules that are trained and saved in full.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import HRAConfig
        >>> HRAConfig(r=4, target_modules=["q_proj"]).r
        4
    """

    r: int = option(8, "Number of reflections; should be even.")
    apply_GS: bool = option(False, "Make the directions of the reflections orthogonal.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    init_weights: bool = option(True, "Start with reflections that cancel; False starts at random.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HRA
        check_layer_selection(self)


__getattr__ = old_names(__name__)
