# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
A model as one walk has seen it.

Whoever asks a model many questions at once, as an injection does, opens `viewing` around them: the functions of
`walking` then answer from what was seen, and whoever replaces a module (`surgery.slots`) says so here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from torch import nn

from . import walking


class ModelView:
    """
    The modules of a model, their names, and the places where they stand.

    Args:
        model: the model, with or without adapters in it.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._look()

    def _look(self) -> None:
        """Walk the model."""
        self.modules: list[tuple[str, nn.Module]] = []
        # id of a module -> what it holds, which stays true while modules are replaced
        self._children: dict[int, walking.Children] = {}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for name, module, children in walking.walk_with_children(self.model, into_bases=True):
            self.modules.append((name, module))
            self._children[id(module)] = children
            for key, child in children.items():
                if child is not None:
                    self._places.setdefault(id(child), []).append((module, key))
        self._forget_answers()

    def _forget_answers(self) -> None:
        self._is_stale = False
        # id of a module -> adapter modules that were put around it since, the innermost first
        self._around: dict[int, list[nn.Module]] = {}
        for answer in ("names", "outside", "base", "_seen_ids", "_names_of"):
            self.__dict__.pop(answer, None)

    def _refresh(self) -> None:
        if self._is_stale:
            self._look()

    def walk(self, into_bases: bool) -> Iterator[tuple[str, nn.Module]]:
        """Yield what `walking.walk` does."""
        self._refresh()
        for name, module in self.modules if into_bases else self.outside:
            around = self._around.get(id(module), ())
            for outer in reversed(around):
                yield name, outer
                name = f"{name}.{outer._base_names[0]}"
            if into_bases or not around:
                yield name, module

    @cached_property
    def outside(self) -> list[tuple[str, nn.Module]]:
        """The modules, without those inside of adapter modules."""
        if not any(walking.is_adapter_module(module) for _, module in self.modules):
            return self.modules
        seen = walking.walk_with_children(self.model, into_bases=False, children_of=self._children_of)
        return [(name, module) for name, module, _ in seen]

    def _children_of(self, module: nn.Module) -> walking.Children:
        """Give what a module holds; only what was put in since has not been seen."""
        children = self._children.get(id(module))
        return walking.children_of(module) if children is None else children

    @cached_property
    def base(self) -> list[nn.Module]:
        """The modules of the base model."""
        return [module for _, module in self.modules if not walking.is_adapter_module(module)]

    def base_modules(self) -> list[nn.Module]:
        """Give what `walking.base_modules` does."""
        self._refresh()
        return self.base

    @cached_property
    def names(self) -> dict[str, nn.Module]:
        """Every name of every module."""
        return walking.list_names(self.model, self._children_of)

    def names_of_modules(self) -> dict[str, nn.Module]:
        """Give what `walking.names_of_modules` does."""
        self._refresh()
        return dict(self.names)

    def places(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Give all places that hold a module: parent and key in it. Places inside of adapter modules count too."""
        return self._places.get(id(module), [])

    def replaced(self, old: nn.Module, new: nn.Module) -> None:
        """
        Note that a module stands in all places of another one.

        Args:
            old: what stood there. If it is inside of the new one now, as the base of an adapter module, the view is
                kept up to date; after any other change the model is looked at anew when it is asked about.
            new: what stands there.
        """
        places = self._places.pop(id(old), [])
        wrappers = _adapters_around(old, new)
        if wrappers is None:
            self._places[id(new)] = places
            self._is_stale = True
            return
        self._places[id(old)] = [(wrappers[0], wrappers[0]._base_names[0])]
        for inner, outer in zip(wrappers, wrappers[1:], strict=False):
            self._places[id(inner)] = [(outer, outer._base_names[0])]
        self._places[id(new)] = places
        innermost = old
        while walking.is_adapter_module(innermost) and id(innermost) not in self._seen_ids:
            innermost = innermost._modules[innermost._base_names[0]]
        self._around.setdefault(id(innermost), []).extend(wrappers)
        if "names" in self.__dict__:
            names = self._names_of.pop(id(old), [])
            self.names.update(dict.fromkeys(names, new))
            self._names_of[id(new)] = names
        if old._modules and not walking.is_adapter_layer(old):  # what stands inside of it has other names now
            self._is_stale = True

    @cached_property
    def _seen_ids(self) -> set[int]:
        return {id(module) for _, module in self.modules}

    @cached_property
    def _names_of(self) -> dict[int, list[str]]:
        """The same as `names`, the other way round."""
        names_of: dict[int, list[str]] = {}
        for name, module in self.names.items():
            names_of.setdefault(id(module), []).append(name)
        return names_of


def _adapters_around(old: nn.Module, new: nn.Module) -> list[nn.Module] | None:
    """List the adapter modules around a module, up to a given one and the innermost first; None if that is no base."""
    wrappers = []
    module = new
    while module is not old:
        if not walking.is_adapter_module(module):
            return None
        wrappers.append(module)
        module = module._modules[module._base_names[0]]
    return wrappers[::-1]


@contextmanager
def viewing(model: nn.Module) -> Iterator[ModelView]:
    """
    Let the functions of `walking` answer from one walk of a model inside a context.

    Modules are replaced by `surgery.slots` meanwhile, and by nothing else.

    Args:
        model: the model.
    """
    view = ModelView(model)
    token = walking.RUNNING.set(view)
    try:
        yield view
    finally:
        walking.RUNNING.reset(token)


def view_of(model: nn.Module) -> ModelView:
    """Give the view of a model that somebody has opened, or a new one."""
    view = walking.running_view(model)
    return ModelView(model) if view is None else view
