# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""WaveFT: W + s times an inverse wavelet transform of a few numbers at places that a seed tells."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch

from ...utils.constants import TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.layers import DeclaredAdditive
from ..declared.method import method
from ..declared.tensors import Frozen, Shape, Tensors, Trained
from . import maths
from .config import WaveFTConfig


class WaveletLayer(DeclaredAdditive):
    """A layer with wavelet coefficients, with what the released package lets do with it."""

    def reset_wave_parameters(self, adapter_name: str) -> None:
        """
        Start an adapter anew, with coefficients of zero.

        Args:
            adapter_name: name.
        """
        self.restart(adapter_name, init_weights=True)


@method(
    "WAVEFT",
    WaveFTConfig,
    patterns={"n_frequency": "n_frequency_pattern"},
    targets=TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING,
    settings={
        f"waveft_{name}": name for name in ("n_frequency", "scaling", "random_loc_seed", "wavelet_family", "use_idwt")
    },
    rule=WaveletLayer,
)
class WaveFT:
    """A layer with a few wavelets added to its weight."""

    trained, frozen = ("spectrum",), ("indices", "places", "filters")

    def values_of_all(targets: Mapping[str, Shape], c: WaveFTConfig) -> dict[str, dict[str, int]]:
        """Share the coefficients out by the sizes of the weights, if that is wished for."""
        sizes = {name: shape[0] * shape[1] for name, shape in targets.items()} if c.proportional_parameters else {}
        total = c.n_frequency * len(sizes)
        return {
            name: {"n_frequency": max(1, round(total * size / sum(sizes.values())))} for name, size in sizes.items()
        }

    def tensors(shape: Shape, c: WaveFTConfig) -> dict[str, Any]:
        """Tell the coefficients, (n,), their places in the weight and among all coefficients, (2, n), and filters."""
        (out, inputs), n = shape, c.n_frequency
        if not 0 < n <= out * inputs:
            raise PeftValueError(
                f"n_frequency must be positive and at most {out * inputs}, the number of entries of a target's "
                f"weight, found {n}"
            )
        indices = cache(partial(maths.draw_places, shape, n, c.random_loc_seed))
        filters = partial(maths.filters_of, c.wavelet_family)
        return {
            "spectrum": Trained((n,), 0.0 if c.init_weights else lambda spectrum: spectrum.normal_().mul_(0.01)),
            "indices": Frozen(indices),
            "places": Frozen(lambda: maths.places_of(indices(), shape, filters()) if c.use_idwt else indices()),
            "filters": Frozen(filters),
        }

    def delta(t: Tensors, shape: Shape, c: WaveFTConfig) -> torch.Tensor:
        """Put the coefficients in their places and transform them, (out, in)."""
        filters = t.filters if c.use_idwt else None
        return maths.matrix_of(t.spectrum * c.scaling, t.places, filters, shape)

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: WaveFTConfig) -> torch.Tensor:
        """Take the input apart, multiply by the few coefficients, and put the output together."""
        filters = t.filters if c.use_idwt else None
        x, size = maths.analyse(x, filters), maths.grid_size(shape, filters)
        y = maths.sparse_product(x, t.spectrum * c.scaling, t.places, size)
        return maths.synthesise(y, filters, shape[0])


WaveFTLayer, WaveFTLinear = WaveFT.Layer, WaveFT.WaveFTLinear


__getattr__ = old_names(__name__)
