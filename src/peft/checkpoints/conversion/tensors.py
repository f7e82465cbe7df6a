# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tensors of layers that transformers has renamed or fused, as those that the model has in their places."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from ...anatomy.walking import adapter_modules
from ...config import PeftConfig
from ...layers.base_layer import BaseTunerLayer
from ...registry import PEFT_TYPE_TO_PREFIX_MAPPING, PeftType
from ...utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..keys import adapter_key_map, prefix_of
from .experts import conversions_of, find_fused_experts, is_fusion, last_part, plain_ending
from .operations import FlattenDims, PeftConcatenate, PermuteDims, stacked_a, stacked_b


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
) -> dict[str, torch.Tensor]:
    """
    Turn the tensors of a checkpoint into those of the model where transformers has renamed or fused their layers.

    Args:
        model: a model with the adapter in it.
        peft_config: the adapter's config.
        adapter_state_dict: key in a checkpoint -> tensor.
        adapter_name: name of the adapter.

    Returns:
        Key in a checkpoint of such a model -> tensor. What the model knows already, or nothing is known of, is as
        before.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    conversions = conversions_of(base)
    tensors = dict(adapter_state_dict)
    if not conversions:
        return tensors
    keys = adapter_key_map(model, adapter_name)
    prefix = prefix_of(model, base)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    for key in [key for key in tensors if key not in keys and key.startswith(prefix)]:
        renamed = key[len(prefix) :]
        for renaming in renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        if prefix + renamed in keys and prefix + renamed not in tensors:  # else it is reported as unexpected
            tensors[prefix + renamed] = tensors.pop(key)
    saved = {place.key: key for key, place in keys.items()}
    wrappers = {
        ".".join(part for part in name.split(".") if part != "base_layer") + f".{layer.parameter_name}": name
        for name, layer in adapter_modules(model)
        if isinstance(layer, BaseTunerLayer) and layer.parameter_name is not None
    }
    for experts in find_fused_experts(base, conversions):
        wrapper = wrappers.get(prefix + experts.parameter)
        for factor, stacked in (("lora_A", stacked_a), ("lora_B", stacked_b)):
            target = saved.get(f"{wrapper}.{factor}.{adapter_name}.weight")
            parts = [[_first_present(tensors, prefix, names, factor) for names in layer] for layer in experts.layers]
            if target is not None and not any(None in layer for layer in parts):
                tensors[target] = stacked([torch.stack([tensors.pop(key) for key in layer]) for layer in parts])
    return tensors


def _first_present(tensors: Mapping[str, torch.Tensor], prefix: str, names: Sequence[str], factor: str) -> str | None:
    keys = (f"{prefix}{name}.{factor}.weight" for name in names)
    return next((key for key in keys if key in tensors), None)


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[Any]:
    """
    Turn the conversions of a model's weights into those of an adapter's tensors.

    transformers calls it when its models load an adapter.

    Args:
        weight_conversions: the model's.
        adapter_name: name of the adapter.
        peft_config: the adapter's config, which says how the method's tensors are named and which experts it reaches;
            if it is left out, every method and all experts are looked for.

    Returns:
        Renamings from keys of a checkpoint to keys of the model's state dict, then conversions for layers of experts.

    Example:

        >>> from peft import LoraConfig
        >>> from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
        >>> key = "base_model.model.0.lora_A.weight"
        >>> for renaming in build_peft_weight_mapping([], "default", LoraConfig()):
        ...     key, _ = renaming.rename_source_key(key)
        >>> key
        '0.lora_A.default.weight'
    """
    conversions = list(weight_conversions or ())
    prefixes = set(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    if peft_config is not None:
        prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type]}
        if getattr(peft_config, "trainable_token_indices", None):
            prefixes.add(PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.TRAINABLE_TOKENS])
    magnitude = f"lora_magnitude_vector.{adapter_name}"
    mapping: list[Any] = [
        WeightRenaming(r"^base_model\.model\.", ""),
        *(WeightRenaming(rf"({prefix}[^\.]*)", rf"\1.{adapter_name}") for prefix in sorted(prefixes)),
        # the one tensor whose name in a checkpoint lacks the ending that it has in the model
        WeightRenaming(rf"{re.escape(magnitude)}$", f"{magnitude}.weight"),
        *(conversion for conversion in conversions if isinstance(conversion, WeightRenaming)),
    ]
    fusions = [fusion for fusion in conversions if is_fusion(fusion) and _concerns(peft_config, fusion)]
    for i, fusion in enumerate(fusions):
        module = fusion.target_patterns[0].rpartition(".")[0]
        # the wrappers for several parameters of a module stand around each other
        around = sum(other.target_patterns[0].rpartition(".")[0] == module for other in fusions[i + 1 :])
        target = f"{module}{'.base_layer' * around}"
        sources = [source.removesuffix(".weight") for source in fusion.source_patterns]
        several = len(sources) > 1
        operations = {
            "lora_A": [MergeModulelist(dim=0), *([Concatenate(dim=1)] if several else []), FlattenDims((0, 1))],
            "lora_B": [
                MergeModulelist(dim=0),
                *([PeftConcatenate(dim=1)] if several else [PermuteDims((1, 2, 0)), FlattenDims((1, 2))]),
            ],
        }
        for factor, steps in operations.items():
            ending = f".{factor}.{adapter_name}.weight"
            mapping.append(fusion.copy([source + ending for source in sources], target + ending, operations=steps))
    return mapping


def _concerns(config: PeftConfig | None, fusion: WeightConverter) -> bool:
    """Whether a config reaches the layers that went into a parameter; their full names are not known here."""
    if config is None or config.peft_type != PeftType.LORA:
        return config is None
    wanted = config.target_modules or ()
    layers = [last_part(plain_ending(source).removesuffix(".weight")) for source in fusion.source_patterns]
    if isinstance(wanted, str):
        return wanted == INCLUDE_LINEAR_LAYERS_SHORTHAND or any(re.search(rf"\b{layer}\b", wanted) for layer in layers)
    return any(last_part(entry) in layers for entry in wanted)
