# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""OSF on a whole model."""

from typing import Any

import torch
from torch import nn

from ...config import PeftConfig
from ...utils.old_names import old_names
from .layer import OSF


class OSFModel(OSF.Model):
    """
    A model with OSF.

    Args:
        model: the base model.
        config: config of the first adapter, or configs by name.
        adapter_name: its name.
        low_cpu_mem_usage: leave the adapter's tensors without content, for a checkpoint.
        state_dict: keys of a checkpoint; modules that it does not have are left out.

    Example:

        >>> import torch
        >>> from peft import OSFConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), OSFConfig(target_modules=["0"]))
        >>> model.get_base_model()[0].effective_rank
        {'default': 2}
    """

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(model, config, adapter_name, low_cpu_mem_usage, state_dict)

    def unmerge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """
        Take merged adapters out of the base weights, which the released package refuses.

        Args:
            args: for callers of the released package.
            kwargs: likewise.
        """
        super().unmerge_adapter()


__getattr__ = old_names(__name__)
