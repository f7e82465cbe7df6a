# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The two factors of a LoRA layer as an optimiser sees them: which belong together, and which matrices they hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from ..tuners.lora.layer import LoraLayer
from ..utils.error import PeftRuntimeError
from ..utils.tensor_parallel import distribute_like, is_divided


_PARTNERS = {"lora_B": "lora_A", "lora_embedding_B": "lora_embedding_A"}


def is_factor_a(name: str) -> bool:
    """Say whether a parameter's name is that of a factor A."""
    return not set(_PARTNERS.values()).isdisjoint(name.split("."))


def name_of_factor_a(name: str) -> str | None:
    """Give the name of the factor A that a factor B belongs to; None for other parameters."""
    parts = name.split(".")
    if parts[-1] == "bias" or set(_PARTNERS).isdisjoint(parts):
        return None
    return ".".join(_PARTNERS.get(part, part) for part in parts)


class Pairing(NamedTuple):
    """
    What a list of names says about the parameters at the same places.

    Attributes:
        partners: place of a factor B -> that of its factor A.
        fixed: places of factors A.
    """

    partners: dict[int, int]
    fixed: frozenset[int]


@lru_cache(maxsize=64)
def pair_by_name(names: tuple[str, ...]) -> Pairing:
    """
    Find what belongs together by name, so that it does not matter what else an adapter has.

    Args:
        names: names of parameters.
    """
    places = {name: place for place, name in enumerate(names)}
    found = {place: places.get(name_of_factor_a(name)) for name, place in places.items()}
    return Pairing(
        {b: a for b, a in found.items() if a is not None},
        frozenset(place for name, place in places.items() if is_factor_a(name)),
    )


def check_places(names: Sequence[str], params: Sequence[torch.Tensor]) -> None:
    """
    Refuse to go by names where something has put other parameters in the place of those that had them.

    Args:
        names: names that parameters of a group had when it was made.
        params: what the group holds now.

    Raises:
        PeftRuntimeError: if there are not as many.
    """
    if len(names) != len(params):
        raise PeftRuntimeError(
            f"the optimiser holds {len(params)} tensors in the place of the {len(names)} parameters that it was made "
            "for, as ZeRO does it, so the factors cannot be seen; use DDP or FSDP2"
        )


def layer_and_adapter(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """
    Find the LoRA layer and the adapter that a factor belongs to.

    Args:
        model: the model that gave the name.
        name: name of a parameter.

    Returns:
        The two; None if the parameter is no factor, one of a method that has a third factor between the two, or one
        that is kept in another form than that of a matrix.
    """
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part in {*_PARTNERS, *_PARTNERS.values()}), None)
    if place is None:
        return None
    layer = model.get_submodule(".".join(parts[:place]))
    is_whole = isinstance(layer, LoraLayer) and (layer.is_embedding or parts[-1] == "weight")
    return (layer, parts[place + 1]) if is_whole and layer.keeps_matrices(parts[place + 1]) else None


@dataclass(frozen=True)
class FactorPair:
    """
    Factors A and B, which hold one matrix each, or one for each group of a convolution or for each expert.

    Args:
        a: (r, in), (r, in, *kernel) or (experts * r, in).
        b: (out, r), (out, r / groups, 1, ...) or (out, r * experts).
        experts: number of experts.

    Raises:
        PeftRuntimeError: if this process has a piece of the tensors only, and no way to see the rest.
    """

    a: torch.Tensor
    b: torch.Tensor
    experts: int = 1

    def __post_init__(self) -> None:
        if self.a.dim() < 2 or self.b.dim() < 2 or not self.a.numel() or not self.b.numel():
            raise PeftRuntimeError(
                f"the factors have the shapes {tuple(self.a.shape)} and {tuple(self.b.shape)} at the step, so their "
                "matrices cannot be seen; the first FSDP and ZeRO-3 keep flat pieces: use DDP or FSDP2"
            )

    @property
    def _blocks(self) -> int:
        return self.experts if self.a.dim() == 2 else self.a.shape[0] // self.b.shape[1]

    def matrices_a(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give the matrices (blocks, r, columns) of a tensor in the shape of A."""
        return tensor.flatten(1).unflatten(0, (self._blocks, -1))

    def matrices_b(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give the matrices (blocks, rows, r) of a tensor in the shape of B."""
        if self.experts > 1:
            return tensor.unflatten(1, (-1, self.experts)).permute(2, 0, 1)
        return tensor.flatten(1).unflatten(0, (self._blocks, -1))

    def times_inverse(self, gradient: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """Multiply a gradient of B by one matrix (r, r) per block, from the right."""
        if self._is_plain(gradient):
            return (gradient.to(inverse.dtype) @ inverse[0]).to(gradient.dtype)
        product = self.matrices_b(whole(gradient)).to(inverse.dtype) @ inverse
        if self.experts > 1:
            product = product.permute(1, 2, 0)
        return _like(product.reshape(gradient.shape), gradient)

    def inverse_times(self, inverse: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Multiply a gradient of A by one matrix (r, r) per block, from the left."""
        if self._is_plain(gradient):
            return (inverse[0] @ gradient.to(inverse.dtype)).to(gradient.dtype)
        product = inverse @ self.matrices_a(whole(gradient)).to(inverse.dtype)
        return _like(product.reshape(gradient.shape), gradient)

    def _is_plain(self, gradient: torch.Tensor) -> bool:
        """Say whether a gradient is one matrix, which needs no views: there is one for each layer and step."""
        return gradient.dim() == 2 and self.experts == 1 and not is_divided(gradient)

    def gram_of_a(self, regularisation: float) -> torch.Tensor:
        """Compute A A' + regularisation * I for each block: (blocks, r, r)."""
        return _gram(self.matrices_a(whole(self.a)), regularisation)

    def gram_of_b(self, regularisation: float) -> torch.Tensor:
        """Compute B' B + regularisation * I for each block: (blocks, r, r)."""
        return _gram(self.matrices_b(whole(self.b)).mT, regularisation)


def inverted(grams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """
    Compute pseudo-inverses, those of one size at once, as accelerators ask for it.

    Args:
        grams: symmetric matrices, (blocks, r, r).
    """
    alike: dict[tuple, list[int]] = {}
    for place, gram in enumerate(grams):
        alike.setdefault((gram.shape[-1], gram.dtype, gram.device), []).append(place)
    inverses = list(grams)
    for places in alike.values():
        stacked = torch.linalg.pinv(torch.cat([grams[place] for place in places]), hermitian=True)
        for place, inverse in zip(places, stacked.split([len(grams[place]) for place in places]), strict=True):
            inverses[place] = inverse
    return inverses


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor of which each process may hold a part; all of them have to ask for it."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def _like(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Bring what was computed on the whole to the type of a gradient, and divide it among processes likewise."""
    value = value.to(gradient.dtype)
    return distribute_like(value, gradient) if is_divided(gradient) else value


def _gram(rows: torch.Tensor, regularisation: float) -> torch.Tensor:
    """Compute R R' + regularisation * I for matrices R, in float32 at least: in 16 bits its inverse would be noise."""
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    gram = rows @ rows.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(regularisation)
    return gram
