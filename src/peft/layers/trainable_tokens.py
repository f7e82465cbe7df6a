# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Rows of an embedding in whose place an adapter has its own, and the same for an output head."""

import functools
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..anatomy.kinds import scale_rows
from ..anatomy.walking import unwrapped
from ..utils.error import PeftIndexError, PeftTypeError, PeftValueError
from ..utils.integrations import dequantize_module_weight, gather_params_ctx
from ..utils.same_tensor import identity_of
from .add_columns import AddColumns
from .base_layer import BaseTunerLayer
from .borrowing import Borrowed
from .buffer_dict import BufferDict
from .weight import WeightLayer


class Tokens(NamedTuple):
    """
    What a layer asks a config for.

    Attributes:
        token_indices: ids of the tokens.
        init_weights: True starts from the rows of the base model, False at random.
    """

    token_indices: Sequence[int]
    init_weights: bool = True


class TrainableTokensLayer(WeightLayer, nn.Module):
    """
    An embedding, or a linear output head, of which an adapter has replaced some rows.

    The matrix is never built: looked-up rows are exchanged, and of the logits only the columns of these tokens are
    corrected.

    Args:
        base_layer: `nn.Embedding` or `nn.Linear`; its weight is (tokens, width).
        adapter_name: adapter to start with.
        config: its config, or `Tokens`.
        tied_adapter: layer to follow, whose base layer holds the same weight.
        kwargs: for `BaseTunerLayer`.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original", "token_slots")
    container_classes = {"trainable_tokens_original": BufferDict, "token_slots": BufferDict}
    corrects_output = True
    # adapters for which this layer has no keys where it follows: release 0.21.2 has none inside a wrapper
    without_aliases: Collection[str] = ()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any = None,
        tied_adapter: "TrainableTokensLayer | None" = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name, config, owner=kwargs.pop("owner", tied_adapter), **kwargs)

    @property
    def tied_adapter(self) -> "TrainableTokensLayer | None":
        """The layer that this one follows; None if it has tensors of its own."""
        return next(iter(self._owners.values()), None)

    def make_adapter(self, adapter_name: str, config: Any, **arguments: Any) -> None:
        """Make room for the rows, and a table that says for each token of the vocabulary which of them is its own."""
        weight, indices = self.get_base_weight(), list(config.token_indices)
        check_token_indices(self.get_base_layer(), "", indices)
        # ZeRO-3 replaces partitioned weights by empty ones and keeps the shape in ds_shape
        vocabulary, width = getattr(weight, "ds_shape", weight.shape)
        self.token_indices[adapter_name] = indices
        self.trainable_tokens_delta[adapter_name] = self.new_parameter(len(indices), width)
        device = "cpu" if weight.is_meta else weight.device
        slots = torch.full((vocabulary,), -1, dtype=torch.int32, device=device)
        slots[indices] = torch.arange(len(indices), dtype=torch.int32, device=device)
        self.token_slots[adapter_name] = slots

    def reset_adapter(self, adapter_name: str, config: Any) -> None:
        """Start from the rows of the base model, or at random."""
        rows = self.trainable_tokens_delta[adapter_name]
        if not getattr(config, "init_weights", True):
            rows.normal_()
            return
        with gather_params_ctx(self.get_base_weight()):
            rows.copy_(self._rows(adapter_name, self.get_base_weight()))

    def follow(self, adapter_name: str, owner: "TrainableTokensLayer") -> None:
        """Hold the very parameter of the owner, which has the same shape for every kind of layer."""
        super().follow(adapter_name, owner)
        self.token_indices[adapter_name] = owner.token_indices[adapter_name]
        own, owned = self.trainable_tokens_delta, owner.trainable_tokens_delta
        own[adapter_name] = owned[adapter_name]
        self.borrow(adapter_name, [Borrowed(own, adapter_name, owned, adapter_name)], owner)

    def token_axes(self, adapter_name: str) -> dict[str, tuple[int, float]]:
        """Say what knows the whole vocabulary; see `BaseTunerLayer.token_axes`."""
        return {f"token_slots.{adapter_name}": (0, -1)}

    def hold_nothing(self, adapter_name: str) -> None:
        """Leave the owner's parameter to the owner alone, so that it has the name that it has there."""
        self.give_back(adapter_name)
        del self.trainable_tokens_delta[adapter_name]

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Leave out what is the owner's; see `adapter_aliases`."""
        return iter(()) if adapter_name in self._owners else super().adapter_keys(adapter_name)

    def _rows(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        return weight[torch.tensor(self.token_indices[adapter], device=weight.device, dtype=torch.long)]

    def adapter_aliases(self, adapter_name: str) -> Iterator[tuple[str, str, bool]]:
        """Yield the key under which the owner's rows stand for this layer too."""
        if adapter_name in self._owners and adapter_name not in self.without_aliases:
            yield "trainable_tokens_delta", f"trainable_tokens_delta.{adapter_name}", False

    # --------------------------------------------------------------------------------------------------- the rule
    def transform_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Put the rows in their places."""
        indices = torch.tensor(self.token_indices[adapter], device=weight.device, dtype=torch.long)
        return weight.index_copy(0, indices, self.trainable_tokens_delta[adapter].to(weight))

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Put the rows in their places, and keep those that stood there."""
        self.trainable_tokens_original[adapter] = self._rows(adapter, weight).detach().clone()
        super().merge_weight_(adapter, weight)

    def commutes_with(self, adapter: str, other: BaseTunerLayer, other_adapter: str) -> bool:
        """Rows of different tokens have no order."""
        if not isinstance(other, TrainableTokensLayer):
            return False
        tokens, others = (
            layer.source(name).token_indices[name] for layer, name in ((self, adapter), (other, other_adapter))
        )
        return set(tokens).isdisjoint(others)

    def inverse_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Put back the rows that stood there."""
        indices = torch.tensor(self.token_indices[adapter], device=weight.device, dtype=torch.long)
        return weight.index_copy(0, indices, self.trainable_tokens_original[adapter].to(weight))

    def get_merged_weights(self, active_adapters: Sequence[str]) -> torch.Tensor:
        """
        Build the weight with the rows of adapters in it.

        Args:
            active_adapters: names; where two have a token, the later one counts.
        """
        weight = self.get_base_weight()
        for adapter in active_adapters:
            weight = self.source(adapter).transform_weight(adapter, weight)
        return weight

    def forward_adapters(
        self, x: torch.Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Compute the layer with the rows of given adapters, whichever are active.

        Args:
            x: input of the base layer.
            active_adapters: names; what this layer lacks is left out, and nothing is added if adapters are off.
            args: passed on to the base layer.
            kwargs: passed on too.
        """
        if self.disable_adapters or self.merged:
            return self.forward(x, *args, **kwargs)
        adapters = [name for name in active_adapters if self.has_adapter(name)]
        if not adapters:
            return self.get_base_layer()(x, *args, **kwargs)
        return self.adapter_forward(adapters, x, *args, **kwargs)

    def current_weight(self) -> torch.Tensor:
        """
        Give the weight with the rows of the active adapters in it.

        As long as somebody holds what was built last, layers whose weight is tied give that very tensor, not an equal
        one: those who divide a model among processes ask `head.weight is embedding.weight` to see a tie.
        """
        adapters = self.adapters_to_apply()
        built = self.get_merged_weights(adapters)
        if not adapters or torch.compiler.is_compiling():
            return built
        sources = tuple((id(self.source(adapter)), adapter) for adapter in adapters)
        key = (sources, identity_of(self.stored_weight()), torch.is_grad_enabled())
        owner = self.source(adapters[0])
        known, held = _HELD.get(owner, (None, None))
        present = held() if known == key else None
        if present is not None and _are_equal(present, built):
            return present
        _HELD[owner] = key, weakref.ref(built)
        if built.requires_grad:  # what was computed with it cannot be used for a second pass back
            built.register_hook(functools.partial(_let_go, weakref.ref(owner)))
        return built

    def correct_outputs(self, adapters: Sequence[str], x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Exchange looked-up rows, or correct logits; where two adapters have a token, the later one counts."""
        if isinstance(self.get_base_layer(), nn.Embedding) or len(adapters) == 1:
            return super().correct_outputs(adapters, x, result)
        for i, adapter in enumerate(adapters):
            result = self._correct_logits(adapter, x, result, later=adapters[i + 1 :])
        return result

    def correct_output(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Exchange looked-up rows, or correct the logits of the adapter's tokens."""
        source = self.source(adapter)
        rows, base = source.trainable_tokens_delta[adapter], self.get_base_layer()
        if not isinstance(base, nn.Embedding):
            return self._correct_logits(adapter, x, result)
        slots = source.token_slots[adapter][x]
        own = scale_rows(base, F.embedding(slots.clamp(min=0), rows)).to(result.dtype)
        return torch.where((slots >= 0).unsqueeze(-1), own, result)

    def _correct_logits(
        self, adapter: str, x: torch.Tensor, result: torch.Tensor, later: Sequence[str] = ()
    ) -> torch.Tensor:
        """Correct the logits of an adapter's tokens, but for those that a later adapter has too."""
        source = self.source(adapter)
        rows = source.trainable_tokens_delta[adapter]
        indices = torch.tensor(source.token_indices[adapter], device=result.device, dtype=torch.long)
        # what is added, not what is put in their place: so the gradient of the logits need not be copied
        difference = rows - self.get_base_weight()[indices].detach().to(rows.dtype)
        for other in later:
            is_others = self.source(other).token_slots[other].to(indices.device)[indices] >= 0
            difference = difference.masked_fill(is_others.unsqueeze(1), 0)
        columns = F.linear(x.to(rows.dtype), difference).to(result.dtype)
        if torch.compiler.is_compiling() or (result.is_leaf and result.requires_grad):
            return result.index_add(-1, indices, columns)
        return AddColumns.apply(result, columns, indices)

    def check_mergeable_together(self, adapters: Sequence[str]) -> None:
        """
        Refuse adapters that have a token in common: of two rows one would be lost.

        Raises:
            PeftValueError: in that case, as release 0.21.2 does.
        """
        owners: dict[int, str] = {}
        for adapter in adapters:
            tokens = self.source(adapter).token_indices[adapter]
            common = [token for token in tokens if token in owners]
            if common:
                raise PeftValueError(
                    f"adapters {owners[common[0]]!r} and {adapter!r} both train the tokens {common[:5]}, of which one "
                    "row only could be merged; merge one of the adapters"
                )
            owners.update(dict.fromkeys(tokens, adapter))


# Layer that owns the rows -> what tells a weight with them from others, and that weight while somebody holds it. It is
# no attribute of the layer, since it must be neither copied nor saved.
_HELD: weakref.WeakKeyDictionary[TrainableTokensLayer, tuple[tuple, weakref.ref]] = weakref.WeakKeyDictionary()


def _let_go(owner: weakref.ref, gradient: torch.Tensor) -> None:
    layer = owner()
    if layer is not None:
        _HELD.pop(layer, None)


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare values, where there are some: rows may have been written to since."""
    try:
        return one.is_meta or torch.equal(one, other)
    except RuntimeError:  # in transforms of torch.func there are no values to be had
        return False


def check_token_indices(layer: nn.Module, name: str, indices: Sequence[int]) -> None:
    """
    Refuse tokens that cannot be trained in a layer.

    Args:
        layer: layer of the base model.
        name: its full name, for messages.
        indices: token ids.

    Raises:
        PeftTypeError: if the layer has no row per token, or an id is no integer.
        PeftIndexError: if an id lies outside of the vocabulary.
        PeftValueError: if an id stands there twice.
    """
    base, where = unwrapped(layer), f" in {name!r}" if name else ""
    if not isinstance(base, (nn.Embedding, nn.Linear)):
        raise PeftTypeError(
            f"tokens can be trained in an nn.Embedding or in a linear output head, {name!r} is a "
            f"{type(base).__name__}; name another layer"
        )
    weight = dequantize_module_weight(base)
    rows = getattr(weight, "ds_shape", weight.shape)[0]
    wrong = [index for index in indices if isinstance(index, bool) or not isinstance(index, int)]
    if wrong:
        raise PeftTypeError(f"token indices{where} must be integers, found {wrong[:5]!r}")
    outside = [index for index in indices if not 0 <= index < rows]
    if outside:
        raise PeftIndexError(
            f"token indices{where} must lie between 0 and {rows - 1}, found {outside[:5]}; to train new tokens, call "
            "resize_token_embeddings on the base model first"
        )
    twice = sorted(index for index, count in Counter(indices).items() if count > 1)
    if twice:
        raise PeftValueError(f"token indices{where} hold {twice[:5]} more than once; name each token once")
