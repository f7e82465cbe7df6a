# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of BEFT."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_targets
from ...configs.fields import Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class BeftConfig(TyingConfig):
    """
    Config of BEFT (Huang et al. 2025, arXiv:2509.15974): a vector is added to the outputs of linear layers.

    Args:
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        modules_to_save: names of modules that are trained and saved in full.
        init_weights: True starts with zeros, which change nothing; False with random numbers.

    Example:

        >>> from peft import BeftConfig
        >>> BeftConfig(target_modules=["v_proj"]).init_weights
        True
    """

    target_modules: Names = shared_field("target_modules")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_weights: bool = option(True, "Start with zeros.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BEFT
        check_targets(self)


__getattr__ = old_names(__name__)
