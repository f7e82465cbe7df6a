# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Changes to a model that happen as a whole or not at all.

Whatever changes a model opens `all_or_nothing` around it. What was there is noted once, by the outermost of such
contexts, in one walk that copies no tensor. What a walk cannot see is told to `layers.undo`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layers.base_changes import deferring_base_changes
from ..layers.undo import undoing, who_undoes
from .slots import without_collecting


_CONTAINERS = (dict, list, set)


class _Before:
    """What models were before they are changed."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        # attributes of modules, configs and merge states: the dictionary that holds them, and a copy of it
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        # containers among them, which are filled again in place, since others may refer to them: with a copy, or
        # without one if they were empty, as nearly all are
        self._containers: list[Any] = []
        self._objects: dict[int, Any] = {}
        self._trainable: dict[int, tuple[nn.Parameter, bool]] = {}
        self._buffers: dict[int, torch.Tensor] = {}
        self._values: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._ways_back: list[Callable[[], Any]] = []

    @without_collecting
    def note(self, roots: Iterable[nn.Module]) -> None:
        """Note all modules of models that are not noted yet."""
        stack = list(roots)
        seen = self._modules
        while stack:
            module = stack.pop()
            if id(module) in seen:
                continue
            seen[id(module)] = module
            attributes = module.__dict__
            self._note_attributes(attributes)
            for parameter in attributes["_parameters"].values():
                if parameter is not None:
                    self._trainable[id(parameter)] = (parameter, parameter.requires_grad)
            for buffer in attributes["_buffers"].values():
                if buffer is not None:
                    self._buffers[id(buffer)] = buffer
            stack.extend(child for child in module._modules.values() if child is not None)
            if "_merge_state" in attributes:
                self._note_merge_state(attributes["_merge_state"])
            configs = attributes.get("peft_config")
            for config in configs.values() if isinstance(configs, dict) else ():
                self._note_object(config)

    def has_noted(self, is_wanted: Callable[[nn.Module], bool]) -> bool:
        """Say whether one of the modules that were noted is wanted."""
        return any(map(is_wanted, self._modules.values()))

    def _note_attributes(self, attributes: dict[str, Any]) -> None:
        self._attributes.append((attributes, attributes.copy()))
        for value in attributes.values():
            if isinstance(value, _CONTAINERS):
                self._containers.append((value, value.copy()) if value else value)

    def _note_object(self, thing: Any) -> bool:
        """Note the attributes of something that is no module; say whether they were not noted yet."""
        if id(thing) in self._objects:
            return False
        self._objects[id(thing)] = thing
        self._note_attributes(thing.__dict__)
        return True

    def _note_merge_state(self, state: Any) -> None:
        if self._note_object(state):
            for original in state.originals:
                self._note_object(original)

    def keep_values(self, tensor: torch.Tensor) -> None:
        """Copy a tensor, if it was there before."""
        noted = id(tensor) in self._trainable or id(tensor) in self._buffers
        if noted and id(tensor) not in self._values:
            self._values[id(tensor)] = (tensor, tensor.data, tensor.detach().clone())

    def on_failure(self, way_back: Callable[[], Any]) -> None:
        """Note what has to be called to undo something."""
        self._ways_back.append(way_back)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make everything that was noted what it was."""
        for way_back in reversed(self._ways_back):
            way_back()
        for tensor, memory, values in self._values.values():
            tensor.data = memory
            tensor.copy_(values)
        for attributes, kept in self._attributes:
            for name in attributes.keys() - kept.keys():
                del attributes[name]
            attributes.update(kept)
        for entry in reversed(self._containers):  # what was noted first counts
            container, kept = entry if isinstance(entry, tuple) else (entry, ())
            container.clear()
            container.extend(kept) if isinstance(container, list) else container.update(kept)
        for parameter, wants_grad in self._trainable.values():
            if parameter.requires_grad != wants_grad:
                parameter.requires_grad_(wants_grad)


@contextmanager
def all_or_nothing(*models: nn.Module) -> Iterator[None]:
    """
    Put models back as they were if something is raised inside.

    That is: modules and their places, settings and hooks, which parameters there are and which are trained, configs of
    adapters, what is merged, and the values of tensors that `keep_values` was told of. Changes of base weights that go
    through `change_base` are put off until the end. Inside of another such context only what that one lacks is noted:
    an exception has to reach the outermost one.

    Args:
        models: what is going to be changed.
    """
    outer = who_undoes()
    if outer is not None:
        outer.note(models)
        yield
        return
    before = _Before()
    before.note(models)
    with undoing(before):
        try:
            with deferring_base_changes():
                yield
        except BaseException:
            before.put_back()
            raise
