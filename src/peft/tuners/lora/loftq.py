# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoftQ on a base model that is quantised already: factors that make up for what its weights have lost.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023, arXiv:2310.08659.
"""

import os
from collections.abc import Callable

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from ...checkpoints.vocabulary import Published, published_folder
from ...utils.error import PeftTypeError, PeftValueError
from ...utils.near_names import FEW
from ...utils.optional_packages import is_bnb_4bit_available
from .layer import Linear, LoraLayer
from .starts.loftq import fit_loss


_PREFIX = "base_model.model."
_FILE = "model.safetensors"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """
    Fit the factors of an adapter to what the weights of its base model have lost by being quantised to 4 bits.

    The quantised weights stay; the weights as they were are read from the files of the published model, one after the
    other. Calling it again, with a callback, may improve more.

    Args:
        peft_model: a `PeftModel` on layers of 4 bits of bitsandbytes.
        model_path: folder with the safetensors files of the unquantised model, or its file; left out, the folder in
            the local cache of the base model's name. Nothing is downloaded.
        adapter_name: name of the adapter.
        callback: is called after each layer, with the model and the name of the layer in the base model; if it returns
            something false, the layer's factors from before are put back.

    Raises:
        PeftValueError: without bitsandbytes, without such layers, or for files that are missing or of another model.
        PeftTypeError: for a model whose layers have other names.
    """
    if not is_bnb_4bit_available():
        raise PeftValueError("replace_lora_weights_loftq is for layers of bitsandbytes with 4 bits; install it")
    layers = _layers_to_fit(peft_model, adapter_name)
    files = _files_of(peft_model, model_path)
    keys = {name: _key_of(peft_model, name, files, layer) for name, layer in layers.items()}
    for name, layer in tqdm(layers.items(), "LoftQ", disable=None, delay=2, leave=False):
        with safe_open(files[keys[name]], framework="pt") as file:
            weight = file.get_tensor(keys[name])
        rounded = layer.get_base_weight().float()
        loss = weight.to(rounded) - rounded
        b, a = fit_loss(loss, layer.r[adapter_name], layer.scaling[adapter_name])
        into, out = layer.factor_weights(adapter_name)
        before = into.clone(), out.clone()
        into.copy_(a)
        out.copy_(b)
        if callback is not None and not callback(peft_model, name):
            into.copy_(before[0])
            out.copy_(before[1])


def _layers_to_fit(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    """Find the layers, by their names in the base model; those that follow others have no factors to fit."""
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Linear)
        and layer.has_adapter(adapter)
        and layer.source(adapter) is layer
        and getattr(layer.quantization_backend, "name", None) == "bnb 4bit"
    }
    if not found:
        raise PeftValueError(
            f"adapter {adapter!r} has no linear layer on weights that bitsandbytes has quantised to 4 bits; load the "
            "base model with BitsAndBytesConfig(load_in_4bit=True), and give the name of an adapter of LoRA"
        )
    foreign = [name for name in found if not name.startswith(_PREFIX)]
    if foreign:
        raise PeftTypeError(f"expected a PeftModel, whose layers are named {_PREFIX}..., found {foreign[0]!r}")
    for name, layer in found.items():
        if adapter in layer.merged_adapters or adapter in layer.variants:
            raise PeftValueError(
                f"LoftQ fits plain factors, and adapter {adapter!r} is merged into {name!r}, or no plain LoRA there; "
                "call unmerge_adapter(), or use it for another adapter"
            )
    return {name.removeprefix(_PREFIX): layer for name, layer in found.items()}


def _files_of(model: nn.Module, path: str | os.PathLike | None) -> dict[str, str]:
    """Give the file of each key of the unquantised model."""
    if path is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(
            model.peft_config.get("default"), "base_model_name_or_path", None
        )
        folder = published_folder(name, None)
        if folder is None:
            raise PeftValueError(
                f"the files of the unquantised model are needed, and none are in the local cache for {name!r}; give "
                "model_path, or download the model first"
            )
    else:
        path = os.fspath(path)
        folder = os.path.dirname(path) if path.endswith(_FILE) else path
    files = Published(folder or ".").files
    if not files:
        raise PeftValueError(
            f"no {_FILE} that can be read in {folder!r}, nor an index with its parts; give the folder of the "
            "unquantised model as model_path"
        )
    return files


def _key_of(model: nn.Module, name: str, files: dict[str, str], layer: LoraLayer) -> str:
    """Find the key of a layer's weight, and refuse one of another shape."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix = f"{getattr(base, 'base_model_prefix', '')}."
    key = f"{name}.weight"
    if key not in files:
        key = key.removeprefix(prefix)
    if key not in files:
        raise PeftValueError(
            f"the files of the unquantised model have no {name}.weight; they hold {', '.join(list(files)[:FEW])} ..., "
            "so they are of another model"
        )
    with safe_open(files[key], framework="pt") as file:
        shape = tuple(file.get_slice(key).get_shape())
    if shape != (layer.out_features, layer.in_features):
        raise PeftValueError(
            f"{key!r} has the shape {shape} in the files of the unquantised model, and "
            f"{(layer.out_features, layer.in_features)} in this one; they are of another model"
        )
    return key
