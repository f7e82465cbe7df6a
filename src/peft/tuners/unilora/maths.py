# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Where the entries of Uni-LoRA's vector go."""

from functools import lru_cache

import numpy as np
import torch

from ...utils.error import PeftValueError
from .config import UniLoraConfig


@lru_cache(maxsize=1)  # all layers of an adapter ask for the same
def positions(count: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Hand the entries of a vector out, each as often as the others, in random order.

    Args:
        count: how many places there are.
        length: how many entries.
        seed: of a generator of numpy.

    Returns:
        (count,), the entry that goes to each place, and (length,), 1 / sqrt(number of places) for each entry, with
        which the map from vectors to places is an isometry; 0 for an entry that goes nowhere.

    Raises:
        PeftValueError: if there are no entries, or less than no places.
    """
    if count < 0 or length <= 0:
        raise PeftValueError(f"an index needs a count of at least 0 and a positive length, found {count} and {length}")
    generator = np.random.default_rng(seed)
    entries = np.repeat(np.arange(length, dtype=np.int64), count // length)
    if count % length:
        entries = np.concatenate([entries, generator.choice(length, size=count % length, replace=False)])
    generator.shuffle(entries)
    index = torch.from_numpy(entries)
    places = torch.bincount(index, minlength=length)
    return index, torch.where(places > 0, places, torch.inf).rsqrt()


def entries(count: int, length: int, seed: int, first: int, size: tuple[int, int]) -> torch.Tensor:
    """
    Tell which entries go to a matrix.

    Args:
        count: how many places there are.
        length: how many entries.
        seed: see `positions`.
        first: which place the matrix begins with.
        size: rows and columns; its places come row by row.
    """
    index, _ = positions(count, length, seed)
    return index[first : first + size[0] * size[1]].view(size).clone()


def scales(count: int, length: int, seed: int, first: int, size: tuple[int, int]) -> torch.Tensor:
    """Tell what the entries of a matrix are multiplied by; the arguments are those of `entries`."""
    return positions(count, length, seed)[1][entries(count, length, seed, first, size)]


def start_vector(c: UniLoraConfig, theta: torch.Tensor) -> None:
    """
    Draw the vector, on the CPU.

    Args:
        c: the config, which has the bound.
        theta: where it is written.
    """
    drawn, bound = torch.empty(theta.shape), c.init_theta_d_bound
    theta.copy_(drawn.uniform_(-bound, bound) if c.init_weights else drawn.normal_())
