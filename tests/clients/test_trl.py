# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""TRL trains tied models through its trainers; what it saves and merges is tied too."""

import math

import pytest
import torch
from support.helpers import assert_close, assert_equal, differs, logits, randomise
from support.tied_models import llama
from transformers import AutoModelForCausalLM

from peft import LoraConfig, PeftModel, PeftWarning, PrefixTuningConfig, get_peft_model, weight_tying_report


CLIENT = "trl"
pytestmark = [
    pytest.mark.filterwarnings("error::peft.PeftWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # between transformers and TRL
]

ROUTES = {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [4, 5, 9]},
}
WIDE = {"head", "both"}
each_route = pytest.mark.parametrize(
    "route", [pytest.param(route, marks=[pytest.mark.wide] * (route in WIDE)) for route in ROUTES]
)
IDS = torch.arange(4, 14).reshape(2, 5)


def lora(route: str) -> LoraConfig:
    options = {"target_modules": ["q_proj", "v_proj"], **ROUTES[route]}
    return LoraConfig(r=2, ensure_weight_tying=True, task_type="CAUSAL_LM", **options)


def two_steps(folder, **changes) -> dict:
    """Arguments that all of TRL's trainers have in common."""
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": 16,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **changes,
    }


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@each_route
def test_supervised_training_is_saved_merged_and_loaded_by_transformers(route, tokenizer, sentences, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": sentences})
    trainer = SFTTrainer(
        model=llama(),
        args=SFTConfig(**two_steps(tmp_path)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=lora(route),
    )
    model, start = trainer.model, trained(trainer.model)
    assert trainer.train().global_step == 2

    assert all(not torch.equal(tensor, start[name]) for name, tensor in trained(model).items())
    assert weight_tying_report(model).holds
    optimised = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(optimised) == sorted({id(p) for p in model.parameters() if p.requires_grad})

    # it computes the loss with the weight of the head, without calling it
    batch = tokenizer([f"{text}</s>" for text in sentences], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)

    expected = logits(model.eval(), IDS)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert weight_tying_report(loaded).holds
    assert_close(logits(loaded, IDS), expected)

    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, IDS), expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert again.config.tie_word_embeddings
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_equal(logits(again, IDS), logits(merged, IDS))


def test_a_prefix_is_trained_although_checkpointing_is_the_default(tokenizer, sentences, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=llama(),
        args=SFTConfig(**two_steps(tmp_path)),
        train_dataset=Dataset.from_dict({"text": sentences}),
        processing_class=tokenizer,
        peft_config=PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    )
    assert trainer.args.gradient_checkpointing
    start = trained(trainer.model)
    with pytest.warns(PeftWarning, match="gradient checkpointing is switched off"):
        trainer.train()
    assert start and all(not torch.equal(tensor, start[name]) for name, tensor in trained(trainer.model).items())
    expected = logits(trainer.model.eval(), IDS)
    assert differs(expected, logits(trainer.model.get_base_model(), IDS))
    trainer.save_model(str(tmp_path / "prefix"))
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "prefix"), IDS), expected)


def test_new_tokens_and_the_head_are_trained_as_one(tokenizer, sentences, tmp_path):
    """What the trainer asks for where a chat template brings new tokens."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [4, 5]},
        modules_to_save=["lm_head"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    with pytest.warns(PeftWarning, match="the whole matrix is trained"):
        trainer = SFTTrainer(
            model=llama(),
            args=SFTConfig(**two_steps(tmp_path)),
            train_dataset=Dataset.from_dict({"text": sentences}),
            processing_class=tokenizer,
            peft_config=config,
        )
    start = trained(trainer.model)
    trainer.train()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in trained(trainer.model).items())
    assert weight_tying_report(trainer.model).holds
    merged = trainer.model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("reference", ["base model", "second adapter"])
def test_preference_training_keeps_its_reference(reference, tokenizer, tmp_path):
    """What answers are compared with is the base model, or a copy of the adapter as it was before."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = {
        "prompt": ["a tied weight is", "an adapter learns", "two names of", "the head reads"],
        "chosen": [" one tensor", " a small change", " one tensor", " the embedding"],
        "rejected": [" the model", " two names", " the head", " a weight"],
    }
    model, config = llama(), lora("embedding")
    if reference == "second adapter":
        model, config = get_peft_model(model, config), None
        randomise(model, "lora_|modules_to_save")
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**two_steps(tmp_path)),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
        peft_config=config,
    )
    model = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()

    first, second = trainer.state.log_history[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0 != second["rewards/margins"]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".default" in name}
    assert weight_tying_report(model).holds
    assert model.active_adapters == ["default"]

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert_close(logits(loaded, IDS), logits(model.eval(), IDS))
