# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
WaveFT: a few wavelet coefficients of the update.

Bilican, Yilmaz, Tekalp, Cinbis, "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", 2025,
arXiv:2505.12532.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("WAVEFT", "peft.tuners.waveft.config:WaveFTConfig", "peft.tuners.waveft.model:WaveFTModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["WaveFTConfig"],
        ".layer": ["WaveFTLayer", "WaveFTLinear"],
        ".model": ["WaveFTModel"],
    },
)
