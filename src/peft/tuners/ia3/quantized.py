# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""IA3's layers on quantised linear layers, under the names that the released package has for them."""

from .layer import Linear


class Linear8bitLt(Linear):
    """IA3 on a linear layer that bitsandbytes has quantised to 8 bits; see `Linear`."""


class Linear4bit(Linear):
    """IA3 on a linear layer that bitsandbytes has quantised to 4 bits; see `Linear`."""


# name of a backend -> IA3's layer for it
LAYER_OF_BACKEND: dict[str, type[Linear]] = {"bnb 8bit": Linear8bitLt, "bnb 4bit": Linear4bit}
