# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A batch in which samples have different adapters: the base layer once, and the adapters' factors as batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .._layer import AdditiveLayer


class MixedBatches:
    """
    To be mixed into LoRA's layers: computes each sample with the adapter that is named for it.

    Factors of one rank are stacked and multiplied as one batch, since many small products cost more than their
    arithmetic. What cannot be stacked is computed adapter by adapter.
    """

    def _mixed_batch_forward(
        self, x: torch.Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if type(self).adapter_forward is not AdditiveLayer.adapter_forward:  # the output is not a sum of terms
            return super()._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        samples: dict[str, list[int]] = {}
        for position, name in enumerate(adapter_names):
            if name != "__base__" and (name in samples or self.has_adapter(name)):
                samples.setdefault(name, []).append(position)
        for index, term in self._mixed_terms(samples, x):
            # added in the type of the term and rounded once, as for one adapter
            result = result.index_copy(0, index, (result[index] + term).to(result.dtype))
        return result

    def _mixed_terms(
        self, samples: dict[str, list[int]], x: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield positions in the batch, and what is to be added there."""
        by_rank: dict[tuple, list[str]] = {}
        for name in samples:
            by_rank.setdefault(self._stacking_key(name, x), []).append(name)
        for key, names in by_rank.items():
            longest = max(len(samples[name]) for name in names)
            # short lists are filled up, which must not become more work than it saves
            if key and len(names) > 1 and longest * len(names) <= 2 * sum(len(samples[name]) for name in names):
                yield self._stacked_term(names, [samples[name] for name in names], longest, x)
                continue
            for name in names:
                index = torch.tensor(samples[name], device=x.device)
                yield index, self.delta_forward(name, x[index])

    def _stacking_key(self, adapter: str, x: torch.Tensor) -> tuple:
        """Give what the factors of adapters must have in common to be stacked; () if they cannot be."""
        if self.is_embedding or self.training or self.lora_B[adapter].bias is not None:
            return ()
        weight = self.lora_A[adapter].weight
        if weight.dim() != 2 or (x.dtype != weight.dtype and not self.cast_input_dtype_enabled):
            return ()
        return weight.shape[0], weight.dtype, weight.device

    def _stacked_term(
        self, names: list[str], samples: list[list[int]], longest: int, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.stack([self.lora_A[name].weight for name in names])
        b = torch.stack([self.lora_B[name].weight for name in names])
        scaling = a.new_tensor([self.scaling[name] for name in names]).view(-1, 1, 1)
        filled = torch.tensor([rows + rows[:1] * (longest - len(rows)) for rows in samples], device=x.device)
        inputs = x[filled].to(a.dtype)  # (adapters, longest, ..., in)
        hidden = torch.bmm(inputs.flatten(1, -2), a.mT) * scaling
        term = torch.bmm(hidden, b.mT).view(*inputs.shape[:-1], b.shape[1])
        if all(len(rows) == longest for rows in samples):
            return filled.flatten(), term.flatten(0, 1)
        wanted = torch.tensor([[i < len(rows) for i in range(longest)] for rows in samples], device=x.device)
        return filled[wanted], term[wanted]
