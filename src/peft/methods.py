# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What authors of methods need, inside the package and outside of it."""

from .anatomy.kinds import apply_weight
from .config import TyingConfig, check_layer_selection
from .layers.scaling import Scaled
from .tuners.base import UnsupportedLayerError
from .tuners.declared import (
    DeclaredActivation,
    DeclaredAdditive,
    DeclaredLayer,
    DeclaredModel,
    DeclaredReplacement,
    DeclaredWeight,
    Frozen,
    Kept,
    Shape,
    Tensors,
    Trained,
    TrainedModule,
    method,
)
from .tuners.lora.starts import Start, register_start
from .tuners.lora.variants import LoraVariant, register_variant
from .utils.error import PeftValueError


__all__ = [
    "DeclaredActivation",
    "DeclaredAdditive",
    "DeclaredLayer",
    "DeclaredModel",
    "DeclaredReplacement",
    "DeclaredWeight",
    "Frozen",
    "Kept",
    "LoraVariant",
    "PeftValueError",
    "Scaled",
    "Shape",
    "Start",
    "Tensors",
    "Trained",
    "TrainedModule",
    "TyingConfig",
    "UnsupportedLayerError",
    "apply_weight",
    "check_layer_selection",
    "method",
    "register_start",
    "register_variant",
]
