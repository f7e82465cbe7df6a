# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of OFT."""

from dataclasses import dataclass
from typing import Any, Literal

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


# the series has long converged, or never will
MOST_TERMS = 1_000


@dataclass
class OFTConfig(TyingConfig):
    """
    Config of OFT (Qiu et al. 2023, arXiv:2306.07280): W x is replaced by W R x, where R turns blocks of features.

    Args:
        r: number of blocks; either this or `oft_block_size` is 0. If it does not divide the number of inputs of a
            layer, the nearest number that does is used there, with a warning.
        oft_block_size: features per block.
        module_dropout: share of the blocks that are left unturned, anew for each input, while training.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        bias: which of the base model's biases to train: "none", "all" or "oft_only".
        exclude_modules: modules to leave out, as a list or a regular expression.
        init_weights: True starts without a turn, False at random, for tests.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        modules_to_save: names of modules that are trained and saved in full.
        coft: keep the turns small (constrained OFT); see `eps`.
        eps: for `coft`: greatest norm of the skew-symmetric matrices of all blocks together.
        block_share: use one block for all.
        use_cayley_neumann: sum a series in place of the matrix inverse of Cayley's transform (Qiu et al. 2025,
            arXiv:2506.19847); faster, and orthogonal up to the terms that are left out.
        num_cayley_neumann_terms: terms of the series.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import OFTConfig
        >>> OFTConfig(oft_block_size=16, target_modules=["q_proj"]).oft_block_size
        16
    """

    r: int = option(0, "Number of blocks; either this or oft_block_size is 0.")
    oft_block_size: int = option(32, "Features per block; either this or r is 0.")
    module_dropout: float = option(0.0, "Share of the blocks that are left unturned while training.")
    target_modules: Names = shared_field("target_modules")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    bias: Literal["none", "all", "oft_only"] = shared_field("bias")
    exclude_modules: Names = shared_field("exclude_modules")
    init_weights: bool = option(True, "Start without a turn; False starts at random.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    coft: bool = option(False, "Keep the turns small (constrained OFT).")
    eps: float = option(6e-5, "For coft: greatest norm of the skew-symmetric matrices together.")
    block_share: bool = option(False, "Use one block for all.")
    use_cayley_neumann: bool = option(True, "Sum a series in place of a matrix inverse.")
    num_cayley_neumann_terms: int = option(5, "Terms of the series.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.OFT
        check_layer_selection(self, refused_with_pattern=())
        if min(self.r, self.oft_block_size) < 0 or bool(self.r) == bool(self.oft_block_size):
            raise ValueError(
                f"one of r (number of blocks) and oft_block_size must be positive and the other one 0, found "
                f"r={self.r} and oft_block_size={self.oft_block_size}"
            )
        if self.num_cayley_neumann_terms > MOST_TERMS:
            raise ValueError(
                f"num_cayley_neumann_terms={self.num_cayley_neumann_terms} is more than {MOST_TERMS}; "
                "use_cayley_neumann=False computes the inverse exactly"
            )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """
        Refuse the fields of a file from before the blocks were turned on the side of the inputs.

        Args:
            kwargs: fields of a config file.

        Raises:
            ValueError: if the file is such a file, whose adapter has tensors of other shapes.
        """
        if "oft_block_size" not in kwargs:
            raise ValueError(
                "the config has no oft_block_size, so it comes from an older kind of OFT adapter, whose tensors have "
                "other shapes; train it anew, or merge it with the version that wrote it"
            )
        return super().check_kwargs(**kwargs)


__getattr__ = old_names(__name__)
