# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of VB-LoRA."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class VBLoRAConfig(TyingConfig):
    """
    Config of VB-LoRA (Li et al. 2024, arXiv:2405.15179): W + B A, whose pieces are mixtures of vectors of one bank.

    Args:
        r: rank of the factors.
        num_vectors: vectors in the bank.
        vector_length: length of a vector; it must divide the numbers of inputs and outputs of every target.
        topk: vectors that are mixed for each piece of a factor.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        save_only_topk_weights: write to checkpoints only which vectors are mixed and with which weights. Files are
            much smaller, but the adapter cannot be trained on from them.
        vblora_dropout: probability of dropping an input of A, while training.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        bias: which of the base model's biases to train: "none", "all" or "vblora_only".
        modules_to_save: names of modules that are trained and saved in full.
        init_vector_bank_bound: the bank starts with numbers between minus this and this.
        init_logits_std: standard deviation of the logits at the start.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import VBLoRAConfig
        >>> VBLoRAConfig(num_vectors=60, vector_length=64, target_modules=["q_proj", "v_proj"]).topk
        2
    """

    r: int = option(4, "Rank of the factors.")
    num_vectors: int = option(256, "Vectors in the bank.")
    vector_length: int = option(256, "Length of a vector; divides the layers' sizes.")
    topk: int = option(2, "Vectors that are mixed for each piece of a factor.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    save_only_topk_weights: bool = option(
        False, "Save only what inference needs; training cannot go on from such a file."
    )
    vblora_dropout: float = option(0.0, "Probability of dropping an input of A, while training.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    bias: str = shared_field("bias")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_vector_bank_bound: float = option(0.02, "Bound of the bank's entries at the start.")
    init_logits_std: float = option(0.1, "Deviation of the logits at the start.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VBLORA
        check_layer_selection(self, refused_with_pattern=("layers_pattern",))


__getattr__ = old_names(__name__)
