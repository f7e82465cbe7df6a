# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The rule of methods that declare how the outputs of a layer are mixed."""

import torch

from ...anatomy.kinds import is_linear
from ...anatomy.offload import tensor_of
from ...layers.weight import WeightLayer
from .layers import DeclaredLayer
from .tensors import Tensors


class DeclaredMixing(DeclaredLayer, WeightLayer):
    """Rule of `mix`: a linear function of a layer's outputs, so of the rows of its weight and of its bias."""

    @property
    def corrects_output(self) -> bool:
        """Whether the outputs are what is mixed, as they are unless the owner of a tied weight has others."""
        return is_linear(self.get_base_layer()) and all(map(self.has_outputs_of_owner, self._owners))

    def mixed(self, adapter: str, outputs: torch.Tensor, function: str = "mix") -> torch.Tensor:
        """
        Mix outputs, with the digits and in the type that they have.

        Args:
            adapter: name.
            outputs: (..., out)
            function: "unmix" to undo it.
        """
        source = self.source(adapter)
        dtype = torch.promote_types(outputs.dtype, next(source.adapter_parameters(adapter)).dtype)
        compute = getattr(self.declared, function)
        return compute(Tensors(source, adapter), outputs.to(dtype), source.settings[adapter]).to(outputs.dtype)

    def correct_output(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Mix the outputs."""
        return self.mixed(adapter, result)

    def transform_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Mix the rows of the weight."""
        return self.from_rows(self.mixed(adapter, self.as_rows(weight).T).T)

    def inverse_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Undo that."""
        return self.from_rows(self.mixed(adapter, self.as_rows(weight).T, "unmix").T)

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether the rows can be found again; if not, the weight that they come from is kept."""
        return self.declared.can_unmix(Tensors(self, adapter), self.settings[adapter])

    def merged_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Mix the bias."""
        bias = tensor_of(self.get_base_layer(), "bias")
        return {} if bias is None else {"bias": self.bias_after(adapter, bias)}

    def bias_after(self, adapter: str, bias: torch.Tensor) -> torch.Tensor:
        """Mix a bias likewise."""
        return self.mixed(adapter, bias) if self.has_outputs_of_owner(adapter) else bias
