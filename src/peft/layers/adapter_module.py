# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What all that is put into a model has in common: layers, wrappers, prompts.

Saving, loading, switching and walking a model ask for nothing else, and so treat all of them alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .borrowing import Borrowed
from .containers import keys_in, parameters_in
from .saved_form import JoinedForm, SavedForm


class AdapterModule:
    """
    A module that this package has put into a model.

    Attributes:
        adapter_layer_names: attributes that hold trainable tensors by adapter name.
        other_param_names: attributes that hold other settings by adapter name.
    """

    _is_adapter_module = True
    # attributes that hold modules of the base model, the one whose place this module has taken first
    _base_names: tuple[str, ...] = ()

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    # whether tensors that layers share stand on the tuner alone, and not on each layer too
    shares_on_tuner: bool = False

    _active_adapter: str | list[str] = "default"
    _disable_adapters: bool = False
    _borrowed: Mapping[str, list[Borrowed]] = MappingProxyType({})
    _borrowers: Iterable["AdapterModule"] = ()
    # While adapters are switched off: adapter name -> numbers of its parameters that were trained before. By number,
    # since parameters may be replaced meanwhile.
    _trained_before: dict[str, set[int]] | None = None

    # ------------------------------------------------------------------------------------------------------- adapters
    def _containers(self) -> list[tuple[str, Any]]:
        """List the name and the content of each attribute that holds tensors by adapter name."""
        held = self._modules
        return [(name, held[name]) for name in self.adapter_layer_names if held.get(name) is not None]

    @property
    def available_adapters(self) -> set[str]:
        """Names of the adapters that have something here."""
        return {name for _, container in self._containers() for name in container.keys()}

    def has_adapter(self, adapter_name: str) -> bool:
        """Say whether an adapter has something here."""
        return adapter_name in self.available_adapters

    def source(self, adapter_name: str) -> "AdapterModule":
        """Give the module that has an adapter's tensors: this one, unless it follows another."""
        return self

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter, or names if several are active."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; not all of them need have something here."""
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are part of the base weight, in the order of merging."""
        return []

    def enable_adapters(self, enabled: bool) -> None:
        """
        Switch adapters on or off.

        Args:
            enabled: True to switch on. What was trainable before is trainable again.
        """
        self._disable_adapters = not enabled
        if enabled:
            self.train_as_before()
        else:
            self.freeze_while_off(self.available_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the adapters that are used; others are frozen.

        Args:
            adapter_names: one name or several.
            inference_mode: freeze the chosen ones too.
        """
        raise NotImplementedError

    def remove_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter's tensors and settings, without a change to which are active.

        Args:
            adapter_name: name; a module that does not have it stays as it is.
        """
        self.give_back(adapter_name)
        for name in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, name, None)
            # settings may be plain values, one for all adapters
            if hasattr(container, "keys") and adapter_name in container:
                del container[adapter_name]
        self.forget_trained_before(adapter_name)

    # ---------------------------------------------------------------------------------- parameters that are others'
    def borrow(self, adapter_name: str, borrowed: Iterable[Borrowed], owner: "AdapterModule | None" = None) -> None:
        """
        Hold parameters of others in the places of own ones, and go on doing so whatever replaces parameters.

        Moving a model to the meta device replaces the parameters of each module by new ones, and so does
        `load_state_dict(..., assign=True)`. What is trained as one would be two afterwards.

        Args:
            adapter_name: the adapter that the parameters belong to.
            borrowed: where they are, and whose they are.
            owner: the adapter module that has them, if it is not this one's base module.
        """
        self.__dict__.setdefault("_borrowed", {})[adapter_name] = list(borrowed)
        _notice_loading(self)
        if owner is not None and self not in owner._borrowers:
            owner.__dict__.setdefault("_borrowers", []).append(self)
            _notice_loading(owner)
        self.take_borrowed()

    def take_borrowed(self) -> None:
        """Hold the parameters of others again; those who hold some of this module's do the same."""
        for borrowed in self._borrowed.values():
            for place in borrowed:
                place.take()
        for borrower in self._borrowers:
            borrower.take_borrowed()

    def give_back(self, adapter_name: str) -> None:
        """Forget which parameters of an adapter are others', since it is deleted."""
        if adapter_name in self._borrowed:
            del self.__dict__["_borrowed"][adapter_name]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move or cast the module as torch does."""
        super()._apply(fn, recurse)
        self.take_borrowed()
        return self

    def train(self, mode: bool = True) -> Any:
        """
        Set the mode, and tie again what was parted by a loader that replaces parameters one by one.

        Args:
            mode: False to evaluate.

        Returns:
            The module.
        """
        self.take_borrowed()
        return super().train(mode)

    # ------------------------------------------------------------------------------------------------------- training
    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of one adapter."""
        return parameters_in(self._containers(), adapter_name)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """
        Freeze adapters or let them be trained, without a change to which are active.

        Args:
            adapter_names: one name or several; names that are not here are passed over.
            requires_grad: False to freeze.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.forget_trained_before(name)
            for parameter in self.adapter_parameters(name):
                if parameter.is_floating_point():
                    parameter.requires_grad_(requires_grad)

    def freeze_while_off(self, adapter_names: Iterable[str]) -> None:
        """
        Freeze adapters because they are switched off, and note which of their parameters were trained.

        Args:
            adapter_names: names.
        """
        noted = self._trained_before or {}
        for name in adapter_names:
            trained = [(i, p) for i, p in enumerate(self.adapter_parameters(name)) if p.requires_grad]
            for number, parameter in trained:
                parameter.requires_grad_(False)
                noted.setdefault(name, set()).add(number)
        self.__dict__["_trained_before"] = noted or None

    def train_as_before(self) -> None:
        """Let those parameters be trained again that were trained when adapters were switched off."""
        noted = self._trained_before or {}
        self.__dict__["_trained_before"] = None
        for name, numbers in noted.items():
            for number, parameter in enumerate(self.adapter_parameters(name)):
                if number in numbers:
                    parameter.requires_grad_(True)

    def forget_trained_before(self, adapter_name: str) -> None:
        """Drop what was noted about an adapter, since somebody has decided otherwise meanwhile."""
        if self._trained_before:
            self._trained_before.pop(adapter_name, None)

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """
        Yield for each tensor of an adapter its key in a checkpoint and its key in this module's state dict.

        The two differ by the adapter's name, which checkpoints leave out.
        """
        return keys_in(self._containers(), adapter_name)

    def shared_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield the same for the tensors that layers share, which a checkpoint holds once."""
        yield from ()

    def repeated_keys(self, adapter_name: str) -> Iterator[str]:
        """Yield those of their keys in a checkpoint that stand there under this module too."""
        yield from ()

    def adapter_aliases(self, adapter_name: str) -> Iterator[tuple[str, str, bool]]:
        """
        Yield what a checkpoint holds for this module although the tensors are those of the one that it follows.

        Yields:
            Key in a checkpoint, key of the tensor in the owner's state dict, and whether it is to be transposed.
        """
        yield from ()

    def saved_forms(self, adapter_name: str) -> Mapping[str, SavedForm]:
        """
        Say which tensors stand in a checkpoint in another form than in the model, or can do so.

        Args:
            adapter_name: name of an adapter that this module has, itself or from the one that it follows.

        Returns:
            Key, as `adapter_keys` or `adapter_aliases` yield it first -> form.
        """
        return {}

    def joined_forms(self, adapter_name: str) -> Mapping[str, JoinedForm]:
        """
        Say which tensors of a checkpoint stand for several ones of the model.

        Args:
            adapter_name: name of an adapter that this module has.

        Returns:
            Key in a checkpoint -> form, whose names are keys as `adapter_keys` yields them first.
        """
        return {}

    def optional_keys(self, adapter_name: str) -> tuple[str, ...]:
        """
        Name the tensors that a checkpoint may lack without a word, since they follow from the base model as it is.

        Args:
            adapter_name: name of an adapter that this module has, itself or from the one that it follows.

        Returns:
            Keys, as `adapter_keys` or `adapter_aliases` yield them first.
        """
        return ()

    def ignored_keys(self, adapter_name: str) -> Iterator[str]:
        """Yield keys of tensors that a checkpoint may hold without a word although nothing uses them."""
        yield from ()

    def is_whole(self, adapter_name: str, key: str, tensor: torch.Tensor) -> bool:
        """
        Say whether a tensor is what this module has, and not the part of it that one of several processes holds.

        Args:
            adapter_name: name of an adapter that this module has.
            key: as `adapter_keys` yields it first.
            tensor: what is going to be saved under it.
        """
        return True

    def fill_missing(self, adapter_name: str, config: Any) -> None:
        """
        Start tensors of an adapter that a checkpoint has left without storage.

        Args:
            adapter_name: name.
            config: the adapter's config.
        """

    def computed_tensors(
        self, adapter_name: str, state_dict: Mapping[str, torch.Tensor], prefix: str
    ) -> dict[str, torch.Tensor]:
        """
        Give tensors of a checkpoint that follow from those of the model, instead of standing in it.

        Args:
            adapter_name: name.
            state_dict: the model's state dict.
            prefix: what keys of this module start with in it.

        Returns:
            Key in a checkpoint -> tensor; they replace what `adapter_keys` tells.
        """
        return {}

    def prepare_to_load(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Make room for the tensors of a checkpoint, where they have another form than those of the model.

        Args:
            adapter_name: name.
            tensors: key in a checkpoint -> tensor. They are not checked yet.
        """


def _notice_loading(module: AdapterModule) -> None:
    """Let a module take what it has borrowed after each `load_state_dict`, of it or of a module around it."""
    if _take_after_loading not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_take_after_loading)


def _take_after_loading(module: AdapterModule, incompatible_keys: Any) -> None:
    module.take_borrowed()
