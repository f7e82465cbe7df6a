# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of Lily."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class LilyConfig(TyingConfig):
    """
    Config of Lily (Zhong et al. 2024, arXiv:2407.09946): x W' + s x A' (sum of p_k B_k), with p routed from x A'.

    Layers that one entry of `target_modules` matches, and whose weights have the same shape, share all B_k; those
    among them that are next to each other share A.

    Args:
        r: rank of the factors.
        stride_A: how many layers in a row share A.
        num_B: how many experts B_k there are, at least 2.
        scaling: s, what the update is multiplied by.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, in the same forms.
        modules_to_save: names of modules that are trained and saved in full.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        init_weights: True starts with B of zero, which changes nothing; False with a random update.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import LilyConfig
        >>> LilyConfig(r=8, stride_A=2, target_modules=["q_proj", "v_proj"]).num_B
        2
    """

    r: int = option(32, "Rank of the factors.")
    stride_A: int = option(1, "How many layers in a row share A.")
    num_B: int = option(2, "How many experts there are.")
    scaling: float = option(1.0, "What the update is multiplied by.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    init_weights: bool = option(True, "Start with B of zero, so that nothing changes.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LILY
        if self.stride_A < 1:
            raise ValueError(f"stride_A counts layers that share A and must be at least 1, found {self.stride_A}")
        if self.num_B < 2:
            raise ValueError(f"num_B counts experts and must be at least 2, found {self.num_B}")
        check_layer_selection(self, ())


__getattr__ = old_names(__name__)
