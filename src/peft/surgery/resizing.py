# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
The method `resize_token_embeddings` of models of transformers, once adapters are in them.

It changes embeddings in their places, puts another layer in the place of the output embedding, and knows nothing of
what adapters hold for each token. So it gets to see the base model, and what stands around it is brought to the new
size afterwards. What cannot be is refused before anything is changed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..anatomy.embeddings import input_embedding, output_embedding, without_adapters_around
from ..anatomy.kinds import features
from ..anatomy.walking import adapter_modules, bare_modules, base_modules, without_adapters
from ..layers.base_layer import BaseTunerLayer
from ..tying.groups import find_tied_groups
from ..utils.error import PeftValueError


# where an embedding notes the rows that it had before it was resized with adapters around
ROWS_BEFORE = "_rows_before_resizing"


def resize_vocabulary(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """
    Call `resize_token_embeddings` of a model that holds adapters.

    New tokens have no part in what adapters change until they are trained; trained copies get the rows that the base
    model gets. Parameters stay the same objects, so what is tied stays tied.

    Args:
        model: a model of transformers.
        args: see transformers; the number of tokens, and what it is to be a multiple of.
        kwargs: see transformers.

    Raises:
        PeftValueError: if an adapter holds tensors for each token that cannot be resized, is merged, or trains a token
            that would be gone. Nothing has been changed then.
    """
    layers = list(_layers_around_embeddings(model))
    tokens = _asked_for(*args, **kwargs)
    for name, layer in layers:
        _refuse(name, layer, tokens)
    before = {name: (module.__dict__.get(ROWS_BEFORE), rows) for name, module, rows in _matrices(model)}
    # trained copies may hold parameters of the base model, and outlive the modules that transformers replaces
    homes = {id(p): (module, key) for module, key, p in _parameters(model)}
    copies = {id(wrapper): dict(wrapper.original_module.named_modules()) for _, wrapper in _wrappers(model)}
    with without_adapters(model) as replaced:
        result = type(model).resize_token_embeddings(model, *args, **kwargs)
        for parent, key, outer, bare in replaced:
            if parent._modules[key] is not bare:
                _put_inside(outer, bare, parent._modules[key])
    for _, wrapper in _wrappers(model):
        _resize_copies(wrapper, copies[id(wrapper)], homes)
    for _, layer in layers:
        _resize_layer(layer)
    _note(model, before)
    return result


def _asked_for(
    new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> int | None:
    """Say how many tokens there are going to be; None if it is not said."""
    if new_num_tokens is None or not pad_to_multiple_of:
        return new_num_tokens
    return -(-new_num_tokens // pad_to_multiple_of) * pad_to_multiple_of


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield the modules of the base model that have a matrix, with the rows of it."""
    for name, module in bare_modules(model):
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            yield name, module, len(weight)


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in base_modules(model):
        yield from ((module, key, p) for key, p in module._parameters.items() if p is not None)


def _wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the wrappers of modules that are trained in full."""
    return ((name, module) for name, module in adapter_modules(model) if "modules_to_save" in module._modules)


def _layers_around_embeddings(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Yield the layers around what transformers may resize: embeddings, and what shares a weight with one."""
    asked = (input_embedding(model), output_embedding(model))
    named = [module for layer in asked if (module := without_adapters_around(layer)) is not None]
    shared = {id(module._parameters.get("weight")) for module in named} - {id(None)}
    for name, layer in adapter_modules(model):
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            is_named = any(base is module for module in named)
            if isinstance(base, nn.Embedding) or is_named or id(base._parameters.get("weight")) in shared:
                yield name, layer


def _refuse(name: str, layer: BaseTunerLayer, tokens: int | None) -> None:
    if layer.merged:
        raise PeftValueError(
            f"the vocabulary cannot be resized while adapters are merged into {name!r}; call unmerge_adapter() first"
        )
    for adapter in sorted(layer.available_adapters):
        source = layer.source(adapter)
        if source.token_axes(adapter) is None:
            raise PeftValueError(
                f"the vocabulary cannot be resized with adapter {adapter!r} around {name!r}: what "
                f"{type(layer).__name__} holds for each token cannot be extended; nothing was changed. Resize the "
                "base model first, and put the adapter in afterwards"
            )
        last = max(getattr(source, "token_indices", {}).get(adapter, ()), default=-1)
        if tokens is not None and last >= tokens:
            raise PeftValueError(
                f"adapter {adapter!r} trains token {last} in {name!r}, which a vocabulary of {tokens} would not have; "
                "nothing was changed. Delete the adapter first, or keep the token"
            )


def _put_inside(outer: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace the module below any number of adapter modules."""
    inner = outer
    while inner._modules[inner._base_names[0]] is not old:
        inner = inner._modules[inner._base_names[0]]
    inner._modules[inner._base_names[0]] = new


def _resize_copies(wrapper: nn.Module, before: dict[str, nn.Module], homes: dict[int, tuple[nn.Module, str]]) -> None:
    """
    Bring trained copies of a module to the size that the module has now.

    Args:
        wrapper: what holds the copies.
        before: the module's parts by name, as they were.
        homes: id of a parameter of the base model -> the module that held it, and its name there.
    """
    parts = dict(wrapper.original_module.named_modules())
    for copied in wrapper.modules_to_save.values():
        for path, part in copied.named_modules():
            base = parts.get(path)
            if base is None:
                continue
            for key, parameter in part._parameters.items():
                wanted = base._parameters.get(key)
                if parameter is None or wanted is None:
                    continue
                holder = homes.get(id(parameter))
                if holder is not None:  # the copy shares it with the base model
                    part._parameters[key] = wanted if holder[0] is before.get(path) else holder[0]._parameters[key]
                elif parameter.shape != wanted.shape:
                    _set_rows(parameter, wanted)
            for size in ("num_embeddings", "out_features", "padding_idx"):
                if size in base.__dict__:
                    setattr(part, size, getattr(base, size))


def _set_rows(parameter: nn.Parameter, base: torch.Tensor) -> None:
    """Cut a parameter to the rows of another tensor, or give it the rows of that which it lacks."""
    rows = min(len(parameter), len(base))
    grown = base.detach().to(parameter.device, parameter.dtype, copy=True)
    grown[:rows] = parameter.detach()[:rows]
    parameter.grad = None
    parameter.data = grown


def _resize_layer(layer: BaseTunerLayer) -> None:
    """Bring what adapters hold for each token to the size that the base layer has now."""
    base = layer.get_base_layer()
    tokens = len(base.weight)
    in_features, out_features = features(base)
    layer.__dict__.update(in_features=in_features, out_features=out_features)
    for adapter in layer.available_adapters:
        if layer.source(adapter) is not layer:
            continue
        for key, (axis, fill) in layer.token_axes(adapter).items():
            path, _, name = key.rpartition(".")
            holder = layer.get_submodule(path)
            tensor = holder._parameters[name] if name in holder._parameters else holder._buffers[name]
            shape = [tokens if i == axis else size for i, size in enumerate(tensor.shape)]
            grown = tensor.detach().new_full(shape, fill)
            rows = min(tokens, tensor.shape[axis])
            grown.narrow(axis, 0, rows).copy_(tensor.detach().narrow(axis, 0, rows))
            tensor.grad = None
            tensor.data = grown
        _set_sizes(layer, adapter)


def _set_sizes(layer: BaseTunerLayer, adapter: str) -> None:
    """Let factors that are linear layers themselves say their sizes."""
    for container in layer.adapter_layer_names:
        factor = layer._modules[container][adapter] if adapter in layer._modules.get(container, ()) else None
        if isinstance(factor, nn.Linear):
            factor.out_features, factor.in_features = factor.weight.shape


def _note(model: nn.Module, before: dict[str, tuple[int | None, int]]) -> None:
    """
    Note what was resized, so that it is saved, and which layers' weights others hold too: some may be new ones.

    Args:
        model: the model, resized.
        before: name of a module -> what was noted there already, and the rows that it had.
    """
    tied = {id(group.parameter) for group in find_tied_groups(model, with_replicas=True)}
    for _, layer in adapter_modules(model):
        if isinstance(layer, BaseTunerLayer):
            layer.base_is_tied = id(layer.stored_weight()) in tied
    for name, module, rows in _matrices(model):
        noted, old = before.get(name, (None, rows))
        if noted is not None or old != rows:
            module.__dict__[ROWS_BEFORE] = old if noted is None else noted
