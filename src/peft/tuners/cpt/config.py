# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of context-aware prompt tuning."""

from dataclasses import dataclass
from typing import Literal

from ...config import PromptLearningConfig
from ...configs.fields import option
from ...registry import PeftType, TaskType
from ...utils.old_names import old_names


_LOSS_TYPES = ("none", "decay", None)


@dataclass
class CPTConfig(PromptLearningConfig):
    """
    Config of context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222).

    The context is a text of examples in front of the input. Each of its tokens has a type: 0 for nothing, then, from
    one example to the next, 1 for the template of an input, 2 for the input, 3 for the template of an output, 4 for
    the label, 5 to 8 for the same of the second example, and so on. Sizes of the base model are always read from it.

    Args:
        cpt_token_ids: tokens of the context; [0] if left out. There are as many virtual tokens.
        cpt_mask: one per token; kept in the file and used for nothing. Ones if left out.
        cpt_tokens_type_mask: type of each token; ones if left out.
        opt_weighted_loss_type: "decay" to let the labels of earlier examples count less in the loss; "none".
        opt_loss_decay_factor: what a label counts relative to that of the next example, with "decay".
        opt_projection_epsilon: how far the embedding of an input's token may move, in units of sqrt(width / 2048).
        opt_projection_format_epsilon: the same for tokens of templates. Labels do not move.
        tokenizer_name_or_path: where the tokens are from; kept in the file and used for nothing.

    Raises:
        ValueError: for another task than CAUSAL_LM, masks of other lengths than the tokens, or an unknown loss.

    Example:

        >>> from peft import CPTConfig
        >>> CPTConfig(
        ...     cpt_token_ids=[5, 6, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4], task_type="CAUSAL_LM"
        ... ).num_virtual_tokens
        4
    """

    cpt_token_ids: list[int] | None = option(None, "Tokens of the context.")
    cpt_mask: list[int] | None = option(None, "One per token; used for nothing.")
    cpt_tokens_type_mask: list[int] | None = option(None, "Type of each token.")
    opt_weighted_loss_type: Literal["none", "decay"] | None = option("none", "How labels are weighted in the loss.")
    opt_loss_decay_factor: float | None = option(1.0, "Weight of a label relative to the next example's.")
    opt_projection_epsilon: float | None = option(0.1, "How far embeddings of inputs may move.")
    opt_projection_format_epsilon: float | None = option(0.1, "How far embeddings of templates may move.")
    tokenizer_name_or_path: str | None = option(None, "Where the tokens are from; used for nothing.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CPT
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"CPT works for task_type='CAUSAL_LM' only, found {self.task_type!r}")
        if self.opt_weighted_loss_type not in _LOSS_TYPES:
            raise ValueError(
                f"opt_weighted_loss_type={self.opt_weighted_loss_type!r} is not known; use 'none' or 'decay'"
            )
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        self.num_virtual_tokens = len(self.cpt_token_ids)
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * self.num_virtual_tokens)
            found = len(getattr(self, name))
            if found != self.num_virtual_tokens:
                raise ValueError(
                    f"{name} has {found} entries for {self.num_virtual_tokens} tokens in cpt_token_ids; give one each"
                )
        # read from each model anew, whatever a file says
        self.num_layers = self.token_dim = self.num_attention_heads = None
        self.num_transformer_submodules = 1


__getattr__ = old_names(__name__)
