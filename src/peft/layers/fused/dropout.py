# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Dropout of which the state of the generator is kept, and not what was drawn from it."""

from typing import NamedTuple

import torch


class Drawn(NamedTuple):
    """
    What was dropped, as it can be drawn again.

    Attributes:
        p: share that was dropped.
        state: of the device's generator before it was drawn; for CUDA its seed and its offset.
    """

    p: float
    state: torch.Tensor | tuple[int, int]


def drop(x: torch.Tensor, p: float) -> tuple[torch.Tensor, Drawn]:
    """
    Drop entries as `torch.nn.functional.dropout` does, the same ones.

    Args:
        x: any tensor.
        p: share to drop, more than 0 and less than 1.

    Returns:
        What is left, scaled, and how to find it again.
    """
    if x.is_cuda:
        generator = torch.cuda.default_generators[x.get_device()]
        drawn = Drawn(p, (generator.initial_seed(), generator.get_offset()))
        return torch.native_dropout(x, p, True)[0], drawn
    drawn = Drawn(p, torch.default_generator.get_state())
    return masked(x, torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p), p), drawn


def mask_again(like: torch.Tensor, drawn: Drawn) -> torch.Tensor:
    """
    Draw what was kept once more.

    Args:
        like: a tensor of the type and layout of what was dropped from.
        drawn: what `drop` has given.

    Returns:
        Of the shape of `like`; True for what is kept.
    """
    if not like.is_cuda:
        generator = torch.Generator()
        generator.set_state(drawn.state)
        return torch.empty_like(like, dtype=torch.bool).bernoulli_(1 - drawn.p, generator=generator)
    # the mask comes from a kernel that draws from the device's own generator, as it does in `torch.utils.checkpoint`
    generator = torch.cuda.default_generators[like.get_device()]
    seed, offset = generator.initial_seed(), generator.get_offset()
    try:
        _rewind(generator, *drawn.state)
        return torch.native_dropout(like, drawn.p, True)[1]
    finally:
        _rewind(generator, seed, offset)


def _rewind(generator: torch.Generator, seed: int, offset: int) -> None:
    if generator.initial_seed() != seed:
        generator.manual_seed(seed)
    generator.set_offset(offset)


def masked(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """
    Give what a mask leaves, scaled so that the expectation stays; the same for gradients.

    Args:
        x: any tensor.
        mask: of its shape.
        p: share that is dropped.
    """
    # as torch rounds it, so that results are the same bit by bit; multiplied in the precision of the number
    scale = 1 / (1 - p) if x.dtype == torch.float64 else torch.ones(()).div_(1 - p).item()
    return x.mul(mask).mul_(scale)
