# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A batch in which samples have different adapters: the base layer once, and the adapters' factors as batches."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch


class MixedBatches:
    """
    To be mixed into LoRA's layers: computes each sample with the adapter that is named for it.

    Factors of one rank are stacked and multiplied as one batch, since many small products cost more than their
    arithmetic. What cannot be stacked is computed adapter by adapter.
    """

    def _mixed_batch_forward(
        self, x: torch.Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if any(name in self.variants for name in adapter_names):  # the output may be no sum of terms
            return super()._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        samples: dict[str, list[int]] = {}
        for position, name in enumerate(adapter_names):
            if name != "__base__" and (name in samples or self.has_adapter(name)):
                samples.setdefault(name, []).append(position)
        for index, term in self._mixed_terms(samples, x):
            # added in the type of the term and rounded once, as for one adapter
            if index is None:
                result = (result + term).to(result.dtype)
            else:
                result = result.index_copy(0, index, (result[index] + term).to(result.dtype))
        return result

    def _mixed_terms(
        self, samples: dict[str, list[int]], x: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor | None, torch.Tensor]]:
        """Yield positions in the batch (None for all of them), and what is to be added there."""
        factors = self._stackable_factors(samples, x)
        by_rank: dict[int, list[str]] = {}
        for name, (a, _) in factors.items():
            by_rank.setdefault(a.shape[0], []).append(name)
        for names in by_rank.values():
            longest = max(len(samples[name]) for name in names)
            # short lists are filled up, which must not become more work than it saves
            if len(names) > 1 and longest * len(names) <= 2 * sum(len(samples[name]) for name in names):
                yield self._stacked_term(names, [factors[name] for name in names], samples, longest, x)
                for name in names:
                    del samples[name]
        for name, rows in samples.items():
            index = torch.tensor(rows, device=x.device)
            yield index, self.delta_forward(name, x[index])

    def _stackable_factors(
        self, adapters: Iterable[str], x: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Find the adapters that are two matrices without a bias, and give these: (r, in) and (out, r)."""
        if self.is_embedding or self.training:  # in training there may be dropout
            return {}
        found = {}
        lora_a, lora_b = self.lora_A, self.lora_B
        for name in adapters:
            a, b = lora_a[name].weight, lora_b[name]
            fits = a.device == x.device and (x.dtype == a.dtype or self.cast_input_dtype_enabled)
            if fits and a.dim() == 2 and b.bias is None:
                found[name] = (a, b.weight)
        return found

    def _stacked_term(
        self,
        names: list[str],
        factors: list[tuple[torch.Tensor, torch.Tensor]],
        samples: dict[str, list[int]],
        longest: int,
        x: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        a, b = (torch.stack(side) for side in zip(*factors, strict=True))
        rows = [samples[name] for name in names]
        filled = [own + own[:1] * (longest - len(own)) for own in rows]
        in_order = longest == 1 and [own[0] for own in rows] == list(range(len(x)))
        index = None if in_order else torch.tensor(filled, device=x.device)
        inputs = (x.unsqueeze(1) if in_order else x[index]).to(a.dtype)  # (adapters, longest, ..., in)
        # the small side is scaled
        hidden = torch.bmm(inputs.flatten(1, -2), a.mT) * a.new_tensor([self.scaling[n] for n in names]).view(-1, 1, 1)
        term = torch.bmm(hidden, b.mT).view(*inputs.shape[:-1], b.shape[1])
        if in_order or all(len(own) == longest for own in rows):
            return None if in_order else index.flatten(), term.flatten(0, 1)
        wanted = torch.tensor([[i < len(own) for i in range(longest)] for own in rows], device=x.device)
        return index[wanted], term[wanted]
