# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of AdaLoRA."""

from dataclasses import dataclass

from ...configs.fields import option
from ...registry import PeftType
from ...utils.old_names import old_names
from ...utils.warning import warn
from ..lora.config import LoraConfig


@dataclass
class AdaLoraConfig(LoraConfig):
    """
    Config of AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): W + lora_alpha / rank * B diag(E) A.

    Every target starts with rank `init_r`. While training, the least important entries of E are set to zero, over all
    targets together, until the average rank is `target_r`.

    Args:
        rank_pattern: target -> which of its ranks are left, as training found out; it is written by the model.
        target_r: average rank per target in the end.
        init_r: rank of each target at first.
        tinit: steps of training before ranks are taken away.
        tfinal: steps of training at the end with the ranks that are left.
        deltaT: steps from one allocation of the ranks to the next.
        beta1: how slowly the average of importances moves, 0 to 1.
        beta2: how slowly the average of their variation moves, 0 to 1.
        orth_reg_weight: weight of the penalty that keeps the rows of A and the columns of B orthonormal.
        total_step: steps of training in all.

    The other fields are those of `LoraConfig`. `r`, `use_rslora`, `lora_bias` and the variants of LoRA have no effect.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import AdaLoraConfig
        >>> config = AdaLoraConfig(init_r=12, target_r=4, tinit=100, tfinal=200, total_step=1000)
        >>> config.peft_type.value
        'ADALORA'
    """

    rank_pattern: dict | None = option(None, "Which ranks are left; written by the model.")
    target_r: int = option(8, "Average rank per target in the end.")
    init_r: int = option(12, "Rank of each target at first.")
    tinit: int = option(0, "Steps before ranks are taken away.")
    tfinal: int = option(0, "Steps at the end with the ranks that are left.")
    deltaT: int = option(1, "Steps from one allocation of the ranks to the next.")
    beta1: float = option(0.85, "How slowly the average of importances moves.")
    beta2: float = option(0.85, "How slowly the average of their variation moves.")
    orth_reg_weight: float = option(0.5, "Weight of the penalty on orthogonality.")
    total_step: int | None = option(None, "Steps of training in all.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        if self.use_dora:
            raise ValueError("AdaLoRA does not work with use_dora; leave it out, or use LoraConfig")
        if self.loftq_config:
            warn("loftq_config belongs to init_lora_weights='loftq', which AdaLoRA does not have; it is left out")
            self.loftq_config = {}
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(f"total_step must be the positive number of training steps, found {self.total_step}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"no step is left to take ranks away: tinit={self.tinit} and tfinal={self.tfinal} together must be "
                f"less than total_step={self.total_step}"
            )
        if self.orth_reg_weight < 0:
            raise ValueError(f"orth_reg_weight must not be negative, found {self.orth_reg_weight}")
        if self.r != AdaLoraConfig.r:
            warn(f"r={self.r} has no effect with AdaLoRA; init_r and target_r are its ranks")


__getattr__ = old_names(__name__)
