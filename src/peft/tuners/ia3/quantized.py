# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""IA3's layers on quantised linear layers, under the names that the released package has for them."""

from ..families.quantized import layers_of_backends
from .layer import Linear


# name of a backend -> IA3's layer for it
LAYER_OF_BACKEND = layers_of_backends(Linear, {"bnb 8bit": "Linear8bitLt", "bnb 4bit": "Linear4bit"}, globals())
