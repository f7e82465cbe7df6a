# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of MiSS."""

from dataclasses import dataclass
from typing import Literal

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names
from ...utils.warning import warn


@dataclass
class MissConfig(TyingConfig):
    """
    Config of MiSS (Kang, Yin 2024, arXiv:2409.15371): W + one small matrix, repeated over the inputs.

    Args:
        r: size of the shards, at most the number of inputs; "bat" needs a divisor of inputs and outputs.
        miss_dropout: probability with which inputs of the update are dropped while training; none with "bat".
        mini_r: number of different columns for "mini", a divisor of the outputs.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        init_weights: the variant, all of which start without a change: True for one row per input of a shard, "bat"
            for an update that depends on the weight, "mini" for rows that are repeated too. False starts the first
            of them at random.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        bias: which of the base model's biases to train: "none", "all" or "miss_only".
        modules_to_save: names of modules that are trained and saved in full.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import MissConfig
        >>> MissConfig(r=16, init_weights="bat", target_modules=["q_proj", "v_proj"]).miss_dropout
        0.0
    """

    r: int = option(64, "Size of the shards.")
    miss_dropout: float = option(0.0, "Probability of dropping an input of the update while training.")
    mini_r: int = option(1, "Number of different columns for 'mini'.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    init_weights: bool | Literal["bat", "mini"] = option(True, "The variant, and whether it starts without a change.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: str | None = shared_field("layers_pattern")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MISS
        if self.init_weights == "bat" and self.miss_dropout:
            warn(
                f"miss_dropout={self.miss_dropout} has no effect with init_weights='bat', which transforms the weight"
            )
        check_layer_selection(self, pattern_needs_indices=False)


__getattr__ = old_names(__name__)
