# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Scale down the leading singular vectors that fine-tuning has given a weight, and that its base weight had no like of.

Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024, arXiv:2410.21228.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...anatomy.walking import adapter_modules
from ...layers.combined_modules import copy_saved_modules, source_of_saved_modules
from ...layers.combined_tokens import combined_tokens, write_tokens
from ...surgery.transaction import all_or_nothing
from ...utils.error import PeftKeyError, PeftValueError
from ...utils.near_names import explain_unknown_adapters
from .layer import LoraLayer


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: nn.Module,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """
    Make an adapter like another one, but with less of its intruder dimensions, and activate it.

    An intruder dimension is a leading left singular vector of the adapted weight that resembles none of the base
    weight's. Less of it gives back what the base model knew, at some cost for what was trained.

    Args:
        peft_model: a model with a trained LoRA adapter that is not merged.
        old_adapter_name: its name; it stays as it is.
        new_adapter_name: name of the adapter to make.
        top_k: how many singular vectors of each adapted weight to look at, from the largest on.
        threshold_epsilon: cosine similarity to all singular vectors of the base weight below which one is an intruder.
        mitigation_lambda: factor for intruders: 1 leaves them as they are, 0 takes them out.
        logging_sink: is called with a line for each layer and one at the end; None is silent.

    Raises:
        PeftValueError: if the model's method is not LoRA, a variant is used, or a layer is no matrix; if the new name
            is taken; if adapters are merged; if a number is out of range. The model stays as it was.
        PeftKeyError: if there is no adapter of the old name.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.tuners.lora.intruders import reduce_intruder_dimension
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights="gaussian"))
        >>> reduce_intruder_dimension(model, logging_sink=None)
        >>> model.active_adapter
        'intruder_reduced'
    """
    _check_numbers(top_k, threshold_epsilon, mitigation_lambda)
    layers = _layers(peft_model, old_adapter_name, new_adapter_name)
    log = logging_sink or (lambda line: None)
    reduced = {}
    for name, layer in layers.items():  # all of it before the model is touched
        reduced[name], found = _reduced(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
        log(f"{name}: {found} intruder dimensions reduced" if found else f"{name}: No intruders")
    base = peft_model.get_base_model()
    saved, tokens = source_of_saved_modules(base, [old_adapter_name]), combined_tokens(base, {old_adapter_name: 1.0})
    with all_or_nothing(peft_model):
        peft_model.add_adapter(new_adapter_name, _config(peft_model.peft_config[old_adapter_name]))
        for name, layer in layers.items():
            _write(layer, old_adapter_name, new_adapter_name, reduced[name])
        if saved is not None:
            copy_saved_modules(base, saved, new_adapter_name)
        write_tokens(base, new_adapter_name, tokens)
        peft_model.set_adapter(new_adapter_name)
    log(f"{new_adapter_name!r} is {old_adapter_name!r} with its intruder dimensions reduced, and is active now")


def _check_numbers(top_k: int, threshold: float, factor: float) -> None:
    if not isinstance(top_k, int) or top_k < 1:
        raise PeftValueError(f"top_k must be a positive integer, found {top_k!r}")
    if not 0 <= threshold <= 1:
        raise PeftValueError(f"threshold_epsilon is a cosine similarity, from 0 to 1, found {threshold!r}")
    if not 0 <= factor <= 1:
        raise PeftValueError(f"mitigation_lambda must be between 0 (take out) and 1 (leave), found {factor!r}")


def _layers(model: nn.Module, old: str, new: str) -> Mapping[str, LoraLayer]:
    """Find the layers that have tensors of the old adapter, and make sure that each can be reduced."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    if old not in configs:
        raise PeftKeyError(explain_unknown_adapters([old], configs))
    if configs[old].peft_type != "LORA":
        raise PeftValueError(f"{old!r} is an adapter of {configs[old].peft_type}, and only LoRA's can be reduced")
    if new in configs:
        raise PeftValueError(f"there is an adapter named {new!r} already; choose another name, or delete it")
    found = {name: module for name, module in adapter_modules(model) if isinstance(module, LoraLayer)}
    layers = {name: m for name, m in found.items() if m.has_adapter(old) and m.source(old) is m}
    for name, layer in found.items():
        if old in layer.variants:
            raise PeftValueError(
                f"{old!r} is {layer.variants[old].name} in {name!r}, whose change of the weight is not that of its "
                "two factors; convert it with save_as_lora first"
            )
        if layer.merged:
            raise PeftValueError(f"adapters are merged into {name!r}; unmerge them first")
        if name in layers and layer.get_base_weight().dim() != 2:
            raise PeftValueError(
                f"{name!r} has a weight of {layer.get_base_weight().dim()} dimensions, and intruders are found in "
                "matrices only"
            )
    return layers


def _reduced(
    layer: LoraLayer, adapter: str, top_k: int, threshold: float, factor: float
) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, int]:
    """Compute two factors, (rows, r) and (r, columns), of the reduced change; None where there is no intruder."""
    stored, change = layer.get_base_weight(), layer.get_delta_weight(adapter)
    # a weight that is stored as (in, out), as an embedding's is, has its outputs on the other side
    turned = layer.factor_layout[0][1]
    weight, change = ((t.T if turned else t).float() for t in (stored, change))
    known = torch.linalg.svd(weight, full_matrices=False)[0]
    left, values, right = torch.linalg.svd(weight + change, full_matrices=False)
    top = left[:, :top_k]
    intruders = ((top.T @ known).abs().amax(dim=1) < threshold).nonzero().flatten()
    if not len(intruders):
        return None, 0
    excess = (left[:, intruders] * values[intruders]) @ right[intruders]
    wanted = (change + (factor - 1) * excess) / layer.scaling[adapter]
    u, t, v = torch.linalg.svd(wanted, full_matrices=False)
    r = layer.r[adapter]
    root = t[:r].sqrt()
    first, second = u[:, :r] * root, root[:, None] * v[:r]
    return ((second.T, first.T) if turned else (first, second)), len(intruders)


def _config(config: Any) -> Any:
    """Copy a config, without a start that would look at base weights or change them."""
    config = copy.copy(config)
    config.init_lora_weights = True
    return config


def _write(layer: LoraLayer, old: str, new: str, factors: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    for target, value in zip(layer.delta_factors(new), factors or layer.delta_factors(old), strict=True):
        target.copy_(value)
    bias = layer.bias_of_factors(old)
    if bias is not None:
        layer.bias_of_factors(new).copy_(bias)
