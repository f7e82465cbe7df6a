# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of RoAd."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_targets
from ...configs.fields import Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class RoadConfig(TyingConfig):
    """
    Config of RoAd (Liao and Monz 2024, arXiv:2409.00119): outputs are taken in pairs that are turned and stretched.

    Args:
        variant: "road_1" gives both outputs of a pair one angle and one length, "road_2" each output its own, and
            "road_4" each output two of each.
        group_size: outputs are paired within groups of so many, the first half with the second; an even number that
            divides the outputs of all targets.
        init_weights: True starts without a turn, which changes nothing; False with random turns.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        modules_to_save: names of modules that are trained and saved in full.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import RoadConfig
        >>> RoadConfig(variant="road_2", target_modules=["q_proj"]).group_size
        64
    """

    variant: str = option("road_1", "How many angles there are: road_1, road_2 or road_4.")
    group_size: int = option(64, "Number of outputs among which pairs are made.")
    init_weights: bool = option(True, "Start without a turn.")
    target_modules: Names = shared_field("target_modules")
    modules_to_save: list[str] | None = shared_field("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ROAD
        if self.variant not in ("road_1", "road_2", "road_4"):
            raise ValueError(f"variant must be 'road_1', 'road_2' or 'road_4', found {self.variant!r}")
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"group_size must be positive and even, found {self.group_size}")
        check_targets(self)


__getattr__ = old_names(__name__)
