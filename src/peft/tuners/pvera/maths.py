# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The noise of PVeRA."""

import torch


def noise_like(tensor: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """
    Draw from the standard normal distribution.

    Args:
        tensor: tells shape, type and device.
        generator: a generator on the CPU; None for the global one of the device.
    """
    if generator is None:
        return torch.randn_like(tensor)
    return torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator).to(tensor.device)
