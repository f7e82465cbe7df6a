# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Whether the embeddings of a model are still those of the base model as it was published.

Which of a config's fields says how many rows there are differs from model to model, and some configs do not say it at
all. So the tensors are compared: with the published files if they are here, else with the shapes of a model that is
built from the published config. Nothing is downloaded.
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..anatomy.walking import bare_modules
from ..surgery.resizing import ROWS_BEFORE
from .keys import embedding_key_map, embedding_tensors


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# rows that are compared at a time
_ROWS = 16384


def embeddings_of(model: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
    """
    Find what has a row per token in a base model: its embeddings, and its output embedding with the bias.

    Args:
        model: a model with adapters.

    Returns:
        Name of a tensor in the model -> its name in the base model without adapters, and the tensor. Modules that are
        trained in full are left out.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    bare = {id(module): name for name, module in bare_modules(base)}
    return {
        live: (f"{bare[id(module)]}.{key}", module._parameters[key])
        for live, (module, key) in embedding_tensors(model).items()
        if id(module) in bare
    }


def changed_embeddings(model: nn.Module, config: Any, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """
    Find the embeddings that differ from those of the base model as it was published, in rows or in values.

    Args:
        model: a model with adapters.
        config: the adapter's config, which names the base model.
        tensors: the model's state dict, with plain names.

    Returns:
        Names of weights in the model. What cannot be compared, because nothing is known of the published model, has
        not changed.
    """
    # ZeRO-3 has empty tensors in the places of those that it has divided
    has_content = {live for live, tensor in tensors.items() if tensor.numel()}
    present = {live: place for live, place in embeddings_of(model).items() if live in has_content}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = {live: module.__dict__.get(ROWS_BEFORE) for live, (module, _) in embedding_tensors(model).items()}
    changed = [live for live in present if before[live] not in (None, len(tensors[live]))]
    folder = published_folder(getattr(config, "base_model_name_or_path", None), getattr(config, "revision", None))
    if folder is None or len(changed) == len(present):
        return changed
    published = Published(folder)
    keys = _keys_in_files([name for name, _ in present.values()], published.files)
    shapes = {name: published.shape(key) for name, key in keys.items()}
    tied = _names_of_one_tensor(present)
    if any(shapes.keys().isdisjoint(tied[live]) for live in embedding_key_map(model) if live in present):
        shapes = {**_shapes_by_config(base, folder), **shapes}
    for live in present:
        known = [name for name in tied[live] if name in keys] or [name for name in tied[live] if name in shapes]
        if live in changed or not known:
            continue
        name, tensor = known[0], tensors[live]
        # adapters may have changed a base weight: merged ones, and starts that take something out of it
        comparable = name in keys and ".base_layer." not in live
        if len(tensor) != shapes[name][0] or (comparable and not published.holds(keys[name], tensor)):
            changed.append(live)
    return changed


def _names_of_one_tensor(
    present: Mapping[str, tuple[str, nn.Parameter]],
) -> dict[str, list[str]]:
    """Give for each weight its name and the names of others that hold the same tensor: files hold it once."""
    return {
        live: [name] + [other for other, p in present.values() if p is parameter and other != name]
        for live, (name, parameter) in present.items()
    }


class Published:
    """
    The weights of a published model, in a folder.

    Args:
        folder: the folder.

    Attributes:
        files: key -> path of the safetensors file that holds it; empty if there are no such files.
    """

    def __init__(self, folder: str) -> None:
        self.files: dict[str, str] = {}
        try:
            if os.path.isfile(path := os.path.join(folder, _SINGLE)):
                with safe_open(path, framework="pt") as file:
                    self.files = dict.fromkeys(file.keys(), path)
            elif os.path.isfile(path := os.path.join(folder, _INDEX)):
                with open(path, encoding="utf-8") as file:
                    table = json.load(file)["weight_map"]
                shards = {key: os.path.join(folder, os.path.basename(name)) for key, name in table.items()}
                self.files = {key: path for key, path in shards.items() if os.path.isfile(path)}
        except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError):
            self.files = {}  # a file that cannot be read tells nothing

    def shape(self, key: str) -> tuple[int, ...]:
        """Read the shape of a tensor."""
        with safe_open(self.files[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def holds(self, key: str, tensor: torch.Tensor) -> bool:
        """
        Say whether a tensor has the values of a published one; types that cannot be compared are taken to have.

        Args:
            key: key of the published tensor, which has as many rows.
            tensor: a tensor, of any type.
        """
        if type(tensor) not in (torch.Tensor, nn.Parameter):  # one that is spread over processes, or quantised
            return True
        if tensor.is_meta or not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            return True
        with safe_open(self.files[key], framework="pt") as file:
            rows = file.get_slice(key)
            if tuple(rows.get_shape()) != tuple(tensor.shape):
                return True
            for start in range(0, len(tensor), _ROWS):
                found, part = rows[start : start + _ROWS], tensor[start : start + _ROWS].detach().cpu()
                if not found.is_floating_point() or found.dtype.itemsize == 1:
                    return True
                if not any(torch.equal(found.to(via).to(part.dtype), part) for via in _roundings(found, part)):
                    return False
        return True


def _roundings(found: torch.Tensor, part: torch.Tensor) -> list[torch.dtype]:
    """List the types that a tensor may have had meanwhile: in half precision, and widened for training afterwards."""
    return list(dict.fromkeys([found.dtype, part.dtype, torch.bfloat16, torch.float16]))


def _keys_in_files(names: Collection[str], keys: Collection[str]) -> dict[str, str]:
    """Find the keys of weights in the published files; a key that several weights may have is none's."""
    found = {name: key for name in names if (key := _key_of(name, keys)) is not None}
    count = Counter(found.values())
    return {name: key for name, key in found.items() if name == key or (count[key] == 1 and key not in names)}


def _key_of(name: str, keys: Collection[str]) -> str | None:
    """Find the key that a weight has in the published files, where what stands in front may be another prefix."""
    if name in keys:
        return name
    parts = name.split(".")
    for start in range(1, len(parts) - 1):
        ending = ".".join(parts[start:])
        found = [key for key in keys if key == ending or key.endswith(f".{ending}")]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _shapes_by_config(base: nn.Module, folder: str) -> dict[str, tuple[int, ...]]:
    """Build the model that the published config describes, without storage, to see which shapes it has."""
    config_cls = type(getattr(base, "config", None))
    if not hasattr(config_cls, "from_pretrained") or not hasattr(type(base), "_from_config"):
        return {}
    try:
        with _quietly(), torch.device("meta"):
            skeleton = type(base)._from_config(config_cls.from_pretrained(folder, local_files_only=True))
    except Exception:  # the code of any model is run here; one that cannot be built tells nothing
        return {}
    return {name: tuple(parameter.shape) for name, parameter in embeddings_of(skeleton).values()}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from talking about a model that nobody is going to use."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def published_folder(name_or_path: str | None, revision: str | None) -> str | None:
    """Find the folder that a published model is in: the one that is named, or that in the cache of the hub."""
    if not name_or_path:
        return None
    if os.path.isfile(os.path.join(name_or_path, "config.json")):
        return name_or_path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    except HFValidationError:  # a path that does not exist here
        return None
    return os.path.dirname(path) if isinstance(path, str) else None
