# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""VB-LoRA: W + B A, with A and B cut into pieces that are mixtures of vectors of a bank that all layers share."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...configs.checks import check_counts, check_magnitudes
from ...utils.constants import TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.layers import DeclaredAdditive
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained
from .config import VBLoRAConfig
from .maths import TopkForm, check_trainable, mixtures


class BankLayer(DeclaredAdditive):
    """A layer that does not train logits of which a checkpoint has left out most."""

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """
        Compute B (A x).

        Raises:
            PeftRuntimeError: while training an adapter from a checkpoint in the short form.
        """
        if self.training:
            check_trainable(adapter, self.source(adapter).vblora_logits_A[adapter])
        return super().delta_forward(adapter, x)

    def reset_vblora_logits(self, adapter_name: str, init_logits_std: float) -> None:
        """
        Draw an adapter's logits anew, from a normal distribution.

        Args:
            adapter_name: name.
            init_logits_std: its standard deviation.
        """
        self.restart(adapter_name, init_logits_std=init_logits_std)


@method(
    "VBLORA",
    VBLoRAConfig,
    kinds={nn.Linear: "Linear", Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING,
    dropout="vblora_dropout",
    settings={name: name for name in ("r", "topk", "save_only_topk_weights")},
    rule=BankLayer,
)
class VBLoRA:
    """A layer with factors out of a vector bank added to its weight."""

    trained, shared = ("logits_A", "logits_B", "vector_bank"), ("vector_bank",)

    def tensors(shape: Shape, c: VBLoRAConfig) -> dict[str, Trained]:
        """Tell the logits, (r, in / vector_length, num_vectors) and (out / vector_length, r, num_vectors)."""
        (outputs, inputs), length = shape, c.vector_length
        if inputs % length or outputs % length:
            raise PeftValueError(
                f"vector_length={length} does not divide {inputs} inputs and {outputs} outputs of a target; choose a "
                "divisor of both, or narrow target_modules"
            )

        def start(logits: torch.Tensor) -> None:
            nn.init.normal_(logits, std=c.init_logits_std)

        return {
            "logits_A": Trained((c.r, inputs // length, c.num_vectors), start),
            "logits_B": Trained((outputs // length, c.r, c.num_vectors), start),
        }

    def shared_tensors(shapes: object, c: VBLoRAConfig) -> dict[str, Trained]:
        """Tell the bank, (num_vectors, vector_length)."""
        size, bound = (c.num_vectors, c.vector_length), c.init_vector_bank_bound
        return {"vector_bank": Trained(size, lambda bank: nn.init.uniform_(bank, -bound, bound))}

    def saved_forms(c: VBLoRAConfig) -> dict[str, TopkForm]:
        """Give the short form of the logits."""
        return dict.fromkeys(("logits_A", "logits_B"), TopkForm(c.topk, c.num_vectors, c.save_only_topk_weights))

    def low_rank(t: Tensors, shape: Shape, c: VBLoRAConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Put B (out, r) and A (r, in) together."""
        bank = t.vector_bank.to(t.logits_A.device)
        b = mixtures(t.logits_B, bank, c.topk).transpose(1, 2).flatten(end_dim=1)
        return b, mixtures(t.logits_A, bank, c.topk).flatten(start_dim=1)

    def check(c: VBLoRAConfig, others: Sequence[VBLoRAConfig]) -> None:
        """Refuse numbers that are none."""
        check_counts(c, "r", "num_vectors", "vector_length", "topk")
        check_magnitudes(c, "init_vector_bank_bound", "init_logits_std")
        if c.topk > c.num_vectors:
            raise PeftValueError(f"topk={c.topk} vectors cannot be chosen out of num_vectors={c.num_vectors}")


VBLoRALayer, Linear = VBLoRA.Layer, VBLoRA.Linear

__getattr__ = old_names(__name__)
