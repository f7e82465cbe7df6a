# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Where tensors are put when nobody says it."""

import torch


def infer_device() -> str:
    """Name the device that tensors are loaded to when nobody says: an accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return "cpu" if accelerator is None else accelerator.type
