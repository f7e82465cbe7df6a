# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Wrappers around modules of the base model: what all of them have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..utils.error import PeftTypeError, PeftValueError
from ..utils.quantization_utils import resolve_quantization_backend
from .adapter_module import AdapterModule
from .call_context import names_of_rows


class AuxiliaryTrainingWrapper(AdapterModule, nn.Module):
    """
    A module of the base model together with what adapters train in its place.

    Subclasses say what is made for an adapter (`update`) and which module computes (`_current_module`).

    Args:
        module_to_save: the module of the base model.
        adapter_name: adapter to start with.
        kwargs: for `update`.
    """

    _base_names = ("original_module",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.original_module = module_to_save
        self._active_adapter: list[str] = [adapter_name]
        self.init_modules(adapter_name, **kwargs)
        self.check_module()
        self.update(adapter_name, **kwargs)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Make the containers for what adapters train."""

    def check_module(self) -> None:
        """
        Refuse modules that cannot be wrapped.

        Raises:
            PeftTypeError: for containers, which have no forward pass of their own.
        """
        check_wrappable(self.original_module)

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Make what an adapter trains here."""
        raise NotImplementedError

    def _current_module(self) -> nn.Module:
        """Give the module that computes at the moment."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Answer as the module that computes would, for what the wrapper itself lacks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or self._base_names[0] not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._current_module(), name)

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter, or names if there are several or none."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters that train something here."""
        return [name for name in self._active_adapter if self.has_adapter(name)]

    def choose(self, adapter_names: Sequence[str]) -> None:
        """Note which adapters of the model are active, without a change to what is trained."""
        self._active_adapter = list(adapter_names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Compute with the module that is in use.

        Args:
            args: passed on.
            kwargs: passed on, but for `adapter_names`: one name per sample, `"__base__"` for none.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            adapter_names = names_of_rows(self, args)
        if adapter_names is not None and not self._disable_adapters:
            return self._mixed_batch_forward(adapter_names, *args, **kwargs)
        return self._current_module()(*args, **kwargs)

    def _mixed_batch_forward(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise PeftValueError(f"{type(self).__name__} cannot compute a batch with an adapter per sample")

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        """
        Find which of these adapters would compute here.

        Raises:
            PeftValueError: if there are several, since only one can take the module's place.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        present = [name for name in names if name in self.available_adapters]
        if len(present) > 1:
            raise PeftValueError(
                f"adapters {', '.join(present)} all bring a {type(self.original_module).__name__} of their own, and "
                "only one can be used; activate one of them"
            )
        return present[0] if present else None

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """
        Choose the adapter that computes here; others are frozen.

        Args:
            adapter_names: one name or several, of which at most one may be present here.
            inference_mode: freeze the chosen one too.
        """
        chosen = self.check_set_adapter(adapter_names)
        self.choose([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        self.set_requires_grad(self.available_adapters - {chosen}, False)
        if chosen is not None:
            self.set_requires_grad([chosen], not inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """
        Remove what an adapter trains here; see `BaseTunerLayer.delete_adapter`.

        Args:
            adapter_name: name.
            new_active_adapters: names that are active afterwards.
        """
        was_trained = any(parameter.requires_grad for parameter in self.adapter_parameters(adapter_name))
        was_active = adapter_name in self._active_adapter
        self.remove_adapter(adapter_name)
        if was_active and len(self._active_adapter) == 1:
            self.set_adapter(new_active_adapters or [], inference_mode=not was_trained)
        elif was_active:
            self.choose([name for name in self._active_adapter if name != adapter_name])

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Give the mapping of keys in a checkpoint to keys in this module's state dict."""
        return dict(self.adapter_keys(adapter_name))

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Pick an adapter's tensors.

        Args:
            adapter_name: name.
            state_dict: this module's state dict.
        """
        return {saved: state_dict[live] for saved, live in self.adapter_keys(adapter_name)}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """
        Give the module that shall take the wrapper's place.

        Args:
            merge: whether the adapter's part is kept.
            safe_merge: refuse tensors that are not finite.
            adapter_names: which adapter; the active one if left out.
        """
        raise NotImplementedError


def check_wrappable(module: nn.Module, name: str = "") -> None:
    """
    Refuse modules that cannot be trained in full by a wrapper.

    Raises:
        PeftTypeError: for containers, which have no forward pass of their own, and for quantised layers.
    """
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        raise PeftTypeError(
            f"modules_to_save cannot hold {name or 'a module'}, which is a {type(module).__name__} and has no forward "
            "pass of its own; name the modules inside it"
        )
    for backend in filter(None, map(resolve_quantization_backend, module.modules())):
        raise PeftTypeError(
            f"modules_to_save cannot hold {name or 'a module'}, whose weight is quantised ({backend.name}) and cannot "
            "be trained; adapt it as a target, or exclude it when the model is quantised"
        )
