# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""One set of trained tokens out of those of several adapters."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn

from ..anatomy.walking import adapter_modules, bare_modules
from .merging.changes import taken_out
from .merging.sharing import merging_layers
from .token_wrapper import TrainableTokensWrapper
from .trainable_tokens import TrainableTokensLayer


class CombinedTokens(NamedTuple):
    """
    Tokens of one module, and what a combination of adapters has in their places.

    Attributes:
        tokens: ids of the tokens that any of the adapters trains.
        rows: (tokens, width).
    """

    tokens: list[int]
    rows: torch.Tensor


def combined_tokens(model: nn.Module, weights: Mapping[str, float]) -> dict[str, CombinedTokens]:
    """
    Add up what adapters have changed in the rows of tokens: base row + sum of weight * (trained row - base row).

    Args:
        model: the base model, with adapters in it.
        weights: adapter name -> weight.

    Returns:
        Full name of a module -> its tokens, for modules with rows of their own; what is tied to them follows.
    """
    layers = dict(_token_layers(model))
    found = {}
    with ExitStack() as base_weights:
        for name in {name: None for layer in layers.values() for name in layer.merged_adapters}:
            base_weights.enter_context(taken_out(merging_layers(model), name))
        for module, layer in layers.items():
            present = [name for name in weights if layer.has_adapter(name) and layer.source(name) is layer]
            tokens = list(dict.fromkeys(token for name in present for token in layer.token_indices[name]))
            if not tokens:
                continue
            base = layer.get_base_weight()[tokens].detach()
            rows = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
            for name in present:
                places = [tokens.index(token) for token in layer.token_indices[name]]
                rows[places] += weights[name] * (layer.trainable_tokens_delta[name].detach() - base[places])
            found[module] = CombinedTokens(tokens, rows)
    return found


def write_tokens(model: nn.Module, adapter_name: str, combined: Mapping[str, CombinedTokens]) -> None:
    """
    Set the rows of an adapter that has been made with these tokens.

    Args:
        model: the base model, with adapters in it.
        adapter_name: name.
        combined: what `combined_tokens` gives.
    """
    layers = dict(_token_layers(model))
    for name, (tokens, rows) in combined.items():
        order = [tokens.index(token) for token in layers[name].token_indices[adapter_name]]
        layers[name].trainable_tokens_delta[adapter_name].copy_(rows[order])


def _token_layers(model: nn.Module) -> Iterator[tuple[str, TrainableTokensLayer]]:
    """Yield what trains tokens beside adapter layers, under the names that modules have without adapters."""
    names = {id(module): name for name, module in bare_modules(model)}
    for _, module in adapter_modules(model):
        if isinstance(module, TrainableTokensWrapper):
            yield names[id(module.token_adapter.get_base_layer())], module.token_adapter
