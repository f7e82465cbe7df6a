# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of LoKr."""

from dataclasses import dataclass
from typing import Literal

from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names
from ..families.lycoris import LycorisConfig


@dataclass
class LoKrConfig(LycorisConfig):
    """
    Config of LoKr (Yeh et al. 2023, arXiv:2309.14859): W is replaced by W + scaling * kron(W1, W2).

    W2 is a product of factors of rank r, W1 is a small matrix.

    Args:
        rank_pattern: name (or regular expression) -> rank, where it differs from r.
        alpha_pattern: name (or regular expression) -> alpha, where it differs.
        r: rank of the factors.
        alpha: the delta is scaled by alpha / r.
        rank_dropout: probability of dropping a row of the delta, while training.
        module_dropout: probability of leaving a layer's adapter out, while training.
        use_effective_conv2d: factors of convolutions keep the dimensions of the kernel apart (Tucker form); has no
            effect on kernels of size 1.
        decompose_both: make W1 a product of factors too, where that has fewer entries.
        decompose_factor: greatest number of rows and of columns of W1; -1 makes W1 and W2 as alike as possible.
        rank_dropout_scale: scale the rows that rank dropout leaves, so that their mean stays.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        init_weights: True (W1 is zero, so a fresh adapter changes nothing), "lycoris" (W2 is zero instead), or False
            (all at random, for tests).
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        modules_to_save: names of modules that are trained and saved in full.

    Raises:
        ValueError: for values that cannot work together.
        TypeError: for a value of the wrong type.

    Example:

        >>> from peft import LoKrConfig
        >>> config = LoKrConfig(r=4, target_modules=["q_proj", "v_proj"])
        >>> sorted(config.target_modules)
        ['q_proj', 'v_proj']
    """

    r: int = option(8, "Rank of the factors.")
    alpha: int = option(8, "The delta is scaled by alpha / r.")
    rank_dropout: float = option(0.0, "Probability of dropping a row of the delta, while training.")
    module_dropout: float = option(0.0, "Probability of leaving a layer's adapter out, while training.")
    use_effective_conv2d: bool = option(False, "Keep the dimensions of kernels apart (Tucker form).")
    decompose_both: bool = option(False, "Make W1 a product of factors too.")
    decompose_factor: int = option(-1, "Greatest number of rows and of columns of W1; -1 for a balanced split.")
    rank_dropout_scale: bool = option(False, "Scale the rows that rank dropout leaves.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    init_weights: bool | Literal["lycoris"] = option(
        True, "Which factor starts at zero: W1 (True), W2 ('lycoris') or none (False)."
    )
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    modules_to_save: list[str] | None = shared_field("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOKR


__getattr__ = old_names(__name__)
