# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of RandLoRA."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names
from ...utils.warning import warn


@dataclass
class RandLoraConfig(TyingConfig):
    """
    Config of RandLoRA (Albert et al. 2025, arXiv:2502.00987): W + sum of many scaled products of random bases.

    Args:
        r: rank of a single product. There are as many of them as make up the full rank, so the greater r is, the
            fewer numbers are trained.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        projection_prng_key: seed from which the bases are drawn; the same for all adapters of a model.
        save_projection: write the bases to checkpoints. Without them files are far smaller, but can be read only where
            the same seed gives the same numbers.
        sparse: draw bases of -1, 0 and 1, of which two thirds are 0.
        very_sparse: the same with a share of 1 - 1 / sqrt(d) of zeros, d being the smaller of the most inputs and the
            most outputs; it wins over `sparse`.
        randlora_dropout: probability of dropping an input of the update, while training.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        randlora_alpha: the update is multiplied by alpha / r.
        bias: which of the base model's biases to train: "none", "all" or "randlora_only".
        modules_to_save: names of modules that are trained and saved in full.
        init_weights: True starts with an update of zero; False with a random one, for tests.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import RandLoraConfig
        >>> RandLoraConfig(r=32, target_modules=["q_proj", "v_proj"]).randlora_alpha
        640
    """

    r: int = option(32, "Rank of a single product.")
    target_modules: Names = shared_field("target_modules")
    projection_prng_key: int = option(0, "Seed from which the bases are drawn.")
    save_projection: bool = option(True, "Write the bases to checkpoints.")
    sparse: bool = option(False, "Draw bases of -1, 0 and 1.")
    very_sparse: bool = option(False, "Draw bases of -1, 0 and 1 that are nearly all 0.")
    randlora_dropout: float = option(0.0, "Probability of dropping an input of the update, while training.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    randlora_alpha: int = option(640, "The update is multiplied by alpha / r.")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_weights: bool = option(True, "Start with an update of zero.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.RANDLORA
        check_layer_selection(self, (), pattern_needs_indices=False)
        if not self.save_projection:
            warn(
                "save_projection=False leaves the projections out of checkpoints; they are drawn again from "
                "projection_prng_key, which may give other numbers with another version of torch"
            )


__getattr__ = old_names(__name__)
