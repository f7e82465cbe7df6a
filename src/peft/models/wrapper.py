# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What `PeftModel` and `PeftMixedModel` have in common: a base model inside, counted and described."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils.hub import PushToHubMixin

from ..checkpoints.load_report import LoadReport
from ..config import PeftConfig
from ..utils.error import PeftValueError
from ..utils.near_names import explain_unknown_adapters
from .status import TunerLayerStatus, TunerModelStatus, count_parameters, get_layer_status, get_model_status


class ModelWrapper(PushToHubMixin, nn.Module):
    """
    A model around what manages the adapters of a base model.

    Attributes:
        base_model: the tuner, which holds the base model.
        load_reports: adapter name -> `LoadReport`, for adapters that were loaded from a checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.load_reports: dict[str, LoadReport] = {}

    def __getattr__(self, name: str) -> Any:
        """Forward what the wrapper lacks to the tuner and the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "_modules" not in self.__dict__:  # while unpickling
                raise
            return getattr(self.base_model, name)

    @property
    def _tuner(self) -> Any:
        """What manages the adapters."""
        return self.base_model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> config as it applies to this model."""
        return self._tuner.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self._tuner.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self._tuner.active_adapters

    def get_base_model(self) -> nn.Module:
        """Give the base model, with adapter layers in it."""
        return self.base_model.model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """
        Switch all adapters off inside a context; the model computes what the base model does.

        Example:

            >>> import torch
            >>> from peft import LoraConfig, get_peft_model
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
            >>> x = torch.ones(1, 4)
            >>> expected = net(x)
            >>> model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
            >>> with model.disable_adapter():
            ...     torch.equal(model(x), expected)
            True
        """
        with self._tuner.adapters_disabled():
            yield

    def _check_names(self, adapter_names: Iterable[str]) -> None:
        """Refuse names of adapters that the model does not have."""
        unknown = sorted(set(adapter_names) - set(self.peft_config))
        if unknown:
            raise PeftValueError(explain_unknown_adapters(unknown, self.peft_config))

    def _check_name_is_free(self, adapter_name: str) -> None:
        if adapter_name in self.peft_config:
            raise PeftValueError(f"there is an adapter named {adapter_name!r} already; delete it or use another name")

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """
        Count parameters; one that several modules share counts once.

        Returns:
            Trainable parameters, all parameters.
        """
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """
        Print how many parameters are trained.

        Example:

            >>> import torch
            >>> from peft import LoraConfig, get_peft_model
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
            >>> get_peft_model(net, LoraConfig(r=2, target_modules=["0"])).print_trainable_parameters()
            trainable params: 16 || all params: 36 || trainable%: 44.4444
        """
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Say in which state each adapter layer and training wrapper is; see `peft.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Say in which state the adapters are; see `peft.get_model_status`."""
        return get_model_status(self)
