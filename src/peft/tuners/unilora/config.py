# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of Uni-LoRA."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class UniLoraConfig(TyingConfig):
    """
    Config of Uni-LoRA (Li et al. 2025, arXiv:2506.00799): W + B A, the entries of B and A being those of one vector.

    Args:
        r: rank of the updates.
        proj_seed: seed from which it is drawn which entry of the vector goes where.
        theta_d_length: length of the vector, which is all that is trained.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        unilora_dropout: probability of dropping an input of A, while training.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        bias: which of the base model's biases to train: "none", "all" or "unilora_only".
        modules_to_save: names of modules that are trained and saved in full.
        init_theta_d_bound: the largest number that the vector starts with.
        init_weights: True starts with uniform numbers within the bound, False with normal ones, for tests.
        save_indices: write to checkpoints which entry goes where. Without that, files are smaller, but can be read
            only where the same seed gives the same numbers, and into a model with the same targets.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import UniLoraConfig
        >>> UniLoraConfig(theta_d_length=1000, target_modules=["q_proj", "v_proj"]).r
        4
    """

    r: int = option(4, "Rank of the updates.")
    proj_seed: int = option(42, "Seed from which it is drawn which entry of the vector goes where.")
    theta_d_length: int = option(256, "Length of the trained vector.")
    target_modules: Names = shared_field("target_modules")
    unilora_dropout: float = option(0.0, "Probability of dropping an input of A, while training.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_theta_d_bound: float = option(0.02, "The largest number that the vector starts with.")
    init_weights: bool = option(True, "Start with uniform numbers.")
    save_indices: bool = option(False, "Write to checkpoints which entry goes where.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.UNILORA
        for name in ("r", "theta_d_length", "init_theta_d_bound"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        if self.proj_seed < 0:
            raise ValueError(f"proj_seed must be at least 0, found {self.proj_seed}")
        if self.bias not in ("none", "all", "unilora_only"):
            raise ValueError(f'bias must be "none", "all" or "unilora_only", found {self.bias!r}')
        check_layer_selection(self, pattern_needs_indices=False)


__getattr__ = old_names(__name__)
