# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What cannot work is refused: with a `PeftError` that is also the built-in that callers of the released package catch,
with a message that says what was found and what to do, before anything is changed, and without a trace on disk.
"""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import adapted_stack as trained
from support.helpers import bert_classifier, features, gpt2, kinds, llama, logits, refused, stack, warned
from support.helpers import stack_config as config
from torch import nn

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

WEIGHTS, BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with an adapter of `stack`, to be damaged."""
    folder = tmp_path / "adapter"
    trained(modules_to_save=["layers.0.down"]).save_pretrained(folder)
    return folder


def change_config(folder: Path, **fields: Any) -> None:
    """Change fields of a saved config."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**content, **fields}), encoding="utf-8")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change tensors of a saved adapter."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


Refusal = Callable[..., None]


@pytest.fixture(params=["from_pretrained", "load_adapter"])
def refuses(request: pytest.FixtureRequest) -> Refusal:
    """A function that expects a damaged adapter to be refused, on each way into a model."""

    def check(folder: Path, classes: Any, *mentions: str) -> None:
        for option in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
            if request.param == "from_pretrained":
                model = stack()
                with refused(model, classes, *mentions, folder=folder.parent):
                    PeftModel.from_pretrained(model, folder, **option)
            else:
                model = get_peft_model(stack(), config(target_modules=["head"]))
                with refused(model, classes, *mentions, folder=folder.parent):
                    model.load_adapter(folder, "b", **option)

    return check


# ------------------------------------------------------------------------------------------ targets
@pytest.mark.parametrize(
    ("kwargs", "classes", "mentions"),
    [
        ({"target_modules": ["upp"]}, ValueError, ("upp", "up")),
        ({"target_modules": "upp"}, ValueError, ("upp", "up")),
        ({"target_modules": r".*\.headd"}, ValueError, ("headd", "head")),
        ({"target_modules": []}, ValueError, ("target_modules", "set()", "layers.0")),
        ({"target_modules": ["up"], "layers_to_transform": [9]}, ValueError, ("up", "layers_to_transform=[9]")),
        (
            {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "h"},
            ValueError,
            ("layers_pattern='h'", "up"),
        ),
        ({"target_modules": ["up"], "exclude_modules": ["up"]}, ValueError, ("exclude_modules={'up'}", "3", "narrow")),
        ({"target_modules": ["up"], "modules_to_save": ["up"]}, ValueError, ("up", "modules_to_save=['up']")),
        ({"target_modules": None}, ValueError, ("target_modules", "custom", "all-linear")),
        ({"target_modules": ["layers.0"]}, ValueError, ("'layers.0'", "Block", "Linear", "modules_to_save")),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("way", ["get_peft_model", "inject_adapter_in_model", "add_adapter"])
def test_targets(kwargs: dict[str, Any], classes: type, mentions: tuple[str, ...], way: str) -> None:
    bad = LoraConfig(r=2, **kwargs)
    if way == "add_adapter":
        model = trained()
        with refused(model, classes, *mentions):
            model.add_adapter("b", bad)
    else:
        base = stack()
        with refused(base, classes, *mentions):
            get_peft_model(base, bad) if way == "get_peft_model" else inject_adapter_in_model(bad, base)


def test_unknown_target_is_of_the_released_class() -> None:
    from peft import NoMatchingPeftModuleError

    with pytest.raises(NoMatchingPeftModuleError):
        get_peft_model(stack(), config(target_modules=["upp"]))


def test_state_dict_without_a_module_of_the_model() -> None:
    base = stack()
    tensors = {"elsewhere.lora_A.weight": torch.ones(2, 8)}
    with refused(base, ValueError, "elsewhere.lora_A.weight", "1 keys"):
        inject_adapter_in_model(config(), base, state_dict=tensors)


# ------------------------------------------------------------------------------------------ names
# parts of a path, and what a container of modules has as an attribute of its own
BAD_NAMES = ["", "a.b", ".", "..", "../up", "/tmp/x", "a/b", "a\\b", "C:x", "a\0b", "a\nb", "train", "keys", "type"]


@pytest.mark.parametrize("name", [*BAD_NAMES, None, 3])
def test_adapter_names(name: Any, tmp_path: Path, saved: Path) -> None:
    base = stack()
    with refused(base, KeyError, "name", repr(name), folder=tmp_path):
        get_peft_model(base, config(), adapter_name=name)
    with refused(base, KeyError, "name", repr(name), folder=tmp_path):
        inject_adapter_in_model(config(), base, adapter_name=name)
    with refused(base, KeyError, "name", repr(name), folder=tmp_path):
        PeftModel.from_pretrained(base, saved, adapter_name=name)
    model = trained()
    with refused(model, KeyError, "name", repr(name), folder=tmp_path):
        model.add_adapter(name, config())
    with refused(model, KeyError, "name", repr(name), folder=tmp_path):
        model.load_adapter(saved, name)


@pytest.mark.parametrize("target", ["emb", "lin"])
def test_names_that_look_odd_but_work(target: str, tmp_path: Path) -> None:
    names = ["a b", "ä", "default2", "-", "0", "base_layer", "weight", "model"]
    model = get_peft_model(kinds(), LoraConfig(target_modules=[target]))
    for name in names:
        model.add_adapter(name, LoraConfig(target_modules=[target]))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(names)
    for name in names:
        assert len(load_file(tmp_path / name / WEIGHTS)) == 2


def test_names_that_are_taken(saved: Path) -> None:
    model = trained()
    with refused(model, ValueError, "'default'", "another name"):
        model.add_adapter("default", config())


# ------------------------------------------------------------------------------------------ tasks and methods
def test_unknown_task_type() -> None:
    with pytest.raises(ValueError, match="'POETRY'.*CAUSAL_LM"):
        LoraConfig(task_type="POETRY")


def test_unknown_task_type_in_a_file(saved: Path, refuses: Refusal) -> None:
    change_config(saved, task_type="POETRY")
    refuses(saved, ValueError, "'POETRY'", "CAUSAL_LM")


def test_head_of_a_task_that_the_model_does_not_have() -> None:
    """A causal model has no classifier; the config is taken, and no parameter of a head is invented."""
    with warned("SEQ_CLS", "LlamaForCausalLM", "classifier or score", "modules_to_save"):
        model = get_peft_model(llama(), LoraConfig(r=2, task_type="SEQ_CLS"))
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "name", ["WARP", *[name.value for name in PeftType if name not in PEFT_TYPE_TO_CONFIG_MAPPING][:1]]
)
def test_unknown_method_in_a_file(saved: Path, name: str, refuses: Refusal) -> None:
    change_config(saved, peft_type=name)
    refuses(saved, KeyError, repr(name), "LORA")


# ------------------------------------------------------------------------------------------ config files
@pytest.mark.parametrize(
    ("content", "classes", "mentions"),
    [
        (b"", ValueError, ("not valid JSON",)),
        (b"{", ValueError, ("not valid JSON", "line 1")),
        (b'{"peft_type": "LORA",}', ValueError, ("not valid JSON",)),
        (b"\xff\xfe\x00", ValueError, ("not valid JSON",)),
        (b"[" * 100_000, ValueError, ("not valid JSON",)),
        (b"[]", ValueError, ("list", "object")),
        (b'"LORA"', ValueError, ("str", "object")),
        (b"null", ValueError, ("NoneType", "object")),
        (b"{}", KeyError, ("peft_type", "nothing")),
        (b'{"r": 2}', KeyError, ("peft_type", "found r")),
        (b'{"peft_type": null}', KeyError, ("peft_type", "null", "LORA")),
        (b'{"peft_type": ["LORA"]}', (), ("LORA",)),
        (b'{"peft_type": 3}', KeyError, ("3", "LORA")),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else None,
)
def test_config_file(saved: Path, content: bytes, classes: Any, mentions: tuple[str, ...], refuses: Refusal) -> None:
    (saved / CONFIG).write_bytes(content)
    with refused(None, classes, *mentions, folder=saved.parent):
        PeftConfig.from_pretrained(saved)
    refuses(saved, classes, *mentions)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": 5},
        {"target_modules": [["up"]]},
        {"exclude_modules": 5},
        {"modules_to_save": 5},
        {"r": "2"},
        {"lora_alpha": "x"},
        {"lora_dropout": "x"},
        {"rank_pattern": ["up"]},
        {"layers_to_transform": "0"},
        {"init_lora_weights": ["gaussian"]},
        {"bias": 3},
        {"eva_config": {"bogus": 1}},
    ],
    ids=str,
)
def test_fields_of_a_wrong_type_in_a_file(saved: Path, fields: dict[str, Any]) -> None:
    change_config(saved, **fields)
    base = stack()
    with refused(base, (), next(iter(fields)), folder=saved.parent):
        PeftModel.from_pretrained(base, saved)


def test_missing_files(saved: Path, tmp_path: Path, refuses: Refusal) -> None:
    (saved / CONFIG).rename(tmp_path / "elsewhere.json")
    refuses(saved, ValueError, CONFIG, str(saved), WEIGHTS, "save_pretrained")
    (tmp_path / "elsewhere.json").rename(saved / CONFIG)
    (saved / WEIGHTS).unlink()
    refuses(saved, ValueError, WEIGHTS, str(saved), CONFIG, "save_pretrained")
    refuses(tmp_path / "nowhere", ValueError, str(tmp_path / "nowhere"))
    with refused(None, ValueError, "no such folder", folder=tmp_path):
        PeftConfig.from_pretrained(saved, subfolder="inner")
    with refused(None, ValueError, "no such folder", folder=tmp_path):
        load_peft_weights(saved, subfolder="inner")


# ------------------------------------------------------------------------------------------ damaged safetensors
def test_truncated_safetensors(saved: Path, refuses: Refusal) -> None:
    """Wherever the file ends too early: in the length, in the header, at its end, in the data."""
    whole = (saved / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for end in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) - 4, len(whole) - 1):
        (saved / WEIGHTS).write_bytes(whole[:end])
        with refused(None, ValueError, str(saved / WEIGHTS), "safetensors", "again"):
            load_peft_weights(saved)
    refuses(saved, ValueError, WEIGHTS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"\xff" * 8 + whole[8:],
        lambda whole: struct.pack("<Q", 1 << 40) + whole[8:],
        lambda whole: whole[:8] + b"\xff" + whole[9:],
        lambda whole: whole[:8] + whole[8:].replace(b'"shape":[2,8]', b'"shape":[9,8]', 1),
        lambda whole: whole[:8] + whole[8:].replace(b'"F32"', b'"F99"', 1),
        lambda whole: whole + b"\0",
        lambda whole: b"PK\x03\x04 no tensors in here",
    ],
    ids=["length", "huge", "header", "shape", "type", "longer", "other format"],
)
def test_damaged_safetensors(saved: Path, damage: Callable[[bytes], bytes], refuses: Refusal) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    assert damage(whole) != whole
    (saved / WEIGHTS).write_bytes(damage(whole))
    refuses(saved, ValueError, str(saved / WEIGHTS), "safetensors", "again")


def test_weights_that_are_a_folder(saved: Path, refuses: Refusal) -> None:
    (saved / WEIGHTS).unlink()
    (saved / WEIGHTS).mkdir()
    refuses(saved, ValueError, WEIGHTS)


# ------------------------------------------------------------------------------------------ tensors that do not fit
@pytest.mark.parametrize(
    "fields", [{"r": 3}, {"rank_pattern": {"head": 3}}, {"target_modules": ["head"], "r": 5}], ids=str
)
def test_other_rank(saved: Path, fields: dict[str, Any], refuses: Refusal) -> None:
    change_config(saved, **fields)
    rank = fields.get("r", 3)
    refuses(saved, RuntimeError, "(2, 8)", f"({rank}, 8)", "nothing was loaded", "rank")


def test_shape_of_one_tensor(saved: Path, refuses: Refusal) -> None:
    key = "base_model.model.head.lora_B.weight"
    for shape in ((4, 3), (4,), (2, 4), (4, 2, 1), (0,)):
        change_tensors(saved, lambda tensors, shape=shape: tensors.update({key: torch.ones(shape)}))
        model = trained(modules_to_save=["layers.0.down"])
        with refused(model, RuntimeError, "1 tensors", str(shape), "(4, 2)", "nothing was loaded"):
            set_peft_model_state_dict(model, load_peft_weights(saved))
    refuses(saved, RuntimeError, "head.lora_B", "(4, 2)")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["head.lora_B.weight", "layers.0.up.lora_A.weight", "layers.0.down.bias"])
def test_tensors_that_are_not_finite(saved: Path, key: str, bad: float, refuses: Refusal) -> None:
    change_tensors(saved, lambda tensors: tensors[f"base_model.model.{key}"].view(-1)[-1:].fill_(bad))
    model = trained(modules_to_save=["layers.0.down"])
    with refused(model, ValueError, "1 tensors", "not finite", "nothing was loaded"):
        model.load_adapter(saved, "default")
    refuses(saved, ValueError, "not finite", "earlier checkpoint")


def test_load_into_an_adapter_that_exists(saved: Path) -> None:
    change_config(saved, r=3)
    change_tensors(saved, lambda tensors: tensors.update({k: torch.ones(3, 3) for k in tensors if "lora_A" in k}))
    model = trained()
    with refused(model, RuntimeError, "(3, 3)", "(2, 8)"):
        model.load_adapter(saved, "default")


# ------------------------------------------------------------------------------------------ other architectures
def test_checkpoint_for_another_architecture(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(r=2)).save_pretrained(tmp_path / "llama")
    base = gpt2()
    with refused(base, ValueError, "q_proj", "v_proj", folder=tmp_path):
        PeftModel.from_pretrained(base, tmp_path / "llama")
    model = get_peft_model(stack(), config())
    with refused(model, ValueError, "q_proj", folder=tmp_path):
        model.load_adapter(tmp_path / "llama", "b")


def test_checkpoint_whose_keys_are_those_of_another_model(saved: Path, refuses: Refusal) -> None:
    """The config fits by chance, the tensors belong elsewhere."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("base_model.model.", "base_model.model.encoder.")] = tensors.pop(key)

    change_tensors(saved, rename)
    found = "base_model.model.encoder."
    refuses(saved, RuntimeError, found, "base_model.model.", "key_mapping", "architecture")


def test_checkpoint_without_any_tensor(saved: Path, refuses: Refusal) -> None:
    """An empty file is no adapter: whoever loads it would get a fresh one without knowing."""
    save_file({}, saved / WEIGHTS)
    refuses(saved, RuntimeError, "no tensor")


def test_head_of_another_size(tmp_path: Path) -> None:
    source = get_peft_model(bert_classifier(), LoraConfig(r=2, task_type="SEQ_CLS"))
    source.save_pretrained(tmp_path / "adapter")
    base = bert_classifier()
    base.classifier = nn.Linear(16, 5)
    with refused(base, RuntimeError, "classifier", "(3, 16)", "(5, 16)", folder=tmp_path):
        PeftModel.from_pretrained(base, tmp_path / "adapter")


# ------------------------------------------------------------------------------------------ pickles
class Bomb:
    """An object whose reading creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize(
    "write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, 2))], ids=["zip", "plain"]
)
@pytest.mark.parametrize("place", ["value", "all", "key"])
def test_pickle_with_code_in_it(saved: Path, tmp_path: Path, write: Callable, place: str, refuses: Refusal) -> None:
    mark = tmp_path / "code has run"
    bomb, tensors = Bomb(mark), load_file(saved / WEIGHTS)
    content = {"value": {**tensors, "extra": bomb}, "all": bomb, "key": {"extra": [bomb], **tensors}}[place]
    write(content, saved / BIN)
    (saved / WEIGHTS).unlink()
    refuses(saved, ValueError, str(saved / BIN), "code", "safetensors")
    assert not mark.exists()
    torch.load(saved / BIN, weights_only=False) if write is torch.save else pickle.loads((saved / BIN).read_bytes())
    assert mark.exists(), "the file would have run code"


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 1}, {"a": [torch.ones(1)]}, torch.ones(2), {1: torch.ones(1)}, None], ids=str
)
def test_pickle_with_something_else_in_it(saved: Path, content: Any, refuses: Refusal) -> None:
    torch.save(content, saved / BIN)
    (saved / WEIGHTS).unlink()
    refuses(saved, ValueError, str(saved / BIN), "dictionary of tensors")


def test_truncated_pickle(saved: Path, refuses: Refusal) -> None:
    tensors = load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    for legacy in (False, True):
        torch.save(tensors, saved / BIN, _use_new_zipfile_serialization=not legacy)
        whole = (saved / BIN).read_bytes()
        for end in (0, 1, 2, 10, 100, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1):
            (saved / BIN).write_bytes(whole[:end])
            with refused(None, ValueError, str(saved / BIN)):
                load_peft_weights(saved)
    refuses(saved, ValueError, BIN)


@pytest.mark.parametrize(
    "content", [b"no tensors", b"\0" * 64, b"\x80\x02.", b"PK\x03\x04" + b"\0" * 60, b"\x80\x02}."], ids=repr
)
def test_file_that_is_no_pickle(saved: Path, content: bytes, refuses: Refusal) -> None:
    (saved / WEIGHTS).unlink()
    (saved / BIN).write_bytes(content)
    refuses(saved, ValueError, str(saved / BIN))


# ------------------------------------------------------------------------------------------ afterwards
def test_a_model_works_on_after_refusals(saved: Path) -> None:
    """The same base and the same name can be used as if nothing had happened."""
    base, x = stack(), features()
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:-8])
    with refused(base, ValueError):
        PeftModel.from_pretrained(base, saved)
    (saved / WEIGHTS).write_bytes(whole)
    change_config(saved, r=3)
    with refused(base, RuntimeError):
        PeftModel.from_pretrained(base, saved)
    change_config(saved, r=2)
    expected = logits(trained(modules_to_save=["layers.0.down"]), x)
    model = PeftModel.from_pretrained(base, saved)
    assert torch.equal(logits(model, x), expected)
    change_config(saved, r=3)
    with refused(model, RuntimeError):
        model.load_adapter(saved, "b")
    change_config(saved, r=2)
    model.load_adapter(saved, "b")
    model.set_adapter("b")
    assert torch.equal(logits(model, x), expected)


def test_hooks_of_gradient_checkpointing_do_not_stay(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    change_config(tmp_path / "adapter", r=3)
    base = llama()
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    with refused(base, RuntimeError, "rank"):
        PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
