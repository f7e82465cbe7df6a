# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of DEFT."""

from dataclasses import dataclass
from typing import Literal

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class DeftConfig(TyingConfig):
    """
    Config of DEFT (Kumar et al. 2025, arXiv:2509.22793): what a weight writes into a few directions is replaced.

    Args:
        r: number of the directions.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        decomposition_method: how a factor P tells the directions: "relu" takes its columns as they are, and what is
            positive of them to find what is written there; "qr" makes them orthonormal, so what they hold is removed.
        init_scale: spread of what is put in the place of that, where `init_weights=False`.
        alpha: what is put there is multiplied by alpha / r; left out or 0, by 1.
        para: whether nothing is put there; then there is no start that changes nothing.
        fan_in_fan_out: whether the layers store their weights as (in, out); they are asked.
        deft_dropout: probability with which inputs of what is put there are dropped while training.
        init_weights: True puts there what was removed, which changes nothing; False random numbers.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        bias: which of the base model's biases to train: "none", "all" or "deft_only".
        modules_to_save: names of modules that are trained and saved in full.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import DeftConfig
        >>> DeftConfig(r=4, target_modules=["q_proj"]).decomposition_method
        'relu'
    """

    r: int = option(8, "Number of directions.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    decomposition_method: Literal["relu", "qr"] = option("relu", "How the directions follow from a factor.")
    init_scale: float = option(1.0, "Spread of a random start.")
    alpha: int | None = option(None, "Scale of what is put into the directions, times r.")
    para: bool = option(False, "Put nothing there.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    deft_dropout: float = option(0.0, "Dropout of the inputs of what is put there.")
    init_weights: bool = option(True, "Start with what was removed.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.DEFT
        if self.decomposition_method not in ("relu", "qr"):
            raise ValueError(f"decomposition_method must be 'relu' or 'qr', found {self.decomposition_method!r}")
        check_layer_selection(self)


__getattr__ = old_names(__name__)
