# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""HRA on a whole model."""

from ...utils.old_names import old_names
from .layer import HRA


class HRAModel(HRA.Model):
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


__getattr__ = old_names(__name__)
