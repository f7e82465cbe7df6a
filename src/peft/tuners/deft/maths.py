# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Directions out of a factor."""

import torch


def directions(p: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Find directions.

    Args:
        p: (out, r)
        method: "relu" or "qr".

    Returns:
        Two tensors (out, r): what is written into, and what tells how much is there.
    """
    if method == "relu":
        return p, p.relu()
    q = torch.linalg.qr(p.to(torch.promote_types(p.dtype, torch.float32))).Q
    return q, q
