# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of OSF."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_names, check_pattern
from ...configs.fields import Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class OSFConfig(TyingConfig):
    """
    Config of OSF (Nayak et al. 2025, arXiv:2504.07097): all but the leading singular directions are trained.

    Args:
        effective_rank: how many leading directions stay as they are: a share of all up to 1.0, or a number; left out,
            half of them.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        rank_pattern: regular expression, found anywhere in a module's name -> such a value; the first that is found.
        init_weights: True starts as the weight is, which changes nothing; False with random numbers.
        modules_to_save: names of modules that are trained and saved in full.
        target_svd_config: kept for files of the released package, where it has no effect either.

    Example:

        >>> from peft import OSFConfig
        >>> OSFConfig(effective_rank=0.75, target_modules=["q_proj"]).effective_rank
        0.75
    """

    effective_rank: int | float | None = option(None, "Leading directions that stay, as a number or a share.")
    target_modules: Names = shared_field("target_modules")
    rank_pattern: dict[str, int | float] | None = option(
        None, "Regular expression -> value for modules it is found in."
    )
    init_weights: bool | None = option(True, "Start as the weight is.")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    target_svd_config: dict[str, int] | None = option(None, "Has no effect.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.OSF
        if isinstance(self.target_modules, str):
            check_pattern("target_modules", self.target_modules)
        elif self.target_modules is not None:
            check_names("target_modules", self.target_modules)
        for pattern in self.rank_pattern or ():
            check_pattern("rank_pattern", pattern)


__getattr__ = old_names(__name__)
