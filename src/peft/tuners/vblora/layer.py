# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""VB-LoRA's layer: logits that choose and mix vectors of the shared bank."""

import torch
import torch.nn.functional as F
from torch import nn

from ...anatomy.kinds import stores_weight_transposed
from ...layers.additive import AdditiveLayer
from ...utils.error import PeftRuntimeError, PeftValueError
from ...utils.old_names import old_names
from .config import VBLoRAConfig
from .topk import NOT_SAVED, TopkForm


class VBLoRALayer(AdditiveLayer):
    """
    What VB-LoRA's layers share: W + B A, with A and B cut into pieces that are mixtures of vectors of the bank.

    Attributes:
        vblora_logits_A: (r, in_features / vector_length, num_vectors) by adapter name.
        vblora_logits_B: (out_features / vector_length, r, num_vectors) by adapter name.
        vblora_vector_bank: (num_vectors, vector_length) by adapter name, one object for all layers.
    """

    adapter_layer_names = ("vblora_logits_A", "vblora_logits_B")
    other_param_names = ("r", "topk", "vblora_dropout", "save_only_topk_weights")
    shared_layer_names = ("vblora_vector_bank",)
    container_classes = {"vblora_dropout": nn.ModuleDict}

    def make_adapter(self, adapter_name: str, config: VBLoRAConfig) -> None:
        """
        Make the logits of an adapter.

        Args:
            adapter_name: name.
            config: the adapter's config.

        Raises:
            PeftValueError: if the vectors do not fit the layer.
        """
        length = config.vector_length
        if self.in_features % length or self.out_features % length:
            raise PeftValueError(
                f"vector_length={length} does not divide {self.in_features} inputs and {self.out_features} outputs of "
                "a target; choose a divisor of both, or narrow target_modules"
            )
        self.r[adapter_name], self.topk[adapter_name] = config.r, config.topk
        self.save_only_topk_weights[adapter_name] = config.save_only_topk_weights
        dropout = config.vblora_dropout
        self.vblora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        r, vectors = config.r, config.num_vectors
        self.vblora_logits_A[adapter_name] = self.new_parameter(r, self.in_features // length, vectors)
        self.vblora_logits_B[adapter_name] = self.new_parameter(self.out_features // length, r, vectors)

    def reset_adapter(self, adapter_name: str, config: VBLoRAConfig) -> None:
        """Draw the logits."""
        for logits in (self.vblora_logits_A, self.vblora_logits_B):
            nn.init.normal_(logits[adapter_name], std=config.init_logits_std)

    def saved_forms(self, adapter_name: str) -> dict[str, TopkForm]:
        """Give the short form of the logits."""
        layer = self.source(adapter_name)
        vectors = layer.vblora_logits_A[adapter_name].shape[-1]
        form = TopkForm(layer.topk[adapter_name], vectors, layer.save_only_topk_weights[adapter_name])
        return dict.fromkeys(self.adapter_layer_names, form)

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the factors together, A (r, in_features) and B (out_features, r)."""
        a = self._mixtures(self.vblora_logits_A[adapter], adapter).flatten(start_dim=1)
        return a, self._mixtures(self.vblora_logits_B[adapter], adapter).transpose(1, 2).flatten(end_dim=1)

    def _mixtures(self, logits: torch.Tensor, adapter: str) -> torch.Tensor:
        """Mix vectors of the bank: (m, n, num_vectors) -> (m, n, vector_length)."""
        if self.training and logits.requires_grad and (logits[0, 0] <= NOT_SAVED).any():
            raise PeftRuntimeError(
                f"adapter {adapter!r} comes from a checkpoint with save_only_topk_weights=True, which lacks what "
                "training needs; train on from a checkpoint with all logits, or call eval()"
            )
        values, indices = logits.topk(self.topk[adapter], dim=-1)
        bank = self.vblora_vector_bank[adapter].to(logits.device)
        return (values.softmax(dim=-1).unsqueeze(-2) @ F.embedding(indices, bank)).squeeze(-2)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Compute B A, in the layout of the base weight."""
        a, b = self.factors(adapter)
        return (b @ a).T if stores_weight_transposed(self.get_base_layer()) else b @ a

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute B (A x)."""
        a, b = self.factors(adapter)
        return F.linear(F.linear(self.vblora_dropout[adapter](x.to(a.dtype)), a), b)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say yes: the delta is a matrix."""
        return True


class Linear(VBLoRALayer, nn.Module):
    """VB-LoRA on `nn.Linear` and on the `Conv1D` of transformers."""


__getattr__ = old_names(__name__)
