# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""IA3 on a whole model."""

from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from .config import IA3Config
from .layer import IA3
from .quantized import LAYER_OF_BACKEND


class IA3Model(IA3.Model):
    """
    A model with IA3 layers in it (Liu et al. 2022, arXiv:2205.05638).

    Args:
        model: the base model; it is changed in place.
        peft_config: an `IA3Config`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the factors on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import IA3Config, IA3Model
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = IA3Model(net, IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]), "default")
        >>> [tuple(net[i].ia3_l["default"].shape) for i in (0, 2)]
        [(8, 1), (1, 8)]
    """

    joined_fields = ("target_modules", "feedforward_modules")
    quantized_layer_classes = LAYER_OF_BACKEND

    def _resolve_targets(self, model: nn.Module, config: IA3Config) -> None:
        super()._resolve_targets(model, config)
        if config.feedforward_modules is None:
            model_type = self.get_model_config(model).get("model_type")
            if model_type not in TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING:
                raise PeftValueError(
                    f"feedforward_modules was left out, and there is no default for model type {model_type!r}; name "
                    "the targets whose inputs are to be scaled, or give an empty list to scale outputs only"
                )
            config.feedforward_modules = set(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[model_type])


__getattr__ = old_names(__name__)
