# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Training a tied embedding in full: how often the matrix is held."""

from collections.abc import Iterator

from case import Row, case, ours, released
from measuring import MemoryMeter
from torch import nn


VOCABULARY, WIDTH = 128 * 1024, 512


@case(
    "tying/memory",
    unit="embeddings",
    rounds=2,
    fresh_process=True,
    rows=[
        Row(
            "tied modules_to_save, 128k x 512: peak extra memory of injection",
            ours("peak"),
            released("peak"),
            value_at_most=1.05,
        ),
        Row("the same, extra memory held afterwards", ours("held"), released("held"), value_at_most=1.05),
        Row(
            "the same, tensors that the two sides compute with", ours("tensors"), released("tensors"), value_at_most=1
        ),
    ],
)
def memory() -> Iterator[dict[str, float]]:
    """Injection with the embedding of a tied model among `modules_to_save`, in units of that embedding."""
    _adapt(_tied_llama(vocabulary=64))  # imports, caches
    model = _tied_llama(VOCABULARY)
    size = VOCABULARY * WIDTH * 4
    meter = MemoryMeter()
    adapted = _adapt(model)
    peak = meter.peak()
    sides = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    yield {
        "peak": peak / size,
        "held": meter.held() / size,
        "tensors": len({side.weight.data_ptr() for side in sides}),
    }


def _tied_llama(vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )


def _adapt(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    return get_peft_model(model, config)
