# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of PEANuT."""

from dataclasses import dataclass

from transformers.activations import ACT2FN

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class PeanutConfig(TyingConfig):
    """
    Config of PEANuT (Zhong et al. 2024, arXiv:2410.01870): a small network turns the weight into what is added to it.

    Args:
        r: width of the network.
        depth: number of its encoders, and of its decoders, between the first and the last layer.
        act_fn: what comes after each of its layers but the last, a name that transformers knows, such as "gelu".
        scaling: what the update is multiplied by.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        modules_to_save: names of modules that are trained and saved in full.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        init_weights: True starts with an update of zero, False with a random one.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import PeanutConfig
        >>> PeanutConfig(depth=1, target_modules=["q_proj"]).act_fn
        'relu'
    """

    r: int = option(32, "Width of the network.")
    depth: int = option(0, "Number of its encoders, and of its decoders.")
    act_fn: str = option("relu", "Name of what comes after its layers.")
    scaling: float = option(1.0, "What the update is multiplied by.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    init_weights: bool = option(True, "Start with an update of zero.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PEANUT
        if self.r <= 0:
            raise ValueError(f"r must be positive, found {self.r}")
        if self.depth < 0:
            raise ValueError(f"depth cannot be negative, found {self.depth}")
        if self.act_fn not in ACT2FN:
            raise ValueError(f"act_fn must be one of {', '.join(ACT2FN)}, found {self.act_fn!r}")
        check_layer_selection(self, ())


__getattr__ = old_names(__name__)
