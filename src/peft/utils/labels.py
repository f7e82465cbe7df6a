# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Labels of decoders, and the inputs that they are to be predicted from."""

import torch

from .error import PeftValueError


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """
    Make a decoder's inputs from its labels: each token is to be predicted from those before it.

    Args:
        input_ids: labels, (batch, length); -100 stands for tokens that are not predicted.
        pad_token_id: token to put in place of -100.
        decoder_start_token_id: token to begin with.

    Returns:
        (batch, length).

    Raises:
        PeftValueError: without a token for padding.

    Example:

        >>> import torch
        >>> from peft import shift_tokens_right
        >>> shift_tokens_right(torch.tensor([[5, 6, -100, -100]]), pad_token_id=0, decoder_start_token_id=1)
        tensor([[1, 5, 6, 0]])
    """
    if pad_token_id is None:
        raise PeftValueError(
            "pad_token_id is None, and labels of -100 need a token in their place; set it in the model's config"
        )
    shifted = input_ids.roll(1, dims=-1)
    shifted[..., 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)
