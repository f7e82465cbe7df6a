# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of BOFT."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class BOFTConfig(TyingConfig):
    """
    Config of BOFT (Liu et al. 2023, arXiv:2311.06243): W x is replaced by s * W R x, R a product of sparse rotations.

    Args:
        boft_block_size: features per block; it must divide the number of inputs of each layer. Either this or
            `boft_block_num` is 0.
        boft_block_num: number of blocks.
        boft_n_butterfly_factor: number of factors of R. Each further one joins blocks that lie twice as far apart, so
            with n of them 2^(n - 1) blocks are mixed. More than one is used only where there is a CUDA device, as in
            the released package, with a warning elsewhere.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        boft_dropout: share of the blocks of one factor, chosen at random, that are left unturned while training.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        bias: which of the base model's biases to train: "none", "all" or "boft_only".
        modules_to_save: names of modules that are trained and saved in full.
        init_weights: True starts without a turn, False at random, for tests.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import BOFTConfig
        >>> BOFTConfig(boft_block_size=8, target_modules=["q_proj"]).boft_block_size
        8
    """

    boft_block_size: int = option(4, "Features per block; either this or the number is 0.")
    boft_block_num: int = option(0, "Number of blocks; either this or their size is 0.")
    boft_n_butterfly_factor: int = option(1, "Number of sparse factors of the rotation.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    boft_dropout: float = option(0.0, "Share of blocks left unturned while training.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_weights: bool = option(True, "Start without a turn; False starts at random.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BOFT
        check_layer_selection(self, refused_with_pattern=())
        size, count = self.boft_block_size, self.boft_block_num
        if min(size, count) < 0 or bool(size) == bool(count):
            raise ValueError(
                f"one of boft_block_size and boft_block_num must be positive and the other one 0, found "
                f"boft_block_size={size} and boft_block_num={count}"
            )


__getattr__ = old_names(__name__)
