# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What every adapter layer has in common.

A method's layer subclasses one of the rules (`AdditiveLayer`, `WeightLayer`, `ActivationLayer`, `ReplacementLayer`)
and writes its math; forward pass, merging, unmerging, activation, freezing and deletion follow from it.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..anatomy.kinds import features
from ..anatomy.offload import computing_device
from ..utils.error import PeftNotImplementedError
from ..utils.former_methods import explain_former_method
from ..utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from ..utils.warning import warn
from .call_context import names_of_rows
from .containers import keys_in, parameters_in
from .merging.checks import check_adapters_to_merge
from .merging.layer import keep_order, merge_layer, take_adapter_out, unmerge_layer
from .merging.mergeable_layer import MergeableLayer
from .merging.state import MergeState, original_weights
from .merging.tensors import undo_merge
from .new_tensors import new_parameter
from .reading import read_bias, read_weight


class BaseTunerLayer(MergeableLayer):
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
        shared_layer_names: attributes that hold, by adapter name, tensors that layers of a model share.
        repeated_layer_names: those of them that stand in checkpoints under each layer too.
        container_classes: class of a container, where it is not `nn.ParameterDict` for tensors or `dict` for settings.
        supports_mixed_batch: whether each sample of a batch can have an adapter of its own.
    """

    shared_layer_names: tuple[str, ...] = ()
    repeated_layer_names: tuple[str, ...] = ()
    container_classes: Mapping[str, Callable[[], Any]] = {}
    supports_mixed_batch: bool = True

    _trainable_adapters: set[str]

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
        self._active_adapter = [adapter_name]
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
        return next((inner._merge_state for inner in self.layers_inside()), None) or MergeState()

    # ---------------------------------------------------------------------------------------------- the base layer
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
            if (former := explain_former_method(type(self), name)) is not None:
                raise former from None
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

    @classmethod
    def prepare_adapter(
        cls, base: nn.Module, config: Any, present: "BaseTunerLayer | None" = None, **arguments: Any
    ) -> Mapping[str, Any]:
        """
        Refuse an adapter that cannot be made, before anything is changed. To be extended by methods.

        Args:
            base: the base layer.
            config: the adapter's config.
            present: the layer around it that is going to have the adapter, if there is one already.
            arguments: for `make_adapter`; `parameter_name` too, where a parameter of the base layer is adapted.

        Returns:
            The arguments, with what was worked out on the way.

        Raises:
            PeftError: if it cannot be made; which class depends on why.
        """
        return arguments

    @classmethod
    def check_following(cls, base: nn.Module, owner: nn.Module) -> None:
        """
        Refuse a layer that cannot follow another one, before anything is changed. To be extended by methods.

        Args:
            base: its base layer.
            owner: base layer of the other one, which holds the same weight.
        """

    def make_adapter(self, adapter_name: str, config: Any, **arguments: Any) -> None:
        """
        Make an adapter's tensors, without values, and note its settings. To be supplied by methods.

        Args:
            adapter_name: name.
            config: the adapter's config.
            arguments: what the model's `_layer_arguments_for` gives for this layer.
        """
        raise PeftNotImplementedError(f"{type(self).__name__} cannot make an adapter")

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

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """
        Say whether an adapter can be written as LoRA; only what adds to the weight of a matrix can.

        Args:
            adapter_name: name of an adapter that this layer has.
        """
        return False

    def shared_containers(self) -> list[tuple[str, Any]]:
        """List the name and the content of each attribute that holds tensors that all layers share."""
        return [(name, self._modules[name]) for name in self.shared_layer_names]

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of one adapter, those that all layers share too."""
        shared = self.shared_containers() if self.shared_layer_names else []  # hardly any method has some
        return parameters_in(self._containers() + shared, adapter_name)

    def shared_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield the same for the tensors that all layers share, which a checkpoint holds once."""
        return keys_in(self.shared_containers(), adapter_name)

    def repeated_keys(self, adapter_name: str) -> Iterator[str]:
        """Yield those of their keys in a checkpoint that stand there under this layer too."""
        if adapter_name not in self._owners and self.has_adapter(adapter_name):
            repeated = ((name, self._modules[name]) for name in self.repeated_layer_names)
            yield from (saved for saved, _ in keys_in(repeated, adapter_name))

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
            Key in this layer's state dict -> axis of the tokens, and the value with which a new token changes
            nothing; None if the adapter cannot be brought to another number of tokens.
        """
        return None

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """Make an uninitialised parameter for an adapter, where and in the type that the base weight calls for."""
        weight = self.stored_weight()
        return new_parameter(weight, *shape, device=computing_device(self.get_base_layer(), weight))

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | str | int | None = None
    ) -> None:
        """
        Move an adapter's tensors to where the base weight is. Clients call it, who have moved that by themselves.

        Args:
            adapter_name: name.
            device: another place to move them to.
        """
        weight = self.stored_weight()
        device = device if device is not None else None if weight is None else weight.device
        if device is None or torch.device(device).type == "meta":
            return
        for _, container in self._containers():
            value = container[adapter_name] if adapter_name in container else None
            if isinstance(value, nn.Parameter):
                value.data = value.data.to(device)
            elif isinstance(value, nn.Module):
                value.to(device)
            elif isinstance(value, torch.Tensor):
                container[adapter_name] = value.to(device)

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
        loaded: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _, container in self._containers():
            if adapter_name not in container:
                continue
            value = container[adapter_name]
            holders = value.modules() if isinstance(value, nn.Module) else [container]
            for holder in holders:
                names = [adapter_name] if holder is container else [*holder._parameters, *holder._buffers]
                loaded += _give_storage(holder, names, device)
        with torch.no_grad():
            self.reset_adapter(adapter_name, config)
            for tensor, values in loaded:
                tensor.copy_(values)

    def reset_adapter(self, adapter_name: str, config: Any) -> None:
        """Give an adapter's tensors the values that they start with. To be supplied by methods; no gradients here."""
        raise PeftNotImplementedError(f"{type(self).__name__} cannot start the tensors of an adapter anew")

    # ------------------------------------------------------------------------------------------ activation, freezing
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
        others = [name for name in self._trainable_adapters if name not in names]
        if others:
            self.set_requires_grad(others, False)
        self.set_requires_grad(names, not inference_mode)
        self._active_adapter = names
        if self._merge_state.contributions or self._merge_state.waiting:
            keep_order(self)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """
        Freeze adapters or let them be trained, without a change to which are active.

        Args:
            adapter_names: one name or several; names that the layer does not have are passed over.
            requires_grad: False to freeze.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        super().set_requires_grad(names, requires_grad)
        (self._trainable_adapters.update if requires_grad else self._trainable_adapters.difference_update)(names)

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
        if self._merge_state.waiting:
            keep_order(self)  # what has waited for it has no reason to any more

    def remove_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter's tensors and settings, without a change to which are active.

        Args:
            adapter_name: name; a layer that does not have it stays as it is.
        """
        take_adapter_out(self, adapter_name)
        self._owners.pop(adapter_name, None)
        super().remove_adapter(adapter_name)
        for _, container in self.shared_containers():
            if adapter_name in container:
                del container[adapter_name]
        self._trainable_adapters.discard(adapter_name)

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


def _give_storage(
    holder: nn.Module, names: Sequence[str], device: torch.device | str | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give storage to tensors of a module that have none; return the others, with copies of their values."""
    filled = []
    for name in names:
        is_parameter = holder._parameters.get(name) is not None
        tensors = holder._parameters if is_parameter else holder._buffers
        tensor = tensors.get(name)
        if tensor is not None and not tensor.is_meta:
            filled.append((tensor, tensor.detach().clone()))
        elif tensor is not None:
            empty = torch.empty_like(tensor, device=device)
            tensors[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return filled
