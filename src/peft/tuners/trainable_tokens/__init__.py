# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Trainable tokens: train single rows of an embedding, and the columns of the logits that belong to them."""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "TRAINABLE_TOKENS",
    "peft.tuners.trainable_tokens.config:TrainableTokensConfig",
    "peft.tuners.trainable_tokens.model:TrainableTokensModel",
    prefix="trainable_tokens_",
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["TrainableTokensConfig"],
        ".layer": ["TrainableTokensLayer"],
        ".model": ["TrainableTokensModel"],
    },
)
