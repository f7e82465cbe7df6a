# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
HiRA: the base weight times a matrix of low rank, entry by entry.

Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("HIRA", "peft.tuners.hira.config:HiraConfig", "peft.tuners.hira.model:HiraModel", is_mixed_compatible=True)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["HiraConfig"],
        ".layer": ["Conv1d", "Conv2d", "Conv3d", "Embedding", "HiraLayer", "Linear"],
        ".model": ["HiraModel"],
    },
)
