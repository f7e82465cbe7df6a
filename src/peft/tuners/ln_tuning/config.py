# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of LayerNorm tuning."""

from dataclasses import dataclass, field

from ...config import TyingConfig, check_names, check_pattern
from ...registry import PeftType


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

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to train (list) or a regular expression."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out: list or regular expression."}
    )
    modules_to_save: list[str] | str | None = field(
        default=None, metadata={"help": "Names of further modules that are trained and saved in full."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LN_TUNING
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_pattern(name, value)
            elif value is not None:
                check_names(name, value)
