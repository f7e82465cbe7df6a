# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Blocks that are corrected by a shadow state, and update it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...configs.checks import check_counts
from ...layers.base_layer import BaseTunerLayer
from ...layers.call_context import current_call
from ...layers.new_tensors import check_new_parameters, on_meta
from ...utils.error import PeftNotImplementedError
from .config import ShadowConfig


class ShadowCarrier:
    """
    What goes from block to block.

    Args:
        hidden: output of the last block, if there was one.
        shadow: (batch, length, width) the shadow state.
    """

    def __init__(self, hidden: torch.Tensor | None, shadow: torch.Tensor) -> None:
        self.hidden = hidden
        self.shadow = shadow


# what an adapter has in a block: the way into the state and back, and how the block updates it
PARTS = ("down", "up", "update_transform", "update_gate", "dropout")


class ShadowLayer(BaseTunerLayer, nn.Module):
    """
    A block with feedback from a shadow state, which the block updates (Li et al. 2026, arXiv:2604.19254).

    Args:
        base_layer: the block.
        adapter_name: adapter to start with.
        config: its config.
        hidden_size: width of the block's input.
        kwargs: see `BaseTunerLayer`.
    """

    adapter_layer_names = tuple(f"shadow_{part}" for part in PARTS)
    other_param_names = ("shadow_r", "shadow_alpha")
    container_classes = dict.fromkeys(adapter_layer_names, nn.ModuleDict)
    supports_mixed_batch = False
    changes_weight = False
    is_mergeable = False

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: ShadowConfig, hidden_size: int, **kwargs: Any
    ) -> None:
        self.__dict__["hidden_size"] = hidden_size
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def update_layer(self, adapter_name: str, config: ShadowConfig, **kwargs: Any) -> None:
        """
        Add an adapter.

        Args:
            adapter_name: name.
            config: its config.
            kwargs: not used.
        """
        self.make_adapter(adapter_name, config)
        self._trainable_adapters.add(adapter_name)

    @classmethod
    def prepare_adapter(cls, base: nn.Module, config: ShadowConfig, **arguments: Any) -> Mapping[str, Any]:
        """Refuse networks that cannot be made; see `BaseTunerLayer.prepare_adapter`."""
        check_counts(config, "r")
        weight, width = next(base.parameters()), arguments["hidden_size"]
        check_new_parameters(weight, (width, config.r), (width, config.update_hidden_size or config.r))
        return super().prepare_adapter(base, config, **arguments)

    def make_adapter(self, adapter_name: str, config: ShadowConfig, **arguments: Any) -> None:
        """Make and start the networks of an adapter."""
        width, update = self.hidden_size, config.update_hidden_size or config.r
        made = {
            "shadow_down": nn.Linear(width, config.r, bias=False),
            "shadow_up": nn.Linear(config.r, width, bias=False),
            "shadow_update_transform": _bottleneck(width, update),
            "shadow_update_gate": _bottleneck(width, update),
            "shadow_dropout": nn.Dropout(config.shadow_dropout) if config.shadow_dropout > 0 else nn.Identity(),
        }
        if config.init_weights:
            nn.init.zeros_(made["shadow_up"].weight)
        weight = next(self.get_base_layer().parameters())
        for name, module in made.items():
            self._modules[name][adapter_name] = _beside(module, weight)
        self.shadow_r[adapter_name] = config.r
        self.shadow_alpha[adapter_name] = config.shadow_alpha

    def fill_missing(self, adapter_name: str, config: ShadowConfig) -> None:
        """Start tensors of an adapter that a checkpoint has left without storage."""
        fresh = ShadowLayer(self.get_base_layer(), adapter_name, config, self.hidden_size)
        for name in self.adapter_layer_names:
            _fill(self._modules[name][adapter_name], fresh._modules[name][adapter_name])

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield keys of an adapter's tensors: in checkpoints every adapter is called default."""
        for saved, live in super().adapter_keys(adapter_name):
            name, _, rest = saved.partition(".")
            yield f"{name}.default.{rest}", live

    # --------------------------------------------------------------------------------------------------- forward pass
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """
        Compute the block, between feedback and update if a model with a shadow state is being computed.

        Args:
            hidden_states: (batch, length, width).
            args: for the block.
            kwargs: likewise.
        """
        adapters, carrier = self.adapters_to_apply(), _carrier()
        if carrier is None or not adapters:
            return self.base_layer(hidden_states, *args, **kwargs)
        return self._with_shadow(adapters[0], carrier, hidden_states, *args, **kwargs)

    def _with_shadow(
        self, adapter: str, carrier: ShadowCarrier, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        hidden_states = self.shadow_inject(hidden_states, carrier.shadow, adapter)
        outputs = self.base_layer(hidden_states, *args, **kwargs)
        carrier.hidden = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        carrier.shadow = self.shadow_update(carrier.hidden, carrier.shadow, adapter)
        return outputs

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the block with an adapter, see `forward`."""
        return self.forward(x, *args, **kwargs)

    def shadow_inject(
        self, hidden_states: torch.Tensor, shadow_states: torch.Tensor, adapter_name: str
    ) -> torch.Tensor:
        """
        Add the feedback.

        Args:
            hidden_states: (batch, length, width) input of the block.
            shadow_states: likewise, the shadow state.
            adapter_name: name.
        """
        down, up = self.shadow_down[adapter_name], self.shadow_up[adapter_name]
        difference = (hidden_states - shadow_states.to(hidden_states)).to(down.weight.dtype)
        feedback = up(down(self.shadow_dropout[adapter_name](difference)))
        return hidden_states + (self.shadow_alpha[adapter_name] * feedback).to(hidden_states.dtype)

    def shadow_update(
        self, hidden_states: torch.Tensor, shadow_states: torch.Tensor, adapter_name: str
    ) -> torch.Tensor:
        """
        Move the shadow state towards what the block gives.

        Args:
            hidden_states: (batch, length, width) output of the block.
            shadow_states: likewise, the shadow state.
            adapter_name: name.
        """
        transform, gate = self.shadow_update_transform[adapter_name], self.shadow_update_gate[adapter_name]
        hidden = hidden_states.to(transform[0].weight.dtype)
        share, state = torch.sigmoid(gate(hidden)), shadow_states.to(hidden)
        return ((1 - share) * state + share * transform(hidden)).to(shadow_states.dtype)

    # -------------------------------------------------------------------------------------------------------- merging
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Refuse: no weight of a block stands for a second model.

        Raises:
            PeftNotImplementedError: always.
        """
        raise PeftNotImplementedError("Shadow cannot be merged: no weight of the base model stands for a second model")

    def unmerge(self) -> None:
        """
        Refuse, as `merge` does.

        Raises:
            PeftNotImplementedError: always.
        """
        self.merge()

    merge_weight_ = unmerge_weight_ = merge


def _carrier() -> ShadowCarrier | None:
    """Give the shadow state of the call that is computed."""
    call = current_call()
    return None if call is None else call.notes.get(ShadowCarrier)


def _bottleneck(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def _beside(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    """Put a new network beside a weight, rounded to its type but kept in float32."""
    if on_meta():
        return module.to("meta")
    half = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize == 2 else torch.float32
    return module.to(half).to(weight.device, torch.float32)


def _fill(module: nn.Module, fresh: nn.Module) -> None:
    """Give parameters without storage those of another module of the same kind."""
    for (name, parameter), (_, new) in zip(
        list(module.named_parameters()), list(fresh.named_parameters()), strict=True
    ):
        if parameter.is_meta:
            path, _, key = name.rpartition(".")
            module.get_submodule(path)._parameters[key] = nn.Parameter(new.detach(), parameter.requires_grad)
