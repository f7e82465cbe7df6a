# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
MiSS: one small matrix that all shards of the weight share.

Kang, Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", 2024, arXiv:2409.15371.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("MISS", "peft.tuners.miss.config:MissConfig", "peft.tuners.miss.model:MissModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["MissConfig"],
        ".layer": ["MissLayer", "MissLinear"],
        ".model": ["MissModel"],
    },
)
