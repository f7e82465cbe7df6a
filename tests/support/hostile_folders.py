# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Folders of adapters as nobody should have them: valid ones of several methods, and ways to change them.

A change is structured: it takes a field, a header entry, a tensor or a file, and puts something there that a program
which trusts files would trip over. Changes can be combined.
"""

import copy
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft import PeftModel, get_peft_model
from peft.checkpoints.aliases import ALIASES_HEADER
from peft.checkpoints.hashes import HASHES_HEADER
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING
from support.helpers import Kinds, gpt2, kinds, llama, logits, randomise, stack


WEIGHTS, BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
# a module that lies where Python finds modules, and that no file has any business to have imported
BAIT = "hostile_bait"

Change = Callable[[random.Random, "Folder"], None]


# ------------------------------------------------------------------------------------------ valid folders
def _tied_llama() -> nn.Module:
    return llama(tied=True)


_PLAIN = {"target_modules": ["up", "head"]}
_ON_KINDS = {"target_modules": ["lin", "head"]}
_PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
# name -> base model, method, fields of the config, options of saving
VALID: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any], dict[str, Any]]] = {
    "lora": (
        stack,
        "LORA",
        {"r": 2, **_PLAIN, "rank_pattern": {"layers.0.up": 3}, "modules_to_save": ["layers.1.down"]},
        {},
    ),
    "lora by patterns": (
        stack,
        "LORA",
        {
            "r": 2,
            "target_modules": r".*layers\.\d+\.(up|down)",
            "exclude_modules": r".*2\.down",
            "rank_pattern": {r"layers\.[01]\.up": 3, r"^layers\.2.*": 1},
            "alpha_pattern": {"down": 3.5},
            "bias": "lora_only",
        },
        {},
    ),
    "lora of layers": (
        stack,
        "LORA",
        {
            "r": 2,
            "target_modules": ["up"],
            "layers_to_transform": [0, 2],
            "layers_pattern": "layers",
            "use_dora": True,
        },
        {},
    ),
    "lora, tied": (
        _tied_llama,
        "LORA",
        {
            "r": 2,
            "target_modules": ["embed_tokens", "q_proj"],
            "ensure_weight_tying": True,
            "task_type": "CAUSAL_LM",
        },
        {"deduplicate_tied": True},
    ),
    "lora with tokens": (
        kinds,
        "LORA",
        {"r": 2, **_ON_KINDS, "trainable_token_indices": {"emb": [1, 5]}},
        {},
    ),
    "adalora": (stack, "ADALORA", {"init_r": 3, "target_r": 2, "total_step": 10, **_PLAIN}, {}),
    "boft": (stack, "BOFT", {"boft_block_size": 4, **_PLAIN}, {}),
    "hra": (stack, "HRA", {"r": 2, **_PLAIN}, {}),
    "ia3": (kinds, "IA3", {**_ON_KINDS, "feedforward_modules": ["lin"]}, {}),
    "layer norms": (kinds, "LN_TUNING", {"target_modules": ["norm"]}, {}),
    "loha": (stack, "LOHA", {"r": 2, **_PLAIN, "rank_pattern": {"head": 3}}, {}),
    "lokr": (stack, "LOKR", {"r": 2, "decompose_both": True, **_PLAIN}, {}),
    "oft": (stack, "OFT", {"r": 0, "oft_block_size": 4, **_PLAIN}, {}),
    "tokens": (kinds, "TRAINABLE_TOKENS", {"target_modules": ["emb"], "token_indices": [1, 3, 5]}, {}),
    "vblora": (
        stack,
        "VBLORA",
        {"r": 2, "num_vectors": 6, "vector_length": 4, "save_only_topk_weights": True, **_PLAIN},
        {},
    ),
    "vera": (stack, "VERA", {"r": 3, **_PLAIN}, {}),
    "prompt": (gpt2, "PROMPT_TUNING", _PROMPT, {}),
    "p-tuning": (gpt2, "P_TUNING", {**_PROMPT, "encoder_hidden_size": 8}, {}),
    "prefix": (gpt2, "PREFIX_TUNING", _PROMPT, {}),
    "multitask prompt": (gpt2, "MULTITASK_PROMPT_TUNING", {**_PROMPT, "num_tasks": 2}, {}),
}


@dataclass
class Folder:
    """
    A folder in memory, to be changed and then written.

    Attributes:
        config: fields of the config.
        entries: key and header entry of each tensor, in the order of the file; keys may stand there twice.
        metadata: free entries of the header.
        data: bytes of the tensors.
        length: what the file says is the size of its header; the true size if it is None.
        of_text: changes of the config's bytes, in order.
        of_bytes: changes of the weights' bytes, in order.
        on_disk: what is done to the folder after it was written, with the folder and a place outside of it.
    """

    config: dict[str, Any]
    entries: list[tuple[str, dict[str, Any]]]
    metadata: dict[str, Any]
    data: bytes
    length: int | None = None
    of_text: list[Callable[[bytes], bytes]] = field(default_factory=list)
    of_bytes: list[Callable[[bytes], bytes]] = field(default_factory=list)
    on_disk: list[Callable[[Path, Path], None]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Folder":
        """Read a valid folder."""
        whole = (path / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8 : 8 + size])
        metadata = header.pop("__metadata__", {})
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        return cls(config, list(header.items()), metadata, whole[8 + size :])

    def weights(self) -> bytes:
        """Put the weights file together."""
        pairs = [("__metadata__", self.metadata)] if self.metadata != {} else []
        header = ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in [*pairs, *self.entries])
        text = f"{{{header}}}".encode()
        text += b" " * (-len(text) % 8)
        whole = struct.pack("<Q", len(text) if self.length is None else self.length) + text + self.data
        for change in self.of_bytes:
            whole = change(whole)
        return whole

    def write(self, path: Path, outside: Path) -> None:
        """Write the folder in the place of whatever is there."""
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        text = json.dumps(self.config).encode()
        for change in self.of_text:
            text = change(text)
        (path / CONFIG).write_bytes(text)
        (path / WEIGHTS).write_bytes(self.weights())
        for change in self.on_disk:
            change(path, outside)


def make_valid(name: str, path: Path) -> tuple[nn.Module, Folder]:
    """Save an adapter that has learned something; give a new base model and the folder."""
    build, method, fields, options = VALID[name]
    model = get_peft_model(build(), PEFT_TYPE_TO_CONFIG_MAPPING[method](**fields))
    randomise(model, "lora_|hada_|lokr_|oft_|boft_|hra_|ia3_|vera_|vblora_|trainable_tokens|prompt_encoder|ln_tuning")
    model.save_pretrained(path, **options)
    return build(), Folder.read(path)


# ------------------------------------------------------------------------------------------ hostile values
# expressions that take for ever on some name of the models above, or blow up while they are compiled
EXPRESSIONS = (
    r"(\w+\.?)+$x",
    r"(.+)+\d!",
    r"(a|a)*" * 10 + "b",
    r"(?:l|l|l|l)(?:a|a|a|a)(?:y|y|y|y)" * 8,
    r".*" * 30 + "z",
    r"([a-z.0-9]*)*\1!",
    r"(?=(.+)+!)x",
    "a?" * 40 + "a" * 40,
    "(?:" * 60 + "ab|c" + ")+" * 60,
    "(?:(?:x{60000}){60000}){60000}",
    "x{99999999999999999999}",
    "(" * 3000 + ")" * 3000,
    "(",
    "[",
    "*",
    "\\",
    "(?P<x>a)(?P<x>b)",
    "(?<=a+)b",
    "(?R)",
    "(?1)",
    "\\p{L}+",
    "[[:alpha:]]+",
    "up{e<=3}",
    "(?i:UP)",
    "^layers",
    "$",
    "|",
    ".*",
)
NAMES = (
    "",
    ".",
    "..",
    "x",
    "up",
    "head",
    "all-linear",
    "layers.0.up",
    "../../outside",
    "/etc/passwd",
    "/dev/zero",
    "C:\\x",
    "a\0b",
    "\n",
    "\u202e",
    "{0.__class__}",
    "%s%n",
    BAIT,
    f"{BAIT}:Class",
    f"__import__('{BAIT}')",
    "__class__",
    "__init__",
    "weight",
    "default",
    "base_layer",
    "lora_A",
    "LORA",
    "VERA",
    "XLORA",
    "CAUSAL_LM",
    "SEQ_CLS",
    "pissa",
    "olora",
    "pissa_niter_999999999",
    "eva",
    "loftq",
    "gaussian",
    "orthogonal",
    "TEXT",
    "SAMPLE_VOCAB",
    "EXACT_SOURCE_TASK",
    "a" * 20_000,
)
NUMBERS = (0, 1, -1, 2, 3, 7, 0.5, -0.5, 1.5, 1e-300, 1e308, -1e308, 255, 65_537, 20_000_000, 2**31, 2**40)
NUMBERS += (2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**300)


def value(rng: random.Random, depth: int = 0) -> Any:
    """Draw a value that some field may not be ready for."""
    kind = rng.randrange(12 if depth < 2 else 7)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind in (1, 2, 3):
        return rng.choice(NUMBERS)
    if kind == 4:
        return rng.choice(EXPRESSIONS)
    if kind in (5, 6):
        return rng.choice(NAMES)
    if kind == 7:
        return [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 3)))]
    if kind == 8:
        return [value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2)))]
    if kind == 9:
        return {str(rng.choice(NAMES + EXPRESSIONS)): value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2)))}
    if kind == 10:
        return rng.choice((list(range(3000)), [f"x.{i}" for i in range(3000)], {f"^x{i}$": 2 for i in range(1000)}))
    nested: Any = 1
    for _ in range(rng.choice((10, 300))):
        nested = [nested]
    return nested


# ------------------------------------------------------------------------------------------ changes of the config
def set_field(rng: random.Random, folder: Folder) -> None:
    """Give a field of the method a hostile value."""
    fields = list(folder.config)
    if rng.random() < 0.2:
        fields = [*PEFT_TYPE_TO_CONFIG_MAPPING["LORA"].__dataclass_fields__, "unknown", "ensure_weight_tying"]
    folder.config[rng.choice(fields)] = value(rng)


def set_size(rng: random.Random, folder: Folder) -> None:
    """Give a field that is a number another one."""
    fields = [k for k, v in folder.config.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if fields:
        folder.config[rng.choice(fields)] = rng.choice(NUMBERS)


def set_pattern(rng: random.Random, folder: Folder) -> None:
    """Put an expression where one is matched."""
    name = rng.choice(
        ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules", "rank_pattern", "alpha_pattern")
    )
    expression = rng.choice(EXPRESSIONS)
    if name.endswith("_pattern") and name != "layers_pattern":
        folder.config[name] = {expression: rng.choice((2, 3, *NUMBERS)), "up": 2}
    else:
        folder.config[name] = expression
    if name == "layers_pattern":
        folder.config["layers_to_transform"] = rng.choice((0, [0, 1], [2**70], -1))


def set_names(rng: random.Random, folder: Folder) -> None:
    """Put other names where modules are named."""
    name = rng.choice(("target_modules", "exclude_modules", "modules_to_save", "target_parameters"))
    chosen = [rng.choice((*NAMES, "down", "layers", "norm", "emb", "conv", "lin", "lm_head", "wte")) for _ in range(3)]
    folder.config[name] = chosen[: rng.randrange(4)]


def set_nested(rng: random.Random, folder: Folder) -> None:
    """Give LoRA settings of its own kinds, and tokens."""
    name = rng.choice(
        (
            "eva_config",
            "corda_config",
            "loftq_config",
            "velora_config",
            "monteclora_config",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
            "lora_ga_config",
            "layer_replication",
            "trainable_token_indices",
            "token_indices",
            "tokenizer_kwargs",
            "init_lora_weights",
            "megatron_config",
        )
    )
    choices: list[Any] = [value(rng), {"rho": value(rng)}, {"nblocks": value(rng)}, {"trust_remote_code": True}]
    choices += [[[0, 2], [1, 3]], [[0, 10**9]], [[0, value(rng)]], {"emb": value(rng)}, [0, 0], [-1], [10**9]]
    folder.config[name] = rng.choice(choices)


def drop_field(rng: random.Random, folder: Folder) -> None:
    """Leave a field out, or give it another name."""
    name = rng.choice(list(folder.config))
    content = folder.config.pop(name)
    if rng.random() < 0.5:
        folder.config[name.upper()] = content


def other_method(rng: random.Random, folder: Folder) -> None:
    """Call the method another one."""
    methods = [str(getattr(key, "value", key)) for key in PEFT_TYPE_TO_CONFIG_MAPPING]
    folder.config["peft_type"] = rng.choice([*methods, value(rng)])


def name_modules_to_import(rng: random.Random, folder: Folder) -> None:
    """Name the bait wherever a config names something of Python."""
    folder.config["auto_mapping"] = rng.choice(
        (
            {"base_model_class": "Class", "parent_library": BAIT},
            {"base_model_class": "pipeline", "parent_library": "transformers"},
            {"base_model_class": "__builtins__", "parent_library": f"transformers.{BAIT}"},
            {"base_model_class": 5, "parent_library": []},
            [BAIT],
            BAIT,
        )
    )
    folder.config[rng.choice(("megatron_core", "tokenizer_name_or_path", "base_model_name_or_path"))] = BAIT


def config_text(rng: random.Random, folder: Folder) -> None:
    """Change the bytes of the config."""

    def with_pair(pair: bytes) -> Callable[[bytes], bytes]:
        return lambda text: b"{" + pair + b"," + text[1:]

    at = rng.random()
    byte = bytes([rng.randrange(256)])
    choices: list[Callable[[bytes], bytes]] = [
        lambda text: text[: int(at * len(text))],
        lambda text: text[: int(at * len(text))] + byte + text[int(at * len(text)) + 1 :],
        lambda text: text + text,
        lambda text: b"\xff\xfe" + text,
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.decode().encode("utf-16"),
        lambda text: text.replace(b'"', b"'"),
        lambda text: b"",
        lambda text: b"null",
        lambda text: b"[" + text + b"]",
        lambda text: b"\0" * 100,
        lambda text: b"[" * 100_000,
        lambda text: b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        lambda text: b"9" * 10_000,
        lambda text: b"\x80\x04}." + text,
        with_pair(b'"r": NaN'),
        with_pair(b'"lora_alpha": Infinity'),
        with_pair(b'"lora_alpha": 1e999'),
        with_pair(b'"extra": -Infinity'),
        with_pair(b'"r": 2, "r": 20000000'),
        with_pair(b'"rank_pattern": {"up": 1, "up": 2}'),
        with_pair(b'"extra": ' + b"1" * 5_000),
        with_pair(b'"extra": "\\ud800"'),
        with_pair(b'"base_model_name_or_path": "\\udfff x"'),
        with_pair(b'"task_type": "\xc3\x28"'),
        with_pair(b'"extra": ' + b"[" * 2_000 + b"]" * 2_000),
        with_pair(b'"peft_type": "VERA"'),
        lambda text: text.replace(b"2", b"20000000"),
        lambda text: text.replace(b"2", b"-2"),
        lambda text: text.replace(b"false", b"true"),
    ]
    folder.of_text.append(rng.choice(choices))


# ------------------------------------------------------------------------------------------ changes of the weights
def header_entry(rng: random.Random, folder: Folder) -> None:
    """Change what the header says about a tensor."""
    at = rng.randrange(len(folder.entries))
    key, entry = folder.entries[at]
    if not (isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list) and "shape" in entry):
        return  # it was changed already
    entry = copy.deepcopy(entry)
    start, end = (*entry["data_offsets"], 0, 0)[:2]
    which = rng.choice(("dtype", "shape", "offsets", "remove", "replace"))
    if not all(type(place) is int for place in (start, end)) or not isinstance(entry["shape"], list):
        return
    if which == "dtype":
        entry["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I64", "I32", "I16", "I8", "U64")
            + ("U32", "U16", "U8", "BOOL", "C64", "F99", "", "f32", 5, None, ["F32"])
        )
    elif which == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            (
                shape[::-1],
                [*shape, 1],
                [1, *shape],
                shape[:-1],
                [],
                [0],
                [-1, *shape],
                [end - start],
                [2**40],
                [2**63],
                [2**64],
                [2**32, 2**32],
                [0, 2**62],
                [1] * 100,
                [1.5],
                ["2"],
                None,
                shape[0] if shape else 1,
            )
        )
    elif which == "offsets":
        entry["data_offsets"] = rng.choice(
            (
                [end, start],
                [start, end + 1],
                [start, end - 1],
                [start + 1, end + 1],
                [0, 2**40],
                [2**40, 2**40 + end - start],
                [-4, end - start - 4],
                [2**64 - 4, end],
                [2**63, 2**63],
                [start],
                [start, end, end],
                [float(start), float(end)],
                None,
                [0, 12],
                [10**30, 10**30 + 4],
            )
        )
    elif which == "remove":
        del entry[rng.choice(list(entry))]
    else:
        folder.entries[at] = (key, rng.choice(({}, [], None, 5, "x", {**entry, "more": 1}, [entry])))
        return
    folder.entries[at] = (key, entry)


def header_as_a_whole(rng: random.Random, folder: Folder) -> None:
    """Change the length of the header, its order, or let a key stand there twice."""
    which = rng.randrange(5)
    if which == 0:
        folder.length = rng.choice((0, 1, 7, 100, 2**20, 10**8, 10**8 + 1, 2**32, 2**40, 2**63, 2**64 - 1))
    elif which == 1:
        folder.entries.append(rng.choice(folder.entries))
    elif which == 2:
        key, entry = rng.choice(folder.entries)
        folder.entries.insert(0, (key, {**(entry if isinstance(entry, dict) else {}), "data_offsets": [0, 10**12]}))
    elif which == 3:
        rng.shuffle(folder.entries)
    else:
        (one, a), (other, b) = rng.choice(folder.entries), rng.choice(folder.entries)
        folder.entries = [(k, {one: b, other: a}.get(k, e)) for k, e in folder.entries]


def header_metadata(rng: random.Random, folder: Folder) -> None:
    """Change the free entries of the header, which hold the table of tied tensors and the hashes."""
    keys = [key for key, _ in folder.entries]
    key = rng.choice(keys)
    table = rng.choice(
        (
            "",
            "x",
            "[]",
            "5",
            "null",
            "{}",
            "[" * 50_000,
            json.dumps({key: [key, False]}),
            json.dumps({"new": [key, True]}),
            json.dumps({"new": [key, 10**30]}),
            json.dumps({"new": ["nowhere", False]}),
            json.dumps({"new": key}),
            json.dumps({"new": [[key], False]}),
            json.dumps({"new": None, key: 1}),
            json.dumps({"a": ["b", False], "b": ["a", False]}),
            json.dumps({f"new{i}": [key, False] for i in range(3000)}),
            json.dumps({k: [key, True] for k in keys}),
            json.dumps({key: "0" * 64}),
            '{"new": ["x", NaN]}',
            "\ud800",
        )
    )
    present = folder.metadata if isinstance(folder.metadata, dict) else {}
    folder.metadata = rng.choice(
        (
            {**present, ALIASES_HEADER: table},
            {**present, HASHES_HEADER: table},
            {**present, "format": rng.choice(("tf", "np", "", "pickle"))},
            {"x" * 10_000: "y" * 10_000},
            {**present, "x": 5},
            {"format": None},
            [1],
            "pt",
            None,
        )
    )


def rename_keys(rng: random.Random, folder: Folder) -> None:
    """Give tensors other names."""
    prefix = "base_model.model."
    names = ("", ".", "..", "a..b", "weight", "__metadata__", "\0", "../x", "a" * 20_000, "base_model", prefix)
    rename = rng.choice(
        (
            lambda key: key.removeprefix(prefix),
            lambda key: prefix + key,
            lambda key: key.replace(".weight", ""),
            lambda key: key.replace("lora_A", "lora_B"),
            lambda key: key.upper(),
            lambda key: key.replace("0", "7"),
            lambda key: key + ".default",
            lambda key: key.replace(".", "/"),
            lambda key: key.replace("weight", "default.weight"),
            lambda key: rng.choice(names),
            lambda key: key.replace("base_model.model", "base_model.model.base_layer"),
        )
    )
    share = rng.choice((0.2, 1.0))
    folder.entries = [(rename(key) if rng.random() < share else key, entry) for key, entry in folder.entries]


def drop_tensors(rng: random.Random, folder: Folder) -> None:
    """Leave tensors out, with their bytes; sometimes all of them."""
    share = rng.choice((0.1, 0.5, 1.0))
    rewrite(folder, {key: tensor for key, tensor in read(folder).items() if rng.random() > share})


def change_tensors(rng: random.Random, folder: Folder) -> None:
    """Change values, shapes and types of tensors so that the file stays whole."""
    tensors = read(folder)
    new: dict[str, torch.Tensor] = {}
    change = rng.choice(
        (
            lambda t: t.to(rng.choice((torch.float64, torch.float16, torch.bfloat16))),
            lambda t: t.to(rng.choice((torch.int64, torch.int8, torch.uint8, torch.bool, torch.int16))),
            lambda t: t.to(rng.choice((torch.float8_e4m3fn, torch.float8_e5m2))),
            lambda t: t.to(torch.complex64),
            lambda t: t.T.contiguous() if t.dim() == 2 else t.unsqueeze(0),
            lambda t: t.reshape(-1),
            lambda t: t[:1],
            lambda t: t[:0],
            lambda t: torch.cat([t, t]),
            lambda t: t.unsqueeze(0),
            lambda t: t.new_zeros(()),
            lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t - 1000,
            lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else t + 200,
            lambda t: torch.full_like(t, 3e38) if t.is_floating_point() else t,
            lambda t: torch.zeros_like(t),
        )
    )
    share = rng.choice((0.2, 1.0))
    for key, tensor in tensors.items():
        new[key] = change(tensor) if rng.random() < share and tensor.dim() else tensor
    if rng.random() < 0.2:
        new[rng.choice(("extra", "base_model.model.head.weight", "base_model.model.x.lora_A.weight"))] = torch.ones(3)
    rewrite(folder, new)


def weights_bytes(rng: random.Random, folder: Folder) -> None:
    """Change the bytes of the weights."""
    at, byte = rng.random(), bytes([rng.randrange(256)])
    folder.of_bytes.append(
        rng.choice(
            (
                lambda whole: whole[: int(at * len(whole))],
                lambda whole: whole[: int(at * len(whole))] + byte + whole[int(at * len(whole)) + 1 :],
                lambda whole: whole[: int(at**4 * len(whole))] + byte + whole[int(at**4 * len(whole)) + 1 :],
                lambda whole: whole + byte * 8,
                lambda whole: whole + whole,
                lambda whole: byte * len(whole),
                lambda whole: b"",
                lambda whole: struct.pack("<Q", 2) + b"{}",
                lambda whole: struct.pack("<Q", 200_000) + b'{"a":' * 40_000,
                lambda whole: b"PK\x03\x04" + whole,
                lambda whole: pickle.dumps(Bomb()),
            )
        )
    )


def read(folder: Folder) -> dict[str, torch.Tensor]:
    """Read the tensors that an unharmed header describes; others are left out."""
    types = {"F32": torch.float32, "I64": torch.int64, "U8": torch.uint8, "I32": torch.int32}
    tensors = {}
    for key, entry in folder.entries:
        try:
            start, end = entry["data_offsets"]
            data = torch.frombuffer(bytearray(folder.data[start:end]), dtype=types[entry["dtype"]])
            tensors[key] = data.reshape(entry["shape"])
        except (KeyError, TypeError, ValueError, RuntimeError):  # changed already
            continue
    return tensors


def rewrite(folder: Folder, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors in the place of those that are there."""
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL", torch.complex64: "C64"}
    names |= {torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    names |= {torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32"}
    folder.entries, data = [], b""
    for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        folder.entries.append(
            (key, {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets})
        )
        data += raw
    folder.data = data


# ------------------------------------------------------------------------------------------ changes of the folder
class Bomb:
    """An object whose unpickling imports the bait."""

    def __reduce__(self) -> tuple:
        return (__import__, (BAIT,))


def _special(rng: random.Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that a pickle can hold and a program may not be ready for."""
    change = rng.choice(
        (
            lambda t: torch.ones(1).expand(10**12),
            lambda t: torch.ones(()).expand(t.shape),
            lambda t: t.to_sparse(),
            lambda t: t.to("meta"),
            lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
            lambda t: nn.Parameter(t.float()),
            lambda t: t.float() * 1j,
        )
    )
    return {key: change(tensor) for key, tensor in tensors.items()}


def use_pickle(rng: random.Random, folder: Folder) -> None:
    """Put a pickle in the place of the weights: whole, with code in it, with something else in it, or damaged."""
    tensors = read(folder)
    content: Any = rng.choice(
        (
            tensors,
            tensors,
            _special(rng, tensors),
            {**tensors, "x": Bomb()},
            Bomb(),
            [Bomb()],
            {"a": 1},
            [],
            None,
            {1: torch.ones(1)},
            {},
        )
    )
    buffer = io.BytesIO()
    if rng.random() < 0.7:
        torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    else:
        pickle.dump(content, buffer, protocol=2)
    whole = buffer.getvalue()
    if rng.random() < 0.4:
        at = rng.randrange(len(whole))
        whole = rng.choice((whole[:at], whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :]))

    def change(path: Path, outside: Path) -> None:
        remove(path / WEIGHTS)
        (path / BIN).write_bytes(whole)

    folder.on_disk.append(change)


def remove(path: Path) -> None:
    """Remove whatever has that name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def change_files(rng: random.Random, folder: Folder) -> None:
    """Put something else in the place of a file: nothing, a folder, a link, a pipe, the other file."""
    name = rng.choice((CONFIG, WEIGHTS))
    target = rng.choice(("secret", "nowhere", "", "/dev/zero", "/dev/null", "/proc/self/environ", "self", "copy"))

    def link(path: Path, outside: Path) -> None:
        file = path / name
        places = {"self": file, "copy": outside / f"moved {name}"}
        if target == "copy" and file.is_file():  # a link to a whole file, as in the cache of the hub
            places["copy"].write_bytes(file.read_bytes())
        remove(file)
        file.symlink_to(places.get(target, Path(target) if target.startswith("/") else outside / target))

    def pipe(path: Path, outside: Path) -> None:
        remove(path / name)
        os.mkfifo(path / name)

    def directory(path: Path, outside: Path) -> None:
        remove(path / name)
        (path / name).mkdir()

    def swap(path: Path, outside: Path) -> None:
        if (path / WEIGHTS).is_file() and (path / CONFIG).is_file():
            one, other = (path / CONFIG).read_bytes(), (path / WEIGHTS).read_bytes()
            (path / CONFIG).write_bytes(other)
            (path / WEIGHTS).write_bytes(one)

    def pending(path: Path, outside: Path) -> None:
        (path / f".{CONFIG}.{rng.choice(('0' * 64, '../x', 'x'))}".replace("/", "_")).write_text(
            '{"peft_type": "LORA"}'
        )

    folder.on_disk.append(
        rng.choice((lambda path, outside: remove(path / name), directory, link, link, pipe, swap, pending))
    )


OF_CONFIG: tuple[Change, ...] = (
    set_field,
    set_field,
    set_size,
    set_size,
    set_pattern,
    set_pattern,
    set_names,
    set_nested,
    drop_field,
    other_method,
    name_modules_to_import,
    config_text,
    config_text,
)
OF_WEIGHTS: tuple[Change, ...] = (
    header_entry,
    header_entry,
    header_as_a_whole,
    header_metadata,
    rename_keys,
    drop_tensors,
    change_tensors,
    change_tensors,
    weights_bytes,
)
OF_FILES: tuple[Change, ...] = (use_pickle, change_files)
CHANGES = OF_CONFIG + OF_WEIGHTS + OF_FILES


# ------------------------------------------------------------------------------------------ what nobody may do
class Trespass(BaseException):
    """Something was done that reading a file must not do. No `except Exception` hides it."""


_watched = {"on": False}
_FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn"}
_FORBIDDEN |= {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _watch(event: str, arguments: tuple) -> None:
    if not _watched["on"]:
        return
    if event in _FORBIDDEN:
        raise Trespass(f"{event}{arguments}")
    if event == "import" and BAIT in str(arguments[0]):
        raise Trespass(f"import {arguments[0]}")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        if not str(arguments[0]).startswith("/dev/null"):
            raise Trespass(f"open{arguments}")


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[None]:
    """Raise `Trespass` if something inside imports the bait, starts a process, or touches a file but to read it."""
    _watched["on"] = True
    try:
        yield
    finally:
        _watched["on"] = False


def forward(model: PeftModel) -> torch.Tensor | None:
    """Compute something with a model, to see whether it works; not with a prefix that is made for another one."""
    base = model.get_base_model()
    if model.peft_type == "PREFIX_TUNING":
        # no reason to refuse it: where a model's config tells its sizes wrongly, the adapter's has to tell them
        own, prompt = base.config, model.active_peft_config
        heads, layers = prompt.num_attention_heads, prompt.num_layers
        if (heads, prompt.token_dim, layers) != (own.num_attention_heads, own.hidden_size, own.num_hidden_layers):
            return None
    takes_ids = isinstance(base, Kinds) or hasattr(base, "config")
    inputs = torch.tensor([[1, 2, 5]]) if takes_ids else torch.ones(2, 8)
    tasks = {"task_ids": torch.tensor([0])} if model.peft_type == "MULTITASK_PROMPT_TUNING" else {}
    return logits(model, inputs, **tasks)
