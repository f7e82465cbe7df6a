# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How AdaLoRA hands out ranks: by the importance of each, smoothed over the steps of training."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ...anatomy.walking import adapter_modules
from ...utils.error import PeftKeyError
from ..lora.layer import LoraLayer
from .config import AdaLoraConfig
from .maths import RANK_AXIS, greatest


class RankAllocator:
    """
    Takes away the least important ranks of a model, until the budget of the step is kept.

    Args:
        model: the base model, with AdaLoRA's layers in it.
        peft_config: config of the adapter.
        adapter_name: its name.

    Attributes:
        adapter_name: the adapter whose ranks are handed out.
        init_bgt: number of ranks of all layers at first.
        target_bgt: number of ranks of all layers in the end.
        ipt: name of a factor -> importance of its entries at the last step.
        exp_avg_ipt: the same, as an average over the steps.
        exp_avg_unc: average variation of it.
    """

    def __init__(self, model: nn.Module, peft_config: AdaLoraConfig, adapter_name: str) -> None:
        self.peft_config, self.adapter_name = peft_config, adapter_name
        layers = [layer for _, layer in self.layers(model)]
        self.init_bgt = sum(layer.lora_E[adapter_name].shape[0] for layer in layers)
        self.target_bgt = peft_config.target_r * len(layers)
        self.reset_ipt()

    def layers(self, model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
        """
        Yield the layers that have the adapter's tensors, by name.

        Args:
            model: the base model.
        """
        for name, module in adapter_modules(model):
            if self.adapter_name in getattr(module, "lora_E", ()):
                yield name, module

    def set_total_step(self, total_step: int) -> None:
        """
        Set how long training is.

        Args:
            total_step: steps in all.
        """
        self.peft_config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forget all importances."""
        self.ipt: dict[str, torch.Tensor] = {}
        self.exp_avg_ipt: dict[str, torch.Tensor] = {}
        self.exp_avg_unc: dict[str, torch.Tensor] = {}

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """
        Give the number of ranks for a step; it falls with the third power of the time that is left.

        Args:
            step: steps of training so far.

        Returns:
            Number of ranks of all layers, and whether they are to be allocated at this step.
        """
        config = self.peft_config
        last = config.total_step - config.tfinal
        if step <= config.tinit:
            return self.init_bgt, False
        if step > last:
            return self.target_bgt, True
        time_left = 1 - (step - config.tinit) / (last - config.tinit)
        budget = int((self.init_bgt - self.target_bgt) * time_left**3 + self.target_bgt)
        return budget, step % config.deltaT == 0

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """
        Take the importances of this step in: |weight * gradient| for each entry.

        Args:
            model: the base model, after a backward pass.
        """
        beta1, beta2 = self.peft_config.beta1, self.peft_config.beta2
        for name, layer in self.layers(model):
            for factor in RANK_AXIS:
                parameter = getattr(layer, factor)[self.adapter_name]
                if parameter.grad is None:
                    continue
                key = f"{name}.{factor}.{self.adapter_name}"
                now = self.ipt[key] = (parameter * parameter.grad).abs().detach()
                zeros = torch.zeros_like(now)
                average = beta1 * self.exp_avg_ipt.get(key, zeros) + (1 - beta1) * now
                variation = (now - average).abs()
                self.exp_avg_unc[key] = beta2 * self.exp_avg_unc.get(key, zeros) + (1 - beta2) * variation
                self.exp_avg_ipt[key] = average

    # clients that bring a `mask_to_budget` of their own call these two
    def _element_score(self, n: str) -> torch.Tensor:
        """Give the importance of each entry of a factor, by the factor's name: its average times its variation."""
        if n not in self.exp_avg_ipt:
            known = ", ".join(map(repr, [*self.exp_avg_ipt][:3])) or "no factor yet"
            raise PeftKeyError(f"no importance of {n!r} is known, but of {known}; call update_ipt after backward")
        return self.exp_avg_ipt[n] * self.exp_avg_unc[n]

    def _combine_ipt(self, ipt_E: torch.Tensor, ipt_AB: torch.Tensor) -> torch.Tensor:
        """Give one number per rank, (r,), from that of its singular value, (r, 1), and of its two vectors, (r, 2)."""
        return ipt_E.flatten() + ipt_AB.sum(dim=1)

    def _importance(self, name: str, layer: LoraLayer) -> torch.Tensor:
        """Give one number per rank, (r,): that of its singular value, and the averages over its two vectors."""
        keys = {factor: f"{name}.{factor}.{self.adapter_name}" for factor in RANK_AXIS}
        if any(key not in self.exp_avg_ipt for key in keys.values()):
            return torch.zeros_like(layer.lora_E[self.adapter_name]).flatten()
        scores = {factor: self._element_score(key) for factor, key in keys.items()}
        vectors = torch.stack((scores["lora_A"].mean(dim=1), scores["lora_B"].mean(dim=0)), dim=1)
        return self._combine_ipt(scores["lora_E"], vectors)

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """
        Set the singular values of the least important ranks to zero.

        Args:
            model: the base model.
            budget: number of ranks to leave.

        Returns:
            Name of a layer's E -> for each of its ranks, whether it is left.
        """
        importances = {f"{name}.lora_E": self._importance(name, layer) for name, layer in self.layers(model)}
        pattern = greatest(importances, budget)
        self.mask_using_rank_pattern(model, pattern)
        return pattern

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """
        Take the importances of a step in, and allocate the ranks if their time has come.

        Args:
            model: the base model, after a backward pass.
            global_step: steps of training so far.
            force_mask: allocate them in any case.

        Returns:
            The budget, and what `mask_to_budget` returns; None if nothing was allocated.
        """
        if global_step < self.peft_config.total_step - self.peft_config.tfinal:
            self.update_ipt(model)
        budget, is_due = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if is_due or force_mask else None

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: Mapping[str, Sequence[bool]]) -> None:
        """
        Set the singular values of the ranks that are not left to zero.

        Args:
            model: the base model.
            rank_pattern: what `mask_to_budget` returns.
        """
        for name, layer in self.layers(model):
            singular_values = layer.lora_E[self.adapter_name]
            mask = rank_pattern[f"{name}.lora_E"]
            if len(mask) != len(singular_values):  # the pattern has ranks that are gone for good
                mask = [mask[rank] for rank in layer.ranks_made[self.adapter_name]]
            singular_values.mul_(torch.tensor(mask, device=singular_values.device).unsqueeze(1))
