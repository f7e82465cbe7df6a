# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of GLoRA."""

from dataclasses import dataclass
from typing import Literal

from ...config import TyingConfig
from ...configs.checks import check_targets
from ...configs.fields import Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


PARTS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}


@dataclass
class GloraConfig(TyingConfig):
    """
    Config of GLoRA (Chavan et al. 2023, arXiv:2306.07967): weight and bias are scaled and shifted, entry by entry.

    Args:
        r: rank of those parts that are of low rank.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        bias: which of the base model's biases to train: "none", "all" or "glora_only".
        modules_to_save: names of modules that are trained and saved in full.
        config_A_B: what the weight is multiplied by (A) and what is added to it (B): "lora" for a matrix of low rank,
            "vector" for a number per output, "constant" for one number, "none" for nothing.
        config_C: what the weight is multiplied by to be added to the bias: "lora", "vector" or "none".
        config_D_E: what the bias is multiplied by (D) and what is added to it (E): "vector", "constant" or "none".
        init_weights: True starts with zeros, which change nothing; False with random numbers.

    Raises:
        ValueError: for a part that there is not.

    Example:

        >>> from peft import GloraConfig
        >>> GloraConfig(config_A_B="vector", target_modules=["q_proj"]).config_D_E
        'constant'
    """

    r: int = option(8, "Rank of parts of low rank.")
    target_modules: Names = shared_field("target_modules")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    config_A_B: Literal["lora", "vector", "constant", "none"] = option("lora", "Form of what the weight meets.")
    config_C: Literal["lora", "vector", "none"] = option("lora", "Form of what the weight brings into the bias.")
    config_D_E: Literal["vector", "constant", "none"] = option("constant", "Form of what the bias meets.")
    init_weights: bool = option(True, "Start with zeros.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.GLORA
        for name, known in PARTS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, found {getattr(self, name)!r}")
        check_targets(self)


__getattr__ = old_names(__name__)
