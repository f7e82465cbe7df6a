# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What every adapter layer has in common, and the rules that a method can follow.

A method's layer subclasses one rule and writes its math; forward pass, merging, unmerging, activation, freezing and
deletion follow from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..anatomy.kinds import along_axis, along_features, apply_weight, feature_axis, features
from ..anatomy.offload import computing_device, refuse_copy_of_offloaded, tensor_of
from ..utils.computed_weights import ComputedWeight, find_computed_weight
from ..utils.error import PeftNotImplementedError
from ..utils.quantization_utils import QuantizationBackend, quantization_extra_repr, resolve_quantization_backend
from ..utils.warning import warn
from .adapter_module import AdapterModule, copy_borrowing, shared_places
from .buffer_dict import BufferDict
from .call_context import names_of_rows
from .merging import (
    MergeState,
    Sharing,
    check_adapters_to_merge,
    merge_layer,
    original_weights,
    take_adapter_out,
    undo_merge,
    unmerge_layer,
)
from .new_tensors import copy_module, new_parameter
from .reading import read_bias, read_weight


if TYPE_CHECKING:
    from ..checkpoints.keys import SavedForm


class BaseTunerLayer(AdapterModule, ABC):
    """
    A layer that wraps a base layer and holds the tensors of any number of adapters.

    A method's layer names the containers of its tensors and settings, and makes and starts the tensors of an adapter
    in `make_adapter` and `reset_adapter`; everything else follows from the rule that it subclasses.

    Args:
        base_layer: the layer to adapt.
        adapter_name: adapter to start with.
        config: its config.
        owner: layer to follow, whose base layer holds the same weight; see `update_layer`.
        shared: containers of tensors that all layers of the model share, by name.
        arguments: for `make_adapter`.

    Attributes:
        shared_layer_names: attributes that hold, by adapter name, tensors that all layers of a model share.
        container_classes: class of a container, where it is not `nn.ParameterDict` for tensors or `dict` for settings.
        weight_name: name of the base layer's parameter that is adapted.
        parameter_name: the same for layers that adapt a named parameter, whatever their base layer does with it.
        changes_weight: whether merging changes that parameter; False if it only replaces tensors (`merged_tensors`).
        supports_mixed_batch: whether each sample of a batch can have an adapter of its own.
        base_layer: the wrapped layer.
        quantization_backend: what the base layer's weight is quantised by; None if it is not.
    """

    _base_names = ("base_layer",)

    shared_layer_names: tuple[str, ...] = ()
    container_classes: Mapping[str, Callable[[], Any]] = {}
    weight_name: str = "weight"
    parameter_name: str | None = None
    changes_weight: bool = True
    supports_mixed_batch: bool = True
    quantization_backend: QuantizationBackend | None = None

    _owners: dict[str, "BaseTunerLayer"]
    _trainable_adapters: set[str]
    _merge_state: MergeState
    _sharing: Sharing | None
    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any = None,
        *,
        owner: "BaseTunerLayer | None" = None,
        shared: Mapping[str, nn.Module] | None = None,
        **arguments: Any,
    ) -> None:
        nn.Module.__init__(self)
        self._wrap(base_layer)
        for name in self.adapter_layer_names:
            self._modules[name] = self.container_classes.get(name, nn.ParameterDict)()
        for name in self.other_param_names:
            setattr(self, name, self.container_classes.get(name, dict)())
        for name in self.shared_layer_names:
            self._modules[name] = shared[name]
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, owner=owner, **arguments)

    def _wrap(self, base_layer: nn.Module) -> None:
        """Take the base layer in; to be called once, after `nn.Module.__init__`."""
        self._modules["base_layer"] = base_layer
        base = self.get_base_layer()
        in_features, out_features = features(base)
        backend = resolve_quantization_backend(base)
        if backend is not None:
            self.__dict__["quantization_backend"] = backend
            if self.weight_name == "weight":
                self.__dict__["weight_name"] = backend.stored_name
        # nn.Module looks at every attribute that is set, which is slow for models with thousands of layers
        self.__dict__.update(
            in_features=in_features,
            out_features=out_features,
            _merge_state=self._state_of_stack(),
            # who else holds the base weight; merging this layer alone must not change theirs
            _sharing=None,
            # layers that are followed: their adapters have no tensors here
            _owners={},
            # Adapters that shall be trained while adapters are enabled. Kept, so that switching adapters costs time
            # for the adapters that change and not for all that are loaded.
            _trainable_adapters=set(),
        )

    def _state_of_stack(self) -> MergeState:
        """Find what is merged into the weight, which other layers around the same base layer may know already."""
        inner = self.base_layer
        while isinstance(inner, BaseTunerLayer):
            if inner.weight_name == self.weight_name:
                return inner._merge_state
            inner = inner.base_layer
        return MergeState()

    # ---------------------------------------------------------------------------------------------- the base layer
    def get_base_layer(self) -> nn.Module:
        """Give the layer of the base model, below any number of adapter layers."""
        layer = self.base_layer
        while "base_layer" in layer._modules:
            layer = layer._modules["base_layer"]
        return layer

    def stored_weight(self) -> torch.Tensor:
        """Give the tensor that holds the base layer's weight, quantised or not; None for layers without one."""
        return getattr(self.get_base_layer(), self.weight_name, None)

    def get_base_weight(self) -> torch.Tensor:
        """Give the weight of the base layer that is adapted; if it is quantised, as a dense matrix of its own."""
        backend = self.quantization_backend
        if backend is not None:
            return backend.get_base_weight(self.get_base_layer())
        return tensor_of(self.get_base_layer(), self.weight_name)

    def computed_weight(self) -> ComputedWeight | None:
        """Say how the base layer computes the weight that is merged into; None if it holds it, as most do."""
        if self.quantization_backend is not None or not self.changes_weight:
            return None
        return find_computed_weight(self.get_base_layer(), self.weight_name)

    def inner_weight(self) -> torch.Tensor:
        """Give the weight that this layer's adapters meet: the base weight as adapter layers inside leave it."""
        inner = self.base_layer
        if isinstance(inner, BaseTunerLayer) and inner.weight_name == self.weight_name:
            return inner.effective_weight()
        return self.get_base_weight()

    def effective_weight(self) -> torch.Tensor:
        """Compute the weight with what the active adapters do to it, here and in adapter layers inside."""
        weight = self.inner_weight()
        for adapter in self.adapters_to_apply():
            weight = self.source(adapter).weight_with(adapter, weight)
        return weight

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """
        Replace the values of the base weight; the parameter object stays, and with it every tie.

        A quantised weight is quantised anew and replaced; one that the layer computes is computed from other values.

        Args:
            weight_data: of the shape that `get_base_weight` gives.
        """
        computed = self.computed_weight()
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight_data)
        elif computed is not None:
            for name, values in computed.tensors_for(weight_data).items():
                attrgetter(name)(self.get_base_layer()).data = values
        else:
            self.stored_weight().data = weight_data

    @property
    def weight(self) -> torch.Tensor:
        """Weight of the base layer, as it is stored; as it is computed with for modules that do so themselves."""
        return read_weight(self)

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias of the base layer, in the same way; None for layers without one."""
        return read_bias(self)

    def __getattr__(self, name: str) -> Any:
        """Give plain settings of the base layer, such as `eps` or `padding_idx`, for modules that read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            settings = self.get_base_layer().__dict__
            if name not in settings:
                raise
            return settings[name]

    def extra_repr(self) -> str:
        """Say how the base layer is quantised, if it is."""
        return quantization_extra_repr(self)

    # ----------------------------------------------------------------------------------------- adapters and tensors
    def update_layer(
        self, adapter_name: str, config: Any = None, *, owner: "BaseTunerLayer | None" = None, **arguments: Any
    ) -> None:
        """
        Add an adapter.

        Args:
            adapter_name: name.
            config: the adapter's config.
            owner: layer to follow, whose base layer holds the same weight; nothing is made here then.
            arguments: for `make_adapter`.
        """
        if owner is not None:
            self.follow(adapter_name, owner)
            return
        self.make_adapter(adapter_name, config, **arguments)
        with torch.no_grad():
            self.reset_adapter(adapter_name, config)
        self._trainable_adapters.add(adapter_name)

    def make_adapter(self, adapter_name: str, config: Any, **arguments: Any) -> None:
        """
        Make an adapter's tensors, without values, and note its settings. To be supplied by methods.

        Args:
            adapter_name: name.
            config: the adapter's config.
            arguments: what the model's `_layer_arguments_for` gives for this layer.
        """
        raise PeftNotImplementedError(f"{type(self).__name__} cannot make an adapter")

    def _containers(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and the content of each attribute that holds tensors by adapter name."""
        for name in self.adapter_layer_names:
            container = self._modules.get(name)
            if container is not None:
                yield name, container

    @property
    def available_adapters(self) -> set[str]:
        """Names of the adapters that this layer has, be it from an owner."""
        return {*self._owners, *(adapter for _, container in self._containers() for adapter in container.keys())}

    def has_adapter(self, adapter_name: str) -> bool:
        """Say whether this layer has an adapter."""
        return adapter_name in self._owners or any(adapter_name in container for _, container in self._containers())

    def follow(self, adapter_name: str, owner: "BaseTunerLayer") -> None:
        """
        Take an adapter from another layer, whose base layer holds the same weight.

        Args:
            adapter_name: name.
            owner: the layer that has the adapter's tensors.
        """
        self._owners[adapter_name] = owner

    def source(self, adapter_name: str) -> "BaseTunerLayer":
        """Give the layer that has an adapter's tensors: this one, or the owner that it follows."""
        return self._owners.get(adapter_name, self)

    def shared_containers(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and the content of each attribute that holds tensors that all layers share."""
        return ((name, self._modules[name]) for name in self.shared_layer_names)

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """
        Yield the parameters of one adapter, those that all layers share too.

        Inside of `torch.func.functional_call` it is the tensors that stand in their places, which are no `Parameter`.
        """
        for _, container in (*self._containers(), *self.shared_containers()):
            own = container._parameters.get(adapter_name)
            if own is not None:
                yield own
            elif isinstance(container._modules.get(adapter_name), nn.Module):
                yield from container._modules[adapter_name].parameters()

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """
        Yield for each tensor of an adapter its key in a checkpoint and its key in this layer's state dict.

        The two differ by the adapter's name, which checkpoints leave out.
        """
        return _keys_in(self._containers(), adapter_name)

    def shared_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield the same for the tensors that all layers share, which a checkpoint holds once."""
        return _keys_in(self.shared_containers(), adapter_name)

    def saved_forms(self, adapter_name: str) -> Mapping[str, "SavedForm"]:
        """
        Say which tensors stand in a checkpoint in another form than in the model, or can do so.

        Args:
            adapter_name: name of an adapter that this layer has, itself or from the one that it follows.

        Returns:
            Key, as `adapter_keys` or `adapter_aliases` yield it first -> form.
        """
        return {}

    def adapter_aliases(self, adapter_name: str) -> Iterator[tuple[str, str, bool]]:
        """
        Yield what a checkpoint holds for this layer although the tensors are those of the layer that it follows.

        Layers of one kind have tensors of the same shapes, so readers that do not know of ties can use them.

        Yields:
            Key in a checkpoint, key of the tensor in the owner's state dict, and whether it is to be transposed.
        """
        owner = self._owners.get(adapter_name)
        if owner is not None and type(owner.get_base_layer()) is type(self.get_base_layer()):
            yield from ((saved, live, False) for saved, live in owner.adapter_keys(adapter_name))

    def token_axes(self, adapter_name: str) -> Mapping[str, tuple[int, float]] | None:
        """
        Say which tensors have an entry for each token, for layers around an embedding or an output head.

        Args:
            adapter_name: name of an adapter that this layer has itself.

        Returns:
            Key in this layer's state dict -> axis of the tokens, and the value with which a new token changes nothing;
            None if the adapter cannot be brought to another number of tokens.
        """
        return None

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """Make an uninitialised parameter for an adapter, where and in the type that the base weight calls for."""
        weight = self.stored_weight()
        return new_parameter(weight, *shape, device=computing_device(self.get_base_layer(), weight))

    def fill_missing(self, adapter_name: str, config: Any) -> None:
        """
        Start tensors of an adapter that a checkpoint has left without storage.

        Args:
            adapter_name: name.
            config: the adapter's config.
        """
        if adapter_name in self._owners:
            if any(parameter.is_meta for parameter in self.adapter_parameters(adapter_name)):
                self._owners[adapter_name].fill_missing(adapter_name, config)
                self.follow(adapter_name, self._owners[adapter_name])
            return
        device = computing_device(self.get_base_layer(), self.stored_weight())
        loaded = []
        for _, container in self._containers():
            if adapter_name not in container:
                continue
            value = container[adapter_name]
            is_module = isinstance(value, nn.Module)
            holder, names = (value, list(value._parameters)) if is_module else (container, [adapter_name])
            for name in names:
                tensor = holder._parameters.get(name)
                if tensor is not None and not tensor.is_meta:
                    loaded.append((tensor, tensor.detach().clone()))
                elif tensor is not None:
                    empty = torch.empty_like(tensor, device=device)
                    holder._parameters[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        with torch.no_grad():
            self.reset_adapter(adapter_name, config)
            for tensor, values in loaded:
                tensor.copy_(values)

    def reset_adapter(self, adapter_name: str, config: Any) -> None:
        """Give an adapter's tensors the values that they start with. To be supplied by methods; no gradients here."""
        raise PeftNotImplementedError(f"{type(self).__name__} cannot start the tensors of an adapter anew")

    # ------------------------------------------------------------------------------------------ activation, freezing
    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the base weight, in the order of merging."""
        return [name for layer, name in self._merge_state.contributions if layer is self]

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the base weight."""
        return bool(self._merge_state.contributions) and bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter, or names if several are active."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; a layer need not have all of them."""
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    def enable_adapters(self, enabled: bool) -> None:
        """
        Switch adapters on or off. Merged adapters are taken out of the weight when switched off.

        Args:
            enabled: True to switch on. What was trainable before is trainable again.
        """
        if not enabled:
            unmerge_layer(self)
        self._disable_adapters = not enabled
        if enabled:
            self.train_as_before()
        else:
            self.freeze_while_off({*self._trainable_adapters, *self.active_adapters})

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the adapters that are used; others are frozen.

        Args:
            adapter_names: one name or several.
            inference_mode: freeze the chosen ones too.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.set_requires_grad([name for name in self._trainable_adapters if name not in names], False)
        self.set_requires_grad(names, not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """
        Freeze adapters or let them be trained, without a change to which are active.

        Args:
            adapter_names: one name or several; names that the layer does not have are passed over.
            requires_grad: False to freeze.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            self.forget_trained_before(name)
            for parameter in self.adapter_parameters(name):
                if parameter.is_floating_point():
                    parameter.requires_grad_(requires_grad)
            (self._trainable_adapters.add if requires_grad else self._trainable_adapters.discard)(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter's tensors and settings. If it was the active one, one that remains becomes active.

        What is trained of the others stays so. One that becomes active is trained if the one that is gone was.

        Args:
            adapter_name: name; a layer that does not have it stays as it is.
        """
        was_trained = adapter_name in self._trainable_adapters
        self.remove_adapter(adapter_name)
        if adapter_name in self.active_adapters:
            self._active_adapter = [name for name in self.active_adapters if name != adapter_name]
            if not self._active_adapter:
                self.set_adapter(sorted(self.available_adapters)[:1], inference_mode=not was_trained)

    def remove_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter's tensors and settings, without a change to which are active.

        Args:
            adapter_name: name; a layer that does not have it stays as it is.
        """
        take_adapter_out(self, adapter_name)
        self._owners.pop(adapter_name, None)
        self.give_back(adapter_name)
        for name in (*self.adapter_layer_names, *self.other_param_names, *self.shared_layer_names):
            container = getattr(self, name, None)
            # settings may be plain values, one for all adapters
            if hasattr(container, "keys") and adapter_name in container:
                del container[adapter_name]
        self._trainable_adapters.discard(adapter_name)
        self.forget_trained_before(adapter_name)

    # -------------------------------------------------------------------------------------------------- forward pass
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Compute the base layer with the active adapters.

        Args:
            x: input of the base layer.
            args: passed on to the base layer.
            kwargs: passed on too, but for `adapter_names`: one name per sample of the batch, `"__base__"` for none.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            adapter_names = names_of_rows(self, (x,))
        if adapter_names is not None and not (self._disable_adapters or self.merged):
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        adapters = self.adapters_to_apply() if adapter_names is None else None
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        return self.adapter_forward(adapters, x, *args, **kwargs)

    def adapters_to_apply(self) -> list[str]:
        """
        Name the adapters that have to be computed here: the active ones that are not in the base weight already.

        Where only adapters that are not active were merged, the weight stands for them and for nothing else.
        """
        if self._disable_adapters:
            return []
        active = [name for name in self.active_adapters if self.has_adapter(name)]
        if self._merge_state.contributions:
            merged = self.merged_adapters
            left = [name for name in active if name not in merged]
            return [] if merged and left == active else left
        return active

    def _mixed_batch_forward(
        self, x: torch.Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute each sample with the adapter named for it."""
        result = self.base_layer(x, *args, **kwargs)
        if not isinstance(result, torch.Tensor):
            raise PeftNotImplementedError(
                f"adapter_names does not work on {type(self.get_base_layer()).__name__} layers adapted by "
                f"{type(self).__name__}, whose output is not one tensor; give each adapter a batch of its own"
            )
        for name in dict.fromkeys(adapter_names):
            if name == "__base__" or not self.has_adapter(name):
                continue
            rows = torch.tensor([i for i, wanted in enumerate(adapter_names) if wanted == name], device=x.device)
            result = result.index_copy(0, rows, self.forward_rows(name, rows, x, *args, **kwargs).to(result.dtype))
        return result

    def forward_rows(
        self, adapter: str, rows: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Compute some samples of a batch with one adapter.

        Args:
            adapter: name.
            rows: numbers of the samples in the batch.
            x: input of the whole batch.
            args: other arguments of the base layer.
            kwargs: likewise.
        """
        return self.adapter_forward([adapter], x[rows], *args, **kwargs)

    @abstractmethod
    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer with adapters that it has. Supplied by the rule."""

    # ------------------------------------------------------------------------------------------------------- merging
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge adapters into the base weight.

        Args:
            safe_merge: compute the result apart, and refuse it if an entry is not finite.
            adapter_names: which adapters; the active ones if left out.

        Raises:
            PeftValueError: if `safe_merge` finds an entry that is not finite.
        """
        merge_layer(self, check_adapters_to_merge(self, adapter_names), safe_merge)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight."""
        if not self.merged:
            warn("no adapter is merged, so there is nothing to unmerge")
        unmerge_layer(self)

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise if this adapter cannot be merged into this base layer; by default every adapter can."""
        return

    def check_mergeable_together(self, adapters: Sequence[str]) -> None:
        """Raise if these adapters of the layer cannot all be merged into its base layer; by default they can."""
        return

    def prepare_merge(self, adapter: str) -> None:
        """Compute what merging an adapter needs the base weight for, before others are merged into it."""
        return

    def commutes_with(self, adapter: str, other: "BaseTunerLayer", other_adapter: str) -> bool:
        """
        Say whether an adapter and another one around the same base layer give the same in whichever order they come.

        Where they do not, the later one cannot be merged while the earlier one is active and not merged.

        Args:
            adapter: name of an adapter of this layer.
            other: this layer, or one inside it.
            other_adapter: name of an adapter of that layer.
        """
        return False

    @torch.no_grad()
    def weight_before_merge(self) -> torch.Tensor:
        """Give the base weight without what is merged: as it is, the copy that was kept, or a new one."""
        if not self._merge_state.contributions:
            return self.get_base_weight()
        if not self._merge_state.replaces(self.weight_name):
            weight = self.get_base_weight().clone()
            undo_merge(self, weight)
            return weight
        with original_weights([self]):
            return self.get_base_weight()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Move or cast what is kept of the base model while adapters are merged, too; see `torch.nn.Module._apply`."""
        module = super()._apply(fn, recurse)
        self._merge_state.apply(fn)
        return module

    @abstractmethod
    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Apply an adapter to a weight of the base layer's layout, in place. Supplied by the rule."""

    def weight_with(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute what merging an adapter would give; the weight itself stays as it is."""
        changed = weight.clone()
        self.prepare_merge(adapter)
        self.merge_weight_(adapter, changed)
        return changed

    @abstractmethod
    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Undo `merge_weight_`. Supplied by the rule."""

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether `unmerge_weight_` can undo `merge_weight_`; if not, a copy of the weight is kept for it."""
        return True

    def merged_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """
        Compute what merging puts in the place of tensors of the base layer other than the weight, such as its bias.

        Returns:
            Name in the base layer -> new tensor; most methods change none.
        """
        return {}

    def bias_after(self, adapter: str, bias: torch.Tensor) -> torch.Tensor:
        """Compute what an adapter makes of a bias of the base layer's shape; most methods leave it alone."""
        return bias

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether an adapter can be converted to LoRA."""
        return False


def _keys_in(containers: Iterable[tuple[str, Any]], adapter_name: str) -> Iterator[tuple[str, str]]:
    """Yield key in a checkpoint and key in the state dict for the tensors that containers hold for an adapter."""
    for name, container in containers:
        if adapter_name not in container:
            continue
        value = container[adapter_name]
        if not isinstance(value, nn.Module):
            if not (isinstance(container, BufferDict) and not container.persistent):
                yield name, f"{name}.{adapter_name}"
            continue
        for key in value.state_dict():
            yield f"{name}.{key}", f"{name}.{adapter_name}.{key}"


class AdditiveLayer(BaseTunerLayer):
    """Rule for methods that add to the weight: W + delta."""

    # whether `delta_forward` also computes adapters that are taken from an owner, through views of its tensors
    has_views_of_owner = False

    @abstractmethod
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute what the adapter adds to the base weight.

        Returns:
            A tensor of the shape and layout of the base weight.
        """

    def add_delta_(self, adapter: str, weight: torch.Tensor, sign: float) -> None:
        """
        Add `sign` times the delta to a weight in place. Methods may do it without building the delta.

        Args:
            adapter: name.
            weight: tensor of the shape and layout of the base weight.
            sign: 1 to merge, -1 to unmerge.
        """
        delta = self.get_delta_weight(adapter)
        weight.add_(delta.to(weight.device, weight.dtype), alpha=sign)

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute what the adapter adds to the output. Methods may do it without building the delta."""
        delta = self.source(adapter).get_delta_weight(adapter)
        return apply_weight(self.get_base_layer(), x.to(delta.dtype) if x.is_floating_point() else x, delta)

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Add the adapters' terms to the base layer's output; the output keeps its type."""
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in adapters:
            if adapter in self._owners and not self.has_views_of_owner:
                result = result + AdditiveLayer.delta_forward(self, adapter, x)
            else:
                result = result + self.delta_forward(adapter, x)
        return result if result.dtype == dtype else result.to(dtype)

    def adds_delta(self, adapter: str) -> bool:
        """Say whether an adapter does nothing but add its delta to whatever weight there is."""
        return True

    def commutes_with(self, adapter: str, other: BaseTunerLayer, other_adapter: str) -> bool:
        """Sums have no order."""
        return isinstance(other, AdditiveLayer) and self.adds_delta(adapter) and other.adds_delta(other_adapter)

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Add the delta."""
        self.add_delta_(adapter, weight, 1.0)

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Subtract the delta."""
        self.add_delta_(adapter, weight, -1.0)


class WeightLayer(BaseTunerLayer):
    """Rule for methods that transform the weight: f(W)."""

    # whether f(W) x is W g(x), and the method supplies g as `transform_input`
    transforms_input = False
    # whether f(W) x follows from W x, and the method supplies how as `correct_output`, for adapters of an owner too;
    # with `transforms_input`, whether it follows from W g(x)
    corrects_output = False

    @abstractmethod
    def transform_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the adapted weight from a weight of the base layer's shape and layout."""

    def forward_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the adapted weight for the forward pass: as it is merged, unless the method has dropout."""
        return self.transform_weight(adapter, weight)

    def inverse_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the weight that `transform_weight` was given, where the method can."""
        raise PeftNotImplementedError(f"the transform of {type(self).__name__} has no inverse")

    def transform_input(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute what the base layer has to be given to give what the adapted one does, where the method can."""
        raise PeftNotImplementedError(f"{type(self).__name__} transforms weights only")

    def correct_output(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Compute what the adapted layer gives from what the base layer does, where the method can."""
        raise PeftNotImplementedError(f"{type(self).__name__} transforms weights only")

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the base layer with the transformed weight, or with transformed inputs where that is the same."""
        if self.transforms_input and all(map(self._meets_input_alike, adapters)):
            dtype = x.dtype
            for adapter in reversed(adapters):  # the last to transform the weight is the first to meet the input
                source = self.source(adapter)
                x = source.transform_input(adapter, x.to(next(source.adapter_parameters(adapter)).dtype))
            result = self.base_layer(x.to(dtype), *args, **kwargs)
            return self.correct_outputs(adapters, x, result) if self.corrects_output else result
        if self.corrects_output and not self.transforms_input:
            return self.correct_outputs(adapters, x, self.base_layer(x, *args, **kwargs))
        layer = self.get_base_layer()
        weight = inner = self.inner_weight()
        for adapter in adapters:
            weight = self.source(adapter).forward_weight(adapter, weight)
        bias, dtype = tensor_of(layer, "bias"), self.stored_weight().dtype
        if self.quantization_backend is not None:  # the layer would bring inputs and bias to a type of its own
            dtype = x.dtype if x.is_floating_point() else weight.dtype
            bias = None if bias is None else bias.to(dtype)
        if self.base_layer is not layer:  # adapter layers inside may change more than the weight
            change = apply_weight(layer, x, (weight - inner).to(dtype))
            return self.base_layer(x, *args, **kwargs) + change
        return apply_weight(layer, x, weight.to(dtype), bias)

    def _meets_input_alike(self, adapter: str) -> bool:
        """Say whether an adapter does to the input of this layer what it does to that of its owner."""
        if adapter not in self._owners:
            return True
        return not self.corrects_output and type(self.source(adapter).get_base_layer()) is type(self.get_base_layer())

    def correct_outputs(self, adapters: Sequence[str], x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Do so for adapters one after the other."""
        for adapter in adapters:
            result = self.correct_output(adapter, x, result)
        return result

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether the method has an inverse."""
        return type(self).inverse_weight is not WeightLayer.inverse_weight

    def weight_with(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the transformed weight, as the forward pass has it."""
        return self.forward_weight(adapter, weight)

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Replace the weight by the transformed one."""
        weight.copy_(self.transform_weight(adapter, weight))

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Replace the weight by what it was transformed from."""
        weight.copy_(self.inverse_weight(adapter, weight))


class ActivationLayer(BaseTunerLayer):
    """Rule for methods that scale features: of the input (columns of W) or of the output (rows of W and bias)."""

    @abstractmethod
    def feature_scale(self, adapter: str) -> torch.Tensor:
        """Give the factors, (in_features,) or (out_features,)."""

    @abstractmethod
    def scales_input(self, adapter: str) -> bool:
        """Say whether the factors belong to the input."""

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Scale input and output around the base layer; input and output keep their types."""
        base, ids, dtype = self.get_base_layer(), x, x.dtype
        on_input = {adapter: self._meets_input(adapter) for adapter in adapters}
        looks_up = isinstance(base, nn.Embedding)
        for adapter in adapters:
            if on_input[adapter] and not looks_up:
                x = x * along_features(base, self.source(adapter).feature_scale(adapter))
        result = self.base_layer(x.to(dtype), *args, **kwargs)
        dtype = result.dtype
        for adapter in adapters:
            factors = self.source(adapter).feature_scale(adapter)
            if on_input[adapter] and looks_up:  # the inputs that are scaled are tokens
                result = result * F.embedding(ids, factors.unsqueeze(-1))
            elif not on_input[adapter]:
                result = result * along_features(base, factors)
        return result.to(dtype)

    def _axis(self, adapter: str) -> int:
        """Give the axis of the base weight along which an adapter of this layer scales."""
        return feature_axis(self.get_base_layer(), self.scales_input(adapter))

    def _meets_input(self, adapter: str) -> bool:
        """Say whether an adapter scales the inputs of this layer; what it scales in the weight is up to its owner."""
        return self.source(adapter)._axis(adapter) == feature_axis(self.get_base_layer(), of_input=True)

    def commutes_with(self, adapter: str, other: BaseTunerLayer, other_adapter: str) -> bool:
        """Factors have no order, be they those of rows or of columns."""
        return isinstance(other, ActivationLayer)

    def can_unmerge(self, adapter: str) -> bool:
        """A feature that was scaled by 0 cannot be brought back."""
        return not (self.feature_scale(adapter) == 0).any()

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Scale columns or rows of the weight."""
        weight.mul_(self._scale_of_weight(adapter, weight))

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Undo the scaling."""
        weight.div_(self._scale_of_weight(adapter, weight))

    def _scale_of_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        factors = self.feature_scale(adapter).to(weight)
        return along_axis(self.get_base_layer(), factors, self._axis(adapter))

    def merged_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Scale the bias, if it is the output that is scaled."""
        bias = tensor_of(self.get_base_layer(), "bias")
        return {} if bias is None or self._meets_input(adapter) else {"bias": self.bias_after(adapter, bias)}

    def bias_after(self, adapter: str, bias: torch.Tensor) -> torch.Tensor:
        """Scale the bias likewise."""
        return bias if self._meets_input(adapter) else bias * self.source(adapter).feature_scale(adapter).to(bias)


class ReplacementLayer(BaseTunerLayer):
    """
    Rule for methods that train a copy of the layer itself, such as of normalisation layers.

    The copies stand in the one container of `adapter_layer_names`. With several active adapters the last one counts.
    """

    changes_weight = False

    def _copies(self) -> nn.ModuleDict:
        return self._modules[self.adapter_layer_names[0]]

    def make_adapter(self, adapter_name: str, config: Any, **arguments: Any) -> None:
        """Copy the base layer."""
        refuse_copy_of_offloaded(self.get_base_layer())
        self._copies()[adapter_name] = copy_module(self.get_base_layer()).requires_grad_(True)

    def follow(self, adapter_name: str, owner: "ReplacementLayer") -> None:
        """Copy the base layer around the parameters that the owner's copy has in the place of shared ones."""
        super().follow(adapter_name, owner)
        theirs = owner._copies()[adapter_name]
        shared = shared_places(self.get_base_layer(), owner.get_base_layer())
        copied, borrowed = copy_borrowing(
            self.get_base_layer(), {name: (theirs, there) for name, (_, there) in shared.items()}
        )
        self._copies()[adapter_name] = copied.requires_grad_(True)
        self.borrow(adapter_name, borrowed, owner)
        self._trainable_adapters.add(adapter_name)

    def adapter_aliases(self, adapter_name: str) -> Iterator[tuple[str, str, bool]]:
        """None: the tensors of a copy stand in the checkpoint, whoever else holds them."""
        yield from ()

    def reset_adapter(self, adapter_name: str, config: Any) -> None:
        """Start from the base layer's values."""
        base = self.get_base_layer().state_dict()
        for key, tensor in self._copies()[adapter_name].state_dict().items():
            tensor.copy_(base[key])

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the copy."""
        return self._copies()[adapters[-1]](x, *args, **kwargs)

    def weight_with(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Give the weight of the copy."""
        return getattr(self._copies()[adapter], self.weight_name)

    def bias_after(self, adapter: str, bias: torch.Tensor) -> torch.Tensor:
        """Give the bias of the copy."""
        return self._copies()[adapter].bias

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """The weight is replaced like the other tensors, see `merged_tensors`."""

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """What was replaced is put back."""

    def merged_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Give the tensors of the copy."""
        return {key: tensor.detach().clone() for key, tensor in self._copies()[adapter].state_dict().items()}


def unwrapped(module: nn.Module) -> nn.Module:
    """Give the layer of the base model in an adapter layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
