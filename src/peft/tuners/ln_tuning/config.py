# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of LayerNorm tuning."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_names, check_pattern
from ...configs.fields import Names, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class LNTuningConfig(TyingConfig):
    """
    Config of LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420): normalisation layers are trained in full.

    Args:
        target_modules: names of the modules to train: a list of names (or their endings, from a dot on) or a regular
            expression that must match the whole name. Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        modules_to_save: names of further modules that are trained and saved in full.

    Example:

        >>> from peft import LNTuningConfig
        >>> LNTuningConfig(target_modules=["input_layernorm"]).target_modules
        ['input_layernorm']
    """

    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    modules_to_save: Names = shared_field("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LN_TUNING
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_pattern(name, value)
            elif value is not None:
                check_names(name, value)


__getattr__ = old_names(__name__)
