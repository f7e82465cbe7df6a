# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Training a tied embedding, in full or token by token: what is held, and what it costs."""

from collections.abc import Callable, Iterator

import torch
from case import Row, case, ours, released
from measuring import MemoryMeter, TensorMeter, best_of
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


@case(
    "tying/tokens",
    unit="CPU s",
    rounds=5,
    rows=[
        Row(
            "trained tokens, 128k x 512 tied: step, against the base model's",
            ours("adapted"),
            ours("base", "base model"),
            ratio_at_most=1.15,
        ),
        Row("the same, released against the base model", released("adapted"), released("base", "base model")),
    ],
)
def tokens() -> Iterator[dict[str, float]]:
    """A step (forward and backward, 2 x 64 tokens) with three trained tokens, against one of the frozen base model."""
    step, nets = _token_steps()
    while True:
        times = best_of(2, *(lambda net=net: step(net) for net in nets.values()))
        yield dict(zip(nets, times, strict=True))


@case(
    "tying/tokens-memory",
    unit="embeddings",
    rounds=2,
    rows=[
        Row(
            "the same step, peak of tensors beyond the base model's",
            ours("beyond"),
            released("beyond"),
            value_at_most=0.01,
        ),
    ],
)
def tokens_memory() -> Iterator[dict[str, float]]:
    """The most bytes of tensors alive at a time in that step, less those of the base model's, per embedding."""
    step, nets = _token_steps()
    while True:
        peaks = {}
        for name, net in nets.items():
            with TensorMeter() as meter:
                step(net)
            peaks[name] = meter.peak
        yield {"beyond": (peaks["adapted"] - peaks["base"]) / (VOCABULARY * WIDTH * 4)}


def _token_steps() -> tuple[Callable[[nn.Module], None], dict[str, nn.Module]]:
    from peft import TrainableTokensConfig, get_peft_model

    ids = torch.randint(0, VOCABULARY, (2, 64))
    base = _net().requires_grad_(False)
    # the backward pass of the base model goes as far down as that of the adapted one
    base[0].register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    config = TrainableTokensConfig(token_indices=[5, 7, 11], target_modules=["0"])
    nets = {"adapted": get_peft_model(_net(), config), "base": base}

    def step(net: nn.Module) -> None:
        net(ids).logsumexp(-1).mean().backward()
        for parameter in net.parameters():
            parameter.grad = None

    for net in nets.values():
        step(net)
    return step, nets


def _net() -> nn.Module:
    """An embedding, something in between, and the head that shares the embedding's matrix."""
    net = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY))
    net[2].weight = net[0].weight
    # what the released package reads to find the tie
    net.config = {"tie_word_embeddings": True}
    net._tied_weights_keys = {"2.weight": "0.weight"}
    net.get_input_embeddings = lambda: net[0]
    net.get_output_embeddings = lambda: net[2]
    return net
