# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Dropout of which the state of the generator is kept where memory is short, and not what was drawn from it."""

import torch


# of a device's generator: all of it, or for CUDA its seed and its offset
State = torch.Tensor | tuple[int, int]


def keeps_mask(x: torch.Tensor) -> bool:
    """Say whether what was drawn is kept; processors need longer to draw it again than to read it."""
    return not x.is_cuda


def draw(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor, State]:
    """
    Drop entries as `torch.nn.functional.dropout` does, the same ones.

    Args:
        x: any tensor.
        p: share to drop, more than 0 and less than 1.

    Returns:
        What is left, scaled; a mask for `masked`; and how to find that again.
    """
    if x.is_cuda:
        generator = torch.cuda.default_generators[x.get_device()]
        state = generator.initial_seed(), generator.get_offset()
        return *torch.native_dropout(x, p, True), state
    state = torch.default_generator.get_state()
    mask = _factors(x, p, torch.default_generator)
    return masked(x, mask, p), mask, state


def draw_again(x: torch.Tensor, p: float, state: State) -> torch.Tensor:
    """
    Find the mask again.

    Args:
        x: a tensor of the type and layout of what was dropped from.
        p: the share that was dropped.
        state: what `draw` has given.

    Returns:
        The mask, of the shape of `x`.
    """
    if not x.is_cuda:
        generator = torch.Generator(device="cpu")
        generator.set_state(state)
        return _factors(x, p, generator)
    # the mask comes from a kernel that draws from the device's own generator, as it does in `torch.utils.checkpoint`
    generator = torch.cuda.default_generators[x.get_device()]
    seed, offset = generator.initial_seed(), generator.get_offset()
    try:
        _rewind(generator, *state)
        return torch.native_dropout(x, p, True)[1]
    finally:
        _rewind(generator, seed, offset)


def masked(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """
    Give what a mask leaves, scaled so that the expectation stays; the same for gradients.

    Args:
        x: any tensor.
        mask: of its shape: whether an entry is left, or what it is multiplied by.
        p: share that is dropped.
    """
    if mask.dtype == torch.bool:
        return torch.ops.aten.native_dropout_backward.default(x, mask, 1 / (1 - p))
    return x.mul(mask).to(x.dtype)


def _factors(x: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    """Draw what entries are multiplied by, which half precision would round the same way everywhere."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x, dtype=dtype).bernoulli_(1 - p, generator=generator).div_(1 - p)


def _rewind(generator: torch.Generator, seed: int, offset: int) -> None:
    if generator.initial_seed() != seed:
        generator.manual_seed(seed)
    generator.set_offset(offset)
