# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adapters out of a model, into files, and back."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.helpers import (
    VOCABULARY,
    WIDTH,
    assert_equal,
    bert_classifier,
    features,
    files_below,
    llama,
    logits,
    randomise,
    refused,
    snapshot,
    stack,
    token_ids,
    trainable,
    warned,
)
from support.helpers import adapted_stack as trained
from support.helpers import stack_config as config

from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    TaskType,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

X = features()
WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


def trained_llama(base: torch.nn.Module | None = None, **changes: Any) -> PeftModel:
    """The same for a language model."""
    model = get_peft_model(llama() if base is None else base, LoraConfig(r=2, **changes)).eval()
    randomise(model, "lora_|modules_to_save")
    return model


def read_json(path: Path) -> dict[str, Any]:
    """Read a file."""
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ what is written
@pytest.mark.parametrize("safe", [True, False])
def test_files_that_are_written(tmp_path: Path, safe: bool) -> None:
    model = trained()
    model.add_adapter("other", config(r=3))
    model.save_pretrained(tmp_path / "deep" / "folder", safe_serialization=safe)
    weights = WEIGHTS if safe else "adapter_model.bin"
    files = {CARD, CONFIG, weights, os.path.join("other", CONFIG), os.path.join("other", weights)}
    assert set(files_below(tmp_path / "deep" / "folder")) == files
    for folder, rank in (("", 2), ("other", 3)):
        tensors = load_peft_weights(str(tmp_path / "deep" / "folder" / folder))
        assert set(tensors) == set(get_peft_model_state_dict(model, adapter_name=folder or "default"))
        assert tensors["base_model.model.head.lora_A.weight"].shape == (rank, 8)


def test_weights_file_says_what_wrote_it(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.metadata()) == {"format", "sha256"}


@dataclass
class ConfigWithFiles(LoraConfig):
    """A config as clients have theirs: it writes more than its fields."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        (folder / "additional_config.json").write_text(str(self.r))
        (folder / "data" / "deep").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "deep" / ".state").write_text(str(self.r))
        (folder / "empty").mkdir(exist_ok=True)


@pytest.mark.parametrize("safe", [True, False])
def test_whatever_a_config_writes_arrives(tmp_path: Path, safe: bool) -> None:
    model = get_peft_model(stack(), ConfigWithFiles(r=2, target_modules=["up"]))
    model.add_adapter("other", ConfigWithFiles(r=3, target_modules=["up"]))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("stays")
    for _ in range(2):  # the second save replaces what the first one wrote
        model.save_pretrained(tmp_path, safe_serialization=safe)
    weights = WEIGHTS if safe else "adapter_model.bin"
    written = {CONFIG, weights, "additional_config.json", "data/deep/.state"}
    assert set(files_below(tmp_path)) == {*written, *(f"other/{name}" for name in written), "data/mine", CARD}
    for folder, r in ((tmp_path, "2"), (tmp_path / "other", "3")):
        assert (folder / "additional_config.json").read_text() == (folder / "data/deep/.state").read_text() == r
        assert (folder / "empty").is_dir()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        trained().save_pretrained(tmp_path / "adapter")
    finally:
        os.umask(old)
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "adapter").iterdir()}
    assert modes == {"0o640"}


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = trained(modules_to_save=["layers.0.down"])
    before = snapshot(model)
    model.save_pretrained(tmp_path)
    assert snapshot(model) == before


def test_selected_adapters(tmp_path: Path) -> None:
    model = trained()
    model.add_adapter("b", config())
    model.add_adapter("c", config())
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    assert set(files_below(tmp_path)) == {CARD, os.path.join("c", CONFIG), os.path.join("c", WEIGHTS)}
    with refused(model, ValueError, "'zz'", "'default', 'b', 'c'", folder=tmp_path):
        model.save_pretrained(tmp_path, selected_adapters=["b", "zz"])


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_state_dict_that_was_gathered_elsewhere(tmp_path: Path) -> None:
    model = trained()
    gathered = {key: torch.full_like(tensor, 2.0) for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert {t.unique().item() for t in load_file(tmp_path / WEIGHTS).values()} == {2.0}


def test_state_dict_that_lacks_tensors_is_saved_as_far_as_it_goes(tmp_path: Path) -> None:
    """Where a model is divided among processes, all but one are given an empty state dict."""
    model = trained()
    gone = "base_model.model.head.lora_B"
    part = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(gone)}
    assert get_peft_model_state_dict(model, state_dict={}) == {}
    with warned("lacks 1 of 8", gone):
        found = get_peft_model_state_dict(model, state_dict=part)
    assert get_peft_model_state_dict(model).keys() - found.keys() == {f"{gone}.weight"}
    with warned("lacks 1 of 8", gone):
        model.save_pretrained(tmp_path, state_dict=part)
    with warned("lacks 1 of 8", gone):
        PeftModel.from_pretrained(stack(), tmp_path)
    prompted = get_peft_model(
        llama(),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=4),
    )
    assert get_peft_model_state_dict(prompted, state_dict={}) == {}


@pytest.mark.parametrize(
    ("build", "task", "expected"),
    [
        (
            stack,
            None,
            {"auto_mapping": {"base_model_class": "Stack", "parent_library": "support.helpers"}, "task_type": None},
        ),
        (llama, TaskType.CAUSAL_LM, {"auto_mapping": None, "task_type": "CAUSAL_LM"}),
    ],
)
def test_saved_config(tmp_path: Path, build: Callable, task: TaskType | None, expected: dict[str, Any]) -> None:
    model = get_peft_model(build(), LoraConfig(r=2, task_type=task, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    saved = read_json(tmp_path / CONFIG)
    assert {key: saved[key] for key in expected} == expected
    assert saved["inference_mode"] is True and model.peft_config["default"].inference_mode is False
    assert saved["target_modules"] == sorted(model.targeted_module_names)
    assert "runtime_config" not in saved and saved["peft_version"] == "0.21.2"


def test_a_tensor_that_stands_under_two_names_is_written_twice(tmp_path: Path) -> None:
    model = trained(modules_to_save=["layers.0.down", "layers.1.down"])
    blocks = model.base_model.model.layers
    blocks[1].down.modules_to_save["default"].weight = blocks[0].down.modules_to_save["default"].weight
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert_equal(saved["base_model.model.layers.0.down.weight"], saved["base_model.model.layers.1.down.weight"])
    assert_equal(logits(PeftModel.from_pretrained(stack(), tmp_path), X), logits(model, X))


# ------------------------------------------------------------------------------------------ the model card
def test_model_card_names_base_and_method(tmp_path: Path) -> None:
    base = llama()
    base.name_or_path = "somebody/tiny-llama"
    trained_llama(base).save_pretrained(tmp_path)
    card = (tmp_path / CARD).read_text(encoding="utf-8")
    assert "base_model: somebody/tiny-llama" in card and "library_name: peft" in card and "- lora" in card
    assert "LORA" in card and read_json(tmp_path / CONFIG)["base_model_name_or_path"] == "somebody/tiny-llama"


@pytest.mark.parametrize(
    "metadata", ["", "---\nlicense: mit\ntags:\n- mine\n---\n", "---\nbase_model: old/base\ntags: []\n---\n"]
)
def test_text_of_an_existing_card_is_kept(tmp_path: Path, metadata: str) -> None:
    text = "# My adapter\n\nWords that I wrote: äöü.\n"
    (tmp_path / CARD).write_text(metadata + text, encoding="utf-8")
    model = trained_llama()
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = (tmp_path / CARD).read_text(encoding="utf-8")
        assert card.endswith(text) and card.count("# My adapter") == 1
        assert "library_name: peft" in card and card.count("- lora") == 1
        assert ("license: mit" in card and "- mine" in card) == ("license" in metadata)
        assert ("old/base" in card) == ("old/base" in metadata)


# ------------------------------------------------------------------------------------------ loading
def test_loading_beside_an_adapter(tmp_path: Path) -> None:
    source = trained(modules_to_save=["layers.0.down"])
    source.save_pretrained(tmp_path)
    model = get_peft_model(stack(), config())
    randomise(model, seed=6)
    model.train()
    names, first = trainable(model), logits(model, X)
    result = model.load_adapter(tmp_path, "b")
    assert result.unexpected_keys == [] and result.missing_keys == []
    assert (model.active_adapter, model.active_adapters) == ("default", ["default"])
    assert not model.training and trainable(model) == names
    assert_equal(logits(model, X), first)
    model.set_adapter("b")
    assert_equal(logits(model, X), logits(source, X))


def test_loading_as_trainable(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    model = get_peft_model(stack(), config()).train()
    model.load_adapter(tmp_path, "b", is_trainable=True)
    first = {name.replace(".b.", ".default.") for name in trainable(model)}
    assert model.training and model.active_adapters == ["default"]
    assert trainable(model) == first | {name.replace(".default.", ".b.") for name in first}
    model.set_adapter("b")
    assert trainable(model) and all(".b." in name for name in trainable(model))
    loaded = PeftModel.from_pretrained(stack().train(), tmp_path, is_trainable=True)
    assert loaded.training and trainable(loaded)


def test_loading_under_a_name_that_exists_replaces_its_tensors(tmp_path: Path) -> None:
    source = trained()
    source.save_pretrained(tmp_path)
    model = get_peft_model(stack(), config()).eval()
    parameters = [id(p) for p in model.parameters()]
    model.load_adapter(tmp_path, "default")
    assert list(model.peft_config) == ["default"] and [id(p) for p in model.parameters()] == parameters
    assert_equal(logits(model, X), logits(source, X))


def test_loading_a_named_adapter_from_its_subfolder(tmp_path: Path) -> None:
    model = trained()
    model.add_adapter("other", config())
    randomise(model, seed=6)
    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stack(), tmp_path, adapter_name="x", subfolder="other")
    assert list(loaded.peft_config) == ["x"]
    assert_equal(logits(loaded, X), logits(model, X))


def test_config_can_be_given(tmp_path: Path) -> None:
    source = trained()
    source.save_pretrained(tmp_path)
    given = config(lora_alpha=100)
    before = given.to_dict()
    loaded = PeftModel.from_pretrained(stack(), tmp_path, config=given)
    assert loaded.base_model.model.head.scaling["default"] == 50
    assert given.to_dict() == before
    with refused(stack(), ValueError, "config", "dict"):
        PeftModel.from_pretrained(stack(), tmp_path, config={"r": 2})


@pytest.mark.parametrize("safe", [True, False])
def test_task_picks_the_class_when_loading(tmp_path: Path, safe: bool) -> None:
    source = get_peft_model(bert_classifier(), LoraConfig(r=2, task_type="SEQ_CLS")).eval()
    randomise(source, "lora_|modules_to_save")
    source.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = PeftModel.from_pretrained(bert_classifier(), tmp_path)
    assert type(loaded).__name__ == "PeftModelForSequenceClassification"
    assert_equal(logits(loaded, token_ids()), logits(source, token_ids()))


def test_missing_tensors_are_reported(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    gone = "base_model.model.head.lora_B.weight"
    save_file({key: t for key, t in saved.items() if key != gone}, tmp_path / WEIGHTS)
    with warned("lacks 1 of 8", gone):
        PeftModel.from_pretrained(stack(), tmp_path)
    model = get_peft_model(stack(), config())
    with warned("lacks 1 of 8", gone):
        result = model.load_adapter(tmp_path, "b")
    assert result.missing_keys == ["base_model.model.head.lora_B.b.weight"]


def test_missing_tensors_leave_none_without_storage(tmp_path: Path) -> None:
    """What the checkpoint lacks starts as in a fresh adapter, also where tensors were made on the meta device."""
    trained().save_pretrained(tmp_path)
    content = {**read_json(tmp_path / CONFIG), "target_modules": ["up", "down", "head"]}
    (tmp_path / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    with warned("lacks 6 of 14"):
        model = PeftModel.from_pretrained(stack(), tmp_path, low_cpu_mem_usage=True)
    assert [name for name, p in model.named_parameters() if p.is_meta] == []
    assert_equal(logits(model, X), logits(trained(), X))


def test_unexpected_tensors_are_reported(tmp_path: Path) -> None:
    trained(target_modules=["up", "down", "head"]).save_pretrained(tmp_path)
    model = trained()
    result = set_peft_model_state_dict(model, load_peft_weights(str(tmp_path)))
    assert len(result.unexpected_keys) == 6 and all(".down." in key for key in result.unexpected_keys)
    assert not any("lora_" in key for key in result.missing_keys)
    assert any("base_layer" in key for key in result.missing_keys)


def test_empty_state_dict_sets_nothing() -> None:
    model = trained()
    expected = logits(model, X)
    result = set_peft_model_state_dict(model, {})
    assert set(result.missing_keys) == set(model.state_dict()) and result.unexpected_keys == []
    assert_equal(logits(model, X), expected)


# ------------------------------------------------------------------------------------------ shapes
def resize_rank(folder: Path, **fields: Any) -> None:
    """Change fields of a saved config, so that it does not fit its tensors any more."""
    (folder / CONFIG).write_text(json.dumps({**read_json(folder / CONFIG), **fields}), encoding="utf-8")


def test_mismatched_sizes_can_be_left_out(tmp_path: Path) -> None:
    source = trained(modules_to_save=["layers.0.down"])
    source.save_pretrained(tmp_path)
    resize_rank(tmp_path, rank_pattern={"head": 3})
    with warned("2 tensors", "(2, 8)", "(3, 8)", "ignore_mismatched_sizes"):
        model = get_peft_model(stack(), config())
        result = model.load_adapter(tmp_path, "b", ignore_mismatched_sizes=True)
    left_out = {f"base_model.model.head.lora_{part}.b.weight" for part in "AB"}
    assert left_out == set(result.missing_keys)
    model.set_adapter("b")
    expected = get_peft_model_state_dict(source)
    for key, tensor in get_peft_model_state_dict(model, adapter_name="b").items():
        if ".head." not in key:
            assert_equal(tensor, expected[key])


def test_resized_vocabulary_says_what_to_do(tmp_path: Path) -> None:
    larger = llama()
    larger.resize_token_embeddings(VOCABULARY + 3)
    source = trained_llama(larger, modules_to_save=["embed_tokens", "lm_head"])
    source.save_pretrained(tmp_path)
    base = llama()
    sizes = (f"({VOCABULARY + 3}, {WIDTH})", f"({VOCABULARY}, {WIDTH})")
    with refused(base, RuntimeError, *sizes, f"resize_token_embeddings({VOCABULARY + 3})", "nothing was loaded"):
        PeftModel.from_pretrained(base, tmp_path)
    base = llama()
    base.resize_token_embeddings(VOCABULARY + 3)
    assert_equal(logits(PeftModel.from_pretrained(base, tmp_path), token_ids()), logits(source, token_ids()))


# ------------------------------------------------------------------------------------------ embeddings
@pytest.mark.parametrize("tied", [False, True])
def test_save_embedding_layers(tmp_path: Path, tied: bool) -> None:
    model = trained_llama(llama(tied=tied), target_modules=["q_proj"])
    base_keys = {f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")}
    for choice, expected in (("auto", set()), (False, set()), (True, base_keys)):
        model.save_pretrained(tmp_path, save_embedding_layers=choice)
        assert {key for key in load_file(tmp_path / WEIGHTS) if "lora_" not in key} == expected


@pytest.mark.parametrize("tied", [False, True])
def test_resized_vocabulary_is_saved_unasked(tmp_path: Path, tied: bool) -> None:
    """What `auto` compares with is the config of the base model as it was published."""
    llama(tied=tied).save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCABULARY + 3)
    model = trained_llama(base, target_modules=["q_proj"])
    with warned("vocabulary", "save_embedding_layers=False"):
        model.save_pretrained(tmp_path / "adapter")
    again = type(llama()).from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    loaded = PeftModel.from_pretrained(again.eval(), tmp_path / "adapter")
    ids = torch.tensor([[VOCABULARY, VOCABULARY + 1, 3]])
    assert_equal(logits(loaded, ids), logits(model, ids))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert not any("embed_tokens" in key for key in load_file(tmp_path / "adapter" / WEIGHTS))


def test_save_embedding_layers_where_there_are_none(tmp_path: Path) -> None:
    model = trained()
    with warned("save_embedding_layers", "embeddings"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert set(load_file(tmp_path / WEIGHTS)) == set(get_peft_model_state_dict(model))


def test_embedding_that_is_adapted_and_saved(tmp_path: Path) -> None:
    """Its base weight is written once, and loading brings it back into another base model."""
    model = trained_llama(target_modules=["embed_tokens"])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / WEIGHTS)}
    embedding = "model.embed_tokens"
    assert keys == {
        "lm_head.weight",
        f"{embedding}.base_layer.weight",
        f"{embedding}.lora_embedding_A",
        f"{embedding}.lora_embedding_B",
    }
    assert_equal(logits(PeftModel.from_pretrained(llama(), tmp_path), token_ids()), logits(model, token_ids()))


TIED = {
    "targets": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("options", TIED.values(), ids=TIED)
def test_what_is_given_can_be_written_by_any_writer(tmp_path: Path, options: dict[str, Any]) -> None:
    """Keys of tied modules stand for one tensor, read forwards or transposed; writers want each laid out by itself."""
    model = trained_llama(llama(tied=True), ensure_weight_tying=True, **options)
    tensors = get_peft_model_state_dict(model)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    save_file(tensors, tmp_path / WEIGHTS)
    model.peft_config["default"].save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(tied=True), tmp_path, strict=True)
    assert_equal(logits(again, token_ids()), logits(model, token_ids()))


# ------------------------------------------------------------------------------------------ keys
@pytest.mark.parametrize(
    "mapping",
    [
        {r"^blocks\.": "layers."},
        {r"^blocks\.(\d+)\.(.*)": r"layers.\1.\2", r"head": "unused"},
        {"no_such": "x", r"blocks": "layers"},
    ],
    ids=str,
)
def test_key_mapping(tmp_path: Path, mapping: dict[str, str]) -> None:
    source = trained(target_modules=["up"])
    source.save_pretrained(tmp_path)
    renamed = {key.replace(".layers.", ".blocks."): t for key, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(renamed, tmp_path / WEIGHTS)
    base = stack()
    with refused(base, RuntimeError, "blocks", "layers", "key_mapping"):
        PeftModel.from_pretrained(base, tmp_path)
    loaded = PeftModel.from_pretrained(stack(), tmp_path, key_mapping=mapping)
    assert_equal(logits(loaded, X), logits(source, X))
    model = get_peft_model(stack(), config(target_modules=["up"]))
    model.load_adapter(tmp_path, "b", key_mapping=mapping)
    model.set_adapter("b")
    assert_equal(logits(model, X), logits(source, X))


@pytest.mark.parametrize(
    "mapping", [{r"layers\.\d": "layers.0"}, {r"layers\.1": "layers.0"}, {"lora_A": "lora_B"}], ids=str
)
def test_mappings_that_would_lose_a_tensor_are_refused(tmp_path: Path, mapping: dict[str, str]) -> None:
    trained(target_modules=["up"]).save_pretrained(tmp_path)
    base, model = stack(), trained(target_modules=["up"])
    mentions = ("layers.0.up", "both get the key", "by key_mapping", "a key of its own")
    with refused(base, ValueError, *mentions):
        PeftModel.from_pretrained(base, tmp_path, key_mapping=mapping)
    with refused(model, ValueError, *mentions):
        model.load_adapter(tmp_path, "other", key_mapping=mapping)
    with refused(None, ValueError, *mentions):
        load_peft_weights(str(tmp_path), key_mapping=mapping)


def test_aliases_cannot_stand_for_tensors_that_are_there(tmp_path: Path) -> None:
    model = trained_llama(llama(tied=True), ensure_weight_tying=True, target_modules=["embed_tokens"])
    model.save_pretrained(tmp_path, deduplicate_tied=True)
    with safetensors.safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        header = file.metadata()
    save_file(get_peft_model_state_dict(model), tmp_path / WEIGHTS, header)
    with refused(None, ValueError, "a tensor of its own", "save the adapter again"):
        load_peft_weights(str(tmp_path))


def test_an_adapter_that_has_the_name_of_a_module() -> None:
    """Taking the adapter's name out of keys must not take out the module's."""
    model = get_peft_model(stack(), config(), adapter_name="up")
    randomise(model)
    tensors = get_peft_model_state_dict(model, adapter_name="up")
    assert set(tensors) == set(get_peft_model_state_dict(trained()))
    other = get_peft_model(stack(), config())
    assert set_peft_model_state_dict(other, tensors).unexpected_keys == []
    assert_equal(logits(other.eval(), X), logits(model.eval(), X))


def test_injected_model_saves_keys_without_a_prefix() -> None:
    model = inject_adapter_in_model(config(target_modules=["head"]), stack())
    assert set(get_peft_model_state_dict(model)) == {"head.lora_A.weight", "head.lora_B.weight"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_state_dict_of_the_base_model(wrapped: bool) -> None:
    made = get_peft_model if wrapped else lambda base, cfg: inject_adapter_in_model(cfg, base)
    model = made(stack(), config(modules_to_save=["layers.0.down"]))
    randomise(model, "lora_|modules_to_save")
    plain = stack().state_dict()
    found = get_base_model_state_dict(model)
    assert list(found) == list(plain)
    for key, tensor in plain.items():
        assert_equal(found[key], tensor)
    doubled = {key: 2 * tensor for key, tensor in plain.items()}
    assert set_base_model_state_dict(model, doubled) == ([], [])
    assert_equal(get_base_model_state_dict(model)["head.weight"], doubled["head.weight"])
    with refused(model, RuntimeError, "head.bias", "zz", "strict=False"):
        set_base_model_state_dict(model, {"zz": torch.ones(1), **{k: v for k, v in plain.items() if k != "head.bias"}})
    result = set_base_model_state_dict(model, {"head.bias": torch.ones(4), "zz": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["zz"] and len(result.missing_keys) == len(plain) - 1
    assert get_base_model_state_dict(model)["head.bias"].tolist() == [1.0] * 4


# ------------------------------------------------------------------------------------------ atomic saves
FILES = {
    WEIGHTS: "peft.checkpoints.write_file.save_file",
    "adapter_model.bin": "torch.save",
    CONFIG: "peft.config.write_text",
}


class Killed(BaseException):
    """What no `except Exception` stops."""


@pytest.mark.parametrize("name", FILES)
def test_interrupted_save_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = trained()
    options = {"safe_serialization": name != "adapter_model.bin"}
    model.save_pretrained(tmp_path, **options)
    before, old = files_below(tmp_path), load_peft_weights(str(tmp_path))
    seen = []

    def write_half(*args: Any, **kwargs: Any) -> None:
        path = next(arg for arg in args if isinstance(arg, str))
        seen.append(path)
        Path(path).write_bytes(b"half of it")
        raise Killed

    randomise(model, seed=8)
    monkeypatch.setattr(FILES[name], write_half)
    with pytest.raises(Killed):
        model.save_pretrained(tmp_path, **options)
    assert len(seen) == 1 and seen[0] != str(tmp_path / name) and tmp_path in Path(seen[0]).parents
    after = files_below(tmp_path)
    assert set(after) == set(before), "nothing half-written stays behind"
    assert after[name] == before[name]
    monkeypatch.undo()
    if name != CONFIG:
        for key, tensor in load_peft_weights(str(tmp_path)).items():
            assert_equal(tensor, old[key])


def test_killed_save_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """The process is gone in the middle of writing, without a chance to clean up."""

    def small(r: int) -> PeftModel:
        return get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=r, target_modules=["0"]))

    small(r=2).save_pretrained(tmp_path)
    before = files_below(tmp_path)
    script = f"""
        import os, torch, peft.checkpoints.write_file
        from peft import LoraConfig, get_peft_model

        def write_half(tensors, path, *args, **kwargs):
            with open(path, "wb") as file:
                file.write(b"half of it")
                file.flush()
                os._exit(9)

        peft.checkpoints.write_file.save_file = write_half
        net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        get_peft_model(net, LoraConfig(r=3, target_modules=["0"])).save_pretrained({str(tmp_path)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    after = files_below(tmp_path)
    assert {name: after[name] for name in (WEIGHTS, CONFIG)} == {name: before[name] for name in (WEIGHTS, CONFIG)}
    assert small(r=2).load_adapter(tmp_path, "b").unexpected_keys == []


def test_save_onto_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    model = trained()
    with refused(model, ValueError, str(path), "folder", folder=tmp_path):
        model.save_pretrained(path)
    with refused(None, AssertionError, str(path), "folder", folder=tmp_path):
        config().save_pretrained(path)


def test_saving_without_storage_is_refused(tmp_path: Path) -> None:
    """Tensors on the meta device hold nothing that could be written."""
    model = get_peft_model(stack(), config(), low_cpu_mem_usage=True)
    with refused(model, (), "lora_A", "low_cpu_mem_usage", folder=tmp_path):
        model.save_pretrained(tmp_path)


def test_names_that_a_base_model_had_before_are_its_own_to_say(tmp_path: Path) -> None:
    """As classes of some versions of transformers do; a mapping that is given counts instead."""

    class Renamed(torch.nn.Module):
        _checkpoint_conversion_mapping = {r"^layers(?!_of)": "layers_of_it"}

        def __init__(self) -> None:
            super().__init__()
            self.layers_of_it = stack().layers

    model = get_peft_model(stack(), config(target_modules=["up"]))
    randomise(model)
    model.save_pretrained(tmp_path)
    for mapping in (None, {r"^layers\.": "layers_of_it."}):
        again = PeftModel.from_pretrained(Renamed(), tmp_path, key_mapping=mapping)
        found, there = again.get_base_model().layers_of_it[0].up, model.get_base_model().layers[0].up
        assert_equal(found.lora_A["default"].weight, there.lora_A["default"].weight)
    with refused(None, ValueError, "none of the checkpoint's"):
        PeftModel.from_pretrained(Renamed(), tmp_path, key_mapping={"^other": "x"})


@pytest.mark.parametrize("shape", [(16,), (0,)])
def test_a_shard_is_said_when_it_is_saved(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = trained()
    model.get_base_model().head.lora_A["default"].weight.data = torch.zeros(shape)
    with warned("'default'", "head.lora_A", "one process holds"):
        model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.head.lora_A.weight"].shape == shape


def test_card_has_the_tags_of_the_base_model_and_no_name_of_its_own(tmp_path: Path) -> None:
    """What a config calls the base may be anything; the hub takes what stands in the card for a repository."""
    base = llama()
    base.add_model_tags(["sft", "mine"])
    trained_llama(base, base_model_name_or_path="experiment").save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / CARD).data
    assert {"sft", "mine", "lora", "transformers"} <= set(data.tags)
    assert data.get("base_model") is None and not any(tag.startswith("base_model:") for tag in data.tags)
