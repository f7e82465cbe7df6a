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
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ..tuners._surgery import adapter_modules
from .adapter_keys import Place, adapter_key_map, bias_key_map, embedding_key_map, read_forms, write_forms
from .constants import (
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from .error import PeftKeyError, PeftPathError, PeftRuntimeError, PeftValueError
from .files import write_atomically
from .other import AuxiliaryTrainingWrapper, infer_device
from .tensor_hashes import hashes_to_header
from .tying import aliases_to_header, restore_aliases, split_aliases
from .vocabulary import vocabulary_has_grown
from .warning import warn


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
        save_embedding_layers: also write the base weights of the embeddings; "auto" does so if the vocabulary was
            resized since the base model was loaded.

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
    return {key: kept[key] if key in kept else aliases[key].read(kept[aliases[key].key]).clone() for key in tensors}


def collect_tensors(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None,
    adapter_name: str,
    save_embedding_layers: str | bool,
) -> dict[str, torch.Tensor]:
    """Do what `get_peft_model_state_dict` does; tensors that tied modules share are views of one memory."""
    config = _config_of(model, adapter_name)
    state_dict = model.state_dict() if state_dict is None else state_dict
    keys = adapter_key_map(model, adapter_name)
    keys.update(bias_key_map(model, adapter_name, getattr(config, "bias", "none")))
    keys.update(_chosen_embedding_keys(model, config, save_embedding_layers))
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
        raise PeftKeyError(f"there is no adapter {adapter_name!r}; the model has {', '.join(configs) or 'none'}")
    return configs[adapter_name]


def _chosen_embedding_keys(model: nn.Module, config: Any, choice: str | bool) -> dict[str, Place]:
    if not choice or (choice == "auto" and not vocabulary_has_grown(model, config)):
        return {}
    keys = embedding_key_map(model)
    if keys and choice == "auto":
        warn(
            "the vocabulary was resized, so the base weights of the embeddings are saved with the adapter; "
            "save_embedding_layers=False leaves them out"
        )
    if not keys and not hasattr(model, "get_input_embeddings"):
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
        `unexpected_keys`: keys of the checkpoint that belong to nothing in the model.

    Raises:
        PeftKeyError: if there is no adapter of that name.
        PeftRuntimeError: if shapes differ, or no key belongs to the adapter.
        PeftValueError: if a tensor has entries that are not finite.
    """
    config = _config_of(model, adapter_name)
    for _, module in adapter_modules(model):
        module.prepare_to_load(adapter_name, peft_model_state_dict)
    keys = adapter_key_map(model, adapter_name)
    own = set(keys)
    keys.update(bias_key_map(model, adapter_name, getattr(config, "bias", "none")))
    for saved, place in embedding_key_map(model).items():
        keys.setdefault(saved, place)
    tensors = live_tensors(model, {place.key for place in keys.values()})
    content = read_forms(model, adapter_name, peft_model_state_dict)
    found = {saved: content[saved] for saved in keys if saved in content}
    unexpected = [key for key in content if key not in keys]
    if peft_model_state_dict and not own & set(found):
        raise PeftRuntimeError(_explain_no_key(adapter_name, list(peft_model_state_dict), list(keys)))
    refuse_not_finite(found)
    expected = {saved: keys[saved].read(tensors[keys[saved].key]).shape for saved in found}
    mismatched = {saved: value.shape for saved, value in found.items() if value.shape != expected[saved]}
    if mismatched:
        _report_mismatch(mismatched, expected, ignore_mismatched_sizes)
    found = {saved: value for saved, value in found.items() if saved not in mismatched}
    values = one_value_per_tensor(found, keys, tensors)
    # a tensor that several modules share is loaded under all its names, whichever of them stand in the checkpoint
    filled = {id(tensors[key]) for key in values}
    missing = [key for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in filled]
    _assign(model, tensors, values)
    return _IncompatibleKeys(missing_keys=missing, unexpected_keys=unexpected)


def live_tensors(model: nn.Module, keys: set[str]) -> dict[str, torch.Tensor]:
    """Find parameters and buffers by their key in the state dict."""
    tensors = {}
    for key in keys:
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        tensors[key] = module._parameters[name] if name in module._parameters else module._buffers[name]
    return tensors


def one_value_per_tensor(
    found: Mapping[str, torch.Tensor], keys: Mapping[str, Place], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Turn the content of a checkpoint into values by key in the model's state dict.

    Where a checkpoint has several values for one tensor of the model, the first is taken, which is the owner's.
    """
    values: dict[str, torch.Tensor] = {}
    first: dict[int, tuple[str, torch.Tensor]] = {}
    disagreeing = []
    for saved, value in found.items():
        place = keys[saved]
        value = place.read(value)
        owner, owned = first.setdefault(id(tensors[place.key]), (saved, value))
        if owner == saved:
            values[place.key] = value
        elif not torch.equal(value.to(owned.device), owned):
            disagreeing.append(f"{saved} (now that of {owner})")
    if disagreeing:
        warn(
            f"the checkpoint has other values for {', '.join(disagreeing)}, although these modules are tied in the "
            "model; the owner's values are used. It was probably saved by a version that let ties come apart"
        )
    return values


def _explain_no_key(adapter_name: str, found: list[str], expected: list[str]) -> str:
    return (
        f"none of the checkpoint's {len(found)} keys belongs to adapter {adapter_name!r}. It holds {found[0]!r}"
        f"{' and others' if len(found) > 1 else ''}, the model expects {expected[0] if expected else 'none'!r}"
        f"{' and others' if len(expected) > 1 else ''}. The checkpoint was made for another architecture or another "
        "config; names that only differ by a prefix can be translated with key_mapping"
    )


def refuse_not_finite(found: Mapping[str, torch.Tensor]) -> None:
    broken = [key for key, value in found.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise PeftValueError(
            f"{len(broken)} tensors of the checkpoint have entries that are not finite, the first is {broken[0]!r}; "
            "nothing was loaded. The training run has diverged or the file is damaged: use an earlier checkpoint"
        )


def _report_mismatch(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], ignore: bool) -> None:
    details = [f"{key}: checkpoint {tuple(shape)}, model {tuple(expected[key])}" for key, shape in found.items()]
    text = f"{len(details)} tensors of the checkpoint have another shape than in the model ({'; '.join(details[:4])})"
    if ignore:
        warn(f"{text}; they were left out, because ignore_mismatched_sizes=True")
        return
    hint = "check the rank and the base model"
    rows = {shape[0] for shape in found.values() if shape}
    if len(rows) == 1 and all(shape[1:] == expected[key][1:] for key, shape in found.items()):
        hint = (
            f"if the vocabulary was resized for training, call resize_token_embeddings({rows.pop()}) on the base first"
        )
    raise PeftRuntimeError(f"{text}; nothing was loaded. What to do: {hint}")


def _assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Write values into tensors; a tensor without storage is replaced wherever the model holds it."""
    replaced: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for key, value in values.items():
            tensor = tensors[key]
            if not tensor.is_meta:
                tensor.copy_(value)
            elif id(tensor) not in replaced:
                replaced[id(tensor)] = _materialised(tensor, value)
    if replaced:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if id(tensor) in replaced:
                        held[name] = replaced[id(tensor)]


def _materialised(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    value = value.detach().to(tensor.dtype, copy=True)
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

    Args:
        model_id: folder, or hub id.
        device: where to put them; an accelerator if there is one.
        key_mapping: regular expression -> replacement for keys (without `base_model.model.` in front); the first
            expression that matches a key is used.
        hf_hub_download_kwargs: `subfolder`, `revision`, `token`, ...

    Raises:
        PeftPathError: if there is no such file.
        PeftValueError: if the file is damaged, or holds anything but tensors.
    """
    device = infer_device() if device is None else device
    path = _find_weights_file(os.fspath(model_id), hf_hub_download_kwargs)
    tensors = _read_safetensors(path, device) if path.endswith(".safetensors") else _read_pickle(path, device)
    if key_mapping:
        tensors = {_mapped_key(key, key_mapping): tensor for key, tensor in tensors.items()}
    return tensors


def _find_weights_file(model_id: str, hub_kwargs: dict[str, Any]) -> str:
    subfolder = hub_kwargs.get("subfolder")
    folder = os.path.join(model_id, subfolder) if subfolder else model_id
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    if os.path.isdir(model_id):
        found = sorted(os.listdir(folder))[:10] if os.path.isdir(folder) else "no such folder"
        raise PeftPathError(
            f"no {SAFETENSORS_WEIGHTS_NAME} in {folder!r} (found: {found}); save_pretrained writes one"
        )
    from huggingface_hub import hf_hub_download

    hub_kwargs = {name: value for name, value in hub_kwargs.items() if name != "device"}
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
    keys = {live: _without_wrappers(live, wrapped) for live in tensors}
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
