# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Reading the tensors of a checkpoint from a file, which is nobody's promise: no code in it is run."""

import os
import re
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..configs.files import HUB_KWARGS, refuse_local
from ..utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..utils.devices import infer_device
from ..utils.error import PeftPathError, PeftValueError
from ..utils.wrapped_names import plain_name, renamed
from .aliases import restore_aliases


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
