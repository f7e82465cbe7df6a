# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of PVeRA."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names
from ...utils.warning import warn


@dataclass
class PveraConfig(TyingConfig):
    """
    Config of PVeRA (Fillioux et al. 2025, arXiv:2512.07703): W + diag(b) B diag(d) A, with noise between B and A.

    Args:
        r: rank of the projections A and B.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        projection_prng_key: seed from which the projections are drawn; the same for all adapters of a model.
        save_projection: write the projections to checkpoints. Without them files are smaller, but can be read only
            where the same seed gives the same numbers.
        pvera_dropout: probability of dropping an input of A, while training.
        d_initial: what the entries of d start with.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        bias: which of the base model's biases to train: "none", "all" or "pvera_only".
        modules_to_save: names of modules that are trained and saved in full.
        init_weights: True starts with b at zero, which changes nothing; False at random, for tests.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        sample_at_inference: draw the inner activations outside of training, too, instead of using their means.
        generator_seed: seed from which each layer draws; left out, they draw from torch's global generator.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import PveraConfig
        >>> PveraConfig(r=64, target_modules=["q_proj", "v_proj"]).sample_at_inference
        False
    """

    r: int = option(256, "Rank of the projections.")
    target_modules: Names = shared_field("target_modules")
    projection_prng_key: int = option(0, "Seed from which the projections are drawn.")
    save_projection: bool = option(True, "Write the projections to checkpoints.")
    pvera_dropout: float = option(0.0, "Probability of dropping an input of A, while training.")
    d_initial: float = option(0.1, "What the entries of d start with.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_weights: bool = option(True, "Start with vectors that change nothing.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    sample_at_inference: bool = option(False, "Draw the inner activations outside of training, too.")
    generator_seed: int | None = option(None, "Seed from which each layer draws.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PVERA
        check_layer_selection(self, ())
        if not self.save_projection:
            warn(
                "save_projection=False leaves the projections out of checkpoints; they are drawn again from "
                "projection_prng_key, which may give other numbers with another version of torch"
            )


__getattr__ = old_names(__name__)
