# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of FourierFT."""

from dataclasses import dataclass, field

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class FourierFTConfig(TyingConfig):
    """
    Config of FourierFT (Gao et al. 2024, arXiv:2405.03003): W + scaling * Re(ifft2(F)), F with few entries.

    Args:
        n_frequency: number of coefficients that are trained per layer, at most the number of the weight's entries.
        scaling: what the transform is multiplied by.
        random_loc_seed: seed from which the places of the coefficients are drawn; layers of one shape have the same.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        bias: which of the base model's biases to train: "none", "all" or "fourier_only".
        modules_to_save: names of modules that are trained and saved in full.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        n_frequency_pattern: name (or regular expression) -> number of coefficients, where it differs.
        init_weights: True starts with coefficients of zero, which change nothing; False at random.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import FourierFTConfig
        >>> FourierFTConfig(n_frequency=100, target_modules=["q_proj", "v_proj"]).scaling
        150.0
    """

    n_frequency: int = option(1000, "Number of coefficients per layer.")
    scaling: float = option(150.0, "What the transform is multiplied by.")
    random_loc_seed: int | None = option(777, "Seed of the coefficients' places.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    n_frequency_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "Name or regular expression -> number of coefficients."}
    )
    init_weights: bool = option(False, "Start with coefficients of zero.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FOURIERFT
        check_layer_selection(self)


__getattr__ = old_names(__name__)
