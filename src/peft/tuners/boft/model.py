# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""BOFT on a whole model."""

from ...utils.old_names import old_names
from .layer import BOFT


class BOFTModel(BOFT.Model):
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


__getattr__ = old_names(__name__)
