# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What LoHa and LoKr share: settings, the two kinds of dropout, scaling, and adding dense deltas to the weight."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ...anatomy.kinds import CONVOLUTIONS, along_axis, along_features, apply_weight
from ...config import TyingConfig
from ...configs.checks import check_layer_selection, check_types
from ...configs.fields import shared_field
from ...layers.merging.changes import changes_adapter
from ...layers.scaling import Scaled
from ...utils.error import PeftValueError
from ...utils.warning import warn
from ..declared.layers import DeclaredAdditive, with_values
from ..declared.method import DeclaredModel
from ..declared.tensors import Shape


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "alpha": (int, float),
    "rank_dropout": (int, float),
    "module_dropout": (int, float),
    "init_weights": (bool, str),
    "modules_to_save": (list, tuple, set, str),
    "layers_to_transform": (int, list, tuple, range),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
}


@dataclass
class LycorisConfig(TyingConfig):
    """
    Fields that the configs of LyCORIS methods share.

    Args:
        rank_pattern: name (or regular expression) -> rank, where it differs from r.
        alpha_pattern: name (or regular expression) -> alpha, where it differs.
    """

    rank_pattern: dict | None = shared_field("rank_pattern")
    alpha_pattern: dict | None = shared_field("alpha_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        if hasattr(self, "target_modules"):  # a config of a method, not this base class itself
            check_types(self, {name: types for name, types in _FIELD_TYPES.items() if hasattr(self, name)})
            check_layer_selection(self, refused_with_pattern=("layers_pattern",))


# fields with values for modules where they differ, and what layers show of their settings
PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}
SETTINGS = {name: name for name in ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")}


def values_of(c: LycorisConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
    """
    Give what follows from the config of a target: the scaling, and whether what rank dropout leaves is scaled.

    Args:
        c: its config.
        names: not used.
        shape: not used.

    Raises:
        PeftValueError: if `r` is not positive.
    """
    if not isinstance(c.r, int) or c.r <= 0:
        raise PeftValueError(f"the rank r must be a positive integer, found {c.r!r}")
    # LoHa has no choice
    return {"scaling": c.alpha / c.r, "rank_dropout_scale": getattr(c, "rank_dropout_scale", True)}


def start_of(declared: type, name: str, c: LycorisConfig) -> Callable[[torch.Tensor], Any]:
    """
    Give what a tensor starts with: zero, or uniform within 1/sqrt(inputs).

    Args:
        declared: class of functions; its `zero_at_start` says which tensors are zero, by `init_weights`.
        name: name of the tensor.
        c: config of the target.
    """
    zero = declared.zero_at_start.get(c.init_weights, declared.zero_at_start[True])
    return nn.init.zeros_ if name in zero else partial(nn.init.kaiming_uniform_, a=math.sqrt(5))


class LycorisLayer(Scaled, DeclaredAdditive):
    """
    Rule of LyCORIS methods: deltas with two kinds of dropout, built and added to the weight where that costs less.

    A method says so in `builds(t, x, shape, c, apart)`, `apart` being whether the delta has to meet the input by
    itself, instead of being added to the weight.
    """

    @changes_adapter
    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """
        Start an adapter anew: each tensor is uniform within 1/sqrt(inputs), or zero.

        Args:
            adapter_name: name.
            init_weights: see the method's config.
        """
        self.start(adapter_name, with_values(self.settings[adapter_name], {"init_weights": init_weights}))

    def reset_adapter_parameters_random(self, adapter_name: str) -> None:
        """
        Start an adapter anew with tensors of which none is zero, so that it changes the layer at once.

        Args:
            adapter_name: name.
        """
        self.reset_adapter_parameters(adapter_name, init_weights=False)

    # --------------------------------------------------------------------------------------------------- the delta
    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> torch.Tensor:
        """
        Compute what the adapter adds to the base weight.

        Args:
            adapter_name: name.
            apply_rank_dropout: drop rows as while training; has no effect in eval mode.

        Returns:
            A tensor of the shape of the base weight.
        """
        delta = super().get_delta_weight(adapter_name)
        kept = self.kept_outputs(adapter_name) if apply_rank_dropout else None
        return delta if kept is None else delta * along_axis(self.get_base_layer(), kept, 0)

    def kept_outputs(self, adapter_name: str) -> torch.Tensor | None:
        """
        Draw what rank dropout multiplies the rows of the delta with, which are output features.

        Returns:
            (out_features,): 0 for rows that are dropped; None where there is nothing to drop.
        """
        c = self.settings[adapter_name]
        if not (c.rank_dropout and self.training):
            return None
        like = next(self.adapter_parameters(adapter_name))
        kept = (torch.rand(self.out_features, device=like.device) > c.rank_dropout).to(like.dtype)
        if c.rank_dropout_scale:
            kept /= kept.mean().clamp(min=1 / self.out_features)  # all may be dropped
        return kept

    # ------------------------------------------------------------------------------------------------ forward pass
    def adds_to_weight(self, adapter: str, x: torch.Tensor, apart: bool) -> bool:
        """
        Say whether the forward pass is to build an adapter's delta.

        Args:
            adapter: name.
            x: the layer's input.
            apart: whether the delta has to meet the input by itself, instead of being added to the weight.

        Returns:
            False where the method has a way around the delta that costs less.
        """
        source, base = self.source(adapter), self.get_base_layer()
        if not isinstance(base, (nn.Linear, *CONVOLUTIONS)):  # such as an embedding that follows another layer
            return True
        return self.declared.builds(source.tensors(adapter), x, self.shape, source.settings[adapter], apart)

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute what the adapter adds to the output, by building the delta or without it."""
        source, base = self.source(adapter), self.get_base_layer()
        if self.adds_to_weight(adapter, x, apart=True):
            delta = source.get_delta_weight(adapter, apply_rank_dropout=True)
            return apply_weight(base, x.to(delta.dtype) if x.is_floating_point() else x, delta)
        result = self.declared.apply(source.tensors(adapter), x, self.shape, source.settings[adapter])
        kept = source.kept_outputs(adapter)
        return result if kept is None else result * along_features(base, kept)

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Add the adapters; see `AdditiveLayer.adapter_forward`.

        Dense deltas are added to the weight, where that is the same to rounding: the input then meets one matrix
        instead of two.
        """
        if self.training:
            adapters = [name for name in adapters if not self._is_dropped(name)]
        if args or kwargs or not self._weight_can_take_deltas(adapters, x):
            return super().adapter_forward(adapters, x, *args, **kwargs)
        base = self.get_base_layer()
        into_weight = [name for name in adapters if self.adds_to_weight(name, x, apart=False)]
        if not into_weight:
            return super().adapter_forward(adapters, x)
        weight = base.weight
        for name in into_weight:
            weight = weight + self.source(name).get_delta_weight(name, apply_rank_dropout=True)
        result = apply_weight(base, x, weight, base.bias)
        for name in adapters:
            if name not in into_weight:
                result = result + self.delta_forward(name, x)
        return result

    def _is_dropped(self, adapter: str) -> bool:
        """Draw whether module dropout leaves an adapter out this time."""
        p = self.source(adapter).settings[adapter].module_dropout
        return p > 0 and torch.rand(1).item() <= p

    def _weight_can_take_deltas(self, adapters: list[str], x: torch.Tensor) -> bool:
        """
        Say whether a layer with another weight computes what the base layer and the adapters do together.

        In half precision it does not: small deltas vanish when they are added to a weight. Nor does it where the base
        layer is more than its weight: other adapters, hooks, a forward pass of its own.
        """
        base = self.base_layer
        if type(base) not in (nn.Linear, *CONVOLUTIONS) or "forward" in base.__dict__:
            return False
        if self.quantization_backend is not None:
            return False
        if base._forward_pre_hooks or base._forward_hooks or base._backward_pre_hooks or base._backward_hooks:
            return False
        dtype = base.weight.dtype
        if dtype.itemsize < 4 or x.dtype != dtype or torch.is_autocast_enabled(x.device.type):
            return False
        parameters = (next(self.source(name).adapter_parameters(name)) for name in adapters)
        return all(p.dtype == dtype and p.device == base.weight.device for p in parameters)

    # ----------------------------------------------------------------------------------------------------- scaling
    def _configured_scaling(self, adapter: str) -> float:
        c = self.settings[adapter]
        return c.alpha / c.r


class LycorisTuner(DeclaredModel):
    """What the models of LyCORIS methods share; the arguments are those of `BaseTuner`."""

    def _check_new_adapter_config(self, config: LycorisConfig) -> None:
        super()._check_new_adapter_config(config)
        known = self.declared.zero_at_start
        if config.init_weights not in known:
            choices = ", ".join(map(repr, known))
            warn(f"init_weights={config.init_weights!r} is none of {choices}; the adapter starts as with True")
