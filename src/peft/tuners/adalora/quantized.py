# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""AdaLoRA's layers on quantised linear layers, under the names that the released package has for each library."""

from .layer import SVDLinear


class SVDLinear8bitLt(SVDLinear):
    """AdaLoRA on a linear layer that bitsandbytes has quantised to 8 bits; see `SVDLinear`."""


class SVDLinear4bit(SVDLinear):
    """AdaLoRA on a linear layer that bitsandbytes has quantised to 4 bits; see `SVDLinear`."""


class SVDQuantLinear(SVDLinear):
    """AdaLoRA on a linear layer that GPTQ has quantised; see `SVDLinear`."""


# name of a backend -> AdaLoRA's layer for it
LAYER_OF_BACKEND: dict[str, type[SVDLinear]] = {
    "bnb 8bit": SVDLinear8bitLt,
    "bnb 4bit": SVDLinear4bit,
    "gptq": SVDQuantLinear,
}
