# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What became of each tensor of a checkpoint: in a report, in one warning, in one error."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import (
    assert_close,
    bert_classifier,
    features,
    llama,
    logits,
    randomise,
    refused,
    snapshot,
    stack,
    warned,
)
from support.helpers import stack_config as config
from support.method_options import OPTIONS
from torch import nn

from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.hotswap import hotswap_adapter
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import LoadReport, PeftLoadError, PeftWarning


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

WEIGHTS = "adapter_model.safetensors"
X = features()
HEAD_B = "base_model.model.head.lora_B.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with an adapter of `stack`, to be damaged."""
    model = get_peft_model(stack(), config())
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    """Change tensors of a saved adapter."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def lose(tensors: Tensors) -> None:
    del tensors[HEAD_B]


def gain(tensors: Tensors) -> None:
    tensors["base_model.model.extra.lora_A.weight"] = torch.ones(2, 8)


def rename(tensors: Tensors) -> None:
    tensors[HEAD_B.replace("head", "haed")] = tensors.pop(HEAD_B)


def reshape(tensors: Tensors) -> None:
    tensors[HEAD_B] = torch.ones(4, 3)


def break_entry(tensors: Tensors) -> None:
    tensors[HEAD_B][0, 0] = float("nan")


EDITS = {"missing": lose, "unexpected": gain, "mismatched": reshape, "not_finite": break_entry}
FORMS = ["from_pretrained", "load_adapter", "load_adapter again", "mixed", "mixed load_adapter"]


@pytest.fixture(params=FORMS)
def way(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[..., Any]]:
    """A way to load: what must stay as it was if it is refused, and the call, which gives the report."""
    if request.param == "from_pretrained" or request.param == "mixed":
        base = stack()
        cls = PeftModel if request.param == "from_pretrained" else PeftMixedModel
        return base, lambda folder, **options: cls.from_pretrained(base, folder, **options).load_reports["default"]
    model = get_peft_model(stack(), config(), mixed=request.param == "mixed load_adapter")
    name = "default" if request.param == "load_adapter again" else "b"

    def load(folder: Path, **options: Any) -> LoadReport:
        result = model.load_adapter(folder, name, **options)
        assert result.report is model.load_reports[name]
        assert result.unexpected_keys == list(result.report.unexpected)
        return result.report

    return model, load


# ------------------------------------------------------------------------------------------ everything fits
@pytest.mark.parametrize("strict", [False, True])
def test_a_complete_checkpoint(saved: Path, way: tuple, strict: bool) -> None:
    report = way[1](saved, strict=strict)
    keys = set(load_file(saved / WEIGHTS))
    assert report.complete and set(report.loaded) == set(report.expected) == keys and len(keys) == 8
    rest = (report.missing, report.unexpected, report.mismatched, report.not_finite, report.tied, report.resized)
    assert not any(rest)
    assert "8 tensors loaded, everything fits" in str(report) and "\n" not in str(report)


METHODS = [
    config(bias="all", modules_to_save=["layers.0.down"]),
    config(use_dora=True, rank_pattern={"head": 3}),
    LoHaConfig(r=2, target_modules=["up"]),
    IA3Config(target_modules=["up"], feedforward_modules=["up"]),
    VeraConfig(r=2, target_modules=["layers.0.up", "layers.1.up"]),
    VBLoRAConfig(r=2, target_modules=["up"], num_vectors=4, vector_length=4, topk=2, save_only_topk_weights=True),
    AdaLoraConfig(target_modules=["up"], init_r=3, target_r=2, total_step=9),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_what_a_method_saves_is_complete(method: Any, tmp_path: Path) -> None:
    get_peft_model(stack(), method).save_pretrained(tmp_path)
    report = PeftModel.from_pretrained(stack(), tmp_path, strict=True).load_reports["default"]
    assert report.complete and set(report.loaded) >= {key for key in load_file(tmp_path / WEIGHTS) if "hada" in key}


# ------------------------------------------------------------------------------------------ what does not fit
def test_missing(saved: Path, way: tuple) -> None:
    change(saved, lose)
    with warned("lacks 1 of 8 tensors", HEAD_B, "start values", "strict=True"):
        report = way[1](saved)
    assert report.missing == (HEAD_B,) and len(report.loaded) == 7 and not report.unexpected


def test_unexpected(saved: Path, way: tuple) -> None:
    change(saved, gain)
    with warned("1 tensors of the checkpoint belong to nothing", "model.extra.lora_A", "LORA", "Stack"):
        report = way[1](saved)
    assert report.unexpected == ("base_model.model.extra.lora_A.weight",) and len(report.loaded) == 8


def test_a_misspelt_key_is_one_warning_with_the_nearest_name(saved: Path, way: tuple) -> None:
    change(saved, rename)
    wrong = HEAD_B.replace("head", "haed")
    with warned("lacks 1 of 8", f"{wrong} (near: {HEAD_B})", "key_mapping"):
        report = way[1](saved)
    assert (report.missing, report.unexpected) == ((HEAD_B,), (wrong,))
    assert report.near(wrong) == [HEAD_B]


def test_nearest_names_are_those_of_the_same_layer(saved: Path) -> None:
    def rename_all(tensors: Tensors) -> None:
        for key in [key for key in tensors if ".up." in key]:
            tensors[key.replace(".up.", ".upp.")] = tensors.pop(key)

    change(saved, rename_all)
    with warned("lacks 6 of 8", "6 tensors of the checkpoint", " ..."):
        report = PeftModel.from_pretrained(stack(), saved).load_reports["default"]
    assert [report.near(key)[0] for key in report.unexpected] == [
        key.replace(".upp.", ".up.") for key in report.unexpected
    ]


def test_mismatched(saved: Path, way: tuple) -> None:
    change(saved, reshape)
    with refused(way[0], RuntimeError, "1 tensors", HEAD_B, "(4, 3)", "(4, 2)", "nothing was loaded", "rank"):
        way[1](saved)
    with warned("1 tensors", "(4, 3)", "ignore_mismatched_sizes"):
        report = way[1](saved, ignore_mismatched_sizes=True)
    assert report.mismatched == {HEAD_B: ((4, 3), (4, 2))} and HEAD_B not in report.loaded + report.missing


def test_not_finite(saved: Path, way: tuple) -> None:
    change(saved, break_entry)
    with refused(way[0], ValueError, "1 tensors", "not finite", HEAD_B, "earlier checkpoint"):
        way[1](saved)


def test_all_at_once_is_one_message(saved: Path) -> None:
    def edit(tensors: Tensors) -> None:
        gain(tensors)
        tensors["base_model.model.layers.0.up.lora_A.weight"] = torch.ones(3, 8)
        del tensors["base_model.model.layers.1.up.lora_A.weight"]

    change(saved, edit)
    with warned("lacks 1 of 8", "layers.1.up", "belong to nothing", "extra", "(3, 8)", "ignore_mismatched_sizes"):
        PeftModel.from_pretrained(stack(), saved, ignore_mismatched_sizes=True)
    change(saved, break_entry)
    everything = ("lacks 1 of 8", "belong to nothing", "(3, 8)", "not finite")
    with refused(stack(), PeftLoadError, *everything):
        PeftModel.from_pretrained(stack(), saved, strict=True)


def test_no_key_matches(saved: Path, way: tuple) -> None:
    def rename_all(tensors: Tensors) -> None:
        for key in list(tensors):
            tensors[key.replace("lora_A", "hada_w1_a").replace("lora_B", "hada_w1_b")] = tensors.pop(key)

    change(saved, rename_all)
    words = (
        "none of the checkpoint's 8 keys",
        "head.hada_w1_a",
        "head.lora_",
        "named like those of LOHA",
        "key_mapping",
    )
    with refused(way[0], RuntimeError, *words):
        way[1](saved)


# ------------------------------------------------------------------------------------------ strict
@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("low", [False, True])
def test_strict_refuses(saved: Path, way: tuple, kind: str, low: bool) -> None:
    change(saved, EDITS[kind])
    with refused(way[0], (RuntimeError, ValueError), "nothing was loaded", "What to do", folder=saved):
        way[1](saved, strict=True, low_cpu_mem_usage=low, ignore_mismatched_sizes=True)
    assert getattr(way[0], "load_reports", {}) == {}, "a refused adapter leaves no report"


@pytest.mark.parametrize("kind", EDITS)
def test_the_error_has_the_report(saved: Path, kind: str) -> None:
    change(saved, EDITS[kind])
    with pytest.raises(PeftLoadError) as caught:
        PeftModel.from_pretrained(stack(), saved, strict=True)
    report = caught.value.report
    assert not report.complete and list(getattr(report, kind))
    assert kind.replace("_", " ") in str(report)
    assert str(pickle.loads(pickle.dumps(caught.value)).report) == str(report)


# ------------------------------------------------------------------------------------------ ties
def test_tied_tensors(tmp_path: Path) -> None:
    options = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    model = get_peft_model(llama(tied=True), LoraConfig(r=2, **options))
    randomise(model, "lora_|modules_to_save")
    for deduplicate in (False, True):
        model.save_pretrained(tmp_path, deduplicate_tied=deduplicate)
        report = PeftModel.from_pretrained(llama(tied=True), tmp_path, strict=True).load_reports["default"]
        assert report.tied == {"base_model.model.lm_head.weight": "base_model.model.model.embed_tokens.weight"}
        assert report.complete and not report.overruled
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors["base_model.model.lm_head.weight"].mul_(2))
    with warned("other values", "lm_head.weight (now that of base_model.model.model.embed_tokens.weight)", "tied"):
        loaded = PeftModel.from_pretrained(llama(tied=True), tmp_path)
    assert loaded.load_reports["default"].overruled == ("base_model.model.lm_head.weight",)
    with refused(llama(tied=True), RuntimeError, "other values", "nothing was loaded"):
        PeftModel.from_pretrained(llama(tied=True), tmp_path, strict=True)
    change(tmp_path, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    report = PeftModel.from_pretrained(llama(tied=True), tmp_path, strict=True).load_reports["default"]
    assert report.complete, "the owner's tensor is there"


# ------------------------------------------------------------------------------------------ resized
def test_tensors_that_are_made_to_fit(tmp_path: Path) -> None:
    """BOFT on a GPU may write more factors than it has here."""
    get_peft_model(stack(), BOFTConfig(boft_block_size=2, target_modules=["up"])).save_pretrained(tmp_path)
    keys = [key for key in load_file(tmp_path / WEIGHTS) if key.endswith("boft_R")]
    change(tmp_path, lambda tensors: tensors.update({key: torch.zeros(2, 4, 2, 2) for key in keys}))
    report = PeftModel.from_pretrained(stack(), tmp_path, strict=True).load_reports["default"]
    assert report.complete and report.resized == dict.fromkeys(keys, ((1, 4, 2, 2), (2, 4, 2, 2)))
    assert str(report).count("resized") == len(keys) == 3


def test_prefix_whose_network_is_dropped(tmp_path: Path) -> None:
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True)
    get_peft_model(llama(), prefix).save_pretrained(tmp_path)
    report = PeftModel.from_pretrained(llama(), tmp_path, strict=True).load_reports["default"]
    assert report.complete and report.loaded == ("prompt_embeddings",)


# ------------------------------------------------------------------------------------------ where reports are kept
def test_reports_follow_their_adapters(saved: Path) -> None:
    model = get_peft_model(stack(), config())
    assert model.load_reports == {}
    model.load_adapter(saved, "b")
    model.load_adapter(saved, "c")
    assert list(model.load_reports) == ["b", "c"] and model.load_reports["b"].adapter_name == "b"
    first = model.load_reports["b"]
    model.load_adapter(saved, "b")
    assert model.load_reports["b"] is not first
    model.delete_adapter("b")
    assert list(model.load_reports) == ["c"]
    assert copy.deepcopy(model).load_reports == model.load_reports
    hotswap_adapter(model, saved, "c", torch_device="cpu")
    assert model.load_reports == {}, "other tensors have taken the place of those that it was about"
    mixed = PeftMixedModel.from_pretrained(stack(), saved)
    mixed.load_adapter(saved, "b")
    mixed.delete_adapter(["b"])
    assert list(mixed.load_reports) == ["default"]


def test_report_of_a_model_that_was_injected_into(saved: Path) -> None:
    """There is no model to keep it, so the result has it; what is missing is for the caller to look at."""
    model = inject_adapter_in_model(config(), stack())
    tensors = {key.removeprefix("base_model.model."): t for key, t in load_peft_weights(str(saved)).items()}
    lost = tensors.pop("head.lora_A.weight")
    tensors["hed.lora_A.weight"] = lost
    result = set_peft_model_state_dict(model, tensors)
    assert result.report.missing == ("head.lora_A.weight",) and result.unexpected_keys == ["hed.lora_A.weight"]
    assert result == (result.missing_keys, ["hed.lora_A.weight"]) and not hasattr(model, "load_reports")


def test_report_of_a_state_dict(saved: Path) -> None:
    model = PeftModel.from_pretrained(stack(), saved)
    set_peft_model_state_dict(model, {HEAD_B: torch.ones(4, 2)})
    assert model.load_reports["default"].loaded == (HEAD_B,) and len(model.load_reports["default"].missing) == 7


def test_a_report_cannot_be_changed(saved: Path) -> None:
    report = PeftModel.from_pretrained(stack(), saved).load_reports["default"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.loaded = ()


# ------------------------------------------------------------------------------------------ tasks and base models
def test_the_message_names_task_and_base_models(tmp_path: Path) -> None:
    base = bert_classifier()
    base.name_or_path = "somebody/bert"
    get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    other = bert_classifier()
    other.name_or_path = "somebody/else"
    other.classifier = nn.Linear(16, 5)
    words = ("LORA for SEQ_CLS", "'somebody/bert'", "BertForSequenceClassification", "'somebody/else'", "(3, 16)")
    with refused(other, RuntimeError, *words):
        PeftModel.from_pretrained(other, tmp_path)


def test_loading_again_after_strict_has_refused(saved: Path) -> None:
    model, x = get_peft_model(stack(), config()).eval(), features()
    expected = logits(model, x)
    whole = load_file(saved / WEIGHTS)
    change(saved, lose)
    with refused(model, RuntimeError, "lacks 1 of 8"):
        model.load_adapter(saved, "default", strict=True)
    assert torch.equal(logits(model, x), expected)
    save_file(whole, saved / WEIGHTS)
    model.load_adapter(saved, "default", strict=True)
    assert torch.equal(logits(model, x), logits(PeftModel.from_pretrained(stack(), saved), x))
    assert get_peft_model_state_dict(model).keys() == whole.keys()


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(saved: Path) -> None:
    change(saved, lose)
    model = get_peft_model(stack(), config())
    before = snapshot(model)
    with pytest.raises(PeftWarning, match="lacks"):
        model.load_adapter(saved, "default")
    assert snapshot(model) == before and model.load_reports == {}


# ------------------------------------------------------------------------------------------ an adapter that is there
def fresh(method: str, **changes: Any) -> PeftModel:
    """An adapter of a method, with an effect."""
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    options = {"target_modules": ["up"], **OPTIONS.get(method, {}), **changes}
    model = get_peft_model(stack(), config_cls(**options)).eval()
    randomise(model, getattr(model.base_model, "prefix", "lora_"))
    return model


SETTINGS = [
    ("LORA", "lora_alpha", 8, 32),
    ("LORA", "use_rslora", False, True),
    ("LORA", "lora_dropout", 0.0, 0.5),
    ("LORA", "alpha_pattern", None, {"layers.0.up": 5}),
    ("LORA", "target_modules", ["up"], ["down", "up"]),
    ("LORA", "r", 2, 3),
    ("LOHA", "alpha", 8, 3),
    ("LOKR", "alpha", 8, 3),
    ("VBLORA", "topk", 2, 1),
]


@pytest.mark.parametrize("method, name, old, new", SETTINGS, ids=lambda value: str(value))
def test_settings_of_an_adapter_that_is_there(tmp_path: Path, method: str, name: str, old: Any, new: Any) -> None:
    fresh(method, **{name: new}).save_pretrained(tmp_path)
    model = fresh(method)
    mentions = ("adapter 'default'", f"{name}: checkpoint {new!r}, model {old!r}", "delete_adapter", "another name")
    with refused(model, RuntimeError, *mentions):
        model.load_adapter(tmp_path, "default", strict=True)
    if name == "r":
        with refused(model, RuntimeError, *mentions, "another shape"):
            model.load_adapter(tmp_path, "default")
    else:
        with warned(*mentions):
            report = model.load_adapter(tmp_path, "default").report
        assert report.settings == {name: (new, old)} and not report.complete
        assert f"setting     {name}" in str(report) and "everything fits" not in str(report)
        assert PeftModel.from_pretrained(stack(), tmp_path).load_reports["default"].settings == {}
    # both ways out of which the message speaks
    expected = logits(PeftModel.from_pretrained(stack(), tmp_path), X)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert_close(logits(model, X), expected)
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "default", strict=True)
    model.set_adapter("default")
    assert_close(logits(model, X), expected)


def test_settings_that_say_the_same(saved: Path) -> None:
    """Where an adapter is from, the order of names, and what was left out are no differences."""
    model = get_peft_model(stack(), config(target_modules={"head", "up"}, rank_pattern={}, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "elsewhere"
    assert model.load_adapter(saved, "default", strict=True).report.complete
    (saved / "adapter_config.json").unlink()
    assert model.load_adapter(saved, "default", strict=True).report.complete


def test_another_method_under_a_name_that_is_there(tmp_path: Path) -> None:
    fresh("LOHA").save_pretrained(tmp_path)
    model = get_peft_model(stack(), config())
    with refused(model, RuntimeError, "none of the checkpoint's"):
        model.load_adapter(tmp_path, "default")
