# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""OFT on a whole model."""

from ...utils.old_names import old_names
from .layer import OFT


class OFTModel(OFT.Model):
    """
    A model with OFT layers in it (Qiu et al. 2023, arXiv:2306.07280; Qiu et al. 2025, arXiv:2506.19847).

    Args:
        model: the base model; it is changed in place.
        peft_config: an `OFTConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the rotations on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import OFTConfig, OFTModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> OFTModel(net, OFTConfig(oft_block_size=4, target_modules=["0"]), "default").targeted_module_names
        ['0']
    """


__getattr__ = old_names(__name__)
