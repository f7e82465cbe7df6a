# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Any adapter that adds to weights as a plain LoRA adapter: the singular vectors of what it adds to each weight.

A weight that several layers share has one change, and so the factors of one layer stand for all of them.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...anatomy.kinds import stores_weight_transposed
from ...anatomy.walking import adapter_modules, is_adapter_layer
from ...checkpoints.state_dict import get_peft_model_state_dict
from ...checkpoints.write_file import write_peft_weights
from ...layers.base_layer import BaseTunerLayer
from ...utils.error import PeftKeyError, PeftTypeError, PeftValueError
from ...utils.files import replacing_adapter
from ...utils.near_names import explain_unknown_adapters
from ...utils.old_names import old_names
from ...utils.warning import warn
from .config import LoraConfig
from .layer import Embedding, Linear
from .starts import changes_base


# fields of any method's config that mean the same in LoRA's
_SAME_IN_LORA = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
)
# relative error from which on a loss that was not asked for is told of
_NOTABLE = 1e-3

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass
class _Converted:
    """What one layer's change has become: (rows, k) and (k, columns), and the share of its norm that is lost."""

    layer: BaseTunerLayer
    factors: Factors
    error: float

    @property
    def rank(self) -> int:
        return self.factors[1].shape[0]


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """
    Write an adapter as LoRA: the best approximation of what it adds to each weight, by truncated SVD.

    The model stays as it is. Saved modules, tokens and ties of the adapter are carried over.

    Args:
        model: a model with an adapter of a method that adds to weights of linear layers or embeddings.
        rank: rank of every layer; or, as a float in (0, 1], the share of the squared norm to keep of each layer's
            change, with the smallest rank that does so.
        adapter_name: name of the adapter.
        progressbar: show one over the layers.
        compile_kwargs: have `torch.compile` make the function for one layer, with these arguments.

    Returns:
        The config of the new adapter, and its tensors, for `set_peft_model_state_dict`.

    Raises:
        PeftValueError: if the rank is none; if the adapter trains biases; if it is merged and is no plain sum.
        PeftTypeError: if a layer's change is nothing that LoRA can stand for, or there is no layer.
        PeftKeyError: if there is no such adapter.

    Example:

        >>> import torch
        >>> from peft import LoHaConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = get_peft_model(net, LoHaConfig(r=2, target_modules=["0"], init_weights=False))
        >>> config, tensors = convert_to_lora(model, rank=4)
        >>> config.r, {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        (4, {'base_model.model.0.lora_A.weight': (4, 8), 'base_model.model.0.lora_B.weight': (8, 4)})
    """
    _check_rank(rank)
    source = _config_of(model, adapter_name)
    layers = _layers(model, adapter_name, source)
    own = {name: layer for name, layer in layers.items() if layer.source(adapter_name) is layer}
    if isinstance(rank, int):
        _check_sizes(own, rank)
    truncate = _truncated if compile_kwargs is None else torch.compile(_truncated, **compile_kwargs)
    converted: dict[str, _Converted] = {}
    for name, layer in tqdm(own.items(), desc="converting to LoRA", disable=not progressbar):
        converted[name] = _convert(layer, adapter_name, rank, truncate)
    if isinstance(rank, int):
        _warn_of_loss(converted, rank)
    names = {id(layer): name for name, layer in own.items()}
    results = {name: converted[names[id(layer.source(adapter_name))]] for name, layer in layers.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        if results[name].rank:
            tensors.update(_tensors(name, layer, adapter_name, results[name].factors))
    tensors.update(_tensors_beside_layers(model, adapter_name))
    return _config(model, source, layers, results, rank, adapter_name), tensors


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """
    Save an adapter as LoRA; see `convert_to_lora`.

    Args:
        path: folder for config and weights, made if it is missing.
        model: the model.
        rank: rank, or share to keep.
        adapter_name: name of the adapter.
        progressbar: show one over the layers.
        compile_kwargs: arguments for `torch.compile`.

    Raises:
        PeftError: as `convert_to_lora` does; nothing is written then.

    Example:

        >>> import os, tempfile, torch
        >>> from peft import LoHaConfig, get_peft_model, save_as_lora
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = get_peft_model(net, LoHaConfig(r=2, target_modules=["0"], init_weights=False))
        >>> folder = tempfile.mkdtemp()
        >>> save_as_lora(folder, model, rank=4)
        >>> sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = False
    Path(path).mkdir(parents=True, exist_ok=True)
    with replacing_adapter(path) as folder:
        config.save_pretrained(folder)
        write_peft_weights(folder, tensors, safe_serialization=True, deduplicate_tied=False)


# ------------------------------------------------------------------------------------------ what is refused
def _check_rank(rank: int | float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise PeftValueError(f"rank must be an integer, or a float in (0, 1] for a share to keep, found {rank!r}")
    if isinstance(rank, int) and rank < 1:
        raise PeftValueError(f"rank must be at least 1, found {rank}; a float in (0, 1] is a share to keep")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise PeftValueError(f"the share to keep must be in (0, 1], found {rank}; for a rank give an integer")


def _check_sizes(layers: Mapping[str, BaseTunerLayer], rank: int) -> None:
    for name, layer in layers.items():
        smallest = min(layer.in_features, layer.out_features)
        if rank > smallest:
            raise PeftValueError(
                f"rank {rank} is larger than what {name!r} can have, which is {smallest}; give at most that, or a "
                "share to keep such as 1.0, with which each layer gets the rank that it needs"
            )


def _config_of(model: nn.Module, adapter_name: str) -> Any:
    """Give an adapter's config; None for layers that were put into a model that keeps none."""
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return None
    if adapter_name not in configs:
        raise PeftKeyError(explain_unknown_adapters([adapter_name], configs))
    config = configs[adapter_name]
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise PeftValueError(
            f"adapter {adapter_name!r} trains biases of the base model (bias={bias!r}), which a conversion would "
            "lose; merge it, or save it as it is"
        )
    if isinstance(config, LoraConfig) and changes_base(config.init_lora_weights):
        raise PeftValueError(
            f"adapter {adapter_name!r} stands on base weights that init_lora_weights={config.init_lora_weights!r} has "
            "changed, and on those of the base model its factors mean something else; save it with "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    return config


def _layers(model: nn.Module, adapter_name: str, config: Any) -> dict[str, BaseTunerLayer]:
    """Find the layers that have an adapter, and make sure that all can be converted."""
    layers = {name: layer for name, layer in _adapter_layers(model) if layer.has_adapter(adapter_name)}
    method = "this adapter" if config is None else f"{adapter_name!r} ({getattr(config.peft_type, 'value', '?')})"
    if not layers:
        raise PeftTypeError(f"{method} has no layer that adds to a weight, so there is nothing to convert to LoRA")
    refused = [name for name, layer in layers.items() if not layer.supports_lora_conversion(adapter_name)]
    if refused:
        raise PeftTypeError(
            f"what {method} does to {refused[0]!r}{f' and {len(refused) - 1} others' if refused[1:] else ''} cannot "
            "be converted to LoRA: only what is added to the weights of linear layers and embeddings can be. Merge "
            "the adapter instead, or save it as it is"
        )
    if getattr(config, "peft_type", None) == "LORA":
        warn(f"adapter {adapter_name!r} is LoRA already; converting it changes its rank at most")
    return layers


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Yield the layers of a method, and not those that wrappers of embeddings have for tokens."""
    wrappers = tuple(_wrappers(model))
    for name, module in adapter_modules(model):
        if is_adapter_layer(module) and not name.startswith(wrappers):
            yield name, module


def _wrappers(model: nn.Module) -> list[str]:
    """List what the names of everything start with that is trained in place of a part of the base model."""
    return [f"{name}." for name, module in adapter_modules(model) if not is_adapter_layer(module)]


# ------------------------------------------------------------------------------------------ one layer
def _convert(layer: BaseTunerLayer, adapter: str, rank: int | float, truncate: Callable) -> _Converted:
    change = _change_of_weight(layer, adapter)
    left, values, right = truncate(change.float())
    values = torch.where(values > _noise(values, change), values, 0)
    squares = values.double().square()
    k = rank if isinstance(rank, int) else _smallest_rank(squares, rank)
    total, lost = squares.sum(), squares[k:].sum()
    error = (lost / total).sqrt().item() if total > 0 else 0.0
    dtype = change.dtype
    return _Converted(layer, ((left[:, :k] * values[:k]).to(dtype), right[:k].to(dtype)), error)


def _truncated(change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.linalg.svd(change, full_matrices=False)


def _noise(values: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Say up to where singular values are what rounding makes of zero."""
    return values[0] * max(change.shape) * torch.finfo(values.dtype).eps


def _smallest_rank(squares: torch.Tensor, share: float) -> int:
    """Find how many of the squared singular values add up to a share of all of them."""
    kept = squares.cumsum(0)
    if kept[-1] == 0:
        return 0
    return min(int((kept < share * kept[-1]).sum()) + 1, len(kept))


def _change_of_weight(layer: BaseTunerLayer, adapter: str) -> torch.Tensor:
    """Compute what an adapter adds to the base weight, in its layout, whether or not that is all it says."""
    if layer.adds_delta(adapter):
        return layer.get_delta_weight(adapter)
    if layer.merged:
        raise PeftValueError(
            f"adapter {adapter!r} changes the weight by what depends on the weight, and something is merged into "
            "that; unmerge first"
        )
    weight = layer.get_base_weight()
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (layer.weight_with(adapter, precise) - precise).to(weight.dtype)


def _layout(layer: BaseTunerLayer) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """Say which factor of LoRA is the left one of the change, and whether they are held transposed."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return Embedding.factor_layout
    return Linear.layout_for(stores_weight_transposed(base))


def _tensors(name: str, layer: BaseTunerLayer, adapter: str, factors: Factors) -> dict[str, torch.Tensor]:
    ending = "" if isinstance(layer.get_base_layer(), nn.Embedding) else ".weight"
    prefix = re.sub(r"(\.base_layer)+$", "", name)
    tensors = {
        f"{prefix}.{factor}{ending}": (matrix.T if transposed else matrix).contiguous()
        for (factor, transposed), matrix in zip(_layout(layer), factors, strict=True)
    }
    bias = _bias(layer, adapter)
    if bias is not None:
        tensors[f"{prefix}.lora_B.bias"] = bias
    return dict(sorted(tensors.items()))


def _bias(layer: BaseTunerLayer, adapter: str) -> torch.Tensor | None:
    """Give what LoRA's own bias adds, for the adapters of LoRA that have one."""
    if not hasattr(layer, "bias_of_factors"):
        return None
    bias = layer.bias_of_factors(adapter)
    return None if bias is None else bias.detach() * layer.scaling[adapter]


# ------------------------------------------------------------------------------------------ the adapter
def _tensors_beside_layers(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Collect what the adapter trains of the base model: saved modules and tokens."""
    wrappers = _wrappers(model)
    if not wrappers:
        return {}
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {key: tensor.detach() for key, tensor in tensors.items() if key.startswith(tuple(wrappers))}


def _config(
    model: nn.Module,
    source: Any,
    layers: Mapping[str, BaseTunerLayer],
    results: Mapping[str, _Converted],
    rank: int | float,
    adapter_name: str,
) -> LoraConfig:
    r = rank if isinstance(rank, int) else 1
    prefix = "base_model.model." if hasattr(model, "get_base_model") else ""
    names = {name: re.sub(r"(\.base_layer)+$", "", name).removeprefix(prefix) for name in layers}
    ranks = {names[name]: results[name].rank for name in layers}
    fields = {name: getattr(source, name) for name in _fields_to_keep(source, layers, adapter_name)}
    targets = fields.get("target_modules")
    if targets is None or not isinstance(targets, str):
        usual = [name for name, k in ranks.items() if k == r]
        fields["target_modules"] = {*(targets or [n for n, k in ranks.items() if k]), *usual}
    without = [name for name, k in ranks.items() if k == 0]
    if without:
        fields["exclude_modules"] = _excluding(fields.get("exclude_modules"), without)
    patterns = {_pattern(name, ranks): k for name, k in ranks.items() if k not in (0, r)}
    with_bias = any(_bias(layer, adapter_name) is not None for layer in layers.values())
    return LoraConfig(
        r=r, lora_alpha=r, rank_pattern=patterns, alpha_pattern=dict(patterns), lora_bias=with_bias, **fields
    )


def _fields_to_keep(source: Any, layers: Mapping[str, BaseTunerLayer], adapter_name: str) -> list[str]:
    """Name fields whose values the new config takes over: common ones, and those of a variant that stays one."""
    variants = (getattr(layer, "variants", {}).get(adapter_name) for layer in layers.values())
    kept = {name for variant in variants if variant is not None for name in variant.kept_by_conversion}
    return [name for name in (*_SAME_IN_LORA, *sorted(kept)) if hasattr(source, name)]


def _excluding(excluded: Any, without: list[str]) -> Any:
    if isinstance(excluded, str):
        return "|".join([f"(?:{excluded})", *map(re.escape, without)])
    return [*(excluded or ()), *without]


def _pattern(name: str, names: Mapping[str, int]) -> str:
    """Give the key by which a pattern means a layer: its name, from the start if others end like it."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _warn_of_loss(converted: Mapping[str, _Converted], rank: int) -> None:
    name, worst = max(converted.items(), key=lambda item: item[1].error)
    if worst.error > _NOTABLE:
        lossy = sum(result.error > _NOTABLE for result in converted.values())
        warn(
            f"rank {rank} does not hold all that the adapter adds to {lossy} of {len(converted)} weights; the "
            f"largest relative error is {worst.error:.3g}, of {name!r}. Give a larger rank, or a share to keep such "
            "as 0.999"
        )


__getattr__ = old_names(__name__)
