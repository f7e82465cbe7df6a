# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The model that is measured, and LoRA written by hand as the bar to reach."""

from typing import Any

import torch
from torch import nn


# name -> vocabulary, width, width of the MLP, layers, heads, heads of keys and values
SHAPES = {"1b": (128256, 2048, 8192, 16, 32, 8), "tiny": (256, 64, 128, 2, 4, 2)}
RANK, SCALE = 16, 2.0


def make_model(shape: str, device: str, layers: int | None) -> nn.Module:
    """
    Make a model with random bfloat16 weights and tied embeddings.

    Args:
        shape: a name in `SHAPES`.
        device: where it is.
        layers: instead of the shape's own number.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, width, mlp, depth, heads, kv_heads = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.tie_weights()
    return model.requires_grad_(False)


class HandWritten(torch.autograd.Function):
    """LoRA of one linear layer by one function: the input is kept once, the term is added into the output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Compute the layer."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ a.to(x.dtype).T
        y = rows @ weight.T
        y.addmm_(hidden, b.to(x.dtype).T, alpha=SCALE)
        ctx.save_for_backward(rows, weight, a, b, hidden)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give the gradients of the input and the factors."""
        rows, weight, a, b, hidden = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        narrow = (gradient @ b.to(rows.dtype)).mul_(SCALE)
        found_b = (gradient.T @ hidden).mul_(SCALE).to(b.dtype)
        found_a = (narrow.T @ rows).to(a.dtype)
        found_x = None
        if ctx.needs_input_grad[0]:
            found_x = (gradient @ weight).addmm_(narrow, a.to(rows.dtype)).view(ctx.shape)
        return found_x, None, found_a, found_b


class HandLora(nn.Module):
    """
    A linear layer with LoRA by `HandWritten`.

    Args:
        base: the layer.
        dtype: type of the factors.
    """

    def __init__(self, base: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        where = {"device": base.weight.device, "dtype": dtype}
        self.a = nn.Parameter(torch.randn(RANK, base.in_features, **where) / 50)
        self.b = nn.Parameter(torch.randn(base.out_features, RANK, **where) / 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer."""
        return HandWritten.apply(x, self.base.weight, self.a, self.b)


def adapt_by_hand(model: nn.Module, targets: list[str], dtype: torch.dtype) -> nn.Module:
    """Put `HandLora` around the layers whose names end in a target."""
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in targets:
            setattr(model.get_submodule(parent), last, HandLora(module, dtype))
    return model


def release_from_hand(model: nn.Module) -> None:
    """Undo `adapt_by_hand`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, HandLora):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base)
