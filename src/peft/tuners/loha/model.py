# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoHa on a whole model."""

from ...utils.old_names import old_names
from .layer import LoHa


class LoHaModel(LoHa.Model):
    """
    A model with LoHa layers in it (Hyeon-Woo et al. 2021, arXiv:2108.06098).

    Args:
        model: the base model; it is changed in place.
        peft_config: a `LoHaConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the factors on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import LoHaConfig, LoHaModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> LoHaModel(net, LoHaConfig(r=2, target_modules=["0"]), "default").targeted_module_names
        ['0']
    """


__getattr__ = old_names(__name__)
