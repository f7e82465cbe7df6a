# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What authors of methods need, inside the package and outside of it."""

from .anatomy.kinds import apply_weight
from .config import TyingConfig
from .configs.checks import check_counts, check_layer_selection, check_magnitudes
from .configs.fields import Indices, Names, option, shared_field
from .layers.activation import ActivationLayer
from .layers.additive import AdditiveLayer
from .layers.replacement import ReplacementLayer
from .layers.saved_form import SavedForm
from .layers.scaling import Scaled
from .layers.weight import WeightLayer
from .registry import register_peft_method
from .tuners.base import BaseTuner
from .tuners.declared.layers import (
    DeclaredActivation,
    DeclaredAdditive,
    DeclaredLayer,
    DeclaredReplacement,
    DeclaredWeight,
)
from .tuners.declared.method import DeclaredModel, method
from .tuners.declared.tensors import Frozen, Kept, Shape, Tensors, Trained, TrainedModule
from .tuners.lora.starts import Start, register_start
from .tuners.lora.variants import LoraVariant, register_variant
from .tuners.targets import UnsupportedLayerError
from .utils.error import PeftValueError
from .utils.warning import warn


__all__ = [
    "ActivationLayer",
    "AdditiveLayer",
    "BaseTuner",
    "DeclaredActivation",
    "DeclaredAdditive",
    "DeclaredLayer",
    "DeclaredModel",
    "DeclaredReplacement",
    "DeclaredWeight",
    "Frozen",
    "Indices",
    "Kept",
    "LoraVariant",
    "Names",
    "PeftValueError",
    "ReplacementLayer",
    "SavedForm",
    "Scaled",
    "Shape",
    "Start",
    "Tensors",
    "Trained",
    "TrainedModule",
    "TyingConfig",
    "UnsupportedLayerError",
    "WeightLayer",
    "apply_weight",
    "check_counts",
    "check_layer_selection",
    "check_magnitudes",
    "method",
    "option",
    "register_peft_method",
    "register_start",
    "register_variant",
    "shared_field",
    "warn",
]
