# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The starts as methods of a layer, by the names that callers of the released package use."""

import torch

from .registry import find_start


class StartMethods:
    """To be mixed into `LoraLayer`."""

    @torch.no_grad()
    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Start an adapter by PiSSA; `init_lora_weights` is "pissa" or "pissa_niter_N"."""
        find_start(init_lora_weights).start(self, adapter_name)

    @torch.no_grad()
    def olora_init(self, adapter_name: str) -> None:
        """Start an adapter by OLoRA."""
        find_start("olora").start(self, adapter_name)

    @torch.no_grad()
    def orthogonal_init(self, adapter_name: str) -> None:
        """Start an adapter with orthogonal halves."""
        find_start("orthogonal").start(self, adapter_name)
