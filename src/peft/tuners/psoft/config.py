# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of PSOFT."""

from dataclasses import dataclass
from typing import Literal

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names
from ...utils.warning import warn


@dataclass
class PsoftConfig(TyingConfig):
    """
    Config of PSOFT (Wu et al. 2025, arXiv:2505.11235): the principal subspace of a weight is rotated and stretched.

    Args:
        r: number of leading singular directions.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        psoft_alpha: kept for files of the released package; the factors are divided by what it multiplies.
        psoft_dropout: probability with which inputs of the update are dropped while training.
        fan_in_fan_out: kept for files of the released package; the layers are asked how they store their weights.
        ab_svd_init: which of the two frozen factors holds the singular values: "psoft_init" the one of the outputs,
            "pissa_init" both.
        psoft_svd: "full", or "lowrank" for a randomised decomposition, which costs less.
        psoft_svd_lowrank_niter: rounds of that.
        random_seed: its seed.
        psoft_orth: whether what is trained is a rotation, and not just any matrix.
        psoft_mag_b: whether its outputs are stretched.
        psoft_mag_a: whether its inputs are.
        use_cayley_neumann: sum a series in place of solving for the rotation.
        num_cayley_neumann_terms: terms of the series.
        cayley_neumann_eps: greatest norm of what the series is of; left out, any.
        modules_to_save: names of modules that are trained and saved in full.
        init_weights: True starts without a turn, which changes nothing; False with a random one.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import PsoftConfig
        >>> PsoftConfig(r=16, target_modules=["q_proj"]).psoft_orth
        True
    """

    r: int = option(32, "Number of leading singular directions.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    psoft_alpha: int = option(32, "Has no effect on what is computed.")
    psoft_dropout: float = option(0.0, "Dropout of the inputs of the update.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    ab_svd_init: Literal["psoft_init", "pissa_init"] = option("psoft_init", "Where the singular values go.")
    psoft_svd: Literal["full", "lowrank"] = option("full", "How weights are decomposed.")
    psoft_svd_lowrank_niter: int = option(10, "Rounds of the randomised decomposition.")
    random_seed: int = option(0, "Its seed.")
    psoft_orth: bool = option(True, "Train a rotation.")
    psoft_mag_b: bool = option(True, "Stretch its outputs.")
    psoft_mag_a: bool = option(True, "Stretch its inputs.")
    use_cayley_neumann: bool = option(False, "Sum a series for the rotation.")
    num_cayley_neumann_terms: int = option(5, "Terms of the series.")
    cayley_neumann_eps: float | None = option(None, "Greatest norm of what the series is of.")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_weights: bool = option(True, "Start without a turn.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PSOFT
        if self.r <= 0:
            raise ValueError(f"r must be positive, found {self.r}")
        for name, known in (("ab_svd_init", ("psoft_init", "pissa_init")), ("psoft_svd", ("full", "lowrank"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, found {getattr(self, name)!r}")
        terms, eps = self.num_cayley_neumann_terms, self.cayley_neumann_eps
        if self.use_cayley_neumann and terms <= 0:
            raise ValueError(f"num_cayley_neumann_terms must be positive, found {terms}")
        if self.use_cayley_neumann and eps is not None and not 0 < eps < 1:
            raise ValueError(f"cayley_neumann_eps must lie between 0 and 1, found {eps}")
        if self.psoft_svd_lowrank_niter != 10 and self.psoft_svd != "lowrank":
            warn("psoft_svd_lowrank_niter has no effect without psoft_svd='lowrank'")
        for name, default in (("num_cayley_neumann_terms", 5), ("cayley_neumann_eps", None)):
            if getattr(self, name) != default and not self.use_cayley_neumann:
                warn(f"{name} has no effect without use_cayley_neumann=True")
        check_layer_selection(self)


__getattr__ = old_names(__name__)
