# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
The structure of a merge: which tensor of the merged model comes from where, found out without any weights.

The adapter is put into a base model on the meta device, by the code that puts it into any model. A copy of that is
merged with the arithmetic taken out, which shows what the merged model holds under which name, what is tied in it, and
everything that merging would refuse. What is left to do is arithmetic, for one base weight after the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..anatomy.skeletons import copy_without_storage
from ..anatomy.walking import adapter_modules, bare_modules, base_modules
from ..layers.base_layer import BaseTunerLayer
from ..layers.merging.sharing import layers_by_weight
from ..layers.merging.weight import merge_weight
from ..models.peft_model import PeftModel
from ..utils.error import PeftNotImplementedError


Holder = tuple[dict[str, torch.Tensor | None], str]


@dataclass(frozen=True, eq=False)
class Unit:
    """
    The adapter layers around one base weight, which are merged together.

    Attributes:
        layers: the layers.
        holders: number of modules that hold the weight, adapted or not.
        names: full names of what merging reads or changes: the weight under all its names, biases, ...
    """

    layers: list[BaseTunerLayer]
    holders: int
    names: tuple[str, ...]


class Structure:
    """
    What merging would give.

    Args:
        model: a model on the meta device with an adapter, whose own tensors are loaded.

    Attributes:
        base: name -> tensor of the base model as it is now. One that an adapter brought along, such as a trained bias,
            has storage; others are on the meta device.
        merged: name -> tensor on the meta device of the merged model; tensors that are tied are one object.
        replaced: name -> trained tensor that takes the place of the base model's.
        units: name -> unit that computes the tensor.
        config: config of the merged model.

    Raises:
        PeftError: if the adapter cannot be merged.
    """

    def __init__(self, model: PeftModel):
        self.model = model
        self._places = {
            f"{name}.{key}" if name else key: (held, key)
            for name, module in bare_modules(model.get_base_model())
            for held in (module._parameters, module._buffers)
            for key, tensor in held.items()
            if tensor is not None and key not in module._non_persistent_buffers_set
        }
        self.base: dict[str, torch.Tensor] = {name: held[key] for name, (held, key) in self._places.items()}
        self._names: dict[int, list[str]] = {}
        for name, tensor in self.base.items():
            self._names.setdefault(id(tensor), []).append(name)
        _refuse_missing(model, {id(tensor) for tensor in self.base.values()})
        self.units = {name: unit for unit in self._find_units() for name in unit.names}
        copied, originals = copy_without_storage(model)
        for layer in _layers(copied):
            _leave_out_arithmetic(layer)
        merged = copied.merge_and_unload()
        self.config = getattr(merged, "config", None)
        self.merged: dict[str, torch.Tensor] = merged.state_dict(keep_vars=True)
        self.replaced: dict[str, torch.Tensor] = {}
        for name, tensor in self.merged.items():
            original = originals.get(id(tensor))
            if original is not None and not original.is_meta and original is not self.base.get(name):
                self.replaced[name] = original

    def aliases(self, name: str) -> list[str]:
        """Give all names of a tensor of the base model."""
        return self._names[id(self.base[name])]

    def _find_units(self) -> Iterator[Unit]:
        base = self.model.get_base_model()
        for layers, holders in layers_by_weight(base, _layers(base)):
            tensors = [
                tensor
                for layer in layers
                for tensor in (*layer.get_base_layer().parameters(), *layer.get_base_layer().buffers())
            ]
            names = dict.fromkeys(name for tensor in tensors for name in self._names.get(id(tensor), ()))
            yield Unit(layers, holders, tuple(names))

    @torch.no_grad()
    def compute(self, unit: Unit, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Merge into one base weight.

        Args:
            unit: the layers.
            values: name -> content of the base model's tensor; of a tensor with several names, one is enough. It may
                be changed in place.

        Returns:
            Name -> merged tensor, for all names of the unit.
        """
        with self._filled(unit, values):
            merge_weight(unit.layers, None, unit.holders, for_good=True)
            return {name: held[key].detach() for name, (held, key) in self._of(unit).items()}

    def _of(self, unit: Unit) -> dict[str, Holder]:
        return {name: self._places[name] for name in unit.names}

    @contextmanager
    def _filled(self, unit: Unit, values: dict[str, torch.Tensor]) -> Iterator[None]:
        """Give a unit's base layers their weights inside a context, and forget afterwards what was merged."""
        states = {id(layer._merge_state): layer._merge_state for layer in unit.layers}.values()
        merged = [(state, state.contributions.copy(), state.originals.copy()) for state in states]
        filled: dict[int, torch.Tensor] = {}
        for name, value in values.items():
            tensor = self.base[name]
            is_parameter = isinstance(tensor, nn.Parameter)
            filled[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
        for name, (held, key) in self._of(unit).items():
            held[key] = filled[id(self.base[name])]
        try:
            yield
        finally:
            for name, (held, key) in self._of(unit).items():
                held[key] = self.base[name]
            for state, contributions, originals in merged:
                state.contributions[:], state.originals[:] = contributions, originals


def _layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for _, module in adapter_modules(model) if isinstance(module, BaseTunerLayer)]


def _refuse_missing(model: PeftModel, base: set[int]) -> None:
    """Refuse adapters of which tensors are not in their file, so that nothing but a whole model could make them."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    other = {id(t) for m in base_modules(model.get_base_model()) for t in m._buffers.values() if t is not None}
    missing = [name for name, tensor in tensors if tensor.is_meta and id(tensor) not in base | other]
    if missing:
        raise PeftNotImplementedError(
            f"{len(missing)} tensors of the adapter do not stand in its file, the first is {missing[0]!r}; merge it "
            "in memory, with PeftModel.from_pretrained(...).merge_and_unload(), and save the result"
        )


def _leave_out_arithmetic(layer: BaseTunerLayer) -> None:
    """Let a layer be merged in name only."""
    layer.__dict__.update(
        prepare_merge=lambda adapter: None,
        merge_weight_=lambda adapter, weight: None,
        can_unmerge=lambda adapter: True,
        merged_tensors=lambda adapter: {},
    )
