# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which parameters of a model hold the weights of experts that were linear layers."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightRenaming

from ...anatomy.walking import bare_modules


class FusedExperts(NamedTuple):
    """
    A parameter that holds the weights of what were linear layers, several per expert.

    Attributes:
        parameter: its full name.
        layers: for each layer of an expert, such as `w1` and `w3`, the names that it has in expert 0, 1, ... Several
            names are for one layer, since modules around it may have been renamed too.
    """

    parameter: str
    layers: list[list[list[str]]]

    @property
    def all_layers(self) -> list[list[str]]:
        """The names of each layer of each expert."""
        return [names for of_expert in self.layers for names in of_expert]

    @property
    def kinds(self) -> set[str]:
        """What the layers of an expert are called."""
        return {last_part(names[0]) for names in self.all_layers}


def find_fused_experts(model: nn.Module, conversions: Sequence[Any]) -> list[FusedExperts]:
    """
    Find the parameters of a model that hold the weights of experts which were linear layers.

    Args:
        model: a model of transformers, with or without adapters.
        conversions: the model's weight conversions.
    """
    renamings = [
        (source, target)
        for conversion in conversions
        if isinstance(conversion, WeightRenaming)
        for source, target in zip(conversion.source_patterns, conversion.target_patterns, strict=False)
        if re.fullmatch(r"[\w.]+", source + target)
    ]

    def names(layer: str) -> list[str]:
        return list(dict.fromkeys([layer, *(layer.replace(target, source) for source, target in renamings if target)]))

    found = []
    for conversion in filter(is_fusion, conversions):
        ending = plain_ending(conversion.target_patterns[0])
        sources = [plain_ending(source).removesuffix(".weight") for source in conversion.source_patterns]
        for module_name, module in bare_modules(model):
            for key, parameter in module._parameters.items():
                full = f".{module_name}.{key}"
                if full.endswith(ending) and parameter is not None and parameter.dim() == 3:
                    stem = full.removesuffix(ending)
                    layers = [
                        [names(f"{stem}{source}".replace("*", str(expert))[1:]) for expert in range(len(parameter))]
                        for source in sources
                    ]
                    found.append(FusedExperts(full[1:], layers))
    return found


def is_fusion(conversion: Any) -> bool:
    """Whether a conversion stacks the weights of linear layers, as LoRA's factors can be."""
    operations = getattr(conversion, "operations", ())
    return (
        [type(operation) for operation in operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
        and [operation.dim for operation in operations] == [0, 1][: len(operations)]
        and all(source.endswith(".weight") for source in conversion.source_patterns)
    )


def plain_ending(pattern: str) -> str:
    """Take a pattern for names of weights as the ending of a name, from a dot on."""
    return "." + pattern.replace("\\.", ".").removeprefix(".")


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def conversions_of(model: nn.Module) -> list[Any]:
    """
    Give the weight conversions of a model; none for models that are not of transformers.

    Args:
        model: a base model.
    """
    from transformers import PreTrainedModel

    return get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
