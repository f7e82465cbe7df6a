# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""transformers adds, loads, switches and deletes adapters of a tied model, and Trainer goes on where it stopped."""

from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, differs, logits, randomise
from support.tied_models import llama
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft import (
    LoraConfig,
    PeftModel,
    PeftWarning,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    weight_tying_report,
)


CLIENT = "transformers"
pytestmark = [
    pytest.mark.filterwarnings("error::peft.PeftWarning"),
    pytest.mark.filterwarnings("ignore:the model holds adapters already:peft.PeftWarning"),
]

ROUTES = {
    "untouched": {},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "targets": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [4, 5, 9]},
}
WIDE = {"untouched", "head"}
each_route = pytest.mark.parametrize(
    "route", [pytest.param(route, marks=[pytest.mark.wide] * (route in WIDE)) for route in ROUTES]
)
TRAINED = r"lora_|modules_to_save|trainable_tokens_delta"
IDS = torch.arange(4, 14).reshape(2, 5)


def lora(route: str, **options) -> LoraConfig:
    options = {"target_modules": ["q_proj", "v_proj"], **ROUTES[route], **options}
    return LoraConfig(r=2, ensure_weight_tying=route != "untouched", **options)


@pytest.fixture
def base(tmp_path) -> Path:
    """A tied model on disk."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def read(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def assert_tied(model: nn.Module, adapters: int) -> None:
    """Check that what the base model shares and what each adapter trains in its place is one tensor."""
    report = weight_tying_report(model)
    assert report.holds and len(report.rows) == 1 + adapters
    members = [p for name, p in model.named_parameters(remove_duplicate=False) if "embed" in name or "lm_head" in name]
    kinds = {(p.shape, p.requires_grad) for p in members}
    assert len({id(p) for p in members}) == len({p.data_ptr() for p in members}) >= len(kinds)


# ---------------------------------------------------------------------------------------- adapters of a model
@each_route
def test_model_is_saved_as_an_adapter_and_read_again(route, base, tmp_path):
    model = read(base)
    plain = logits(model, IDS)
    model.add_adapter(lora(route), "mine")
    assert model.active_adapters() == ["mine"]
    assert_equal(logits(model, IDS), plain)
    randomise(model, TRAINED)
    expected = logits(model, IDS)
    assert differs(expected, plain)
    adapters = route != "untouched"
    assert_tied(model, adapters)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()

    again = read(tmp_path / "adapter")
    assert_tied(again, adapters)
    assert_close(logits(again, IDS), expected)
    beside = read(base)
    beside.load_adapter(str(tmp_path / "adapter"), is_trainable=True)
    beside.train()  # it replaces parameters one by one, and only without is_trainable sets the mode by itself
    assert_tied(beside, adapters)
    assert_close(logits(beside, IDS), expected)
    trained = {name for name, p in beside.named_parameters() if p.requires_grad}
    assert trained == {name.replace("mine", "default") for name, p in model.named_parameters() if p.requires_grad}
    wrapped = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert_close(logits(wrapped, IDS), expected)


@each_route
def test_adapter_saved_by_a_peft_model_is_loaded(route, tmp_path):
    """Whether or not the file has aliases for readers that know of no ties."""
    model = get_peft_model(llama(), lora(route, task_type="CAUSAL_LM"))
    randomise(model, TRAINED)
    for deduplicate in (False, True):
        model.save_pretrained(tmp_path, deduplicate_tied=deduplicate)
        loaded = llama()
        loaded.load_adapter(str(tmp_path))
        assert_tied(loaded, route != "untouched")
        assert_close(logits(loaded, IDS), logits(model, IDS))


@each_route
def test_adapters_are_switched_and_deleted(route, base, tmp_path):
    model, outputs = read(base), {}
    for seed, name in enumerate(("one", "two")):
        model.add_adapter(lora(route), name)
        randomise(model, rf"({TRAINED}).*{name}", seed)
        assert model.active_adapters() == [name]
        outputs[name] = logits(model, IDS)
    assert differs(outputs["one"], outputs["two"])
    model.set_adapter("one")
    assert_equal(logits(model, IDS), outputs["one"])
    model.save_pretrained(tmp_path / "one")
    model.load_adapter(str(tmp_path / "one"), "three")
    assert model.active_adapters() == ["three"]
    assert_close(logits(model, IDS), outputs["one"])
    assert_tied(model, 3 * (route != "untouched"))

    model.delete_adapter(["one", "three"])
    model.set_adapter("two")
    assert_equal(logits(model, IDS), outputs["two"])
    assert_tied(model, route != "untouched")
    model.disable_adapters()
    assert_close(logits(model, IDS), logits(llama(), IDS))


@pytest.mark.parametrize("again", ["one", "two"])
def test_an_adapter_comes_after_the_last_one_was_deleted(again, base, tmp_path):
    model = read(base)
    model.add_adapter(lora("targets"), "one")
    randomise(model, TRAINED)
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path / "one")
    model.delete_adapter("one")
    model.load_adapter(str(tmp_path / "one"), again)
    assert model.active_adapters() == [again]
    assert_close(logits(model, IDS), expected)


def test_adapters_are_enabled_again(base):
    """This holds for adapter layers; transformers 5.24.0 leaves modules_to_save off, whatever peft is used."""
    model = read(base)
    model.add_adapter(lora("targets"))
    randomise(model, TRAINED)
    expected = logits(model, IDS)
    model.disable_adapters()
    assert differs(logits(model, IDS), expected)
    model.enable_adapters()
    assert_equal(logits(model, IDS), expected)


# ---------------------------------------------------------------------------------------- Trainer
SAMPLES = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(4, 48, (8, 6), generator=torch.Generator().manual_seed(1))
]


def trainer(route: str, folder: Path, **changes) -> Trainer:
    """A trainer of a fresh model: four steps, saved after each second one."""
    return trainer_of(get_peft_model(llama(), lora(route, task_type="CAUSAL_LM")), folder, **changes)


def trainer_of(model: nn.Module, folder: Path, **changes) -> Trainer:
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return Trainer(model=model, args=TrainingArguments(**options), train_dataset=SAMPLES, eval_dataset=SAMPLES[:2])


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


@each_route
def test_training_goes_on_from_a_checkpoint(route, tmp_path):
    whole = trainer(route, tmp_path)
    start = learned(whole.model)
    whole.train()
    expected = learned(whole.model)
    assert all(not torch.equal(expected[name], start[name]) for name in start)

    torch.manual_seed(7)  # what the resumed run starts with must not matter
    resumed = trainer(route, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(learned(resumed.model), expected, atol=0.0, rtol=0.0)
    assert_tied(resumed.model, route != "untouched")
    optimised = [id(p) for group in resumed.optimizer.param_groups for p in group["params"]]
    assert sorted(optimised) == sorted({id(p) for p in resumed.model.parameters() if p.requires_grad})


def test_training_of_a_prompt_goes_on_from_a_checkpoint(tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    whole = trainer_of(get_peft_model(llama(), config), tmp_path)
    whole.train()
    resumed = trainer_of(get_peft_model(llama(), config), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(learned(resumed.model), learned(whole.model), atol=0.0, rtol=0.0)


@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, encoder_hidden_size=8, prefix_projection=True, task_type="CAUSAL_LM"),
    ],
    ids=["p_tuning", "projection"],
)
def test_training_of_a_prompt_whose_network_is_not_saved_does_not_go_on(config, tmp_path):
    """A checkpoint holds the finished prompt: it fits no optimiser that has trained the network behind it."""
    trainer_of(get_peft_model(llama(), config), tmp_path).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = trainer_of(get_peft_model(llama(), config), tmp_path)
    before = learned(resumed.model)
    with pytest.raises(ValueError, match="cannot be resumed: a network computes its prompt.*resume_from_checkpoint"):
        resumed.train(resume_from_checkpoint=checkpoint)
    torch.testing.assert_close(learned(resumed.model), before, atol=0.0, rtol=0.0)

    with pytest.warns(PeftWarning, match="the network is dropped"):  # the way out that the message names
        resumed.model.load_adapter(checkpoint, "default")
    start = learned(resumed.model)
    goes_on = trainer_of(resumed.model, tmp_path)
    goes_on.train()
    assert set(start) == {"prompt_encoder.default.embedding.weight"}
    assert all(not torch.equal(tensor, start[name]) for name, tensor in learned(goes_on.model).items())


@each_route
def test_best_checkpoint_is_loaded_in_the_end(route, tmp_path):
    """The best one is the one with the highest loss here, so that it is not the last."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(route, tmp_path, metric_for_best_model="loss", greater_is_better=True, **options)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses[0] > losses[1]
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-2"
    best = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-2")
    torch.testing.assert_close(
        get_peft_model_state_dict(run.model), get_peft_model_state_dict(best), atol=0.0, rtol=0.0
    )
    assert_tied(run.model, route != "untouched")
