# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Embeddings and output heads of which adapters of other methods train single tokens."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .trainable_tokens import Tokens, TrainableTokensLayer
from .training_wrapper import AuxiliaryTrainingWrapper


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """
    An embedding or output head of which adapters of another method train single tokens.

    The layer in `token_adapter` does the work: it is an adapter layer like any other. The wrapper gives it the name
    that checkpoints have.

    Args:
        module_to_save: the module of the base model.
        adapter_name: adapter to start with.
        token_indices: ids of its tokens.
        tied_adapter: layer to follow, whose base layer holds the same weight.
        is_named: whether the name in the config that reaches the followed module reaches this one too. Release 0.21.2
            then has keys for it in a checkpoint.
    """

    _base_names = ("token_adapter",)

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        token_indices: Sequence[int],
        tied_adapter: TrainableTokensLayer | None = None,
        is_named: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        self.token_adapter = TrainableTokensLayer(
            module_to_save, adapter_name, Tokens(token_indices=list(token_indices)), tied_adapter
        )
        self.token_adapter.without_aliases = set() if is_named else {adapter_name}

    def update(self, active_adapter: str, **kwargs: Any) -> None:
        """
        Add an adapter.

        Args:
            active_adapter: its name.
            kwargs: `token_indices`, `tied_adapter` and `is_named`, as for the constructor.
        """
        if not kwargs.get("is_named", True):
            self.token_adapter.without_aliases.add(active_adapter)
        config = Tokens(token_indices=list(kwargs["token_indices"]))
        self.token_adapter.update_layer(active_adapter, config, owner=kwargs.get("tied_adapter"))

    @property
    def original_module(self) -> nn.Module:
        """The module of the base model."""
        return self.token_adapter.base_layer

    @property
    def weight(self) -> torch.Tensor:
        """The weight with the tokens of the active adapters, for those who compute with it instead of the module."""
        return self.token_adapter.current_weight()

    @property
    def _disable_adapters(self) -> bool:
        return self.token_adapter.disable_adapters

    @property
    def _active_adapter(self) -> list[str]:
        return self.token_adapter.active_adapters

    @property
    def available_adapters(self) -> set[str]:
        """Names of the adapters that train tokens here."""
        return self.token_adapter.available_adapters

    def has_adapter(self, adapter_name: str) -> bool:
        """Say whether an adapter trains tokens here."""
        return self.token_adapter.has_adapter(adapter_name)

    def choose(self, adapter_names: Sequence[str]) -> None:
        """Note which adapters of the model are active, without a change to what is trained."""
        self.token_adapter._active_adapter = list(adapter_names)

    def _current_module(self) -> nn.Module:
        return self.token_adapter.get_base_layer()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with the active adapters' tokens; see `BaseTunerLayer.forward`."""
        return self.token_adapter(*args, **kwargs)

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Allow everything: tokens of several adapters can be used together."""

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """
        Choose the adapters whose tokens are used; others are frozen.

        Args:
            adapter_names: one name or several.
            inference_mode: freeze the chosen ones too.
        """
        self.token_adapter.set_adapter(adapter_names, inference_mode)

    # The layer inside is visited by itself, so there is nothing left to do here.
    def enable_adapters(self, enabled: bool) -> None:
        """Do nothing: the layer inside is told by itself."""

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Do nothing: the layer inside is told by itself."""

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Do nothing: the layer inside is told by itself."""

    def remove_adapter(self, adapter_name: str) -> None:
        """Do nothing: the layer inside is told by itself."""

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield nothing: the layer inside says its keys by itself."""
        yield from ()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give the layer inside, which is then taken off like any other adapter layer."""
        return self.token_adapter
