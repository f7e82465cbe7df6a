# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which tensors of a model belong to an adapter, and under which keys they stand in a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..anatomy.embeddings import input_embedding, output_embedding, without_adapters_around
from ..anatomy.walking import adapter_modules, base_parameters, is_adapter_layer, walk
from ..layers.saved_form import JoinedForm, SavedForm
from ..utils.wrapped_names import plain_name


class Place(NamedTuple):
    """
    Where the tensor of a checkpoint stands in a model.

    Attributes:
        key: key in the model's state dict, without what wrappers such as torch.compile's put into it.
        transposed: whether the model keeps it the other way round.
    """

    key: str
    transposed: bool = False

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Turn the model's tensor into the checkpoint's, or the other way round; the result is a view."""
        return tensor.T if self.transposed else tensor


def adapter_key_map(model: nn.Module, adapter_name: str) -> dict[str, Place]:
    """
    List the tensors of an adapter.

    Args:
        model: a model with adapter modules.
        adapter_name: name.

    Returns:
        Key in a checkpoint -> place in the model. Of modules that share a tensor, the owner comes first. What all
        layers share stands there once, under the name that it has in the tuner.
    """
    config = (getattr(model, "peft_config", None) or {}).get(adapter_name)
    followers = set(getattr(config, "modules_to_tie", None) or ())
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base_name = prefix_of(model, base)
    modules = sorted(adapter_modules(model), key=lambda item: item[0].removeprefix(base_name) in followers)
    prefixes = {id(module): f"{name}." if name else "" for name, module in modules}
    saved_prefixes = _saved_prefixes(modules)
    keys = {}
    for _, module in modules:
        prefix = prefixes[id(module)]
        saved_prefix = saved_prefixes[id(module)]
        keys.update((saved_prefix + saved, Place(prefix + live)) for saved, live in _plain_keys(module, adapter_name))
    tuner = base_name.removesuffix("model.")
    for _, module in modules:
        for saved, live in module.shared_keys(adapter_name):
            place = tuner if module.shares_on_tuner else prefixes[id(module)]
            keys.setdefault(tuner + saved, Place(place + live))
    for _, module in modules:
        repeated = module.repeated_keys(adapter_name)
        keys.update((saved_prefixes[id(module)] + saved, keys[tuner + saved]) for saved in repeated)
    for _, module in modules:
        for saved, live, transposed in module.adapter_aliases(adapter_name):
            owner = prefixes[id(module.source(adapter_name))]
            keys[saved_prefixes[id(module)] + saved] = Place(owner + live, transposed)
    return keys


def keys_in_parts(model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """
    Find the tensors of an adapter that are parts of what they should be, such as a shard that nobody has gathered.

    Args:
        model: a model with adapter modules.
        adapter_name: name.
        state_dict: the model's state dict, with plain names.

    Returns:
        Keys in the state dict.
    """
    found = []
    for name, module in adapter_modules(model):
        prefix = f"{name}." if name else ""
        for saved, live in _plain_keys(module, adapter_name):
            tensor = state_dict.get(prefix + live)
            if tensor is not None and not module.is_whole(adapter_name, saved, tensor):
                found.append(prefix + live)
    return found


def _plain_keys(module: nn.Module, adapter_name: str) -> Iterator[tuple[str, str]]:
    return ((plain_name(saved), plain_name(live)) for saved, live in module.adapter_keys(adapter_name))


def prefix_of(model: nn.Module, part: nn.Module) -> str:
    """
    Find what the names of everything in a part of a model start with.

    Args:
        model: the model.
        part: the model itself, or a module inside it.
    """
    name = next(plain_name(name) for name, module in model.named_modules() if module is part)
    return f"{name}." if name else ""


def _saved_prefixes(modules: Sequence[tuple[str, nn.Module]]) -> dict[int, str]:
    """
    Find what the keys of each adapter module start with in a checkpoint: a file knows of one method only.

    So layers of other methods around a layer leave no trace. The wrappers for several parameters of a module do, since
    nothing else tells their tensors apart.
    """
    by_name = dict(modules)
    prefixes = {}
    for name, module in modules:
        outer, _, key = name.rpartition(".")
        while key == "base_layer" and _adapts_whole_module(by_name.get(outer)) and _adapts_whole_module(module):
            name = outer
            outer, _, key = name.rpartition(".")
        prefixes[id(module)] = f"{name}." if name and not getattr(module, "_keys_at_top", False) else ""
    return prefixes


def _adapts_whole_module(module: nn.Module | None) -> bool:
    return module is not None and is_adapter_layer(module) and module.parameter_name is None


def _saved_forms(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SavedForm]]:
    """Yield the key in a checkpoint, and the form, of the tensors that have one."""
    modules = list(adapter_modules(model))
    prefixes = _saved_prefixes(modules)
    for _, module in modules:
        if module.has_adapter(adapter_name):
            prefix = prefixes[id(module)]
            for key, form in module.saved_forms(adapter_name).items():
                yield prefix + key, form


def _joined_forms(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, list[str], JoinedForm]]:
    """Yield the key in a checkpoint, the keys of what it stands for, and the form, of the tensors that are joined."""
    modules = list(adapter_modules(model))
    prefixes = _saved_prefixes(modules)
    for _, module in modules:
        prefix = prefixes[id(module)]
        for key, form in module.joined_forms(adapter_name).items():
            yield prefix + key, [prefix + name for name in form.names], form


def optional_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """
    Find the keys of tensors that a checkpoint may lack without a word.

    Args:
        model: a model with adapter modules.
        adapter_name: name.
    """
    return set(_keys_of_having(model, adapter_name, "optional_keys"))


def ignored_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """
    Find the keys of tensors that a checkpoint may hold without a word, although nothing in the model uses them.

    Args:
        model: a model with adapter modules.
        adapter_name: name.
    """
    return set(_keys_of_having(model, adapter_name, "ignored_keys"))


def _keys_of_having(model: nn.Module, adapter_name: str, method: str) -> Iterator[str]:
    """Yield the keys in a checkpoint that a method of the modules with an adapter yields."""
    modules = list(adapter_modules(model))
    prefixes = _saved_prefixes(modules)
    for _, module in modules:
        if module.has_adapter(adapter_name):
            yield from (prefixes[id(module)] + key for key in getattr(module, method)(adapter_name))


def write_forms(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Put tensors into the form in which the adapter's config wants them saved.

    Args:
        model: a model with adapter modules.
        adapter_name: name.
        tensors: key in a checkpoint -> the model's tensor.
    """
    written = dict(tensors)
    for key, form in _saved_forms(model, adapter_name):
        if form.is_used and key in written:
            parts = form.write(written.pop(key))
            written.update((key + ending, part) for ending, part in zip(form.endings, parts, strict=True))
    for key, names, form in _joined_forms(model, adapter_name):
        if all(name in written for name in names):
            written[key] = form.join(*(written.pop(name) for name in names))
    return written


def read_forms(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Undo `write_forms`, for tensors of which all parts are there.

    Args:
        model: a model with adapter modules.
        adapter_name: name.
        tensors: content of a checkpoint.
    """
    read = dict(tensors)
    for key, form in _saved_forms(model, adapter_name):
        if all(key + ending in read for ending in form.endings):
            read[key] = form.read(*(read.pop(key + ending) for ending in form.endings))
    for key, names, form in _joined_forms(model, adapter_name):
        if key in read:
            read.update(zip(names, form.split(read.pop(key)), strict=True))
    return read


def bias_key_map(model: nn.Module, adapter_name: str, which: str) -> dict[str, Place]:
    """
    List the base model's biases that an adapter trains beside its own tensors.

    Args:
        model: a model with adapter modules.
        adapter_name: name.
        which: the config's `bias`.
    """
    if which == "all":
        keys = {name: Place(name) for name, _ in base_parameters(model) if name == "bias" or name.endswith(".bias")}
        # release 0.21.2 writes biases of modules that are trained in full twice; its reader expects both
        for place in adapter_key_map(model, adapter_name).values():
            if place.key.endswith(".bias"):
                keys[place.key.replace(f".{adapter_name}.", ".")] = place
        return keys
    keys = {}
    if which != "none":
        for name, module in adapter_modules(model):
            base = module._modules.get("base_layer")
            if base is not None and getattr(base, "bias", None) is not None:
                keys[f"{name}.base_layer.bias"] = Place(f"{name}.base_layer.bias")
    return keys


def embedding_key_map(model: nn.Module) -> dict[str, Place]:
    """List the base weights of a model's input and output embeddings, those that the model itself names."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    wanted = {id(without_adapters_around(layer)) for layer in (input_embedding(base), output_embedding(base))}
    weights = embedding_tensors(model).items()
    return {live: Place(live) for live, (module, key) in weights if id(module) in wanted and key == "weight"}


def embedding_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """
    List the base weights of all embeddings, and weight and bias of the output embedding: what has a row per token.

    A module that is trained in full is left out: it is in a checkpoint already, under the name that the base has.

    Returns:
        Name of the tensor -> the module that holds it, and its name there.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = without_adapters_around(output_embedding(base))
    main = without_adapters_around(input_embedding(base))
    return {
        f"{name}.{key}": (module, key)
        for name, module in walk(model, into_bases=True)
        if (isinstance(module, nn.Embedding) or module is head or module is main) and ".original_module" not in name
        for key in ("weight", "bias")
        if module._parameters.get(key) is not None
    }
