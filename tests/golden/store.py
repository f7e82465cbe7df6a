# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The packed facts and tensors (`scripts/pack_golden.py` writes them), each file read once."""

import functools
import gzip
import json
from collections import defaultdict
from pathlib import Path

import safetensors.torch
from torch import Tensor


FOLDER = Path(__file__).parent


@functools.cache
def facts() -> dict[str, dict]:
    """Return all facts: `bases`, `cases` and `scripts`, each a dict by name."""
    return json.loads(gzip.decompress((FOLDER / "facts.json.gz").read_bytes()))


@functools.cache
def _packed(file: str) -> dict[str, dict[str, dict[str, Tensor]]]:
    content = gzip.decompress((FOLDER / "tensors" / f"{file}.safetensors.gz").read_bytes())
    packed = defaultdict(lambda: defaultdict(dict))
    for path, tensor in safetensors.torch.load(content).items():
        owner, kind, key = path.split("/", 2)
        packed[owner][kind][key] = tensor
    return packed


def tensors(file: str, owner: str, kind: str) -> dict[str, Tensor]:
    """Return the tensors that `owner` (a case, a script or "base") has in a file, fresh copies by key."""
    return {key: tensor.clone() for key, tensor in _packed(file)[owner][kind].items()}
