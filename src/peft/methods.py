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
    "PeftValueError",
    "Scaled",
    "Shape",
    "Tensors",
    "Trained",
    "TrainedModule",
    "TyingConfig",
    "UnsupportedLayerError",
    "apply_weight",
    "check_layer_selection",
    "method",
]
