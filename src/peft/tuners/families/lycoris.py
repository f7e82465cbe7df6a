# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What LoHa and LoKr share: settings, the two kinds of dropout, scaling, and adding dense deltas to the weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...anatomy.kinds import CONVOLUTIONS, along_axis, apply_weight
from ...config import TyingConfig, check_layer_selection, check_types
from ...layers.additive import AdditiveLayer
from ...layers.merging.changes import changes_adapter
from ...layers.scaling import Scaled
from ...utils.error import PeftValueError
from ...utils.warning import warn
from ..base import BaseTuner


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

    rank_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "Name or regular expression -> rank, where it differs from r."}
    )
    alpha_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "Name or regular expression -> alpha, where it differs."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if hasattr(self, "target_modules"):  # a config of a method, not this base class itself
            check_types(self, {name: types for name, types in _FIELD_TYPES.items() if hasattr(self, name)})
            check_layer_selection(self, refused_with_pattern=("layers_pattern",))


class LycorisLayer(Scaled, AdditiveLayer):
    """
    What the layers of LyCORIS methods share.

    Attributes:
        zero_at_start: value of `init_weights` -> the tensors that start at zero; the others start at random.
    """

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")
    has_views_of_owner = True
    zero_at_start: Mapping[Any, tuple[str, ...]]

    # ------------------------------------------------------------------------------------------- making an adapter
    def make_adapter(self, adapter_name: str, config: Any, r: int = 0, alpha: float = 0.0, **arguments: Any) -> None:
        """
        Make an adapter's tensors; see `BaseTunerLayer.make_adapter`.

        Args:
            adapter_name: name.
            config: the adapter's config.
            r: rank, positive.
            alpha: numerator of the scaling.
            arguments: not used.

        Raises:
            PeftValueError: if `r` is not positive.
        """
        if not isinstance(r, int) or r <= 0:
            raise PeftValueError(f"the rank r must be a positive integer, found {r!r}")
        self.r[adapter_name] = r
        self.alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / r
        self.rank_dropout[adapter_name] = config.rank_dropout
        # LoHa has no choice: what rank dropout leaves is always scaled
        self.rank_dropout_scale[adapter_name] = getattr(config, "rank_dropout_scale", True)
        self.module_dropout[adapter_name] = config.module_dropout
        self.create_adapter_parameters(adapter_name, r, config)

    def create_adapter_parameters(self, adapter_name: str, r: int, config: Any) -> None:
        """Make the uninitialised tensors of an adapter. Supplied by methods."""
        raise NotImplementedError

    def _weight_shape(self) -> tuple[int, ...]:
        """Shape of the base weight: (out, in), or (out, in per group, *kernel) for convolutions."""
        base = self.get_base_layer()
        kernel = base.kernel_size if isinstance(base, CONVOLUTIONS) else ()
        return (self.out_features, self.in_features // getattr(base, "groups", 1), *kernel)

    @changes_adapter
    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """
        Start an adapter anew: each tensor is uniform within 1/sqrt(inputs), or zero.

        Args:
            adapter_name: name.
            init_weights: see the method's config.
        """
        zero = self.zero_at_start.get(init_weights, self.zero_at_start[True])
        for name, container in self._containers():
            if adapter_name not in container:
                continue
            if name in zero:
                nn.init.zeros_(container[adapter_name])
            else:
                nn.init.kaiming_uniform_(container[adapter_name], a=math.sqrt(5))

    def reset_adapter(self, adapter_name: str, config: Any) -> None:
        """Start an adapter anew, as the config says."""
        self.reset_adapter_parameters(adapter_name, config.init_weights)

    # --------------------------------------------------------------------------------------------------- the delta
    def compute_delta(self, adapter_name: str) -> torch.Tensor:
        """Compute the scaled delta, in any shape of as many entries as the base weight has. Supplied by methods."""
        raise NotImplementedError

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> torch.Tensor:
        """
        Compute what the adapter adds to the base weight.

        Args:
            adapter_name: name.
            apply_rank_dropout: drop rows as while training; has no effect in eval mode.

        Returns:
            A tensor of the shape of the base weight.
        """
        delta = self.compute_delta(adapter_name).reshape(self._weight_shape())
        kept = self.kept_outputs(adapter_name) if apply_rank_dropout else None
        return delta if kept is None else delta * along_axis(self.get_base_layer(), kept, 0)

    def kept_outputs(self, adapter_name: str) -> torch.Tensor | None:
        """
        Draw what rank dropout multiplies the rows of the delta with, which are output features.

        Returns:
            (out_features,): 0 for rows that are dropped; None where there is nothing to drop.
        """
        p = self.rank_dropout[adapter_name]
        if not (p and self.training):
            return None
        like = next(self.adapter_parameters(adapter_name))
        kept = (torch.rand(self.out_features, device=like.device) > p).to(like.dtype)
        if self.rank_dropout_scale[adapter_name]:
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
            False where `delta_forward` has a way around the delta that costs less.
        """
        return True

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute what the adapter adds to the output, by building the delta."""
        delta = self.source(adapter).get_delta_weight(adapter, apply_rank_dropout=True)
        return apply_weight(self.get_base_layer(), x.to(delta.dtype) if x.is_floating_point() else x, delta)

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
        p = self.source(adapter).module_dropout[adapter]
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
        return self.alpha[adapter] / self.r[adapter]


class LycorisTuner(BaseTuner):
    """What the models of LyCORIS methods share; the arguments are those of `BaseTuner`."""

    pattern_fields = {"r": "rank_pattern", "alpha": "alpha_pattern"}

    def _check_new_adapter_config(self, adapter_name: str, config: LycorisConfig) -> None:
        super()._check_new_adapter_config(adapter_name, config)
        known = self.tuner_layer_cls.zero_at_start
        if config.init_weights not in known:
            choices = ", ".join(map(repr, known))
            warn(f"init_weights={config.init_weights!r} is none of {choices}; the adapter starts as with True")
