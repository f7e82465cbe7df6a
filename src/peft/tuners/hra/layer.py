# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""HRA on single layers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...layers.merging.changes import changes_adapter
from ...utils.error import PeftValueError
from ...utils.warning import warn
from ..base import BaseTunerLayer, check_adapters_to_merge
from ..families.rotations import Rotation, RotationLayer, full_precision
from .config import HRAConfig


__all__ = ["BaseTunerLayer", "HRAConfig", "HRAConv2d", "HRALayer", "HRALinear", "check_adapters_to_merge"]


# ------------------------------------------------------------------------------------------------------------- math
@dataclass(frozen=True)
class Reflections(Rotation):
    """
    A product of Householder reflections in the compact form I - U T U'.

    Args:
        directions: U, (features, r), columns of length 1.
        core: T, (r, r).
    """

    directions: torch.Tensor
    core: torch.Tensor

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows (..., features) at the cost of two products with U."""
        rows = rows.to(self.directions.dtype)
        return rows - (rows @ self.directions) @ (self.core @ self.directions.mT)

    def transposed(self) -> "Reflections":
        """Give the reflections in the opposite order."""
        return Reflections(self.directions, self.core.mT)


def reflections(directions: torch.Tensor) -> Reflections:
    """
    Give the product of the reflections H_i = I - 2 u_i u_i' in the order of the columns, H_1 H_2 ... H_r.

    Args:
        directions: (features, r), columns of any length; one of length 0 reflects nothing.
    """
    unit = F.normalize(directions, dim=0)
    # the inverse of T has the products of earlier with later columns above its diagonal, and 1/2 on it
    inverse = (unit.mT @ unit).triu(1) + torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device) / 2
    identity = torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
    return Reflections(unit, torch.linalg.solve_triangular(inverse, identity, upper=True))


def orthogonal_reflections(directions: torch.Tensor) -> Reflections:
    """
    Give the product of reflections at the columns after Gram-Schmidt: minus the identity in the space that they span.

    Args:
        directions: (features, r), linearly independent columns.
    """
    unit, _ = torch.linalg.qr(directions)
    return Reflections(unit, 2 * torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device))


# ----------------------------------------------------------------------------------------------------------- layers
class HRALayer(RotationLayer):
    """
    HRA on one layer.

    Attributes:
        hra_u: adapter name -> directions of the reflections, (features, r).
        hra_r: adapter name -> number of reflections.
        hra_apply_GS: adapter name -> whether the directions are made orthogonal.
    """

    adapter_layer_names = ("hra_u",)
    other_param_names = ("hra_r", "hra_apply_GS")

    def make_adapter(self, adapter_name: str, config: HRAConfig, r: int | None = None, **kwargs: Any) -> None:
        """
        Make the directions.

        Args:
            adapter_name: name.
            config: the adapter's config.
            r: number of reflections, if it is another one than the config's.
            kwargs: not used; kept for callers of the released package.

        Raises:
            PeftValueError: if there is no reflection.
        """
        r = r or config.r
        if r < 1:
            raise PeftValueError(f"r must be at least 1, found {r}")
        self.hra_u[adapter_name] = self.new_parameter(self.rows_to_rotate(), r)
        self.hra_r[adapter_name], self.hra_apply_GS[adapter_name] = r, config.apply_GS

    def reset_adapter(self, adapter_name: str, config: HRAConfig) -> None:
        """Start with pairs of reflections that cancel, where that is wanted and can be, else at random."""
        if not config.init_weights:
            self.reset_hra_parameters_random(adapter_name)
        else:
            self.reset_hra_parameters(adapter_name)

    @changes_adapter
    def reset_hra_parameters(self, adapter_name: str) -> None:
        """
        Start an adapter anew, as the identity if the number of reflections is even.

        Args:
            adapter_name: name.
        """
        u, r = self.hra_u[adapter_name], self.hra_r[adapter_name]
        if r % 2:
            warn(f"r={r} is odd: reflections cancel in pairs, so the new adapter changes the model's outputs at once")
            self.reset_hra_parameters_random(adapter_name)
        elif self.hra_apply_GS[adapter_name]:  # of two equal directions nothing would remain of the second one
            self.reset_hra_parameters_random(adapter_name)
        else:
            half = torch.empty_like(u[:, ::2])
            nn.init.kaiming_uniform_(half, a=5**0.5)
            u.data.copy_(half.repeat_interleave(2, dim=1))

    @changes_adapter
    def reset_hra_parameters_random(self, adapter_name: str) -> None:
        """
        Start an adapter anew, at random.

        Args:
            adapter_name: name.
        """
        nn.init.kaiming_uniform_(self.hra_u[adapter_name], a=5**0.5)

    def rotation(self, adapter: str, training: bool = False) -> Reflections:
        """Compute the product of the reflections that rows meet; the weight meets them in the opposite order."""
        directions = full_precision(self.hra_u[adapter])
        product = orthogonal_reflections if self.hra_apply_GS[adapter] else reflections
        return product(directions).transposed()

    def get_delta_weight(self, adapter_name: str, reverse: bool = False) -> torch.Tensor:
        """
        Build the product of the reflections, H_1 ... H_r. It is meant for looking at; nothing else needs it.

        Args:
            adapter_name: name.
            reverse: in the opposite order.

        Returns:
            (features, features)
        """
        product = super().get_delta_weight(adapter_name)
        return product if reverse else product.T


class HRALinear(HRALayer, nn.Module):
    """HRA on `nn.Linear` and transformers' `Conv1D`; see `BaseTunerLayer` for the arguments."""


class HRAConv2d(HRALayer, nn.Module):
    """HRA on `nn.Conv2d`: what is reflected are the rows of the weight (out, in * kernel height * kernel width)."""

    transforms_input = False
