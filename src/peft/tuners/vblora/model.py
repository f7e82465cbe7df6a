# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""VB-LoRA on a whole model."""

from ...utils.old_names import old_names
from .layer import VBLoRA


class VBLoRAModel(VBLoRA.Model):
    """
    A model with VB-LoRA layers in it (Li et al. 2024, arXiv:2405.15179).

    Args:
        model: the base model; it is changed in place.
        peft_config: a `VBLoRAConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the logits on the meta device; the bank, which is small, is made anyway.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Raises:
        PeftValueError: if sizes do not fit each other or a target.

    Example:

        >>> import torch
        >>> from peft import VBLoRAConfig, VBLoRAModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> config = VBLoRAConfig(r=2, num_vectors=6, vector_length=2, target_modules=["0", "2"])
        >>> model = VBLoRAModel(net, config, "default")
        >>> net[0].vblora_vector_bank["default"] is net[2].vblora_vector_bank["default"]
        True
    """


__getattr__ = old_names(__name__)
