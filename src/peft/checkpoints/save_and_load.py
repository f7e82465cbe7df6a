# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Adapter tensors out of a model and into it: one pipeline for every method.

Every adapter module says which of its tensors belong to an adapter, and under which key each stands in a checkpoint
(see `adapter_keys.py`). Saving reads that table from right to left, loading from left to right.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ..anatomy.embeddings import input_embedding
from ..anatomy.offload import computing_device, is_offloaded
from ..anatomy.walking import adapter_modules, innermost_module
from ..config import HUB_KWARGS, refuse_local
from ..layers.adapter_module import AdapterModule
from ..layers.base_layer import BaseTunerLayer
from ..layers.merging.changes import taken_out
from ..layers.merging.sharing import merging_layers
from ..layers.undo import keep_values
from ..surgery.saved_modules import AuxiliaryTrainingWrapper, infer_device
from ..surgery.slots import without_collecting
from ..surgery.transaction import all_or_nothing
from ..utils.constants import (
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from ..utils.error import PeftKeyError, PeftPathError, PeftRuntimeError, PeftValueError
from ..utils.files import write_atomically
from ..utils.integrations import changes_weights_while_loading
from ..utils.near_names import explain_unknown_adapters
from ..utils.warning import warn
from ..utils.wrapped_names import plain_name, renamed
from .aliases import aliases_to_header, restore_aliases, split_aliases
from .hashes import hashes_to_header
from .keys import Place, adapter_key_map, bias_key_map, embedding_key_map, embedding_tensors, read_forms, write_forms
from .load_report import LoadReport, LoadResult
from .vocabulary import changed_embeddings


__all__ = [
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "torch_load",
]


# ------------------------------------------------------------------------------------------ saving
def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, torch.Tensor]:
    """
    Collect the tensors of an adapter under the keys that checkpoints have.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: the model's state dict, if it had to be gathered from several processes.
        adapter_name: name.
        unwrap_compiled: take the model out of `torch.compile`'s wrapper first.
        save_embedding_layers: also write the base weights of the embeddings; "auto" does so if they differ
            from those of the published base model, as after resizing the vocabulary.

    Raises:
        PeftKeyError: if there is no adapter of that name.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(model).items()}
        {'base_model.model.0.lora_A.weight': (2, 4), 'base_model.model.0.lora_B.weight': (4, 2)}
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    tensors = collect_tensors(model, state_dict, adapter_name, save_embedding_layers)
    # a tensor that tied modules share is given under each key with memory of its own, so that any writer can take it
    kept, aliases = split_aliases(tensors)
    return {
        # some writers take tensors only as they lie in memory
        key: kept[key].contiguous()
        if key in kept
        else aliases[key].read(kept[aliases[key].key]).clone(memory_format=torch.contiguous_format)
        for key in tensors
    }


def collect_tensors(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None,
    adapter_name: str,
    save_embedding_layers: str | bool,
) -> dict[str, torch.Tensor]:
    """Do what `get_peft_model_state_dict` does; tensors that tied modules share are views of one memory."""
    config = _config_of(model, adapter_name)
    state_dict = renamed(model.state_dict() if state_dict is None else state_dict, plain_name)
    keys = adapter_key_map(model, adapter_name)
    keys.update(bias_key_map(model, adapter_name, getattr(config, "bias", "none")))
    keys.update(_chosen_embedding_keys(model, adapter_name, state_dict, save_embedding_layers))
    missing = [place.key for place in keys.values() if place.key not in state_dict]
    if missing:
        raise PeftKeyError(
            f"the state dict lacks {len(missing)} tensors of adapter {adapter_name!r}, the first is {missing[0]!r}"
        )
    tensors = {saved: place.read(state_dict[place.key]) for saved, place in keys.items()}
    for name, module in adapter_modules(model):
        tensors.update(module.computed_tensors(adapter_name, state_dict, f"{name}." if name else ""))
    return write_forms(model, adapter_name, tensors)


def _config_of(model: nn.Module, adapter_name: str) -> Any:
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        raise PeftKeyError(explain_unknown_adapters([adapter_name], configs))
    return configs[adapter_name]


def _chosen_embedding_keys(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor], choice: str | bool
) -> dict[str, Place]:
    """Choose the base weights of embeddings that are saved with an adapter."""
    if not choice:
        return {}
    keys = embedding_key_map(model)
    if choice == "auto":
        changed = changed_embeddings(model, _config_of(model, adapter_name), state_dict)
        report = getattr(model, "load_reports", {}).get(adapter_name)
        # base weights that a checkpoint brought along, which it would lack when it is saved again
        brought = set(report.loaded) - set(report.expected) if report is not None else set()
        wanted = [*(keys if changed else ()), *changed, *sorted(brought.intersection(embedding_tensors(model)))]
        keys = {name: Place(name) for name in wanted}
        if changed:
            warn(
                f"{', '.join(changed[:4])}{' ...' if len(changed) > 4 else ''} differ from the published base "
                "model's, as they do after the vocabulary was resized, so the base weights of the embeddings are "
                "saved with the adapter; save_embedding_layers=False leaves them out"
            )
    elif not keys and input_embedding(model) is None:
        warn("save_embedding_layers was given, but the model does not say which layers its embeddings are")
    return keys


# ------------------------------------------------------------------------------------------ loading
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """
    Put the tensors of a checkpoint into an adapter. If anything is refused, no tensor is changed.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        peft_model_state_dict: key in a checkpoint -> tensor.
        adapter_name: name of the adapter to fill.
        ignore_mismatched_sizes: leave out tensors of another shape, with a warning, instead of raising.
        low_cpu_mem_usage: the adapter was made on the meta device; its tensors are replaced, not written to. Tensors
            on the meta device are recognised without it, too.

    Returns:
        `missing_keys`: tensors of the model that were not set (also those of the base model and of other adapters);
        `unexpected_keys`: keys of the checkpoint that belong to nothing in the model; `report`: the `LoadReport`.

    Raises:
        PeftKeyError: if there is no adapter of that name.
        PeftLoadError: if shapes differ, no key belongs to the adapter, or a tensor has entries that are not finite.
    """
    return load_tensors(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes, quiet=True)


@without_collecting
def load_tensors(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    adapter_name: str,
    ignore_mismatched_sizes: bool = False,
    strict: bool = False,
    quiet: bool = False,
    settings: Mapping[str, tuple[Any, Any]] | None = None,
) -> LoadResult:
    """
    Do what `set_peft_model_state_dict` does.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        tensors: key in a checkpoint -> tensor.
        adapter_name: name of the adapter to fill.
        ignore_mismatched_sizes: leave out tensors of another shape.
        strict: raise on anything that does not fit.
        quiet: do not warn about tensors that are missing or unexpected.
        settings: fields in which the checkpoint's config differs from the adapter's; see `LoadReport`.
    """
    with all_or_nothing(model):
        return _load_tensors(model, tensors, adapter_name, ignore_mismatched_sizes, strict, quiet, settings or {})


def _load_tensors(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    adapter_name: str,
    ignore_mismatched_sizes: bool,
    strict: bool,
    quiet: bool,
    settings: Mapping[str, tuple[Any, Any]],
) -> LoadResult:
    """Do what `load_tensors` does; what it changes before it raises is put back."""
    config = _config_of(model, adapter_name)
    tensors = renamed(tensors, plain_name)
    before = _make_room(model, adapter_name, tensors)
    keys = adapter_key_map(model, adapter_name)
    keys.update(bias_key_map(model, adapter_name, getattr(config, "bias", "none")))
    expected = tuple(keys)
    for name in embedding_tensors(model):
        keys.setdefault(name, Place(name))
    tensors = under_new_names(model, tensors, adapter_name, keys)
    live = live_tensors(model, {place.key for place in keys.values()})
    content = read_forms(model, adapter_name, tensors)
    found = {saved: content[saved] for saved in keys if saved in content}
    shapes = {saved: (tuple(value.shape), _shape_of(keys[saved], live)) for saved, value in found.items()}
    mismatched = {saved: pair for saved, pair in shapes.items() if pair[0] != pair[1]}
    fitting = {saved: value for saved, value in found.items() if saved not in mismatched}
    values, tied, overruled = one_value_per_tensor(fitting, keys, live)
    # a tensor that several modules share is loaded under all its names, whichever of them stand in the checkpoint
    filled = {id(live[key]) for key in values}
    report = LoadReport(
        adapter_name,
        expected=expected,
        loaded=tuple(fitting),
        missing=tuple(key for key in expected if key not in found and id(live[keys[key].key]) not in filled),
        unexpected=tuple(key for key in content if key not in keys),
        mismatched=mismatched,
        mistyped=_mistyped(fitting, keys, live),
        not_finite=not_finite(found),
        tied=tied,
        overruled=overruled,
        resized={
            saved: (tuple(before[keys[saved].key]), tuple(live[keys[saved].key].shape))
            for saved in expected
            if keys[saved].key in before and before[keys[saved].key] != live[keys[saved].key].shape
        },
        settings=settings,
        about=_about(model, config),
    )
    report.refuse(strict, ignore_mismatched_sizes)
    report.warn(quiet)
    present = model.state_dict(keep_vars=True)
    missing = [plain_name(key) for key, tensor in present.items() if id(tensor) not in filled]
    with taken_out(merging_layers(model), adapter_name):
        _assign(model, live, values)
    if hasattr(model, "load_reports"):
        model.load_reports[adapter_name] = report
    result = LoadResult(missing_keys=missing, unexpected_keys=list(report.unexpected))
    result.report = report
    return result


def _make_room(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Let adapter modules prepare for tensors of another form; give the shapes from before, by key in the model."""
    before = {}
    for name, module in adapter_modules(model):
        if type(module).prepare_to_load is not AdapterModule.prepare_to_load:
            own = module.named_parameters(name, remove_duplicate=False)
            before.update((plain_name(key), parameter.shape) for key, parameter in own)
            module.prepare_to_load(adapter_name, tensors)
    return before


def _shape_of(place: Place, live: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    return tuple(place.read(live[place.key]).shape)


def _mistyped(
    found: Mapping[str, torch.Tensor], keys: Mapping[str, Place], live: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, str]]:
    types = {saved: (value.dtype, live[keys[saved].key].dtype) for saved, value in found.items()}
    return {
        saved: tuple(str(dtype).removeprefix("torch.") for dtype in pair)
        for saved, pair in types.items()
        if pair[0].is_floating_point != pair[1].is_floating_point
    }


def _about(model: nn.Module, config: Any) -> str:
    """Say what an adapter is for, and what it is being loaded into; base models are named where they differ."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    method, task = (getattr(value, "value", value) for value in (config.peft_type, config.task_type))
    names = config.base_model_name_or_path, getattr(base, "name_or_path", None)
    differ = all(names) and names[0] != names[1]
    return (
        f"The adapter is {method}{f' for {task}' if task else ''}{f', trained on {names[0]!r}' if differ else ''}; "
        f"the model is a {type(base).__name__}{f', {names[1]!r}' if differ else ''}"
    )


def under_new_names(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], adapter_name: str, known: Collection[str]
) -> Mapping[str, torch.Tensor]:
    """
    Turn tensors of layers that transformers has renamed or fused since they were saved into those of the model.

    Args:
        model: a model with the adapter in it.
        tensors: key in a checkpoint -> tensor.
        adapter_name: name of the adapter.
        known: keys that the adapter has.
    """
    if all(key in known for key in tensors) or not changes_weights_while_loading():
        return tensors
    from .conversion import convert_peft_adapter_state_dict_for_transformers

    config = _config_of(model, adapter_name)
    return convert_peft_adapter_state_dict_for_transformers(model, config, tensors, adapter_name)


def live_tensors(model: nn.Module, keys: set[str]) -> dict[str, torch.Tensor]:
    """Find parameters and buffers by their key in the state dict."""
    tensors = {}
    for key in keys:
        path, _, name = key.rpartition(".")
        module = innermost_module(model, path)
        tensors[key] = module._parameters[name] if name in module._parameters else module._buffers[name]
    return tensors


def one_value_per_tensor(
    found: Mapping[str, torch.Tensor], keys: Mapping[str, Place], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str], tuple[str, ...]]:
    """
    Turn the content of a checkpoint into values by key in the model's state dict.

    Where a checkpoint has several values for one tensor of the model, the first is taken, which is the owner's.

    Returns:
        The values; the keys of the checkpoint that share a tensor with another one, and that one; those among them
        that have another value.
    """
    values: dict[str, torch.Tensor] = {}
    first: dict[int, tuple[str, torch.Tensor]] = {}
    tied, overruled = {}, []
    for saved, value in found.items():
        place = keys[saved]
        value = place.read(value)
        owner, owned = first.setdefault(id(tensors[place.key]), (saved, value))
        if owner == saved:
            values[place.key] = value
            continue
        tied[saved] = owner
        if not torch.equal(value.to(owned.device), owned):
            overruled.append(saved)
    return values, tied, tuple(overruled)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """List the keys of tensors with entries that are infinite or no numbers."""
    return tuple(
        key for key, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()
    )


def _assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Write values into tensors; a tensor without storage is replaced wherever the model holds it."""
    without_storage = {id(tensors[key]): key for key in reversed(values) if tensors[key].is_meta}
    homes = _homes(model) if without_storage else {}
    replaced = {
        token: _materialised(tensors[key], values[key], homes.get(token, homes.get(None)))
        for token, key in without_storage.items()
    }
    with torch.no_grad():
        for key, value in values.items():
            if id(tensors[key]) not in replaced:
                keep_values([tensors[key]])
                tensors[key].copy_(value)
    if replaced:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if id(tensor) in replaced:
                        held[name] = replaced[id(tensor)]


def _homes(model: nn.Module) -> dict[int | None, torch.device]:
    """
    Find where tensors without storage belong: on the device of the base weight that they adapt.

    Returns:
        id of a tensor -> device; under None that of the model's first weight, for prompts, which adapt none.
    """
    homes: dict[int | None, torch.device] = {}
    for tensor in model.parameters():
        if not tensor.is_meta:
            homes[None] = tensor.device
            break
    for _, module in adapter_modules(model):
        is_layer = isinstance(module, BaseTunerLayer)
        base = module.get_base_layer() if is_layer else getattr(module, "original_module", None)
        weight = None if base is None else next(base.parameters(), None)
        if weight is not None and (not weight.is_meta or is_offloaded(base)):
            home = computing_device(base, weight)
            homes.update((id(tensor), home) for tensor in module.parameters() if tensor.is_meta)
    return homes


def _materialised(tensor: torch.Tensor, value: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    value = value.detach().to(device=device, dtype=tensor.dtype, copy=True)
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


# ------------------------------------------------------------------------------------------ files
def refuse_without_storage(tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Refuse to save tensors that hold nothing.

    Raises:
        PeftRuntimeError: if one is on the meta device.
    """
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise PeftRuntimeError(
            f"{len(empty)} tensors are on the meta device and have no content, the first is {empty[0]!r}; an adapter "
            "that was made with low_cpu_mem_usage=True has to be loaded before it can be saved"
        )


def write_peft_weights(
    folder: str, tensors: Mapping[str, torch.Tensor], safe_serialization: bool, deduplicate_tied: bool
) -> None:
    """
    Write the tensors of a checkpoint; an older file is replaced when the new one is whole.

    Args:
        folder: an existing folder.
        tensors: key -> tensor.
        safe_serialization: write safetensors; False writes a pickle.
        deduplicate_tied: write a tensor that stands under several keys once.
    """
    if not safe_serialization:
        write_atomically(os.path.join(folder, WEIGHTS_NAME), lambda path: torch.save(tensors, path))
        return
    kept, aliases = split_aliases(tensors)
    header = {"format": "pt"}
    if deduplicate_tied:
        header.update(aliases_to_header(aliases))
    else:
        # the format has no notion of two names for one tensor
        kept.update((alias, place.read(kept[place.key]).detach().clone()) for alias, place in aliases.items())
    whole = {key: tensor.detach().contiguous() for key, tensor in kept.items()}
    header.update(hashes_to_header(whole))
    write_atomically(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), lambda path: _save_sorted(whole, path, header))


def _save_sorted(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str]) -> None:
    """Write safetensors with the metadata in alphabetical order, so that equal adapters give equal files."""
    save_file(tensors, path, metadata)
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the order has no influence on the length; only another way of escaping could have
            file.seek(8)
            file.write(text.ljust(size))


def load_peft_weights(
    model_id: str,
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, torch.Tensor]:
    """
    Read the tensors of a checkpoint from a local folder or from the hub.

    Their keys are as if nothing had been compiled or wrapped when they were saved.

    Args:
        model_id: folder, or hub id.
        device: where to put them; an accelerator if there is one.
        key_mapping: regular expression -> replacement for keys (without `base_model.model.` in front); the first
            expression that matches a key is used.
        hf_hub_download_kwargs: `subfolder`, `revision`, `token`, ...

    Raises:
        PeftPathError: if there is no such file.
        PeftValueError: if the file is damaged, or holds anything but tensors; if two of its keys become one.
    """
    device = infer_device() if device is None else device
    path = _find_weights_file(os.fspath(model_id), hf_hub_download_kwargs)
    tensors = _read_safetensors(path, device) if path.endswith(".safetensors") else _read_pickle(path, device)
    tensors = {key: _usable(tensor, key, path) for key, tensor in tensors.items()}
    if key_mapping:
        tensors = renamed(tensors, lambda key: _mapped_key(key, key_mapping), by="key_mapping")
    return renamed(tensors, plain_name)


def _find_weights_file(model_id: str, hub_kwargs: dict[str, Any]) -> str:
    subfolder = hub_kwargs.get("subfolder")
    folder = os.path.join(model_id, subfolder) if subfolder else model_id
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    refuse_local(model_id, folder, SAFETENSORS_WEIGHTS_NAME)
    from huggingface_hub import hf_hub_download

    hub_kwargs = {name: value for name, value in hub_kwargs.items() if name in HUB_KWARGS or name == "subfolder"}
    errors = []
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        try:
            return hf_hub_download(model_id, name, **hub_kwargs)
        except Exception as error:  # the hub's client has dozens of classes for 'cannot be had'
            errors.append(error)
    raise PeftPathError(
        f"no {SAFETENSORS_WEIGHTS_NAME} at {model_id!r}: it is no local folder, and the hub answered: {errors[0]}"
    ) from errors[0]


def _read_safetensors(path: str, device: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        return restore_aliases(load_file(path, device=device), header)
    except (SafetensorError, OSError) as error:
        raise PeftValueError(
            f"{path!r} is not a whole safetensors file ({error}); copy or download it again"
        ) from error


def _read_pickle(path: str, device: str) -> dict[str, torch.Tensor]:
    try:
        tensors = torch_load(path, map_location=device)
    except (UnpicklingError, AttributeError, ImportError) as error:
        raise PeftValueError(
            f"{path!r} holds more than tensors, and loading it could run code: {error}. Ask for the adapter in "
            "safetensors format"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise PeftValueError(f"{path!r} is not a whole PyTorch file ({error!r}); copy or download it again") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items()
    ):
        raise PeftValueError(f"{path!r} does not hold a dictionary of tensors")
    return tensors


def _usable(tensor: torch.Tensor, key: str, path: str) -> torch.Tensor:
    """Give a tensor of a file in a form that can be computed with; refuse what is no matrix of numbers."""
    is_whole = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_complex())
    # a pickle can say that a few numbers are repeated without end
    if not is_whole or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise PeftValueError(
            f"{key!r} in {path!r} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} that is not stored as "
            "plain numbers, as the tensors of adapters are; save the adapter again"
        )
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """Call `torch.load`, by default so that a file cannot run code."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def _mapped_key(key: str, key_mapping: Mapping[str, str]) -> str:
    prefix = "base_model.model."
    name = key.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        changed, count = re.subn(pattern, replacement, name)
        if count:
            return key[: len(key) - len(name)] + changed
    return key


# ------------------------------------------------------------------------------------------ base model
def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Give the state dict that the base model would have without adapters around its modules.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tensors = base.state_dict()
    return {clean: tensors[live] for clean, live in _base_keys(base, tensors).items()}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """
    Load a state dict of the base model into a model with adapters.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: keys as the base model has them.
        strict: raise if keys are missing or unexpected.

    Raises:
        PeftRuntimeError: with `strict`, if keys differ.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state_dict = renamed(state_dict, plain_name)
    keys = _base_keys(base, base.state_dict())
    missing = [key for key in keys if key not in state_dict]
    unexpected = [key for key in state_dict if key not in keys]
    if strict and (missing or unexpected):
        raise PeftRuntimeError(
            f"keys of the base model's state dict differ: missing {missing[:5]} ({len(missing)}), unexpected "
            f"{unexpected[:5]} ({len(unexpected)}); strict=False loads what fits"
        )
    base.load_state_dict({keys[key]: value for key, value in state_dict.items() if key in keys}, strict=False)
    return _IncompatibleKeys(missing_keys=missing, unexpected_keys=unexpected)


def _base_keys(base: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Map the keys that the bare base model has to those that it has now."""
    wrapped = {name: module._base_names[0] for name, module in adapter_modules(base)}
    keys = {live: _without_wrappers(plain_name(live), wrapped) for live in tensors}
    return {clean: live for live, clean in keys.items() if clean is not None}


def _without_wrappers(live: str, wrapped: Mapping[str, str]) -> str | None:
    """Take adapter modules out of a key; None for a key of their own tensors."""
    path, clean = "", []
    for part in live.split("."):
        if path not in wrapped:
            clean.append(part)
        elif part != wrapped[path]:
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(clean)
