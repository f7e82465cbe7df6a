# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of FRoD."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names
from ...utils.warning import warn


@dataclass
class FrodConfig(TyingConfig):
    """
    Config of FRoD (Wan et al. 2025, arXiv:2512.23485): W = U (diag(l) + S) V', of which l and a sparse S are trained.

    Args:
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        projection_prng_key: seed from which it is drawn where S has entries; the same for all adapters of a model.
        save_projection: write the bases V, and where S has entries, to checkpoints. Without them files are smaller,
            but can be read only where the same computations give the same numbers.
        frod_dropout: probability of dropping an input of the update, while training.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        bias: which of the base model's biases to train: "none", "all" or "frod_only".
        modules_to_save: names of modules that are trained and saved in full.
        init_weights: True starts with an update of zero; False with a random one, for tests.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        sparse_rate: share of the entries of S that are trained.
        regularization_alpha: what is added to the diagonals of the matrices that are inverted to find a basis.
        progressbar: show how far the computation of the bases is.
        runtime_offload_base_weight: has no effect here: base weights stay where they are.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import FrodConfig
        >>> FrodConfig(sparse_rate=0.02, target_modules=["q_proj", "v_proj"]).projection_prng_key
        0
    """

    target_modules: Names = shared_field("target_modules")
    projection_prng_key: int = option(0, "Seed from which it is drawn where S has entries.")
    save_projection: bool = option(True, "Write the bases to checkpoints.")
    frod_dropout: float = option(0.0, "Probability of dropping an input of the update, while training.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_weights: bool = option(True, "Start with an update of zero.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    sparse_rate: float = option(0.01, "Share of the entries of S that are trained.")
    regularization_alpha: float = option(0.001, "What is added to diagonals before matrices are inverted.")
    progressbar: bool = option(True, "Show how far the computation of the bases is.")
    runtime_offload_base_weight: bool = option(False, "Has no effect: base weights stay where they are.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FROD
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"sparse_rate must be a share between 0 and 1, found {self.sparse_rate}")
        check_layer_selection(self, ())
        if not self.save_projection:
            warn(
                "save_projection=False leaves the bases out of checkpoints; they are computed again from the base "
                "weights, which may give other numbers with another version of torch or on another machine"
            )


__getattr__ = old_names(__name__)
