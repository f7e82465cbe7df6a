# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of VB-LoRA."""

from dataclasses import dataclass, field

from ...config import TyingConfig, check_layer_selection
from ...registry import PeftType


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
        fan_in_fan_out: kept for files of the released package; the layers are asked how they store their weights.
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

    r: int = field(default=4, metadata={"help": "Rank of the factors."})
    num_vectors: int = field(default=256, metadata={"help": "Vectors in the bank."})
    vector_length: int = field(default=256, metadata={"help": "Length of a vector; divides the layers' sizes."})
    topk: int = field(default=2, metadata={"help": "Vectors that are mixed for each piece of a factor."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to adapt (list), a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out: list or regular expression."}
    )
    save_only_topk_weights: bool = field(
        default=False, metadata={"help": "Save only what inference needs; training cannot go on from such a file."}
    )
    vblora_dropout: float = field(
        default=0.0, metadata={"help": "Probability of dropping an input of A, while training."}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Whether layers keep their weights as (in, out)."})
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'vblora_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that are trained and saved in full."}
    )
    init_vector_bank_bound: float = field(default=0.02, metadata={"help": "Bound of the bank's entries at the start."})
    init_logits_std: float = field(default=0.1, metadata={"help": "Deviation of the logits at the start."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that the indices count."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VBLORA
        check_layer_selection(self, refused_with_pattern=("layers_pattern",))
