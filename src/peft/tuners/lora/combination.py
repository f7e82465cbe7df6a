# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
One adapter out of several: the work of `LoraModel.add_weighted_adapter`.

Every layer's factors are seen as batches of matrices, B (groups, out, r) and A (groups, r, in), with one group for all
layers but grouped convolutions. What is computed of them is in `utils/low_rank_sums.py`.

Everything is computed before the new adapter is made, so a combination that is refused leaves no trace.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...anatomy.matching import find_targets
from ...anatomy.walking import adapter_modules, names_of_modules
from ...layers.combined_modules import copy_saved_modules, source_of_saved_modules
from ...layers.combined_tokens import CombinedTokens, combined_tokens, write_tokens
from ...surgery.transaction import all_or_nothing
from ...utils.error import PeftValueError
from ...utils.low_rank_sums import Combination, Factors, Part
from ...utils.near_names import explain_unknown_adapters
from ...utils.warning import warn
from ..base import BaseTuner
from .config import LoraConfig
from .layer import LoraLayer
from .variants import find_variant, names_asked_for


# ------------------------------------------------------------------------------------------ layers
def _groups(layer: LoraLayer) -> int:
    return getattr(layer.get_base_layer(), "groups", 1)


def _as_matrices(layer: LoraLayer, adapter: str) -> Factors:
    """Give a layer's factors as batches of matrices, in a type that is precise enough."""
    # what has room for greater ranks counts with those that it has
    into, out = (
        layer.rank_axis(name).cut(factor, layer.r[adapter])
        for name, factor in zip(("lora_A", "lora_B"), layer.factors_written_out(adapter), strict=True)
    )
    groups = _groups(layer)
    dtype = torch.promote_types(into.dtype, torch.float32)
    b = out.detach().reshape(groups, out.shape[0] // groups, -1)
    return Factors(b.to(dtype), into.detach().reshape(groups, into.shape[0] // groups, -1).to(dtype))


def _part(layer: LoraLayer, adapter: str, weight: float) -> Part:
    bias = layer.lora_B[adapter].bias.detach() if layer.lora_bias[adapter] else None
    return Part(_as_matrices(layer, adapter), layer.scaling[adapter], weight, bias)


@dataclass
class _Combined:
    """What the new adapter is in one layer, still without its scaling; B's bias is None if no adapter has one."""

    layer: LoraLayer
    factors: Factors
    bias: torch.Tensor | None

    def write(self, adapter: str, exact: bool) -> None:
        """Set the factors of an adapter that has been made; `exact` makes up for a scaling other than one."""
        into, out = self.layer.factor_weights(adapter)
        scaling = self.layer.scaling[adapter]
        into.copy_(self.factors.a.reshape(into.shape))
        out.copy_((self.factors.b / scaling if exact else self.factors.b).reshape(out.shape))
        if self.bias is not None:
            self.layer.lora_B[adapter].bias.copy_(self.bias / scaling)


def _combine_layer(layer: LoraLayer, weights: dict[str, float], combination: Combination) -> _Combined:
    rank = combination.rank_of([layer.r[name] for name in weights])
    groups = _groups(layer)
    if rank % groups:
        raise PeftValueError(f"rank {rank} cannot be divided among the {groups} groups of a convolution")
    parts = [_part(layer, name, weight) for name, weight in weights.items()]
    biases = [part.bias * part.coefficient for part in parts if part.bias is not None]
    return _Combined(layer, combination.factors(parts, rank // groups), sum(biases) if biases else None)


# ------------------------------------------------------------------------------------------ the model
@torch.no_grad()
def add_weighted_adapter(
    model: BaseTuner, adapters: Sequence[str], weights: Iterable[float], adapter_name: str, combination: Combination
) -> None:
    """
    Combine adapters of a model into a new one; see `LoraModel.add_weighted_adapter`.

    Args:
        model: the model.
        adapters: names of the adapters.
        weights: one per adapter.
        adapter_name: name of the new adapter.
        combination: how to combine.

    Raises:
        PeftValueError: if that cannot be done; the model stays as it was.
    """
    if adapter_name in model.peft_config:
        warn(f"there is an adapter named {adapter_name!r} already; it is left as it is, and nothing was combined")
        return
    weighted = _check_adapters(model, adapters, [float(weight) for weight in weights])
    combination.check()
    configs = [model.peft_config[name] for name in weighted]
    source = source_of_saved_modules(model.model, list(weighted))
    config = copy.copy(configs[0])
    config.target_modules = _joined_targets(configs)
    layers, followers = _layers_of(model, list(weighted))
    parts = {name: {a: w for a, w in weighted.items() if layer.has_adapter(a)} for name, layer in layers.items()}
    rows = combined_tokens(model.model, weighted)
    config.trainable_token_indices = _joined_tokens(configs, rows)
    config.modules_to_save = None if source is None else model.peft_config[source].modules_to_save
    for field in _become_plain(configs):
        setattr(config, field, None)
    config.ensure_weight_tying = any(other.ensure_weight_tying for other in configs)
    config.lora_bias = any(layer.lora_bias[a] for name, layer in layers.items() for a in parts[name])
    if config.init_lora_weights not in (True, False, "gaussian"):
        config.init_lora_weights = True  # what else there is may look at base weights, or change them
    _set_ranks(config, {name: combination.rank_of([layers[name].r[a] for a in parts[name]]) for name in layers})
    _narrow_targets(model, config, set(layers), followers)
    exact = not _leaves_root_of_rank(combination, configs)
    with all_or_nothing(model):
        model.add_adapter(adapter_name, config)  # first, as in the release: what is drawn comes after its start
        for name, layer in layers.items():
            _combine_layer(layer, parts[name], combination).write(adapter_name, exact)
        if source is not None:
            copy_saved_modules(model.model, source, adapter_name)
        write_tokens(model.model, adapter_name, rows)


def _leaves_root_of_rank(combination: Combination, configs: Sequence[LoraConfig]) -> bool:
    """
    Say whether the new adapter's scaling, which is the root of its rank with `use_rslora`, comes on top of the sum.

    Release 0.21.2 gives that for a linear combination, and what it gave is what people have tuned their weights to. A
    single adapter, one of several that is scaled otherwise, and all other kinds come out as what they are.
    """
    return combination.kind == "linear" and len(configs) > 1 and all(config.use_rslora for config in configs)


def _check_adapters(model: BaseTuner, adapters: Sequence[str], weights: list[float]) -> dict[str, float]:
    """Give name -> weight; a name that comes several times gets the sum."""
    if isinstance(adapters, str) or not adapters:
        raise PeftValueError(f"adapters must be a list of at least one name, found {adapters!r}")
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown:
        raise PeftValueError(explain_unknown_adapters(unknown, model.peft_config))
    if not weights or not all(torch.isfinite(torch.tensor(weights))):
        raise PeftValueError(f"weights must be finite numbers, one per adapter, found {weights}")
    if len(weights) != len(adapters):
        warn(f"{len(adapters)} adapters and {len(weights)} weights were given; what is left over is not used")
    configs = [model.peft_config[name] for name in adapters]
    add_up = _have_sum_of_their_kind(configs) or bool(_become_plain(configs))
    for name, config in zip(adapters, configs, strict=True):
        # as a rule, a variant is no sum of deltas, so it has no weighted sum; nor have parameters that experts share
        asked = [] if add_up else names_asked_for(config)
        asked += ["target_parameters"] if config.target_parameters else []
        if asked:
            raise PeftValueError(
                f"adapter {name!r} uses {', '.join(asked)}; its effect is no sum of deltas, so it cannot be combined"
            )
    weighted: dict[str, float] = {}
    for name, weight in zip(adapters, weights, strict=False):
        weighted[name] = weighted.get(name, 0.0) + weight
    return weighted


def _have_sum_of_their_kind(configs: Sequence[LoraConfig]) -> bool:
    variants = {find_variant(config) for config in configs}
    return len(variants) == 1 and all(v is not None and v.has_weighted_sum(configs) for v in variants)


def _become_plain(configs: Sequence[LoraConfig]) -> set[str]:
    """Name the fields that ask for variants, if all of these add deltas and so have a sum that is plain LoRA."""
    variants = {find_variant(config) for config in configs} - {None}
    add_deltas = all(v.adds_delta and not v.changes_base() for v in variants)
    return {v.field for v in variants} if add_deltas and not _have_sum_of_their_kind(configs) else set()


def _joined_targets(configs: Sequence[LoraConfig]) -> set[str] | str:
    targets = [config.target_modules for config in configs]
    if all(isinstance(target, str) for target in targets):
        return "|".join(f"({target})" for target in dict.fromkeys(targets))
    if any(isinstance(target, str) for target in targets):
        raise PeftValueError(
            "target_modules is a regular expression for some of the adapters and a list of names for others; make "
            "them all the same"
        )
    return {name for target in targets for name in target or ()}


def _layers_of(model: BaseTuner, adapters: list[str]) -> tuple[dict[str, LoraLayer], set[str]]:
    """
    Find the layers that have one of the adapters.

    Returns:
        Full name -> layer for those with factors of their own, and the names of those that follow one of them.

    Raises:
        PeftValueError: if adapters disagree in which layers follow which.
    """
    layers, followers = {}, set()
    for name, layer in adapter_modules(model.model):
        present = [a for a in adapters if layer.has_adapter(a)] if isinstance(layer, LoraLayer) else []
        owners = {id(layer.source(adapter)): layer.source(adapter) for adapter in present}
        if not owners:
            continue
        (owner, *others) = owners.values()
        if others or [a for a in adapters if owner.has_adapter(a)] != present:
            raise PeftValueError(
                f"the adapters disagree in whether {name!r} is tied: one was trained with ensure_weight_tying=True "
                "and another one without; they cannot be combined into one that is tied"
            )
        if owner is layer:
            if any(weight.is_meta for a in present for weight in layer.factor_weights(a)):
                raise PeftValueError(f"the factors of {name!r} are on the meta device; load the adapters first")
            layers[name] = layer
        else:
            followers.add(name)
    return layers, followers


def _joined_tokens(configs: Sequence[LoraConfig], rows: Mapping[str, CombinedTokens]) -> Any:
    """Give the tokens of the new adapter: as the adapters name them, or module by module where they differ."""
    asked = [config.trainable_token_indices for config in configs]
    if not rows or all(tokens == asked[0] for tokens in asked):
        return asked[0]
    return {name: found.tokens for name, found in rows.items()}


def _set_ranks(config: LoraConfig, ranks: dict[str, int]) -> None:
    """Set the ranks of layers, and alphas that make the scaling one."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    config.r = config.lora_alpha = usual
    config.rank_pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    config.alpha_pattern = dict(config.rank_pattern)


def _narrow_targets(model: BaseTuner, config: LoraConfig, layers: set[str], followers: set[str]) -> None:
    """Name the layers one by one where the joined targets would reach others than the adapters have."""
    modules = names_of_modules(model.model)
    first: dict[int, str] = {}
    for name, module in modules.items():
        first.setdefault(id(module), name)
    found = {first[id(modules[name])] for name in find_targets(config, [name for name in modules if name]).names}
    # the output projection of an attention layer stands inside that layer's base, and comes along with it
    outer = {name for name in layers if ".base_layer." not in name}
    if found - followers != outer:
        config.target_modules = outer
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
