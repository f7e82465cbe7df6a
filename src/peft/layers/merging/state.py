# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What is merged into the weight of a base layer, and what stood there before."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ...anatomy.offload import Replacements, is_offloaded
from ..adapter_module import AdapterModule


# an adapter layer, and the name of the adapter whose part it puts into the weight
Contribution = tuple[AdapterModule, str]


@dataclass
class Original:
    """
    A tensor of the base model in whose place a module holds another one while something is merged.

    Quantised layers also have attributes that go with the tensor.

    Attributes:
        module: the module.
        name: the tensor's name there.
        tensor: the one that does not stand there at the moment.
        of: attribute of the base layer whose value it is, or is computed from.
    """

    module: nn.Module
    name: str
    tensor: torch.Tensor | None
    of: str

    def swap(self) -> None:
        """Exchange the tensor with the one that the module holds."""
        held = holder(self.module, self.name)
        held[self.name], self.tensor = self.tensor, held[self.name]


@dataclass
class MergeState:
    """
    What is merged into the weight of one base layer. The layers around it share this object.

    Attributes:
        contributions: a layer around the base layer and the adapter's name, in the order of merging. The adapter's
            tensors may be those of an owner that the layer follows.
        originals: tensors of the base model that were replaced, not changed in place: because other modules that were
            not merged alike hold them too, or because there is no way back.
        waiting: what shall be merged as soon as another adapter is, on whose result it works.
    """

    contributions: list[Contribution] = field(default_factory=list)
    waiting: list[Contribution] = field(default_factory=list)
    originals: list[Original] = field(default_factory=list)

    def replaces(self, name: str) -> bool:
        """Say whether a tensor of that name was replaced."""
        return any(original.of == name for original in self.originals)

    def replace(self, module: nn.Module, name: str, tensor: torch.Tensor, of: str | None = None) -> None:
        """Put a tensor into a module of the base model; what stood there at first is kept."""
        held = holder(module, name)
        if not any(original.module is module and original.name == name for original in self.originals):
            self.originals.append(Original(module, name, held[name], of or name))
        held[name] = tensor

    def restore(self) -> None:
        """Put all tensors back that were replaced; nothing is merged any more."""
        for original in self.originals:
            original.swap()
        self.originals.clear()
        self.contributions.clear()

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """
        Move or cast the tensors that were replaced along with the model.

        Args:
            function: what `torch.nn.Module._apply` is given. It may see a tensor twice, as that of a module would.
        """
        for original in self.originals:
            if isinstance(original.tensor, torch.Tensor):
                original.tensor = _converted(original.tensor, function)


def _converted(tensor: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Convert a tensor; a parameter stays the object that others may hold, where torch can do that."""
    with torch.no_grad():
        new = function(tensor)
    if new is tensor or not isinstance(tensor, nn.Parameter):
        return new
    if torch._has_compatible_shallow_copy_type(tensor, new):
        tensor.data = new
        return tensor
    return nn.Parameter(new, tensor.requires_grad) if type(tensor) is nn.Parameter else new


@dataclass
class Sharing:
    """
    Who holds a parameter of the base model that stands in several places.

    Attributes:
        layers: the adapter layers around modules that hold it.
        places: all modules of the base model that hold it, with its name there.
    """

    layers: list[AdapterModule]
    places: list[tuple[nn.Module, str]]


def holder(module: nn.Module, name: str) -> dict[str, torch.Tensor | None] | Replacements:
    """Give the dictionary in which a module holds a tensor, or what stands for it where the tensor is offloaded."""
    holders = (module._parameters, module._buffers, module.__dict__)
    held = next(held for held in holders if name in held)
    # a placeholder stays where it is, and what it stands for is replaced
    return Replacements(module) if getattr(held[name], "is_meta", False) and is_offloaded(module) else held


@contextmanager
def original_weights(layers: Iterable[AdapterModule]) -> Iterator[None]:
    """Put tensors whose place a merged one took back inside a context, so that ties can be seen as they were."""
    states = {id(layer._merge_state): layer._merge_state for layer in layers}.values()
    originals = [original for state in states for original in state.originals]
    for original in originals:
        original.swap()
    try:
        yield
    finally:
        for original in originals:
            original.swap()
