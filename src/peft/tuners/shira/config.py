# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of SHiRA."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names
from ...utils.warning import warn


@dataclass
class ShiraConfig(TyingConfig):
    """
    Config of SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175): W + a sparse matrix, whose few entries are trained.

    With a `mask_type` of your own, set the attribute `mask_fn` of the config, which is not saved: a function of the
    base layer, r and further keyword arguments that gives a tensor of zeros and ones of the weight's shape, with as
    many ones as entries are trained.

    Args:
        r: r * (inputs + outputs) entries are trained per layer, as many as LoRA of that rank has.
        mask_type: how entries are chosen: "random", or a name of your own.
        random_seed: seed from which they are drawn; layers of one shape have the same. None stands for a fixed one.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        fan_in_fan_out: has no effect on the layers that can be adapted.
        init_weights: True starts with zeros, which change nothing; False at random.
        modules_to_save: names of modules that are trained and saved in full.

    Attributes:
        mask_fn: the function that chooses entries, where `mask_type` is not "random".

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import ShiraConfig
        >>> ShiraConfig(r=8, target_modules=["q_proj", "v_proj"]).mask_type
        'random'
    """

    r: int = option(32, "As many entries are trained as LoRA of this rank has numbers.")
    mask_type: Literal["random"] = option("random", "How entries are chosen.")
    random_seed: int | None = option(None, "Seed of the choice.")
    target_modules: Names = shared_field("target_modules")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    init_weights: bool = option(True, "Start with zeros.")
    modules_to_save: list[str] | None = shared_field("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SHIRA
        self.mask_fn: Callable[..., Any] | None = None
        if self.mask_type != "random" and not self.inference_mode:
            warn(
                f"mask_type={self.mask_type!r} is not known, so entries are chosen by a function of yours; set it as "
                "config.mask_fn before the config is used"
            )
        check_layer_selection(self)


__getattr__ = old_names(__name__)
