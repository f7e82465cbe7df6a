# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""AdaMSS on a whole model."""

from typing import Any

from torch import nn

from ...utils.old_names import old_names
from .layer import Adamss


class AdamssModel(Adamss.Model):
    """
    A model with AdaMSS adapters in it (Zheng et al., NeurIPS 2025).

    Args:
        model: the base model; it is changed in place.
        config: an `AdamssConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make tensors without storage, to be filled from a checkpoint.
        state_dict: tensors that tell which modules are adapted, in place of the config's targets.

    Example:

        >>> import torch
        >>> from peft import AdamssConfig, AdamssModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> config = AdamssConfig(r=4, num_subspaces=2, target_modules=["0"])
        >>> AdamssModel(net, config=config, adapter_name="default").targeted_module_names
        ['0']
    """

    def __init__(
        self, model: nn.Module, config: Any, adapter_name: str, low_cpu_mem_usage: bool = False, state_dict: Any = None
    ) -> None:
        super().__init__(model, config, adapter_name, low_cpu_mem_usage, state_dict)


__getattr__ = old_names(__name__)
