# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of DeLoRA."""

from dataclasses import dataclass, field

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class DeloraConfig(TyingConfig):
    """
    Config of DeLoRA (Bini et al. 2025, arXiv:2503.18225): a low-rank update of normalised directions.

    Args:
        r: rank of the update.
        delora_lambda: what the trained strength starts with: a bound of the update beside the columns of the weight.
        module_dropout: probability with which inputs of the update are dropped while training.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        bias: which of the base model's biases to train: "none", "all" or "delora_only".
        init_weights: True starts with B of zero, which changes nothing; False with a random update.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        rank_pattern: name (or regular expression) -> rank, where it differs from r.
        lambda_pattern: name (or regular expression) -> strength at the start, where it differs.
        modules_to_save: names of modules that are trained and saved in full.

    Raises:
        ValueError: for values that cannot work together.

    Example:

        >>> from peft import DeloraConfig
        >>> DeloraConfig(r=16, target_modules=["q_proj", "v_proj"]).delora_lambda
        15
    """

    r: int = option(8, "Rank of the update.")
    delora_lambda: int = option(15, "What the trained strength starts with.")
    module_dropout: float = option(0.0, "Dropout of the inputs of the update.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    bias: str = shared_field("bias")
    init_weights: bool = option(True, "Start with an update of zero.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    rank_pattern: dict = shared_field("rank_pattern")
    lambda_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "Name or regular expression -> strength, where it differs."}
    )
    modules_to_save: list[str] | None = shared_field("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.DELORA
        if self.r <= 0:
            raise ValueError(f"r must be positive, found {self.r}")
        check_layer_selection(self, ("layers_to_transform",))


__getattr__ = old_names(__name__)
