# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""TinyLoRA on a whole model."""

from typing import Any

from torch import nn

from ...utils.old_names import old_names
from .layer import TinyLora


class TinyLoraModel(TinyLora.Model):
    """
    A model with TinyLoRA layers in it (Morris et al. 2026, arXiv:2602.04118).

    Args:
        model: the base model; it is changed in place.
        config: a `TinyLoraConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: has no effect here, as what is not in a checkpoint has to be computed.
        kwargs: `state_dict`: adapter tensors; if given, the modules named by its keys are adapted.

    Raises:
        PeftConfigError: if adapters differ in `save_projection`.

    Example:

        >>> import torch
        >>> from peft import TinyLoraConfig, TinyLoraModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> model = TinyLoraModel(net, TinyLoraConfig(u=3, target_modules=["0", "2"]), "default")
        >>> {group: tuple(v.shape) for group, v in model.tinylora_v["default"].items()}
        {'0': (3,), '1': (3,)}
    """

    def __init__(
        self, model: nn.Module, config: Any, adapter_name: str, low_cpu_mem_usage: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(model, config, adapter_name, low_cpu_mem_usage, **kwargs)


__getattr__ = old_names(__name__)
