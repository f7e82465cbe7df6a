# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Covariances of layers' inputs, summed up while a model is run."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from ....utils.error import PeftValueError


class _Sum:
    """
    The sum of X' X over inputs X of some layers, each of which gets them in one call after the other.

    Args:
        features: width of the inputs.
        like: a tensor of the type and on the device of the sum.

    Attributes:
        matrix: (features, features)
        samples: how many samples there were.
        calls: how many inputs there were.
        calls_of: name of a layer -> how many of them it has got: as many, or one less.
        last: the last of the inputs, as long as a layer has still to get it.
    """

    def __init__(self, features: int, like: torch.Tensor) -> None:
        self.matrix = like.new_zeros(features, features)
        self.samples = self.calls = 0
        self.calls_of: dict[str, int] = {}
        self.last: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor) -> None:
        rows, samples = _scaled_rows(inputs, self.matrix.dtype)
        self.matrix.addmm_(rows.T, rows)
        self.samples, self.calls = self.samples + samples, self.calls + 1

    def without_last(self) -> "_Sum":
        """Give the sum of all inputs but the last one."""
        other = _Sum(0, self.matrix)
        rows, samples = _scaled_rows(self.last, self.matrix.dtype)
        other.matrix = torch.addmm(self.matrix, rows.T, rows, alpha=-1)
        other.samples, other.calls = self.samples - samples, self.calls - 1
        return other

    def late(self) -> list[str]:
        """Name the layers that have not got the last of the inputs."""
        return [name for name, calls in self.calls_of.items() if calls < self.calls]


class Covariances:
    """
    The covariance of each layer's inputs.

    Layers that get the very same tensors, such as the projections to queries, keys and values, share one sum: it is
    computed and held once. As soon as one of them gets another input, it goes on with a copy.

    Args:
        in_own_type: sum up in the type of the inputs, and not in float32.
    """

    def __init__(self, in_own_type: bool = False) -> None:
        self._in_own_type = in_own_type
        self._sum_of: dict[str, _Sum] = {}
        # inputs that layers have got as their first ones -> sum that begins with it
        self._first: dict[int, tuple[Any, int, _Sum]] = {}

    @torch.no_grad()
    def look(self, name: str, inputs: tuple[Any, ...]) -> None:
        """
        Take an input of a layer in.

        Args:
            name: name of the layer.
            inputs: its arguments, of which the first one is (..., features).

        Raises:
            PeftValueError: if the first input of a layer holds nan or infinite entries.
        """
        x = inputs[0]
        total = self._sum_of.get(name)
        if total is None:
            total = self._begin(name, x)
            if total.calls:  # another layer has had the same input
                total.calls_of[name] = total.calls
                return
        if total.calls_of[name] < total.calls:
            if x is total.last:
                total.calls_of[name] = total.calls
                if not total.late():
                    total.last = None
                return
            total = self._split(name, total)
        for other in total.late():
            self._split(other, total)
        total.add(x)
        total.calls_of[name] = total.calls
        total.last = x if len(total.calls_of) > 1 else None

    def _begin(self, name: str, x: torch.Tensor) -> _Sum:
        """Find the sum that begins with an input, or begin one."""
        version = -1 if x.is_inference() else x._version
        found = self._first.get(id(x))
        if found is not None and found[0]() is x and found[1] == version != -1 and found[2].calls == 1:
            total = found[2]
        else:
            if not x.isfinite().all():
                raise PeftValueError(
                    f"the inputs of {name!r} hold nan or infinite entries, which have no covariance; check the data, "
                    "and the type that the model computes in"
                )
            total = _Sum(x.shape[-1], x if self._in_own_type else x.new_empty(0, dtype=torch.float32))
            self._first[id(x)] = weakref.ref(x), version, total
        self._sum_of[name] = total
        total.calls_of[name] = 0
        return total

    def _split(self, name: str, total: _Sum) -> _Sum:
        """Let a layer that has not got the last input go on with a sum of its own."""
        own = total.without_last()
        own.calls_of[name] = total.calls_of.pop(name)
        self._sum_of[name] = own
        if not total.late():
            total.last = None
        return own

    def finish(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """
        Give the covariances. They are of no use to anybody else, and are given away.

        Args:
            names: of all layers.

        Returns:
            Name -> (features, features); layers with the same inputs have the same tensor.

        Raises:
            PeftValueError: if a layer was never called, or its inputs were not finite.
        """
        for total in {id(total): total for total in self._sum_of.values()}.values():
            for name in total.late():
                self._split(name, total)
        sums, self._sum_of, self._first = self._sum_of, {}, {}
        never = [name for name in names if name not in sums]
        if never:
            raise PeftValueError(
                f"run_model calls no layer named {', '.join(map(repr, never))}, so nothing is known about its inputs; "
                "check what run_model runs, or leave these targets out"
            )
        means: dict[int, torch.Tensor] = {}
        for name, total in sums.items():
            if id(total) not in means:
                means[id(total)] = total.matrix.div_(max(total.samples, 1))
                if not total.matrix.isfinite().all():
                    raise PeftValueError(
                        f"the covariance of the inputs of {name!r} is not finite; check the data, and do not use "
                        "use_float16_for_covariance where inputs are large"
                    )
        return {name: means[id(sums[name])] for name in names}


def _scaled_rows(inputs: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """
    Scale each sample by its largest entry, so that none of them counts for more than others.

    Args:
        inputs: (features,), (rows, features) of one sample, or (samples, ..., features).
        dtype: type to compute in.

    Returns:
        (rows, features), and the number of samples.
    """
    x = inputs.detach().to(dtype)
    x = x.reshape(1, -1, x.shape[-1]) if x.dim() < 3 else x.flatten(1, -2)
    largest = x.amax((1, 2), keepdim=True)
    # where nothing is positive, the largest entry says nothing about the size of the others
    largest = largest.where(largest > 0, x.abs().amax((1, 2), keepdim=True))
    largest = largest.where(largest > 0, torch.ones_like(largest))
    return (x / largest).flatten(0, 1), len(x)
