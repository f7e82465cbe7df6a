# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
RoAd: outputs are taken in pairs, and each pair is turned and stretched.

Liao, Monz, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", 2024,
arXiv:2409.00119.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("ROAD", "peft.tuners.road.config:RoadConfig", "peft.tuners.road.model:RoadModel", is_mixed_compatible=True)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["RoadConfig"],
        ".layer": ["Linear", "RoadLayer"],
        ".model": ["RoadModel"],
    },
)
