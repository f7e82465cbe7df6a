# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
GraLoRA: low-rank updates of the blocks of a grid.

Jung et al., "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", 2025, arXiv:2505.20355.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("GRALORA", "peft.tuners.gralora.config:GraloraConfig", "peft.tuners.gralora.model:GraloraModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["GraloraConfig"],
        ".layer": ["GraloraLayer"],
        ".model": ["GraloraModel"],
    },
)
