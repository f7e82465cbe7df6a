# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Base models whose weights accelerate keeps away from the modules: in main memory, or on disk.

Between two forward passes an offloaded module holds parameters without storage. Whoever has to read a weight asks for
it here, and gets it from where it is kept. A merged weight is put in its place there, in main memory, and the
original comes back as it was when it is taken out again. What would have to copy, train or share the weight itself is
refused, because it would go wrong without a word: copies would compute with the base weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..utils.error import PeftRuntimeError, PeftValueError
from .embeddings import input_embedding, without_adapters_around
from .matching import lies_in
from .walking import bare_modules


def is_offloaded(module: nn.Module) -> bool:
    """Say whether accelerate keeps parameters of this very module elsewhere."""
    return _offloading_hook(module) is not None and any(
        parameter is not None and parameter.is_meta for parameter in module._parameters.values()
    )


def computing_device(module: nn.Module, weight: torch.Tensor) -> Any:
    """Give the device on which a layer computes: that of its weight, or where accelerate brings an offloaded one."""
    return _offloading_hook(module).execution_device if is_offloaded(module) else weight.device


def tensor_of(module: nn.Module, name: str) -> torch.Tensor | None:
    """
    Give a parameter or buffer of a module with its content, from where accelerate keeps it if that is elsewhere.

    Args:
        module: a module of the base model.
        name: the tensor's name in it.

    Returns:
        The tensor itself, or a copy on the device on which the module computes; None if the module has none.
    """
    held = getattr(module, name, None)
    if not getattr(held, "is_meta", False) or not is_offloaded(module):
        return held
    hook = _offloading_hook(module)
    return hook.weights_map[name].to(hook.execution_device)


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """
    Give an offloaded module its tensors inside a context, in which it can be computed with others in their place.

    Accelerate's hook is out of the way meanwhile: it would fetch all tensors and lose those that stand for them.
    """
    if not is_offloaded(module):
        yield
        return
    parameters, buffers, forward = dict(module._parameters), dict(module._buffers), module.__dict__.get("forward")
    for name, parameter in parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(tensor_of(module, name), requires_grad=False)
    for name in buffers:
        module._buffers[name] = tensor_of(module, name)
    module.__dict__["forward"] = module._old_forward
    try:
        yield
    finally:
        module.__dict__["forward"] = forward
        module._parameters.update(parameters)
        module._buffers.update(buffers)


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """
    Bring what accelerate keeps elsewhere of an adapter layer to where it computes, inside a context.

    What is changed meanwhile, as by merging, is kept in main memory afterwards; the files of weights on disk stay as
    they are. The layers of this package read offloaded weights without it.

    Args:
        layer: a layer, or any part of a model.
    """
    offloaded = [module for module in layer.modules() if is_offloaded(module)]
    with ExitStack() as stack:
        for module in offloaded:
            stack.enter_context(onloaded(module))
        before = [{name: tensor.clone() for name, tensor in held.items()} for held in map(_tensors_in, offloaded)]
        yield
        after = [_tensors_in(module) for module in offloaded]
    for module, old, new in zip(offloaded, before, after, strict=True):
        for name, tensor in new.items():
            if name in old and not torch.equal(tensor, old[name]):
                Replacements(module)[name] = tensor


def _tensors_in(module: nn.Module) -> dict[str, torch.Tensor]:
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


class _Changed(Mapping):
    """Offloaded tensors, of which some were replaced."""

    def __init__(self, original: Mapping[str, torch.Tensor]) -> None:
        self.original = original
        self.replaced: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.replaced[name] if name in self.replaced else self.original[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.original)

    def __len__(self) -> int:
        return len(self.original)

    def __getattr__(self, name: str) -> Any:
        if name == "original":  # while unpickling
            raise AttributeError(name)
        return getattr(self.original, name)


class Replacements:
    """
    What stands in the place of offloaded tensors of one module: name -> tensor, or None where it is the original.

    Args:
        module: an offloaded module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._hook = _offloading_hook(module)

    def __getitem__(self, name: str) -> torch.Tensor | None:
        kept = self._hook.weights_map
        return kept.replaced.get(name) if isinstance(kept, _Changed) else None

    def __setitem__(self, name: str, tensor: torch.Tensor | None) -> None:
        if not isinstance(self._hook.weights_map, _Changed):
            self._hook.weights_map = _Changed(self._hook.weights_map)
        replaced = self._hook.weights_map.replaced
        if tensor is None:
            replaced.pop(name, None)
        else:
            replaced[name] = tensor.detach().to("cpu")


def _offloading_hook(module: nn.Module) -> Any:
    hook = vars(module).get("_hf_hook")  # what has none is asked often, and `nn.Module` looks for it everywhere
    if hook is None:
        return None
    return next((part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "offload", False)), None)


def refuse_offloaded(model: nn.Module, config: PeftConfig, targets: Iterable[str]) -> None:
    """
    Refuse configs that need a weight itself where it is offloaded, before anything is changed.

    These are modules that are trained in full, biases that are trained, and whatever is reached of a tie: accelerate
    gives each member a parameter of its own, so the tie cannot be seen any more, let alone be kept.

    Args:
        model: the base model.
        config: config with resolved targets.
        targets: full names of the modules to adapt.

    Raises:
        PeftValueError: if there is such a module.
    """
    offloaded = {name: module for name, module in bare_modules(model) if is_offloaded(module)}
    if not offloaded:
        return
    saved = getattr(config, "modules_to_save", None) or ()
    copied = [name for name in offloaded if saved and lies_in(saved, name)]
    if copied:
        raise PeftValueError(
            f"modules_to_save reaches {copied[0]!r}, whose weight is offloaded and cannot be copied; nothing was "
            "changed. Give it a device of its own in device_map, or add the adapter before the model is dispatched"
        )
    which = getattr(config, "bias", "none")
    trained = [
        name
        for name, module in offloaded.items()
        if getattr(module, "bias", None) is not None and (which == "all" or (which != "none" and name in targets))
    ]
    if trained:
        raise PeftValueError(
            f"bias={which!r} trains the bias of {trained[0]!r}, which is offloaded, and would never be read; nothing "
            "was changed. Use bias='none', or give the module a device of its own in device_map"
        )
    tied = _members_of_ties(model, offloaded)
    reached = sorted(tied & {*targets, *_with_tokens(model, config, offloaded)})
    if reached:
        raise PeftValueError(
            f"{reached[0]!r} shares its weight with another module, and is offloaded, so that the two cannot be seen "
            "to be one; nothing was changed. Give all modules that share the weight one device in device_map, or "
            "leave them out of target_modules and trainable_token_indices"
        )


def _with_tokens(model: nn.Module, config: PeftConfig, offloaded: dict[str, nn.Module]) -> set[str]:
    """Find offloaded modules of which single tokens are trained beside the method."""
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, dict):
        return {name for name in offloaded if lies_in(list(tokens), name)}
    embedding = without_adapters_around(input_embedding(model)) if tokens else None
    return {name for name, module in offloaded.items() if module is embedding}


def _members_of_ties(model: nn.Module, offloaded: dict[str, nn.Module]) -> set[str]:
    """Find offloaded modules whose weights were tied: accelerate has noted it, or the model declares it."""
    noted = {
        name for name, module in offloaded.items() if getattr(_offloading_hook(module), "tied_params_names", None)
    }
    declared: set[str] = set()
    for prefix, module in bare_modules(model):
        keys: Any = getattr(module, "all_tied_weights_keys", None)
        if isinstance(keys, dict):
            members = (member.rpartition(".")[0] for pair in keys.items() for member in pair)
            declared.update(f"{prefix}.{member}" if prefix else member for member in members)
    return noted | (declared & set(offloaded))


def refuse_copy_of_offloaded(module: nn.Module) -> None:
    """
    Refuse to train a copy of a module whose weights are not there.

    Args:
        module: layer of the base model.

    Raises:
        PeftValueError: if it is offloaded.
    """
    if is_offloaded(module):
        raise PeftValueError(
            f"the adapter trains a copy of a {type(module).__name__} whose weight is offloaded and cannot be copied; "
            "nothing was changed. Give it a device of its own in device_map, or add the adapter before the model is "
            "dispatched"
        )


def refuse_merge_into_offloaded(module: nn.Module) -> None:
    """
    Refuse to merge into a quantised weight that is not there.

    Args:
        module: quantised layer of the base model.

    Raises:
        PeftRuntimeError: if its weight is offloaded.
    """
    if is_offloaded(module):
        raise PeftRuntimeError(
            f"the quantised weight of a {type(module).__name__} layer is offloaded, so nothing can be merged into it; "
            "load the model without offloading to merge"
        )
