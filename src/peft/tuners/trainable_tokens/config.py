# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of trainable tokens."""

from dataclasses import dataclass, field

from ...config import TyingConfig
from ...configs.checks import check_types
from ...configs.fields import option
from ...registry import PeftType
from ...utils.old_names import old_names


@dataclass
class TrainableTokensConfig(TyingConfig):
    """
    Train the embeddings of single tokens; everything else stays frozen.

    What is tied to a targeted embedding, such as the output head, is adapted with it: a new token is read and written
    with one vector. `LoraConfig(trainable_token_indices=...)` does the same beside LoRA.

    Args:
        token_indices: ids of the tokens.
        target_modules: names of the embeddings (list) or a regular expression; the model's input embedding if left
            out. Linear output heads can be named too.
        init_weights: True starts from the rows of the base model, False at random.

    Example:

        >>> from peft import TrainableTokensConfig
        >>> TrainableTokensConfig(token_indices=[5, 7]).token_indices
        [5, 7]
    """

    token_indices: list[int] = field(default_factory=list, metadata={"help": "Ids of the tokens to train."})
    target_modules: list[str] | str | None = option(None, "Names of the embeddings, or a regular expression.")
    init_weights: bool = option(True, "Start from the rows of the base model.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS
        check_types(self, {"token_indices": (list, tuple, set, range)})


__getattr__ = old_names(__name__)
