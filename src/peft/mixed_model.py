# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`PeftMixedModel`: several adapters active at once, for inference."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils.hub import PushToHubMixin

from .config import PeftConfig
from .mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from .peft_model import PeftModel
from .utils.error import PeftNotImplementedError, PeftValueError


__all__ = ["PeftMixedModel"]


class PeftMixedModel(PushToHubMixin, nn.Module):
    """
    A base model of whose adapters several can be active at once.

    In this version all adapters are of one method.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how.
        adapter_name: name of the adapter.

    Raises:
        PeftValueError: for methods whose adapters cannot be active beside others.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"]), adapter_name="a", mixed=True)
        >>> model.add_adapter("b", LoraConfig(target_modules=["0"]))
        >>> model.set_adapter(["a", "b"])
        >>> model.active_adapters
        ['a', 'b']
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> None:
        super().__init__()
        self._check_method(peft_config)
        self.base_model = PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_config.peft_type](
            model, {adapter_name: peft_config}, adapter_name
        )

    @staticmethod
    def _check_method(peft_config: PeftConfig) -> None:
        if peft_config.peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
            raise PeftValueError(
                f"adapters of method {peft_config.peft_type} cannot be active beside others; methods that can: "
                f"{', '.join(getattr(key, 'value', key) for key in PEFT_TYPE_TO_MIXED_MODEL_MAPPING)}"
            )

    def __getattr__(self, name: str) -> Any:
        """Forward what the wrapper lacks to the tuner and the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "_modules" not in self.__dict__:  # while unpickling
                raise
            return getattr(self.base_model, name)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> config as it applies to this model."""
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        """Name or names of the active adapters."""
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self.base_model.active_adapters

    get_nb_trainable_parameters = PeftModel.get_nb_trainable_parameters
    print_trainable_parameters = PeftModel.print_trainable_parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base model."""
        return self.base_model.model.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch all adapters off inside a context."""
        with self.base_model.adapters_disabled():
            yield

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """
        Put another adapter beside those that the model has. It is not active at first.

        Args:
            adapter_name: its name.
            peft_config: what to adapt and how.
            low_cpu_mem_usage: make its tensors on the meta device.
            autocast_adapter_dtype: keep them in float32 where the base is in half precision.

        Raises:
            PeftNotImplementedError: for a method other than that of the first adapter.
        """
        self._check_method(peft_config)
        if any(config.peft_type != peft_config.peft_type for config in self.peft_config.values()):
            raise PeftNotImplementedError("adapters of different methods on one model are not part of this version")
        if adapter_name in self.peft_config:
            raise PeftValueError(f"there is an adapter named {adapter_name!r} already; delete it or use another name")
        self.base_model.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the adapters that are used; others are frozen.

        Args:
            adapter_name: one name or several.
            inference_mode: freeze the chosen ones too.

        Raises:
            PeftValueError: for a name that the model does not have.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown:
            raise PeftValueError(
                f"there is no adapter {', '.join(unknown)}; the model has {', '.join(self.peft_config)}"
            )
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        self.base_model.delete_adapter(adapter_name)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge the active adapters and give the base model back; see `BaseTuner.merge_and_unload`."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Give the base model back as it was."""
        return self.base_model.unload(*args, **kwargs)
