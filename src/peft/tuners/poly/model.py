# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Poly on a whole model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...layers.call_context import call_with
from ...utils.old_names import old_names
from .layer import Poly


class PolyModel(Poly.Model):
    """
    A model with Poly layers in it (Ponti et al. 2022, arXiv:2202.13914).

    Args:
        model: the base model; it is changed in place.
        config: a `PolyConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make its tensors on the meta device, to be filled by loading a checkpoint.
        kwargs: `state_dict`: adapter tensors; if given, the modules named by its keys are adapted.

    Raises:
        PeftValueError: if `n_splits` does not divide the inputs and outputs of a target.

    Example:

        >>> import torch
        >>> from peft import PolyConfig, PolyModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> config = PolyConfig(r=2, n_tasks=3, target_modules=["0"], init_weights=False)
        >>> model = PolyModel(net, config, "default").eval()
        >>> outputs = model(torch.ones(3, 4), task_ids=[2, 0, 2])
        >>> torch.equal(outputs[0], outputs[2]), torch.equal(outputs[0], outputs[1])
        (True, False)
    """

    def __init__(
        self, model: nn.Module, config: Any, adapter_name: str, low_cpu_mem_usage: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(model, config, adapter_name, low_cpu_mem_usage, **kwargs)

    def forward(self, *args: Any, task_ids: torch.Tensor | Sequence[int] | None = None, **kwargs: Any) -> Any:
        """
        Call the base model.

        Args:
            args: passed on.
            task_ids: (batch,) task of each sample; may be left out where there is one task.
            kwargs: passed on.
        """
        return self._call(super().forward, args, kwargs, task_ids)

    def generate(self, *args: Any, task_ids: torch.Tensor | Sequence[int] | None = None, **kwargs: Any) -> Any:
        """
        Generate with the base model.

        Args:
            args: passed on.
            task_ids: (batch,) task of each sample; beams and several outputs of one sample have its task.
            kwargs: passed on.
        """
        return self._call(self.model.generate, args, kwargs, task_ids, repeats=True)

    @staticmethod
    def _call(function: Any, args: tuple, kwargs: dict[str, Any], task_ids: Any, **changes: Any) -> Any:
        if task_ids is None:
            return function(*args, **kwargs)
        return call_with(function, args, kwargs, task_ids=task_ids, **changes)


__getattr__ = old_names(__name__)
