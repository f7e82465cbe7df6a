# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""AdaLoRA's layers on quantised linear layers, under the names that the released package has for each library."""

from ..families.quantized import layers_of_backends
from .layer import SVDLinear


_NAMES = {"bnb 8bit": "SVDLinear8bitLt", "bnb 4bit": "SVDLinear4bit", "gptq": "SVDQuantLinear"}

# name of a backend -> AdaLoRA's layer for it
LAYER_OF_BACKEND = layers_of_backends(SVDLinear, _NAMES, globals())
