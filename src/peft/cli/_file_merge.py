# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Merging an adapter into the files of a base model.

Every tensor is read, merged and written by itself, so the memory that it takes is that of the largest weight and what
merging needs beside it, not that of a file. A file of the result appears under its name when it is whole, and a note
in the folder says which are, so that a merge that was killed goes on where it stopped.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..anatomy.skeletons import build_skeleton, model_config_path
from ..config import PeftConfig
from ..models.peft_model import PeftModel
from ..tying.groups import find_tied_groups
from ..utils.error import PeftNotImplementedError, PeftPathError, PeftRuntimeError, PeftValueError
from ..utils.files import write_atomically
from ._adapter_config import read_adapter_config
from ._structure import Structure, Unit
from ._tensor_files import DTYPES, INDEX_NAME, NAMES, BaseFiles, TensorWriter, read_json


PROGRESS_NAME = "merge_in_progress.json"
# weights in other formats would be those of the base model
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def merge_files(base: str, adapter: str, out: str, progressbar: bool = True) -> dict[str, Any]:
    """
    Merge an adapter into the files of a base model.

    Args:
        base: folder of a transformers model in safetensors files.
        adapter: folder of an adapter.
        out: folder to write to: new, empty, or that of a merge of the same files that did not end.
        progressbar: show progress, in bytes.

    Returns:
        Plain values: the folder, its files, their size, and what happened to tensors.

    Raises:
        PeftPathError: if a folder lacks what it should hold, or `out` holds something else.
        PeftValueError: if the files do not fit together.
        PeftNotImplementedError: if the adapter can only be merged in memory.
    """
    config = read_adapter_config(adapter)
    _refuse_config(config)
    raw_config = read_json(model_config_path(base))
    if raw_config.get("quantization_config"):
        raise PeftNotImplementedError(
            f"the weights in {base!r} are quantised; merge into the files of the model that they were made from"
        )
    files = BaseFiles.open(base)
    skeleton = build_skeleton(base, config)
    keys = _keys_by_name(skeleton, files)
    _use_forms_of_files(skeleton, files, keys)
    groups = find_tied_groups(skeleton)
    structure = Structure(PeftModel.from_pretrained(skeleton, adapter, config=config, low_cpu_mem_usage=True))
    plan = _Plan.make(structure, files, keys)
    progress = _Progress.open(out, _fingerprint(files, adapter, raw_config))
    finished_before = list(progress.finished)
    room = shutil.disk_usage(out).free
    needed = sum(shard.size for name, shard in plan.shards.items() if name not in progress.finished)
    if room < needed:
        raise PeftPathError(f"{out!r} has room for {room:,d} bytes, and {needed:,d} are to be written")
    with tqdm(total=plan.size, unit="B", unit_scale=True, desc="merging", disable=not progressbar) as bar:
        for name, shard in plan.shards.items():
            if name in progress.finished:
                bar.update(shard.size)
                continue
            write_atomically(os.path.join(out, name), lambda path, shard=shard: _write(path, shard, plan, bar))
            progress.note(name)
    _write_other_files(base, out, plan, raw_config, structure.config)
    progress.end()
    apart = [g.members for g in groups if len({id(structure.merged[m]) for m in g.members}) > 1]
    return {
        "out": out,
        "files": list(plan.shards),
        "bytes": plan.size,
        "finished_before": finished_before,
        "computed": plan.computed,
        "added": plan.added,
        "left_out": sorted(set(files.where) - {key for shard in plan.shards.values() for key in shard.tensors}),
        "untied": [name for members in apart for name in members],
    }


def _refuse_config(config: PeftConfig) -> None:
    """Refuse what does not come down to one base weight after the other."""
    way_out = "merge it in memory, with PeftModel.from_pretrained(...).merge_and_unload(), and save the result"
    if config.is_prompt_learning:
        raise PeftValueError(f"{config.peft_type} puts virtual tokens in front of inputs; there is nothing to merge")
    if getattr(config, "layer_replication", None):
        raise PeftNotImplementedError(
            f"layer_replication gives the merged model more layers than the files have; {way_out}"
        )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise PeftNotImplementedError(
            f"init_lora_weights={start!r} starts by changing the base weights, which the files do not know of; save "
            f"the adapter with path_initial_model_for_weight_conversion, or {way_out}"
        )


# ------------------------------------------------------------------------------------------ base files and base model
def _keys_by_name(skeleton: nn.Module, files: BaseFiles) -> dict[str, str]:
    """Map names of the model to keys of the files, which may differ by the name of the model without its head."""
    names = skeleton.state_dict()
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    keys = {}
    for key in files.where:
        for name in (key, prefix + key, key.removeprefix(prefix)):
            if name in names:
                keys.setdefault(name, key)
                break
    return keys


def _use_forms_of_files(skeleton: nn.Module, files: BaseFiles, keys: Mapping[str, str]) -> None:
    """
    Give the model's tensors the types that they have in the files.

    Raises:
        PeftValueError: if the model does not fit the files.
    """
    instead: dict[int, torch.Tensor] = {}
    present = skeleton.state_dict(keep_vars=True)
    for name, tensor in present.items():
        if name not in keys or id(tensor) in instead:
            continue
        key = keys[name]
        entry = files.shards[files.where[key]].entries[key]
        if entry.shape != tuple(tensor.shape):
            raise PeftValueError(
                f"{key!r} has shape {entry.shape} in the files, and {tuple(tensor.shape)} in the model that their "
                "config describes; load the model in Python and save it again"
            )
        if entry.dtype not in DTYPES:
            raise PeftValueError(f"{key!r} has type {entry.dtype}, which cannot be merged into")
        form = torch.empty_like(tensor, dtype=DTYPES[entry.dtype])
        is_parameter = isinstance(tensor, nn.Parameter)
        instead[id(tensor)] = nn.Parameter(form, requires_grad=False) if is_parameter else form
    for module in skeleton.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                held[key] = instead.get(id(tensor), tensor)


# ------------------------------------------------------------------------------------------ what is written where
@dataclass
class _Shard:
    """
    A file of the result.

    Attributes:
        metadata: free entries of its header.
        tensors: key -> name of the type, shape, number of bytes.
    """

    metadata: Mapping[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of bytes of its tensors."""
        return sum(count for _, _, count in self.tensors.values())


@dataclass
class _Plan:
    """
    What the files of the result hold, and where it comes from.

    Attributes:
        structure: the merged model.
        files: the base model's files.
        keys: name in the model -> key in the files.
        names: key -> name in the model.
        shards: name of a file -> its content.
        added: keys that the base model's files do not have.
    """

    structure: Structure
    files: BaseFiles
    keys: Mapping[str, str]
    names: dict[str, str]
    shards: dict[str, _Shard]
    added: list[str]

    @classmethod
    def make(cls, structure: Structure, files: BaseFiles, keys: Mapping[str, str]) -> "_Plan":
        names = {key: name for name, key in keys.items()}
        plan = cls(structure, files, keys, names, {}, [])
        for file_name, file in files.shards.items():
            shard = plan.shards[file_name] = _Shard(dict(file.metadata) or {"format": "pt"})
            for key in file.entries:
                if names.get(key) in structure.merged:  # what the model does not have, it would not save either
                    shard.tensors[key] = _form(structure.merged[names[key]])
        plan._refuse_other_names()
        plan._add_missing()
        plan.shards = {name: shard for name, shard in plan.shards.items() if shard.tensors}
        for unit in set(structure.units.values()):
            for name in unit.names:
                plan.key_of(name)
        return plan

    def _refuse_other_names(self) -> None:
        """Refuse files whose tensors transformers would rename or join to those of the model."""
        unknown = sorted(set(self.files.where) - set(self.names))
        lacking = [
            name for name in self.structure.base if self.find_key(name) is None and name not in self.structure.replaced
        ]
        if unknown and lacking:
            raise PeftNotImplementedError(
                f"the files name tensors otherwise than the model: they hold {unknown[0]!r} ({len(unknown)} such "
                f"keys), the model has {lacking[0]!r} ({len(lacking)}). Load the model in Python and save it again, "
                "or merge in memory"
            )

    def _add_missing(self) -> None:
        """Find room for tensors that no file has: trained heads, and those that are not tied any more."""
        where = self.files.where
        written = {id(self.structure.merged[name]) for name in self.keys if name in self.structure.merged}
        for name, tensor in self.structure.merged.items():
            present = name in self.structure.base and self.find_key(name) is not None
            if id(tensor) in written or not (present or name in self.structure.replaced):
                continue
            written.add(id(tensor))
            beside = where[self.key_of(name)] if present else list(self.shards)[-1]
            self.shards[beside].tensors[name] = _form(tensor)
            self.names[name] = name
            self.added.append(name)

    def find_key(self, name: str) -> str | None:
        """Find the key in the files for a tensor of the base model, by any of its names."""
        return next((self.keys[alias] for alias in (name, *self.structure.aliases(name)) if alias in self.keys), None)

    def key_of(self, name: str) -> str:
        """Do the same, and refuse what is not there."""
        key = self.find_key(name)
        if key is None:
            raise PeftValueError(f"the adapter changes {name!r}, which the base model's files do not hold")
        for alias in self.structure.aliases(name):
            if self.keys.get(alias, key) != key and not self._equal(key, self.keys[alias]):
                raise PeftValueError(
                    f"{key!r} and {self.keys[alias]!r} are tied in the model, but have other values in the files; "
                    "load the model in Python and save it again, so that it is settled which counts"
                )
        return key

    def _equal(self, key: str, other: str) -> bool:
        where = self.files.where
        pairs = zip(
            self.files.shards[where[key]].chunks(key), self.files.shards[where[other]].chunks(other), strict=False
        )
        return all(one == another for one, another in pairs)

    def read(self, name: str) -> torch.Tensor:
        """Give the content of a tensor of the base model: what the adapter brought along for it, or that of a file."""
        tensor = self.structure.base[name]
        if not tensor.is_meta:
            return tensor.detach().clone()
        key = self.find_key(name)
        return self.files.shards[self.files.where[key]].read(key)

    def unit_of(self, key: str) -> Unit | None:
        """Give the unit that computes the tensor of a key; None if it is not computed."""
        name = self.names.get(key)
        return None if name in self.structure.replaced else self.structure.units.get(name)

    def brought_along(self, key: str) -> torch.Tensor | None:
        """Give the tensor that the adapter has for a key as it is."""
        name = self.names.get(key)
        if name in self.structure.replaced:
            return self.structure.replaced[name]
        tensor = self.structure.base.get(name)
        return None if tensor is None or tensor.is_meta else tensor

    @property
    def size(self) -> int:
        """Number of bytes of all tensors."""
        return sum(shard.size for shard in self.shards.values())

    @property
    def computed(self) -> int:
        """Number of tensors that are not copied from the base model's files."""
        keys = [key for shard in self.shards.values() for key in shard.tensors]
        return sum(self.unit_of(key) is not None or self.brought_along(key) is not None for key in keys)


def _form(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], int]:
    return NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size()


def _write(path: str, shard: _Shard, plan: _Plan, bar: tqdm) -> None:
    """Write a file of the result, unit by unit."""
    where = plan.files.where
    by_unit: dict[Unit | None, list[str]] = {}
    for key in shard.tensors:
        by_unit.setdefault(plan.unit_of(key), []).append(key)
    with open(path, "wb") as file:
        writer = TensorWriter(file, shard.tensors, shard.metadata)
        for unit, keys in by_unit.items():
            computed = {} if unit is None else plan.structure.compute(unit, _values(plan, unit))
            for key in keys:
                trained = plan.brought_along(key)
                if unit is not None:
                    writer.write(key, _checked(key, computed[plan.names[key]], shard))
                elif trained is not None:
                    writer.write(key, _checked(key, trained, shard))
                else:
                    source = key if key in where else plan.find_key(plan.names[key])
                    entry = plan.files.shards[where[source]].entries[source]
                    _check_form(key, (entry.dtype, entry.shape, entry.size), shard)
                    writer.copy(key, plan.files.shards[where[source]], source)
                bar.update(shard.tensors[key][2])
            del computed
        file.flush()
        os.fsync(file.fileno())


def _values(plan: _Plan, unit: Unit) -> dict[str, torch.Tensor]:
    """Read what a unit needs, each tensor once."""
    first = {id(plan.structure.base[name]): name for name in reversed(unit.names)}
    return {name: plan.read(name) for name in first.values()}


def _checked(key: str, tensor: torch.Tensor, shard: _Shard) -> torch.Tensor:
    _check_form(key, _form(tensor), shard)
    return tensor


def _check_form(key: str, found: tuple[str, tuple[int, ...], int], shard: _Shard) -> None:
    if found != shard.tensors[key]:
        raise PeftRuntimeError(
            f"{key!r} was to be {shard.tensors[key]}, and merging gives {found}; merge in memory instead"
        )


# ------------------------------------------------------------------------------------------ the folder
@dataclass
class _Progress:
    """The note in the folder that says which files are whole, for a merge that is taken up again."""

    path: str
    fingerprint: str
    finished: list[str]

    @classmethod
    def open(cls, out: str, fingerprint: str) -> "_Progress":
        path = os.path.join(out, PROGRESS_NAME)
        if os.path.isfile(path):
            noted = read_json(path)
            if noted.get("fingerprint") != fingerprint:
                raise PeftPathError(
                    f"{out!r} holds a merge of other files that did not end; choose another folder, or empty this one"
                )
            for name in os.listdir(out):  # what the killed process was writing
                if name.startswith(".") and (".safetensors." in name or PROGRESS_NAME in name):
                    os.unlink(os.path.join(out, name))
            finished = [name for name in noted["finished"] if os.path.isfile(os.path.join(out, name))]
            return cls(path, fingerprint, finished)
        if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
            raise PeftPathError(f"{out!r} exists and is not an empty folder; choose another one")
        os.makedirs(out, exist_ok=True)
        progress = cls(path, fingerprint, [])
        progress._write()
        return progress

    def note(self, name: str) -> None:
        self.finished.append(name)
        self._write()

    def end(self) -> None:
        os.unlink(self.path)

    def _write(self) -> None:
        _write_json(self.path, {"fingerprint": self.fingerprint, "finished": self.finished})


def _fingerprint(files: BaseFiles, adapter: str, config: Mapping[str, Any]) -> str:
    """Tell apart merges of other files: names, sizes and times of the base model's, content of the adapter's."""
    digest = hashlib.sha256(json.dumps([__version__, config], sort_keys=True).encode())
    for name, file in files.shards.items():
        stat = os.stat(file.path)
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for name in sorted(os.listdir(adapter)):
        path = os.path.join(adapter, name)
        if name.startswith("adapter_") and os.path.isfile(path):
            with open(path, "rb") as content:
                for chunk in iter(lambda content=content: content.read(2**22), b""):
                    digest.update(chunk)
    return digest.hexdigest()


def _write_other_files(base: str, out: str, plan: _Plan, raw_config: dict[str, Any], merged_config: Any) -> None:
    """Write index and config of the merged model, and copy what else is in the base model's folder."""
    for name in _other_files(base):
        shutil.copyfile(os.path.join(base, name), os.path.join(out, name))
    if plan.files.index is not None:
        weight_map = {key: name for name, shard in plan.shards.items() for key in shard.tensors}
        metadata = {**plan.files.index.get("metadata", {}), "total_size": plan.size}
        content = {**plan.files.index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(os.path.join(out, INDEX_NAME), content)
    changed = copy.deepcopy(raw_config)
    for config, values in (
        (merged_config, changed),
        (getattr(merged_config, "text_config", None), changed.get("text_config")),
    ):
        if isinstance(values, dict) and getattr(config, "tie_word_embeddings", True) is False:
            values["tie_word_embeddings"] = False
    changed["architectures"] = [type(plan.structure.model.get_base_model()).__name__]
    _write_json(os.path.join(out, "config.json"), changed)


def _other_files(base: str) -> Iterable[str]:
    for name in sorted(os.listdir(base)):
        hidden_or_weights = name.startswith(".") or name.endswith(WEIGHT_ENDINGS) or name == "config.json"
        if not hidden_or_weights and os.path.isfile(os.path.join(base, name)):
            yield name


def _write_json(path: str, content: Any) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")

    write_atomically(path, write)
