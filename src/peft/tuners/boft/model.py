# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""BOFT on a whole model."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...utils.constants import TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING
from ..families.rotations import RotationModel
from .layer import BOFTLayer, Conv2d, Linear


class BOFTModel(RotationModel):
    """
    A model with BOFT layers in it (Liu et al. 2023, arXiv:2311.06243).

    Args:
        model: the base model; it is changed in place.
        peft_config: a `BOFTConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the blocks on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import BOFTConfig, BOFTModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> BOFTModel(net, BOFTConfig(boft_block_size=4, target_modules=["0"]), "default").targeted_module_names
        ['0']
    """

    prefix = "boft_"
    tuner_layer_cls = BOFTLayer
    layer_classes = {nn.Conv2d: Conv2d, Conv1D: Linear, nn.Linear: Linear}
    target_module_mapping = TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING
