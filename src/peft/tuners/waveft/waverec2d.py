# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: the inverse wavelet transform."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {"peft.tuners.waveft.maths": ["Wavelet", "WaveletDetailTuple2d", "WaveletTensorTuple", "waverec2d"]},
)
