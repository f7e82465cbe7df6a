# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of Poly."""

from dataclasses import dataclass
from typing import Literal

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class PolyConfig(TyingConfig):
    """
    Config of Poly (Ponti et al. 2022, arXiv:2202.13914): x W' + x A_t B_t / r; task t mixes A_t and B_t of skills.

    With `n_splits` > 1 each part of the features has a mixture of its own (Caccia et al. 2022, arXiv:2211.03831).

    Args:
        r: rank of a skill.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, in the same forms.
        modules_to_save: names of modules that are trained and saved in full.
        init_weights: True starts with B of zero, which changes nothing; False with a random update.
        poly_type: how a mixture is found; "poly" is the only way.
        n_tasks: how many tasks there are. If there are several, each call of the model needs `task_ids`.
        n_skills: how many skills a layer has.
        n_splits: into how many parts the features are split; has to divide the inputs and outputs of every target.

    Example:

        >>> from peft import PolyConfig
        >>> PolyConfig(n_tasks=3, target_modules=["q_proj", "v_proj"]).n_skills
        4
    """

    r: int = option(8, "Rank of a skill.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_weights: bool = option(True, "Start with B of zero, so that nothing changes.")
    poly_type: Literal["poly"] = option("poly", "How a mixture is found.")
    n_tasks: int = option(1, "How many tasks there are.")
    n_skills: int = option(4, "How many skills a layer has.")
    n_splits: int = option(1, "Into how many parts the features are split.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.POLY
        check_layer_selection(self, (), pattern_needs_indices=False)


__getattr__ = old_names(__name__)
