# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of Super-Tuning."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names
from ...utils.warning import warn


@dataclass
class SupertuningConfig(TyingConfig):
    """
    Config of Super-Tuning (2026, arXiv:2607.09287): the entries of W of largest magnitude are trained.

    Args:
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        modules_to_save: names of modules that are trained and saved in full.
        sparsity: share of the entries of each weight that are left as they are, at least 0 and less than 1.
        select_top: True trains the entries of largest magnitude, False those of smallest.
        r: rank of a LoRA that is added ("Supra"); none if left out.
        lora_alpha: its output is multiplied by lora_alpha / r; 2 * r if left out.
        lora_dropout: probability with which inputs of that LoRA are dropped while training.
        init_weights: True starts without a change; False at random.
        save_precomputed_indices: whether files say which entries are trained. If not, they are found again from the
            base model's weights, which must be the same to the last digit.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import SupertuningConfig
        >>> SupertuningConfig(sparsity=0.95, r=4, target_modules=["q_proj", "v_proj"]).lora_alpha
        8
    """

    target_modules: Names = shared_field("target_modules")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    sparsity: float = option(0.99, "Share of the entries that are left as they are.")
    select_top: bool = option(True, "Train the entries of largest magnitude, or those of smallest.")
    r: int | None = option(None, "Rank of a LoRA that is added.")
    lora_alpha: float | None = option(None, "The output of that LoRA is multiplied by lora_alpha / r.")
    lora_dropout: float = option(0.0, "Probability of dropping an input of that LoRA while training.")
    init_weights: bool = option(True, "Start without a change.")
    save_precomputed_indices: bool = option(True, "Save which entries are trained.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SUPERTUNING
        for name in ("sparsity", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, found {getattr(self, name)!r}")
        if self.r is not None and (not isinstance(self.r, int) or self.r < 1):
            raise ValueError(f"r must be a whole number, 1 at least, or None, found {self.r!r}")
        if self.r is None and self.lora_alpha is not None:
            raise ValueError(f"lora_alpha={self.lora_alpha!r} has no effect without r; give r, or leave it out")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if not self.save_precomputed_indices:
            warn(
                "save_precomputed_indices=False: which entries are trained is found again from the base model's "
                "weights when the adapter is loaded, so these must be the same to the last digit"
            )
        check_layer_selection(self)


__getattr__ = old_names(__name__)
