# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
C3A: a matrix of circulant blocks.

Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", 2024, arXiv:2407.19342.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("C3A", "peft.tuners.c3a.config:C3AConfig", "peft.tuners.c3a.model:C3AModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["C3AConfig"],
        ".layer": ["C3ALayer", "C3ALinear"],
        ".model": ["C3AModel"],
    },
)
