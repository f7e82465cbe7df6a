# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LayerNorm tuning's layer: a trained copy of the base layer per adapter."""

from torch import nn

from ...layers.replacement import ReplacementLayer
from ...utils.old_names import old_names


class LNTuningLayer(ReplacementLayer, nn.Module):
    """
    A layer of any class with trained copies of it; buffers such as running statistics belong to the copy too.

    Attributes:
        ln_tuning_layers: copies by adapter name.
    """

    adapter_layer_names = ("ln_tuning_layers",)
    container_classes = {"ln_tuning_layers": nn.ModuleDict}


__getattr__ = old_names(__name__)
