# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of HiRA."""

from dataclasses import dataclass
from typing import Literal

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class HiraConfig(TyingConfig):
    """
    Config of HiRA (Huang et al. 2025): W + W * (B A), where * multiplies entry by entry.

    Args:
        r: rank of the factors.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        hira_dropout: probability with which inputs of the update are dropped while training; not for embeddings.
        fan_in_fan_out: kept for files of the released package; the layers are asked how they store their weights.
        modules_to_save: names of modules that are trained and saved in full.
        init_weights: True starts with B of zero, which changes nothing, and "gaussian" with another A; False with a
            random update.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        rank_pattern: kept for files of the released package, where it has no effect either.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import HiraConfig
        >>> HiraConfig(r=16, target_modules=["q_proj", "v_proj"]).hira_dropout
        0.0
    """

    r: int = option(32, "Rank of the factors.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    hira_dropout: float = option(0.0, "Dropout of the inputs of the update.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_weights: bool | Literal["gaussian"] | None = option(True, "How the factors start.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    rank_pattern: dict = shared_field("rank_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HIRA
        check_layer_selection(self, pattern_needs_indices=False)


__getattr__ = old_names(__name__)
