# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of WaveFT."""

from dataclasses import dataclass, field

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.near_names import did_you_mean, nearest
from ...utils.old_names import old_names


# name of a wavelet -> length of its filters less 2, for rows and columns
WAVELET_REDUCTIONS: dict[str, tuple[int, int]] = {
    f"{family}{order}": (per_order * order - 2,) * 2
    for family, first, last, per_order in (("db", 1, 38, 2), ("sym", 2, 20, 2), ("coif", 1, 17, 6))
    for order in range(first, last + 1)
}


@dataclass
class WaveFTConfig(TyingConfig):
    """
    Config of WaveFT (Bilican et al. 2025, arXiv:2505.12532): W + scaling * inverse wavelet transform of a few numbers.

    Args:
        n_frequency: number of coefficients that are trained per layer, at most the number of the weight's entries.
        scaling: what the transform is multiplied by.
        wavelet_family: name of the wavelet: db1 to db38, sym2 to sym20 or coif1 to coif17.
        use_idwt: whether coefficients are transformed; if not, each of them is an entry of the update itself.
        random_loc_seed: seed from which the places of the coefficients are drawn; layers of one shape have the same.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        bias: which of the base model's biases to train: "none", "all" or "waveft_only".
        modules_to_save: names of modules that are trained and saved in full.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        n_frequency_pattern: name (or regular expression) -> number of coefficients, where it differs.
        proportional_parameters: whether each layer gets a share of all coefficients, `n_frequency` per layer on
            average, that follows the number of its weight's entries.
        init_weights: True starts with coefficients of zero, which change nothing; False at random.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import WaveFTConfig
        >>> WaveFTConfig(n_frequency=100, target_modules=["q_proj", "v_proj"]).wavelet_family
        'db1'
    """

    n_frequency: int = option(2592, "Number of coefficients per layer.")
    scaling: float = option(25.0, "What the transform is multiplied by.")
    wavelet_family: str = option("db1", "Name of the wavelet: db1 to db38, sym2 to sym20 or coif1 to coif17.")
    use_idwt: bool = option(True, "Transform the coefficients, or use them as they are.")
    random_loc_seed: int = option(777, "Seed of the coefficients' places.")
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
    proportional_parameters: bool = option(False, "Share the coefficients out by the sizes of the weights.")
    init_weights: bool = option(True, "Start with coefficients of zero.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.WAVEFT
        if self.wavelet_family not in WAVELET_REDUCTIONS:
            raise ValueError(
                f"wavelet_family must be one of db1 to db38, sym2 to sym20 and coif1 to coif17, found "
                f"{self.wavelet_family!r}{did_you_mean(nearest(str(self.wavelet_family), WAVELET_REDUCTIONS))}"
            )
        check_layer_selection(self)


__getattr__ = old_names(__name__)
