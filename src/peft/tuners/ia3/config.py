# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of IA3."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_names, check_pattern
from ...configs.fields import Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class IA3Config(TyingConfig):
    """
    Config of IA3 (Liu et al. 2022, arXiv:2205.05638): features are multiplied by learned factors.

    Args:
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        feedforward_modules: those of the targets whose inputs are scaled, as a list or a regular expression; of the
            others the outputs are. Left out, the model type decides.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        modules_to_save: names of modules that are trained and saved in full.
        init_ia3_weights: True starts with factors of 1, which change nothing; False at random, for tests.

    Raises:
        ValueError: if `feedforward_modules` lists a module that `target_modules` does not.

    Example:

        >>> from peft import IA3Config
        >>> config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
        >>> sorted(config.feedforward_modules)
        ['down_proj']
    """

    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    feedforward_modules: Names = option(None, "Targets whose inputs are scaled: list or regular expression.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_ia3_weights: bool = option(True, "Start with factors that change nothing.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_pattern(name, value)
            elif value is not None:
                check_names(name, value)
                setattr(self, name, set(value))
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            other = sorted(self.feedforward_modules - self.target_modules)
            if other:
                raise ValueError(
                    f"feedforward_modules has {', '.join(other)}, which target_modules lacks; only a target can have "
                    "its inputs scaled"
                )


__getattr__ = old_names(__name__)
