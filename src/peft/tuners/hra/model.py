# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""HRA on a whole model."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING
from ..families.rotations import RotationModel
from .layer import HRAConv2d, HRALayer, HRALinear


class HRAModel(RotationModel):
    """
    A model with HRA layers in it (Yuan et al. 2024, arXiv:2405.17484).

    Args:
        model: the base model; it is changed in place.
        peft_config: an `HRAConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the directions on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import HRAConfig, HRAModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> HRAModel(net, HRAConfig(r=2, target_modules=["0"]), "default").targeted_module_names
        ['0']
    """

    prefix = "hra_"
    tuner_layer_cls = HRALayer
    layer_classes = {nn.Conv2d: HRAConv2d, Conv1D: HRALinear, nn.Linear: HRALinear}
    target_module_mapping = TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING
