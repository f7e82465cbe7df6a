# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of TinyLoRA."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names
from ...utils.warning import warn


@dataclass
class TinyLoraConfig(TyingConfig):
    """
    Config of TinyLoRA (Morris et al. 2026, arXiv:2602.04118): W + B (sum of v_i P_i) A, of which only v is trained.

    Args:
        r: how many singular vectors of a weight are mixed.
        u: how many numbers a trained vector has.
        weight_tying: share of layers that have no vector of their own: 0 for one vector per layer, 1 for one vector
            that all layers share.
        projection_seed: seed from which the directions P are drawn; those of a layer depend on its place among the
            targets, too.
        save_projection: write the directions to checkpoints. Without them files are smaller, but can be read only
            where the same seed gives the same numbers.
        init_v_bound: for `init_weights="uniform"`, the largest number that a vector may start with.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        tinylora_dropout: probability of dropping an input of A, while training.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        bias: which of the base model's biases to train: "none", "all" or "tinylora_only".
        modules_to_save: names of modules that are trained and saved in full.
        init_weights: True starts with vectors of zero, which change nothing; "uniform", and False as well, with random
            numbers within `init_v_bound`.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import TinyLoraConfig
        >>> TinyLoraConfig(u=13, weight_tying=1.0, target_modules=["q_proj", "v_proj"]).r
        2
    """

    r: int = option(2, "How many singular vectors of a weight are mixed.")
    u: int = option(64, "How many numbers a trained vector has.")
    weight_tying: float = option(0.0, "Share of layers that have no vector of their own.")
    projection_seed: int = option(42, "Seed from which the directions are drawn.")
    save_projection: bool = option(True, "Write the directions to checkpoints.")
    init_v_bound: float = option(0.02, "Bound of random vectors.")
    target_modules: Names = shared_field("target_modules")
    tinylora_dropout: float = option(0.0, "Probability of dropping an input of A, while training.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_weights: bool | str = option(True, 'Start with vectors of zero, or "uniform".')
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TINYLORA
        if self.r <= 0 or self.u <= 0:
            raise ValueError(f"r and u must be positive, found r={self.r} and u={self.u}")
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(f"weight_tying must be a share between 0 and 1, found {self.weight_tying}")
        check_layer_selection(self, ())
        if not self.save_projection:
            warn(
                "save_projection=False leaves the directions out of checkpoints; they are drawn again from "
                "projection_seed, which may give other numbers with another version of torch"
            )


__getattr__ = old_names(__name__)
