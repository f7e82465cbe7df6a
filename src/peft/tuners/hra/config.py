# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of HRA."""

from dataclasses import dataclass, field

from ...config import TyingConfig, check_layer_selection
from ...registry import PeftType


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

    r: int = field(default=8, metadata={"help": "Number of reflections; should be even."})
    apply_GS: bool = field(default=False, metadata={"help": "Make the directions of the reflections orthogonal."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to adapt (list), a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out: list or regular expression."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start with reflections that cancel; False starts at random."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that the indices count."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all or hra_only."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that are trained and saved in full."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HRA
        check_layer_selection(self)
