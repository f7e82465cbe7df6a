# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Teach new tokens to a model whose input embedding and output head are one tensor, and keep them one tensor.

The model learns two new tokens that mark where somebody speaks. For that the whole embedding is trained
(`modules_to_save`), next to LoRA on the attention layers. The script then goes the way of every adapter (save, load on
a fresh base, merge, save, reopen without peft) and checks at each stage that the tie held and that the logits are
still those of the trained model. It exits with status 1 if not.

    python finetune.py                      # SmolLM2-135M-Instruct
    python finetune.py --model tiny         # a random model, seconds
    python finetune.py --model PATH_OR_ID   # any causal language model with tied embeddings
"""

import argparse
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from base_models import base_source
from measure import Stage, compare, measure, plot_loss, table
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tying.report import weight_tying_report


NEW_TOKENS = ["<|speech|>", "<|/speech|>"]
TEXT = Path(__file__).parent / "data" / "pride_and_prejudice.txt"
TOLERANCE = 1e-4
STEPS = {"smollm2": 30, "tiny": 200}
LEARNING_RATE = {"smollm2": 3e-4, "tiny": 3e-3}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a folder or a hub id")
    parser.add_argument("--output", type=Path, help="folder for everything that is saved (outputs/tied_embeddings)")
    parser.add_argument("--text", type=Path, default=TEXT, help="plain text to train on; the last tenth is held out")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks per step")
    parser.add_argument("--block-size", type=int, default=128, help="tokens per block")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--target-modules", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    parser.add_argument("--embedding", default="embed_tokens", help="name of the input embedding in the model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.output = args.output or Path("outputs") / "tied_embeddings" / Path(args.model).name
    args.steps = args.steps or STEPS.get(args.model, 60)
    args.learning_rate = args.learning_rate or LEARNING_RATE.get(args.model, 3e-4)
    return args


def prepare_base(source: str):
    """The base with the new tokens in it. Called twice, and equal both times: an adapter fits only an equal base."""
    model = AutoModelForCausalLM.from_pretrained(source).float()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(NEW_TOKENS, special_tokens=True)
    old = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > old:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():  # start from the mean of the known tokens: a neutral value, and no random number in it
            weight = model.get_input_embeddings().weight
            weight[old:] = weight[:old].mean(dim=0)
    return model, tokenizer


def mark_speech(text: str) -> str:
    """Unwrap the lines of each paragraph and turn its quotation marks into the new tokens."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    marked = [re.sub(r'"([^"]*)("|$)', rf"{NEW_TOKENS[0]}\1{NEW_TOKENS[1]}", p) for p in paragraphs]
    return "\n\n".join(marked)


def make_blocks(file: Path, tokenizer, size: int) -> tuple[list[dict], list[dict]]:
    """The text as blocks of `size` tokens: the first nine tenths to train on, the rest held out."""
    ids = tokenizer(mark_speech(file.read_text(encoding="utf-8")), return_tensors="pt").input_ids[0]
    blocks = [{"input_ids": block, "labels": block} for block in ids.split(size) if len(block) == size]
    held_out = max(1, len(blocks) // 10)
    return blocks[:-held_out], blocks[-held_out:]


def add_adapter(model, args: argparse.Namespace) -> PeftModel:
    """LoRA on the attention layers, and the whole embedding trained together with the head that is tied to it."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=32,
        target_modules=args.target_modules,
        modules_to_save=[args.embedding],
        ensure_weight_tying=True,
    )
    return get_peft_model(model, config)


def train(model: PeftModel, blocks: list[dict], args: argparse.Namespace) -> list[dict]:
    """Train with the Trainer of transformers, which shows a progress bar; returns its log."""
    settings = TrainingArguments(
        output_dir=str(args.output / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=max(1, args.steps // 30),
        save_strategy="no",
        report_to=[],
        seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=settings, train_dataset=blocks)
    trainer.train()
    model.to("cpu")  # wherever it was trained, the comparisons below are made in float32 on the CPU
    return trainer.state.log_history


def run(args: argparse.Namespace) -> list[Stage]:
    """The whole road; returns one measured stage for each stop on it."""
    adapter, merged = args.output / "adapter", args.output / "merged"

    source = base_source(args.model, args.output / "base")
    base, tokenizer = prepare_base(source)
    train_blocks, held_out = make_blocks(args.text, tokenizer, args.block_size)
    before = measure("base, before training", base, held_out)

    model = add_adapter(base, args)
    plot_loss(train(model, train_blocks, args), args.output / "loss.png")
    model.save_pretrained(adapter)
    trained = measure("trained", model, held_out, adapter)
    print(f"\n{weight_tying_report(model)}\n")

    del base, model
    fresh_base, _ = prepare_base(source)
    model = PeftModel.from_pretrained(fresh_base, adapter)
    reloaded = measure("adapter on a fresh base", model, held_out)

    model = model.merge_and_unload()
    model.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    in_memory = measure("merged", model, held_out, merged)

    del fresh_base, model
    model = AutoModelForCausalLM.from_pretrained(merged).float()
    reopened = measure("reopened without peft", model, held_out)

    compare([reloaded, in_memory, reopened], trained)
    return [before, trained, reloaded, in_memory, reopened]


def problems(stages: list[Stage]) -> list[str]:
    """What must not have happened."""
    untied = [stage.name for stage in stages if not stage.tie_held]
    broken = [f"{name}: the input embedding and the output head are not tied" for name in untied]
    compared = [stage for stage in stages if stage.difference is not None]
    moved = [
        f"{stage.name}: logits moved by {stage.difference:.1e}, allowed are {TOLERANCE:.0e}"
        for stage in compared
        if not stage.difference <= TOLERANCE  # written so that a NaN counts too
    ]
    return broken + moved


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    set_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    stages = run(args)
    print(f"\n{table(stages)}\n\nsaved in {args.output}: adapter/, merged/ and the loss curve loss.png")
    for problem in problems(stages):
        print(f"FAILED: {problem}")
    return 1 if problems(stages) else 0


if __name__ == "__main__":
    raise SystemExit(main())
