# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Uni-LoRA on a whole model."""

from typing import Any

import torch
from torch import nn

from ...utils.old_names import old_names
from .layer import UniLora
from .maths import positions


class UniLoraModel(UniLora.Model):
    """
    A model with Uni-LoRA layers in it (Li et al. 2025, arXiv:2506.00799).

    Args:
        model: the base model; it is changed in place.
        config: a `UniLoraConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: has no effect here, as what is not in a checkpoint has to be computed.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import UniLoraConfig, UniLoraModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> model = UniLoraModel(net, UniLoraConfig(theta_d_length=10, target_modules=["0", "2"]), "default")
        >>> tuple(model.unilora_theta_d["default"].shape)
        (10,)
    """

    def __init__(
        self, model: nn.Module, config: Any, adapter_name: str, low_cpu_mem_usage: bool = False, state_dict: Any = None
    ) -> None:
        super().__init__(model, config, adapter_name, low_cpu_mem_usage, state_dict)

    @staticmethod
    def generate_index(lora_param_count: int, theta_d_length: int, proj_seed: int) -> torch.Tensor:
        """
        Draw which entry of a vector goes to which place.

        Args:
            lora_param_count: how many places there are.
            theta_d_length: how many entries the vector has.
            proj_seed: seed.

        Returns:
            (lora_param_count,), each entry as often as the others, give or take one.

        Raises:
            PeftValueError: for a negative count, or a length that is not positive.
        """
        return positions(lora_param_count, theta_d_length, proj_seed)[0].clone()


__getattr__ = old_names(__name__)
