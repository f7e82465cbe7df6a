# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Lily: low-rank factors that neighbouring layers share on one side, and a routed mixture of shared experts on the other.

Zhong et al., "Low-Rank Interconnected Adaptation across Layers", 2024, arXiv:2407.09946.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("LILY", "peft.tuners.lily.config:LilyConfig", "peft.tuners.lily.model:LilyModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["LilyConfig"],
        ".layer": ["LilyLayer", "Linear"],
        ".model": ["LilyModel"],
    },
)
