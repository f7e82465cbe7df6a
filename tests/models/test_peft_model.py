# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`PeftModel`: adapters by name, what is trained when, what is forwarded to the base model."""

import copy
import pickle
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import (
    assert_close,
    assert_equal,
    bert_classifier,
    differs,
    features,
    gpt2,
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
from torch import nn

from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    LoHaConfig,
    LoraConfig,
    LoraModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.anatomy.walking import adapter_modules
from peft.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peft.layers.modules_to_save import ModulesToSaveWrapper
from peft.tuners.lora.layer import LoraLayer
from peft.utils import prepare_model_for_kbit_training
from peft.utils.warning import PeftWarning


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

X = features()


def config(*names: str, **changes: Any) -> LoraConfig:
    """A small LoRA for `stack`."""
    return LoraConfig(**{"r": 2, "target_modules": list(names) or ["up", "head"], **changes})


def model_with(*adapters: str, **changes: Any) -> PeftModel:
    """A model with adapters whose tensors all have an effect."""
    model = get_peft_model(stack(), config(**changes), adapter_name=adapters[0]).eval()
    for name in adapters[1:]:
        model.add_adapter(name, config(**changes))
    randomise(model)
    return model


def adapters_of(names: set[str]) -> set[str]:
    """Adapters that parameter names belong to."""
    return {part for name in names for part in name.split(".") if part in ("default", "a", "b", "c")}


# ------------------------------------------------------------------------------------------ classes of tasks
def test_a_class_of_a_task_enters_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(MODEL_TYPE_TO_PEFT_MODEL_MAPPING, "CAUSAL_LM", PeftModelForCausalLM)

    class OwnModel(PeftModelForCausalLM, task="CAUSAL_LM"):
        pass

    class OwnKind(OwnModel):  # without a task: for those who call it by its name
        pass

    model = get_peft_model(stack(), config(task_type="CAUSAL_LM"))
    assert type(model) is OwnModel
    model.save_pretrained(tmp_path)
    assert type(PeftModel.from_pretrained(stack(), tmp_path)) is OwnModel
    assert type(OwnKind.from_pretrained(stack(), tmp_path)) is OwnKind


def test_a_card_of_ones_own_is_what_is_saved(tmp_path: Path) -> None:
    class OwnCard(PeftModel):
        def create_or_update_model_card(self, output_dir: str) -> None:
            (Path(output_dir) / "README.md").write_text("our own")

    OwnCard(stack(), config()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "our own"


def test_a_conversion_on_saving_is_the_matter_of_the_method(tmp_path: Path) -> None:
    model = get_peft_model(stack(), LoHaConfig(target_modules=["up"]))
    with refused(model, ValueError, "works for LoRA, found LoHaConfig", folder=tmp_path):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path)


# ------------------------------------------------------------------------------------------ adapters by name
def test_adapters_come_and_go() -> None:
    model = model_with("a")
    first = logits(model, X)
    model.add_adapter("b", config("down"))
    assert (list(model.peft_config), model.active_adapters, model.active_adapter) == (["a", "b"], ["a"], "a")
    assert_equal(logits(model, X), first)
    model.set_adapter("b")
    assert (model.active_adapters, model.active_adapter) == (["b"], "b")
    assert model.active_peft_config.target_modules == {"down"}
    assert_equal(logits(model, X), logits(stack(), X))
    with warned("'b' was deleted", "'a'"):
        model.delete_adapter("b")
    assert (list(model.peft_config), model.active_adapters, model.active_adapter) == (["a"], ["a"], "a")
    assert_equal(logits(model, X), first)
    model.delete_adapter("a")
    assert not model.peft_config and model.active_adapters == []
    assert_equal(logits(model, X), logits(stack(), X))


def test_the_active_adapter_is_never_stale() -> None:
    model = model_with("a", "b")
    model.base_model.set_adapter("b")
    assert (model.active_adapter, model.active_adapters) == ("b", ["b"])
    assert model.active_peft_config is model.peft_config["b"]
    model.base_model.set_adapter(["b", "a"])
    assert (model.active_adapter, model.active_adapters) == (["b", "a"], ["b", "a"])
    assert model.active_peft_config is model.peft_config["b"]
    both = logits(model, X)
    model.active_adapter = "a"
    assert model.active_adapters == ["a"] and differs(logits(model, X), both)
    model.delete_adapter("b")
    model.delete_adapter("a")
    assert model.active_adapter == model.active_adapters == []


def test_deleting_an_adapter_that_is_not_active_says_nothing() -> None:
    model = model_with("a", "b")
    expected = logits(model, X)
    model.delete_adapter("b")
    assert model.active_adapters == ["a"] and adapters_of(trainable(model)) == {"a"}
    assert not any(".b." in key for key in model.state_dict())
    assert_equal(logits(model, X), expected)


def test_deleting_one_of_several_active_ones() -> None:
    model = model_with("a", "b", "c")
    model.base_model.set_adapter(["a", "b", "c"])
    model.delete_adapter("b")
    assert model.active_adapters == ["a", "c"]
    both = logits(model, X)
    model.set_adapter("a")
    assert differs(logits(model, X), both)


@pytest.mark.parametrize(
    ("call", "classes", "mentions"),
    [
        (lambda m: m.set_adapter("zz"), ValueError, ("'zz'", "'a', 'b'")),
        (lambda m: m.delete_adapter("zz"), ValueError, ("'zz'", "'a', 'b'")),
        (lambda m: m.set_adapter(["a", "b"]), TypeError, ("base_model.set_adapter",)),
        (lambda m: m.add_adapter("a", config()), ValueError, ("'a'", "another name")),
        (lambda m: m.base_model.delete_adapter("zz"), ValueError, ("'zz'",)),
        (lambda m: get_peft_model_state_dict(m, adapter_name="zz"), KeyError, ("'zz'", "'a', 'b'")),
        (lambda m: set_peft_model_state_dict(m, {}, adapter_name="zz"), KeyError, ("'zz'",)),
    ],
)
def test_names_that_are_not_there(call: Any, classes: type, mentions: tuple[str, ...]) -> None:
    model = model_with("a", "b")
    with refused(model, classes, *mentions):
        call(model)


def test_the_same_name_after_deletion_starts_anew() -> None:
    model = model_with("a", "b")
    model.delete_adapter("b")
    model.add_adapter("b", config(r=5))
    assert model.base_model.model.head.r == {"a": 2, "b": 5}
    model.set_adapter("b")
    assert_equal(logits(model, X), logits(stack(), X))


def test_add_adapter_to_a_model_in_eval_mode() -> None:
    """What is added computes in eval mode too: its dropout is off."""
    model = model_with("a")
    model.add_adapter("b", config("up", "down", lora_dropout=0.5))
    model.set_adapter("b")
    randomise(model, r"lora_.*\.b\b", seed=4)
    assert {module.training for module in model.modules()} == {False}
    assert_equal(logits(model, X), logits(model, X))


def test_adding_while_merged_keeps_the_output() -> None:
    model = model_with("a")
    expected = logits(model, X)
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # it may have to unmerge, and says so then
        model.add_adapter("b", config())
    assert_close(logits(model, X), expected)
    assert adapters_of(trainable(model)) == {"a"}


def test_set_adapter_unmerges_with_a_warning() -> None:
    model = model_with("a", "b")
    model.set_adapter("b")
    expected = logits(model, X)
    model.set_adapter("a")
    model.merge_adapter()
    with warned("merged"):
        model.set_adapter("b")
    assert_close(logits(model, X), expected)


# ------------------------------------------------------------------------------------------ what is trained
def test_only_the_active_adapter_is_trained() -> None:
    model = model_with("a", "b")
    assert adapters_of(trainable(model)) == {"a"} and all("lora_" in name for name in trainable(model))
    model.set_adapter("b")
    assert adapters_of(trainable(model)) == {"b"}
    model.set_adapter("b", inference_mode=True)
    assert trainable(model) == set()
    model.set_adapter("a")
    assert adapters_of(trainable(model)) == {"a"}
    model.base_model.set_adapter(["a", "b"])
    assert adapters_of(trainable(model)) == {"a", "b"}


@pytest.mark.parametrize("inference_mode", [False, True])
def test_inference_mode(inference_mode: bool) -> None:
    model = get_peft_model(stack(), config(inference_mode=inference_mode, modules_to_save=["layers.0.down"]))
    assert bool(trainable(model)) != inference_mode
    assert model.base_model.model.head.active_adapters == ["default"]


def test_frozen_adapter_stays_frozen_when_another_one_is_added() -> None:
    model = get_peft_model(stack(), config(inference_mode=True))
    model.add_adapter("b", config())
    assert trainable(model) == set()
    model.set_adapter("b")
    assert adapters_of(trainable(model)) == {"b"}


@pytest.mark.parametrize("mode", ["set", "requires_grad"])
def test_frozen_by_hand_stays_frozen_when_another_one_is_added(mode: str) -> None:
    model = model_with("a")
    if mode == "set":
        model.set_adapter("a", inference_mode=True)
    else:
        model.set_requires_grad("a", False)
    model.add_adapter("b", config())
    assert trainable(model) == set()


def test_disable_adapter_gives_back_what_was_trained() -> None:
    model = model_with("a", "b", modules_to_save=["layers.0.down"])
    for prepare in (
        lambda: model.set_adapter("b"),
        lambda: model.set_adapter("a"),
        lambda: model.set_requires_grad("a", False),
        lambda: model.set_requires_grad(["a", "b"]),
        lambda: model.set_adapter("a", inference_mode=True),
    ):
        prepare()
        before, expected = trainable(model), logits(model, X)
        with model.disable_adapter():
            assert_equal(logits(model, X), logits(stack(), X))
            assert not model.has_active_enabled_adapter
        assert trainable(model) == before
        assert_equal(logits(model, X), expected)
        assert model.has_active_enabled_adapter


def test_disable_adapter_after_an_exception() -> None:
    model = model_with("a")
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_nested_disable_adapter() -> None:
    model, base = model_with("a"), logits(stack(), X)
    adapted, names = logits(model, X), trainable(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert_equal(logits(model, X), base)
        assert_equal(logits(model, X), base)
    assert_equal(logits(model, X), adapted)
    assert trainable(model) == names


def test_disable_adapter_where_adapters_are_off_already() -> None:
    model, base = model_with("a"), logits(stack(), X)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert_equal(logits(model, X), base)
    model.base_model.enable_adapter_layers()
    assert differs(logits(model, X), base)


def test_switching_while_disabled() -> None:
    model, base = model_with("a", "b"), logits(stack(), X)
    model.set_adapter("b")
    expected = logits(model, X)
    model.set_adapter("a")
    with model.disable_adapter():
        model.set_adapter("b")
        model.add_adapter("c", config("up", "down"))
        assert_equal(logits(model, X), base)
    assert_equal(logits(model, X), expected)
    assert adapters_of(trainable(model)) == {"b"}


@pytest.mark.parametrize("for_a_while", [False, True])
def test_layers_that_are_added_while_adapters_are_off_are_off_too(for_a_while: bool) -> None:
    model, base = model_with("a"), logits(stack(), X)
    off = model.disable_adapter() if for_a_while else nullcontext()
    with off:
        if not for_a_while:
            model.base_model.disable_adapter_layers()
        model.add_adapter("b", config("up", "layers.0.down", "head", modules_to_save=["layers.1.down"]))
        randomise(model, r"\.b\b")
        model.set_adapter("b")
        assert_equal(logits(model, X), base)
    if not for_a_while:
        model.base_model.enable_adapter_layers()
    assert differs(logits(model, X), base)
    assert not any(module.disable_adapters for _, module in adapter_modules(model))
    assert adapters_of(trainable(model)) == {"b"}
    assert all(p.requires_grad for _, module in adapter_modules(model) for p in module.adapter_parameters("b"))


def test_gradients_do_not_reach_a_disabled_adapter() -> None:
    model = model_with("a", modules_to_save=["layers.0.down"])
    with model.disable_adapter():
        assert not model(X).requires_grad


def test_training_one_adapter_leaves_the_rest_alone() -> None:
    model = model_with("a", "b", modules_to_save=["layers.0.down"])
    model.set_adapter("b")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable(model) and adapters_of(changed) == {"b"}
    assert any("modules_to_save.b" in name for name in changed)


# ------------------------------------------------------------------------------------------ counting
def test_counting(capsys: pytest.CaptureFixture) -> None:
    model = get_peft_model(stack(), config("head"))
    total = sum(p.numel() for p in stack().parameters()) + 2 * 8 + 4 * 2
    assert model.get_nb_trainable_parameters() == (24, total)
    model.print_trainable_parameters()
    out, err = capsys.readouterr()
    assert out == f"trainable params: 24 || all params: {total} || trainable%: {100 * 24 / total:.4f}\n"
    assert err == ""


def test_a_shared_parameter_counts_once() -> None:
    plain, tied = llama(), llama(tied=True)
    shared = tied.lm_head.weight.numel()
    counts = [get_peft_model(base, LoraConfig(r=2)).get_nb_trainable_parameters() for base in (plain, tied)]
    assert counts[0][0] == counts[1][0] and counts[0][1] - counts[1][1] == shared


# ------------------------------------------------------------------------------------------ forwarding
def test_attributes_are_found_through_the_wrapper() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert model.config is model.base_model.model.config and model.config.model_type == "llama"
    assert model.prefix == "lora_" and model.peft_type == PeftType.LORA
    assert isinstance(model.base_model, LoraModel)
    assert model.get_base_model() is model.base_model.model
    assert model.lm_head is model.get_base_model().lm_head
    assert model.device == torch.device("cpu") and model.dtype == model.base_model_torch_dtype == torch.float32
    assert model.get_input_embeddings() is model.get_base_model().model.embed_tokens
    assert hasattr(model, "generate") and not hasattr(model, "no_such_attribute")
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = model.no_such_attribute
    assert model.modules_to_save is None


def test_attributes_of_a_module_that_is_trained_in_full() -> None:
    model = get_peft_model(stack(), config("up", modules_to_save=["head"]))
    head = model.base_model.model.head
    assert isinstance(head, ModulesToSaveWrapper) and model.modules_to_save == {"head"}
    assert (head.in_features, head.out_features) == (8, 4)
    assert head.weight is head.modules_to_save["default"].weight
    with model.disable_adapter():
        assert head.weight is head.original_module.weight
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = head.no_such_attribute


def test_state_dict_has_the_prefix_of_the_wrapper() -> None:
    model = get_peft_model(stack(), config("head"))
    assert {key.startswith("base_model.model.") for key in model.state_dict()} == {True}


def test_forward_arguments() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM")).eval()
    randomise(model)
    ids = token_ids()
    expected = logits(model, ids)
    assert_equal(logits(model, input_ids=ids), expected)
    assert_equal(logits(model, inputs_embeds=model.get_input_embeddings()(ids)), expected)
    assert isinstance(model(ids, return_dict=False), tuple)
    assert model(ids, labels=ids).loss > 0
    assert len(model(ids, output_hidden_states=True).hidden_states) == 3


def test_sequence_classifier_trains_its_head() -> None:
    model = get_peft_model(bert_classifier(), LoraConfig(r=2, task_type="SEQ_CLS"))
    heads = {name for name in trainable(model) if "lora_" not in name}
    assert heads == {f"base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")}
    assert model(token_ids(), labels=torch.tensor([0, 2])).loss > 0


# ------------------------------------------------------------------------------------------ generation
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_generate(task: str | None, build: Any) -> None:
    base = build()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = base.generate(token_ids(), attention_mask=torch.ones(2, 5), **options)
    model = get_peft_model(base, LoraConfig(r=2, task_type=task, fan_in_fan_out=build is gpt2)).eval()
    options["attention_mask"] = torch.ones(2, 5)
    assert torch.equal(model.generate(input_ids=token_ids(), **options), plain)
    assert torch.equal(model.generate(token_ids(), **options), plain)
    randomise(model)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.requires_grad else 1
    adapted = model.generate(input_ids=token_ids(), **options)
    assert adapted.shape == (2, 9) and not torch.equal(adapted, plain)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=token_ids(), **options), plain)


def generating_with_two() -> PeftModelForCausalLM:
    """A Llama with two adapters that change what it says."""
    model = get_peft_model(llama(), LoraConfig(r=2, task_type="CAUSAL_LM"), adapter_name="a").eval()
    model.add_adapter("b", LoraConfig(r=2, task_type="CAUSAL_LM"))
    randomise(model)
    for name, parameter in model.named_parameters():
        parameter.data *= 4 if "lora_" in name else 1
    return model


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_an_adapter_per_sample(beams: int) -> None:
    model, ids = generating_with_two(), token_ids(3)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    options["eos_token_id"] = None
    rows = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        rows[name] = model.generate(input_ids=ids, **options)
    with model.disable_adapter():
        rows["__base__"] = model.generate(input_ids=ids, **options)
    names = ["b", "__base__", "a"]
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    assert torch.equal(mixed, torch.stack([rows[name][i] for i, name in enumerate(names)]))


class Checkpointing(nn.Module):
    """A model that says by itself that it checkpoints activations, without transformers' methods for it."""

    is_gradient_checkpointing = is_activation_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(4, 4), nn.Linear(4, 4)

    def get_input_embeddings(self) -> nn.Module:
        """Name the embedding."""
        return self.emb

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Be asked for it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ids to features."""
        return self.lin(self.emb(ids))


@pytest.mark.parametrize("prepare", ["get_peft_model", "prepare_model_for_kbit_training"])
def test_a_checkpointing_model_of_ones_own_can_be_copied_and_pickled(prepare: str) -> None:
    """Its embedding has a hook by then, which lets gradients through."""
    net = Checkpointing()
    if prepare == "prepare_model_for_kbit_training":
        prepare_model_for_kbit_training(net)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["lin"]))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.get_base_model().emb(torch.tensor([1])).requires_grad


# ------------------------------------------------------------------------------------------ adapter per sample
def per_sample() -> PeftModel:
    """A model with two adapters, each with a head of its own."""
    model = get_peft_model(stack(), config("up", modules_to_save=["head"]), adapter_name="a").eval()
    model.add_adapter("b", config("up", "down", modules_to_save=["head"]))
    randomise(model, "lora_|modules_to_save")
    return model


def test_adapter_per_sample_with_modules_to_save() -> None:
    model = per_sample()
    rows = {"__base__": logits(stack(), X)}
    for name in ("a", "b"):
        model.set_adapter(name)
        rows[name] = logits(model, X)
    names = ["b", "__base__", "a"]
    assert_close(logits(model, X, adapter_names=names), torch.stack([rows[n][i] for i, n in enumerate(names)]))
    with model.disable_adapter():
        assert_close(logits(model, X, adapter_names=names), rows["__base__"])


@pytest.mark.parametrize(
    ("prepare", "names", "mention"),
    [
        (lambda m: None, ["a", "b"], "3"),
        (lambda m: None, ["a", "b", "zz"], "'zz'"),
        (lambda m: m.train(), ["a", "b", "a"], "eval()"),
        (lambda m: m.merge_adapter(), ["a", "b", "a"], "unmerge_adapter()"),
    ],
    ids=["length", "unknown", "training", "merged"],
)
def test_adapter_per_sample_that_cannot_work(prepare: Any, names: list[str], mention: str) -> None:
    model = per_sample()
    prepare(model)
    with refused(model, ValueError, "adapter_names", mention):
        model(X, adapter_names=names)


# ------------------------------------------------------------------------------------------ modules_to_save
def test_modules_to_save_belong_to_their_adapter() -> None:
    model, base = per_sample(), stack()
    head = model.base_model.model.head
    assert set(head.modules_to_save) == {"a", "b"}
    assert all(p.data_ptr() != head.original_module.weight.data_ptr() for p in head.modules_to_save.parameters())
    outputs = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        outputs[name] = logits(model, X)
        heads = {n for n in trainable(model) if "lora_" not in n}
        assert heads == {f"base_model.model.head.modules_to_save.{name}.{part}" for part in ("weight", "bias")}
    assert differs(outputs["a"], outputs["b"])
    assert_equal(head.original_module.weight, base.head.weight)
    with refused(model, ValueError, "a, b", "one"):
        model.base_model.set_adapter(["a", "b"])
    with warned("'b' was deleted"):
        model.delete_adapter("b")
    assert set(head.modules_to_save) == {"a"}
    assert_equal(logits(model, X), outputs["a"])


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_modules_to_save_when_unloading(way: str) -> None:
    model = per_sample()
    model.set_adapter("b")
    expected = logits(model, X) if way == "merge_and_unload" else logits(stack(), X)
    base = getattr(model, way)()
    assert type(base.head) is nn.Linear
    assert_close(logits(base, X), expected)


def test_modules_to_save_merge_the_adapter_that_is_named() -> None:
    model = per_sample()
    model.set_adapter("b")
    expected = logits(model, X)
    model.set_adapter("a")
    assert_close(logits(model.merge_and_unload(adapter_names=["b"]), X), expected)


def test_modules_to_save_with_safe_merge() -> None:
    model = per_sample()
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["a"].weight[0, 0] = float("nan")
    with refused(model, ValueError, "'a'", "finite"):
        model.merge_and_unload(safe_merge=True)


def test_modules_to_save_of_one_adapter_only() -> None:
    model = model_with("a")
    model.add_adapter("b", config("up", modules_to_save=["layers.0.down"]))
    with_a = logits(model, X)
    wrapper = model.base_model.model.layers[0].down
    randomise(model, r"modules_to_save\.b")
    assert_equal(logits(model, X), with_a)
    assert adapters_of(trainable(model)) == {"a"}
    model.set_adapter("b")
    assert wrapper._current_module() is wrapper.modules_to_save["b"]
    assert differs(logits(model, X), with_a)
    model.set_adapter("a")
    assert_equal(logits(model, X), with_a)
    model.delete_adapter("b")
    assert_equal(logits(model, X), with_a)


def test_a_whole_block_is_saved_with_what_is_in_it() -> None:
    model = get_peft_model(stack(), config("up", modules_to_save=["layers.1", "layers.1.up"]))
    inner = model.base_model.model.layers[1]
    assert isinstance(inner, ModulesToSaveWrapper) and not any(isinstance(m, LoraLayer) for m in inner.modules())
    assert model.targeted_module_names == ["layers.0.up", "layers.2.up"]


@pytest.mark.parametrize(
    ("kwargs", "classes", "mentions"),
    [
        ({"modules_to_save": ["layers"]}, TypeError, ("layers", "ModuleList")),
        ({"modules_to_save": "head"}, TypeError, ("modules_to_save", "'head'", "list")),
    ],
    ids=str,
)
def test_modules_that_cannot_be_saved(kwargs: dict[str, Any], classes: type, mentions: tuple[str, ...]) -> None:
    base = stack()
    with refused(base, classes, *mentions):
        get_peft_model(base, config(**kwargs))
    model = get_peft_model(stack(), config("layers.0.up"))
    with refused(model, classes, *mentions):
        model.add_adapter("b", config("up", "head", **kwargs))


def test_a_layer_that_another_adapter_targets_cannot_be_saved_in_full() -> None:
    """Its copy would hold the other adapter, and the other adapter's checkpoint would get other keys."""
    model = model_with("a")
    with refused(model, TypeError, "head"):
        model.add_adapter("b", config("down", modules_to_save=["head"]))


def test_unknown_module_to_save_is_warned_about() -> None:
    with warned("modules_to_save", "'haed'"):
        get_peft_model(stack(), config("up", modules_to_save=["haed"]))


# ------------------------------------------------------------------------------------------ gradient checkpointing
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_gradient_checkpointing(task: str | None) -> None:
    """The base is frozen, so without help no gradient would reach a checkpointed layer."""
    base = llama()
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)  # renamed in v5
    enable({"use_reentrant": True})
    model = get_peft_model(base, LoraConfig(r=2, task_type=task)).train()
    randomise(model)
    assert model.get_input_embeddings()(token_ids()).requires_grad
    model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(reached) == trainable(model) and all(grad.abs().sum() > 0 for grad in reached.values())

    plain = get_peft_model(llama(), LoraConfig(r=2, task_type=task)).train()
    randomise(plain)
    plain(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for name, grad in reached.items():
        assert_close(plain.get_parameter(name).grad, grad)


def test_without_gradient_checkpointing_nothing_is_prepared() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2))
    assert not model.get_input_embeddings()(token_ids()).requires_grad


def test_preparing_a_model_that_only_names_its_embedding() -> None:
    class Small(nn.Module):
        is_gradient_checkpointing = True

        def __init__(self) -> None:
            super().__init__()
            self.emb, self.lin = nn.Embedding(4, 4), nn.Linear(4, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.emb

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lin(self.emb(ids))

    model = get_peft_model(Small(), LoraConfig(r=2, target_modules=["lin"]))
    assert model.base_model.model.emb(torch.tensor([1])).requires_grad


# ------------------------------------------------------------------------------------------ names and aliases
class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use it twice."""
        return self.second(torch.tanh(self.other(self.first(x))))


def shared() -> Shared:
    """The model above, the same each time."""
    torch.manual_seed(0)
    return Shared().eval()


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"], ["second", "first"], "first|second"])
def test_one_layer_under_two_names_gets_one_adapter(names: Any, tmp_path: Path) -> None:
    model = get_peft_model(shared(), LoraConfig(r=2, target_modules=names)).eval()
    base = model.base_model.model
    assert model.targeted_module_names == ["first"]
    assert isinstance(base.first, LoraLayer) and base.second is base.first
    assert type(base.first.base_layer) is nn.Linear
    randomise(model)
    expected = logits(model, X)
    model.save_pretrained(tmp_path)
    assert_equal(logits(PeftModel.from_pretrained(shared(), tmp_path), X), expected)
    merged = model.merge_and_unload()
    assert merged.first is merged.second and type(merged.first) is nn.Linear
    assert_close(logits(merged, X), expected)


@pytest.mark.parametrize("name", ["first", "second"])
def test_settings_by_any_name_of_a_layer(name: str) -> None:
    config = LoraConfig(r=2, target_modules=["first"], rank_pattern={name: 3}, alpha_pattern={name: 6})
    layer = get_peft_model(shared(), config).base_model.model.first
    assert (layer.r["default"], layer.scaling["default"]) == (3, 2.0)


@pytest.mark.parametrize("name", ["first", "second"])
def test_module_to_save_by_any_of_its_names(name: str) -> None:
    model = get_peft_model(shared(), LoraConfig(r=2, target_modules=["other"], modules_to_save=[name]))
    base = model.base_model.model
    assert isinstance(base.first, ModulesToSaveWrapper) and base.second is base.first


@pytest.mark.parametrize("name", ["first", "second"])
def test_module_in_a_state_dict_by_any_of_its_names(name: str) -> None:
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"]), shared(), state_dict=tensors)
    assert isinstance(model.first, LoraLayer) and model.second is model.first


# ------------------------------------------------------------------------------------------ without a PeftModel
def test_functions_for_models_without_a_wrapper() -> None:
    model = inject_adapter_in_model(config(), stack(), adapter_name="a")
    with warned("a", "b"):
        inject_adapter_in_model(config(), model, adapter_name="b")
    randomise(model)
    set_adapter(model, "a")
    assert adapters_of(trainable(model)) == {"a"}
    set_adapter(model, ["a", "b"], inference_mode=True)
    assert trainable(model) == set() and model.head.active_adapters == ["a", "b"]
    set_requires_grad(model, "b")
    assert adapters_of(trainable(model)) == {"b"}
    assert delete_adapter(model, "b", "lora_") == ["a"]
    assert model.head.available_adapters == {"a"}
    assert delete_adapter(stack(), "b", "lora_") is None


def test_cast_adapter_dtype() -> None:
    model = inject_adapter_in_model(config("head"), stack())
    model.to(torch.bfloat16)
    parameters = list(model.head.adapter_parameters("default"))
    cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    cast_adapter_dtype(model, "default")
    assert {p.dtype for p in model.head.adapter_parameters("default")} == {torch.float32}
    assert [id(p) for p in model.head.adapter_parameters("default")] == [id(p) for p in parameters]
    assert model.head.get_base_weight().dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------ base models
@pytest.mark.parametrize("value", [SimpleNamespace(model_type="mine"), object(), None, 5, {"model_type": "mine"}])
def test_what_a_model_calls_its_config_may_be_anything(value: Any, tmp_path: Path) -> None:
    base, again = stack(), stack()
    base.config = again.config = value
    get_peft_model(base, config()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(again, tmp_path)
    kind = getattr(value, "model_type", "custom") if not isinstance(value, dict) else "mine"
    assert model.base_model.get_model_config(again)["model_type"] == kind


def test_another_name_of_the_base_model_is_said() -> None:
    base = stack()
    base.name_or_path = "theirs"
    with warned("'mine'", "'theirs'"):
        model = get_peft_model(base, config(base_model_name_or_path="mine"))
    assert model.peft_config["default"].base_model_name_or_path == "theirs"
    again = stack()
    again.name_or_path = "theirs"
    get_peft_model(again, config(base_model_name_or_path="theirs"))
    assert get_peft_model(stack(), config(base_model_name_or_path="mine")).active_peft_config.base_model_name_or_path


def test_samples_are_not_mixed_where_a_saved_module_gives_no_tensor() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gru = nn.Linear(8, 8), nn.GRU(8, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gru(self.up(x))[0]

    settings = config("up", modules_to_save=["gru"])
    model = get_peft_model(Recurrent(), settings, "a").eval()
    model.add_adapter("b", settings)
    with refused(model, TypeError, "adapter_names", "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "GRU"):
        model(torch.randn(2, 3, 8), adapter_names=["a", "b"])
