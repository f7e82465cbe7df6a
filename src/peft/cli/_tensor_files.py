# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Safetensors files, tensor by tensor.

They are read with plain file access, not mapped into memory: what was read and let go of takes no memory any more.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..utils import files
from ..utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..utils.error import PeftPathError, PeftValueError


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 16 * 2**20
CACHE_LINE = 64


@dataclass(frozen=True)
class Entry:
    """
    What a file's header says about a tensor.

    Attributes:
        dtype: name of the type in the format.
        shape: sizes.
        start: where its bytes start in the file.
        size: number of bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """
    A safetensors file.

    Attributes:
        path: where it is.
        metadata: free entries of its header.
        entries: key -> what the header says, in the order of the file.
    """

    path: str
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry] = field(repr=False)

    @classmethod
    def open(cls, path: str) -> "TensorFile":
        """
        Read the header.

        Raises:
            PeftPathError: if there is no such file.
            PeftValueError: if it is not a whole safetensors file.
        """
        if not os.path.isfile(path):
            raise PeftPathError(f"there is no file {path!r}")
        try:
            with safe_open(path, framework="pt"):  # checks that header and sizes fit together
                pass
        except (SafetensorError, OSError) as error:
            raise PeftValueError(f"{path!r} is not a whole safetensors file ({error}); copy it again") from error
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        entries = {
            key: Entry(
                value["dtype"],
                tuple(value["shape"]),
                8 + length + value["data_offsets"][0],
                value["data_offsets"][1] - value["data_offsets"][0],
            )
            for key, value in header.items()
        }
        return cls(path, metadata, dict(sorted(entries.items(), key=lambda item: item[1].start)))

    def read(self, key: str) -> torch.Tensor:
        """
        Read a tensor.

        Raises:
            PeftValueError: if its type is one that this version cannot compute with.
        """
        entry = self.entries[key]
        if entry.dtype not in DTYPES:
            raise PeftValueError(f"{key!r} in {self.path!r} has type {entry.dtype}, which cannot be read")
        # The last bit of a sum can depend on where in a cache line its terms start. So the tensor gets the place that
        # it has where a file is mapped into memory, and what is computed from it is the same.
        room = torch.empty(entry.size + 2 * CACHE_LINE, dtype=torch.uint8)
        first = (entry.start - room.data_ptr()) % CACHE_LINE
        place = room[first : first + entry.size]
        if entry.size:
            with open(self.path, "rb") as file:
                file.seek(entry.start)
                file.readinto(memoryview(place.numpy()))
        dtype = DTYPES[entry.dtype]
        aligned = place.data_ptr() % dtype.itemsize == 0
        return (place if aligned else place.clone()).view(dtype).reshape(entry.shape)

    def meta(self, key: str) -> torch.Tensor:
        """Give a tensor without storage of the shape and type that the header says."""
        entry = self.entries[key]
        return torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype, torch.uint8), device="meta")

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor in pieces."""
        entry = self.entries[key]
        with open(self.path, "rb") as file:
            file.seek(entry.start)
            for offset in range(0, entry.size, CHUNK):
                yield file.read(min(CHUNK, entry.size - offset))


def open_adapter(folder: str) -> TensorFile:
    """
    Open the tensors of a saved adapter.

    Args:
        folder: folder that `save_pretrained` has written.

    Raises:
        PeftPathError: if it holds no safetensors file.
    """
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path) and os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
        raise PeftPathError(
            f"{folder!r} holds a pickle ({WEIGHTS_NAME}), which is not read here; load the adapter in Python and "
            "save it with save_pretrained, which writes safetensors"
        )
    if not os.path.isfile(path):
        found = sorted(os.listdir(folder))[:10] if os.path.isdir(folder) else "no such folder"
        raise PeftPathError(f"no {SAFETENSORS_WEIGHTS_NAME} in {folder!r} (found: {found})")
    return TensorFile.open(path)


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class BaseFiles:
    """
    The weights of a base model in its folder.

    Attributes:
        folder: the folder.
        shards: file name -> file, in order.
        index: content of the index; None if there is one file only.
    """

    folder: str
    shards: Mapping[str, TensorFile]
    index: Mapping[str, Any] | None

    @classmethod
    def open(cls, folder: str) -> "BaseFiles":
        """
        Read the headers of all files.

        Raises:
            PeftPathError: if there are no safetensors files.
            PeftValueError: if the index and the files do not fit together.
        """
        path = os.path.join(folder, INDEX_NAME)
        if not os.path.isfile(path):
            if not os.path.isfile(os.path.join(folder, SINGLE_NAME)):
                found = sorted(os.listdir(folder))[:10] if os.path.isdir(folder) else "no such folder"
                raise PeftPathError(
                    f"neither {SINGLE_NAME} nor {INDEX_NAME} in {folder!r} (found: {found}); a model with other files "
                    "can be loaded in Python and saved with save_pretrained"
                )
            return cls(folder, {SINGLE_NAME: TensorFile.open(os.path.join(folder, SINGLE_NAME))}, None)
        index = read_json(path)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_plain_name(name) for name in weight_map.values()):
            raise PeftValueError(f"{path!r} has no table from tensors to file names; copy it again")
        names = sorted(set(weight_map.values()))
        files = {name: TensorFile.open(os.path.join(folder, name)) for name in names}
        missing = [key for key, name in weight_map.items() if key not in files[name].entries]
        if missing:
            raise PeftValueError(
                f"{path!r} says that {weight_map[missing[0]]!r} holds {missing[0]!r}, and it does not "
                f"({len(missing)} such keys); copy the model again"
            )
        return cls(folder, files, index)

    @cached_property
    def where(self) -> dict[str, str]:
        """For each key the name of its file."""
        return {key: name for name, file in self.shards.items() for key in file.entries}


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name.endswith(".safetensors")


def read_json(path: str) -> dict[str, Any]:
    """
    Read a JSON file that holds an object.

    Raises:
        PeftPathError: if there is no such file.
        PeftValueError: if it holds something else.
    """
    try:
        return files.read_json(path)
    except FileNotFoundError as error:
        raise PeftPathError(f"there is no file {path!r}") from error


class TensorWriter:
    """
    Writes a safetensors file whose tensors come in any order.

    Args:
        file: an empty file, open for writing.
        shapes: key -> name of the type, shape and number of bytes; in the order of the file.
        metadata: free entries of the header.
    """

    def __init__(
        self, file: BinaryIO, shapes: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
    ):
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for key, (dtype, shape, count) in shapes.items():
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + count]}
            offset += count
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._file, self._first = file, 8 + len(text)
        self._places = {key: header[key]["data_offsets"] for key in shapes}
        file.truncate(self._first + offset)

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Write a tensor of the type and shape that were announced."""
        start, end = self._places.pop(key)
        self._file.seek(self._first + start)
        if end > start:
            self._file.write(memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))

    def copy(self, key: str, source: TensorFile, source_key: str) -> None:
        """Copy a tensor's bytes from another file."""
        start, _ = self._places.pop(key)
        self._file.seek(self._first + start)
        for chunk in source.chunks(source_key):
            self._file.write(chunk)

    @property
    def left(self) -> list[str]:
        """Keys that were not written yet."""
        return list(self._places)
