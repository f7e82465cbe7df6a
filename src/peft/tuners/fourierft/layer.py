# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""FourierFT: W + s Re(ifft2(F)), where F has a few real coefficients at places that a seed tells."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.layers import DeclaredAdditive
from ..declared.method import method
from ..declared.tensors import Frozen, Shape, Tensors, Trained
from .config import FourierFTConfig
from .maths import is_worth_building, spectral_matrix, spectral_product


class SpectralLayer(DeclaredAdditive):
    """A layer with a spectrum, with what the released package lets do with it."""

    def reset_fourier_parameters(self, adapter_name: str) -> None:
        """
        Start an adapter anew, with coefficients of zero.

        Args:
            adapter_name: name.
        """
        self.restart(adapter_name, init_weights=True)


@method(
    "FOURIERFT",
    FourierFTConfig,
    patterns={"n_frequency": "n_frequency_pattern"},
    targets=TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING,
    settings={
        "fourierft_n_frequency": "n_frequency",
        "fourierft_scaling": "scaling",
        "fourierft_random_loc_seed": "random_loc_seed",
    },
    names={"places": "indices"},
    rule=SpectralLayer,
)
class FourierFT:
    """A layer with a sparse spectrum added to its weight."""

    trained, frozen = ("spectrum",), ("places",)

    def tensors(shape: Shape, c: FourierFTConfig) -> dict[str, Any]:
        """Tell the coefficients, (n,), and their places: rows and columns, (2, n)."""
        out, inputs = shape
        n = c.n_frequency
        if not 0 < n <= out * inputs:
            raise PeftValueError(
                f"n_frequency must be positive and at most {out * inputs}, the number of entries of a target's "
                f"weight, found {n}"
            )

        def places() -> torch.Tensor:
            generator = torch.Generator().manual_seed(c.random_loc_seed)
            chosen = torch.randperm(out * inputs, generator=generator)[:n]
            return torch.stack((chosen // inputs, chosen % inputs))

        def start(spectrum: torch.Tensor) -> None:
            nn.init.normal_(spectrum).mul_(not c.init_weights)  # what is drawn after it does not depend on the start

        return {"spectrum": Trained((n,), start), "places": Frozen(places)}

    def delta(t: Tensors, shape: Shape, c: FourierFTConfig) -> torch.Tensor:
        """Transform the spectrum, (out, in)."""
        return (spectral_matrix(t.spectrum, t.places, shape) * c.scaling).to(t.spectrum.dtype)

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: FourierFTConfig) -> torch.Tensor:
        """Transform the input, and back from the few coefficients, unless they are too many for that."""
        if is_worth_building(x.shape[:-1].numel(), c.n_frequency, shape):
            return F.linear(x, FourierFT.delta(t, shape, c))
        return (spectral_product(x, t.spectrum, t.places, shape) * c.scaling).to(x.dtype)


FourierFTLayer, FourierFTLinear = FourierFT.Layer, FourierFT.FourierFTLinear


__getattr__ = old_names(__name__)
