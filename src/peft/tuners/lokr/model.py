# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoKr on a whole model."""

from ...utils.old_names import old_names
from .layer import LoKr


class LoKrModel(LoKr.Model):
    """
    A model with LoKr layers in it (Yeh et al. 2023, arXiv:2309.14859).

    Args:
        model: the base model; it is changed in place.
        peft_config: a `LoKrConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the factors on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import LoKrConfig, LoKrModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> LoKrModel(net, LoKrConfig(r=2, target_modules=["0"]), "default").targeted_module_names
        ['0']
    """


__getattr__ = old_names(__name__)
