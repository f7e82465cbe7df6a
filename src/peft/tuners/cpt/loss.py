# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The loss of context-aware prompt tuning, which counts the labels in the context as well."""

import torch
from torch.nn import functional as F

from .config import CPTConfig


IGNORED = -100


def is_label(types: torch.Tensor) -> torch.Tensor:
    """
    Say which tokens are labels.

    Args:
        types: (...) types of tokens; see `CPTConfig`.
    """
    return (types > 0) & (types % 4 == 0)


def with_context(labels: torch.Tensor, types: torch.Tensor, config: CPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Put the context in front of labels and types.

    Args:
        labels: (batch, length) token ids, -100 at positions without a loss.
        types: (batch, length) types of the input's tokens, counted from 1 as those of a first example.
        config: which tells the context.

    Returns:
        (batch, tokens + length) both; the types of the input go on where those of the context end.
    """
    context_types = types.new_tensor(config.cpt_tokens_type_mask)
    context_ids = labels.new_tensor(config.cpt_token_ids)
    examples = -(-int(max(config.cpt_tokens_type_mask, default=0)) // 4)
    types = torch.where(types > 0, types + 4 * examples, types)
    batch = len(labels)
    return (
        torch.cat([context_ids.expand(batch, -1), labels], dim=1),
        torch.cat([context_types.expand(batch, -1), types], dim=1),
    )


def weighted_loss(logits: torch.Tensor, labels: torch.Tensor, types: torch.Tensor, config: CPTConfig) -> torch.Tensor:
    """
    Average the cross entropy of labels, those of earlier examples with less weight if the config says so.

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length) token ids of context and input, -100 at positions without a loss.
        types: (batch, length) their types.
        config: which tells the weights.

    Returns:
        The mean over positions of weight times cross entropy.
    """
    labels, types = labels[:, 1:].to(logits.device), types[:, 1:].to(logits.device)
    labels = labels.masked_fill(~is_label(types), IGNORED)
    logits = logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    if config.opt_weighted_loss_type == "decay":
        losses = losses * config.opt_loss_decay_factor ** _examples_after(types)
    return losses.sum() / (labels != IGNORED).sum()


def _examples_after(types: torch.Tensor) -> torch.Tensor:
    """Count, for each token, the labels of later examples in its sample; (batch, length)."""
    examples = torch.where(is_label(types), types // 4, 0)
    present = examples.new_zeros(len(types), int(examples.max()) + 1).scatter(1, examples, 1)
    from_here_on = present.flip(1).cumsum(1).flip(1)
    return (from_here_on - present).gather(1, examples)
