# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What is asked of every client: base models as folders, and what its folders must hold when they are read again."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from peft import LoraConfig, PeftModel, get_peft_model, weight_tying_report
from support.helpers import assert_close
from support.scripts import load_script
from support.tied_models import llama


ROOT = Path(__file__).parents[2]
IDS = torch.arange(4, 14).reshape(2, 5)

# Ways to adapt tied weights, as options of a config.
ROUTES = {
    "plain": {},
    "saved_embedding": {"modules_to_save": ["embed_tokens"]},
    "saved_both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "targeted": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "targeted_both": {"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [4, 5, 9]},
}


def assert_imports_recorded(*packages: str) -> None:
    """`make test` checks what an installed client imports from `peft`; its record is that of this version."""
    script = load_script(ROOT / "scripts" / "record_client_imports.py")
    recorded = json.loads(script.OUT.read_text())
    for package in packages:
        found = script.client_imports(script.folder_of(package))
        assert recorded[package] == found, f"run {script.__file__} {package}"


def write_base(folder: Path, tied: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write a tiny Llama and its tokenizer, and give the folder as clients want it, as a string."""
    llama(tied).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def outputs(model: torch.nn.Module | str | Path) -> torch.Tensor:
    """Give the logits of a model, or of the model in a folder, in float32."""
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return model.eval()(input_ids=IDS).logits.float()


def adapted(base: str, adapter: str | Path, rows: int | None = None) -> PeftModel:
    """Put an adapter that a client saved on a fresh base model, with `rows` in its embedding where it was grown."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


def assert_same_adapter(folder: str | Path, other: str | Path, **tolerance: float) -> None:
    """Two folders hold the same tensors: training that went on from a checkpoint ended where the other one did."""
    ours, theirs = (load_file(Path(path) / "adapter_model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], **tolerance)


def assert_merged(merged: str | Path, model: PeftModel, tied: bool, dtype: torch.dtype = torch.float32) -> None:
    """A client's merged folder, written in `dtype`, computes what the adapter did, and is tied where it should be."""
    if dtype is torch.float32:
        assert_close(outputs(merged), outputs(model), atol=1e-5)
    else:  # the client merges in float32, then rounds
        rounded = copy.deepcopy(model).merge_and_unload().to(dtype).float()
        assert_close(outputs(merged), outputs(rounded), atol=1e-3)
    read = AutoModelForCausalLM.from_pretrained(merged)
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == tied


def assert_tied(model: PeftModel) -> None:
    """Every group of tied weights of a reloaded model is still one tensor."""
    assert weight_tying_report(model).holds


def trained(base: str, folder: Path, route: str, tied: bool, **options: Any) -> PeftModel:
    """Train an adapter by two steps of our own, for clients that only read what was trained, and save it."""
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **ROUTES[route], **options}
    config = LoraConfig(ensure_weight_tying=tied and route != "plain", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()
