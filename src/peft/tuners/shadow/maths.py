# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Losses of the small model by itself."""

import torch
from torch.nn import functional as F


_IGNORED = -100


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Give the mean cross entropy of each next token.

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length), -100 at positions without a loss.
    """
    wanted = labels[:, 1:].to(logits.device)
    return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=_IGNORED)


def class_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Give the loss of a classifier: for numbers, one of several classes, or several classes, as the labels are.

    Args:
        logits: (batch, classes).
        labels: (batch,) numbers or classes, or (batch, classes).
    """
    labels = labels.to(logits.device)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).squeeze())
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels.view(-1))


def last_token(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Give what stands at the last position of each sample that is not masked.

    Args:
        x: (batch, length, features).
        attention_mask: (batch, length); the last position counts if left out.
    """
    if attention_mask is None:
        return x[:, -1]
    positions = torch.arange(attention_mask.shape[-1], device=x.device)
    last = (attention_mask.to(x.device).bool() * positions).argmax(dim=-1)
    return x[torch.arange(len(x), device=x.device), last]
