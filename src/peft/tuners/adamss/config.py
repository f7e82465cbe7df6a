# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of AdaMSS."""

import importlib.util
from dataclasses import dataclass
from typing import Literal

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.error import PeftImportError
from ...utils.old_names import old_names


@dataclass
class AdamssConfig(TyingConfig):
    """
    Config of AdaMSS (Zheng et al. 2025): rows of W in clusters, with a small low-rank change each. Needs scikit-learn.

    Args:
        r: number of singular vectors of the weight that clusters and changes are made of.
        num_subspaces: number of clusters.
        subspace_rank: rank of the change of a cluster, at most.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        init_weights: "orthogonal" starts without a change; None, which False stands for too, at random.
        modules_to_save: names of modules that are trained and saved in full.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        use_asa: whether `update_and_allocate` freezes all but the most important clusters while training.
        asa_target_subspaces: how many clusters of the whole model are trained in the end.
        init_warmup: step from which on clusters are frozen.
        final_warmup: last step at which they are.
        mask_interval: steps between two times that clusters are frozen.
        asa_importance_beta: how slowly the importance of a number forgets.
        asa_uncertainty_beta: how slowly the uncertainty of it does.
        asa_schedule_exponent: how much sooner than evenly clusters are frozen.
        use_dynamic_rank: whether the singular values of a cluster decide about the rank of its change.
        svd_threshold: share of the largest singular value that the others must exceed to count.
        random_seed: seed of the decomposition.

    Raises:
        ImportError: without scikit-learn.
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import AdamssConfig
        >>> AdamssConfig(r=16, target_modules=["q_proj", "v_proj"]).init_weights
        'orthogonal'
    """

    r: int = option(100, "Number of singular vectors of the weight.")
    num_subspaces: int = option(5, "Number of clusters.")
    subspace_rank: int = option(1, "Rank of the change of a cluster, at most.")
    target_modules: Names = shared_field("target_modules")
    init_weights: Literal["orthogonal"] | None = option("orthogonal", "Start without a change, or None for at random.")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    use_asa: bool = option(False, "Freeze all but the most important clusters while training.")
    asa_target_subspaces: int = option(50, "How many clusters of the model are trained in the end.")
    init_warmup: int = option(50, "Step from which on clusters are frozen.")
    final_warmup: int = option(1000, "Last step at which they are.")
    mask_interval: int = option(100, "Steps between two times that clusters are frozen.")
    asa_importance_beta: float = option(0.85, "How slowly importance forgets.")
    asa_uncertainty_beta: float = option(0.85, "How slowly uncertainty forgets.")
    asa_schedule_exponent: float = option(3.0, "How much sooner than evenly clusters are frozen.")
    use_dynamic_rank: bool = option(False, "Let singular values decide about ranks.")
    svd_threshold: float = option(0.1, "Share of the largest singular value that the others must exceed.")
    random_seed: int = option(0, "Seed of the decomposition.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAMSS
        if importlib.util.find_spec("sklearn") is None:
            raise PeftImportError("AdaMSS needs scikit-learn; run pip install scikit-learn")
        self.init_weights = self.init_weights or None
        if self.init_weights not in ("orthogonal", None):
            raise ValueError(f"init_weights must be 'orthogonal', None or False, found {self.init_weights!r}")
        if self.use_asa:
            for name in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"{name} must be positive, found {getattr(self, name)!r}")
            if self.init_warmup >= self.final_warmup:
                raise ValueError(
                    f"init_warmup must be less than final_warmup, found {self.init_warmup} and {self.final_warmup}"
                )
        check_layer_selection(self, (), pattern_needs_indices=False)


__getattr__ = old_names(__name__)
