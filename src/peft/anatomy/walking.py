# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Walking a model around its adapters."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from operator import itemgetter
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..utils.wrapped_names import WRAPPED


# What somebody has seen of a model already, and keeps up to date: a `view.ModelView`.
RUNNING: ContextVar[Any] = ContextVar("running_view", default=None)


def running_view(model: nn.Module) -> Any:
    """Give the view of a model that somebody has opened; None if nobody has."""
    view = RUNNING.get()
    return view if view is not None and view.model is model else None


def is_adapter_module(module: nn.Module) -> bool:
    """Say whether a module was put into the model by this package (an adapter layer or a training wrapper)."""
    return getattr(type(module), "_is_adapter_module", False)


def innermost_base_layer(layer: nn.Module) -> nn.Module:
    """Give the layer of the base model inside an adapter layer, below any number of others."""
    layer = layer._modules["base_layer"]
    while "base_layer" in layer._modules:
        layer = layer._modules["base_layer"]
    return layer


def is_adapter_layer(module: nn.Module) -> bool:
    """Say whether a module is an adapter layer: one that has a base layer, unlike training wrappers."""
    return is_adapter_module(module) and module._base_names == ("base_layer",)


def unwrapped(module: nn.Module) -> nn.Module:
    """Give the layer of the base model in an adapter layer, or the module itself."""
    return innermost_base_layer(module) if is_adapter_layer(module) else module


def stack_of(module: nn.Module) -> list[nn.Module]:
    """List the adapter layers around one base layer, the outermost first."""
    layers = []
    while is_adapter_layer(module):
        layers.append(module)
        module = module._modules["base_layer"]
    return layers


def walk(model: nn.Module, into_bases: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """
    Yield each module of a model once, under its first name, without what adapters are made of.

    Args:
        model: the model; its own name is "".
        into_bases: also yield the original modules inside adapter modules. Adapter tensors are never entered.

    Yields:
        Full name and module, in the order of registration. An adapter module has the name of the module that it
        replaced. What torch.compile or FSDP wraps has the name of its wrapper, which comes first; `get_submodule`
        finds modules by such names too, since these wrappers answer for what they wrap.
    """
    view = running_view(model)
    if view is not None:
        return view.walk(into_bases)
    return map(itemgetter(0, 1), walk_with_children(model, into_bases))


Children = Mapping[str, nn.Module | None]


def children_of(module: nn.Module) -> Children:
    """Give what a module holds: name in it -> module."""
    return module._modules


def walk_with_children(
    model: nn.Module, into_bases: bool, children_of: Callable[[nn.Module], Children] = children_of
) -> Iterator[tuple[str, nn.Module, Children]]:
    """
    Yield name, module and all children of what `walk` yields, by a walk through the model as it is now.

    Args:
        model: the model.
        into_bases: see `walk`.
        children_of: gives what a module holds, for those who have looked already.
    """
    seen = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = children_of(module)
        yield name, module, children
        if not children:
            continue
        if is_adapter_module(module):
            children = {key: children[key] for key in module._base_names} if into_bases else {}
        prefix = f"{name}." if name else ""
        for key in reversed(children):
            if children[key] is not None:
                stack.append((name if key in WRAPPED else prefix + key, children[key]))


def base_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of the base model, each once, with or without adapters around them."""
    view = running_view(model)
    return _walk_base(model) if view is None else iter(view.base_modules())


def _walk_base(model: nn.Module) -> Iterator[nn.Module]:
    seen = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = module._modules
        if is_adapter_module(module):
            stack.extend(children[key] for key in module._base_names)
        else:
            yield module
            if children:
                stack.extend(child for child in children.values() if child is not None)


def names_of_modules(model: nn.Module) -> dict[str, nn.Module]:
    """
    List every name under which a module of the model can be reached: a module that is held twice has two.

    Returns:
        Full name -> module, in the order of registration. An adapter layer has the name of its base layer, and what
        stands inside that has the name that it has without adapters. Training wrappers are not entered. The name of
        what torch.compile or FSDP wraps belongs to the wrapper.
    """
    view = running_view(model)
    return list_names(model) if view is None else view.names_of_modules()


def list_names(model: nn.Module, children_of: Callable[[nn.Module], Children] = children_of) -> dict[str, nn.Module]:
    """
    Do what `names_of_modules` does, by a walk through the model as it is now.

    Args:
        model: the model.
        children_of: see `walk_with_children`.
    """
    names = {}
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        names.setdefault(name, module)
        while is_adapter_layer(module):
            module = module._modules["base_layer"]
        # what computes a layer's weight is no layer, whatever its name ends with
        children = {} if isinstance(module, ParametrizationList) else children_of(module)
        if children and not is_adapter_module(module):
            prefix = f"{name}." if name else ""
            stack.extend(
                (name if key in WRAPPED else prefix + key, children[key])
                for key in reversed(children)
                if children[key] is not None
            )
    return names


def innermost_module(model: nn.Module, name: str) -> nn.Module:
    """
    Find a module by its name, below what torch.compile or FSDP has put around it.

    Args:
        model: the model.
        name: full name of the module, as `walk` yields it or with the parts of wrappers.
    """
    module = model
    for part in name.split(".") if name else ():
        child = module._modules.get(part)  # `get_submodule` asks for attributes, which takes ten times as long
        module = getattr(module, part) if child is None else child
    while wrapped := WRAPPED & module._modules.keys():
        module = module._modules[wrapped.pop()]
    return module


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each adapter layer and training wrapper of a model, with its full name."""
    return ((name, module) for name, module in walk(model, into_bases=True) if is_adapter_module(module))


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the base model under the names that they have without adapters around them."""
    bare_names = {}
    for name, module in walk(model, into_bases=True):
        parent, _, key = name.rpartition(".")
        parent_name, inside_adapter = bare_names.get(parent, ("", False))
        if inside_adapter:  # the base of an adapter module takes the adapter module's name
            bare = parent_name
        else:
            bare = f"{parent_name}.{key}" if parent_name else key
        bare_names[name] = (bare, is_adapter_module(module))
        if not is_adapter_module(module):
            yield bare, module


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the base model, that is all but those that adapters brought along."""
    for name, module in walk(model, into_bases=True):
        if not is_adapter_module(module):
            prefix = f"{name}." if name else ""
            yield from ((prefix + key, p) for key, p in module._parameters.items() if p is not None)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[list[tuple[nn.Module, str, nn.Module, nn.Module]]]:
    """
    Put the modules of the base model in the places of adapter modules inside a context.

    Yields:
        For each place: the parent, the name in it, the adapter module, and the module that stands there inside.
    """
    replaced = []
    for _, parent in list(walk(model, into_bases=True)):
        for key, child in parent._modules.items():
            if child is not None and is_adapter_module(child) and not is_adapter_module(parent):
                bare = child
                while is_adapter_module(bare):
                    bare = bare._modules[bare._base_names[0]]
                replaced.append((parent, key, child, bare))
                parent._modules[key] = bare
    try:
        yield replaced
    finally:
        for parent, key, child, _ in replaced:
            parent._modules[key] = child


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Give the parent of a module, the module, and its name in the parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """
    Give the name that a module has in a model.

    Args:
        model: any model.
        reference_module: a part of it.

    Returns:
        The first of its full names; `""` if it is no part of the model, or the model itself.
    """
    return next((name for name, module in model.named_modules() if module is reference_module), "")
