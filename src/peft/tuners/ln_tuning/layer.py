# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LayerNorm tuning: a trained copy of the base layer per adapter."""

from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ..declared.method import method
from .config import LNTuningConfig


@method(
    "LN_TUNING",
    LNTuningConfig,
    kinds={nn.Module: "LNTuningLayer"},
    targets=TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING,
)
class LNTuning:
    """A layer of any class with trained copies of it; buffers such as running statistics belong to the copy too."""

    trained = ("layers",)


LNTuningLayer = LNTuning.Layer


__getattr__ = old_names(__name__)
