# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
HRA: adaptation by Householder reflections of a layer's inputs.

Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
2024, arXiv:2405.17484.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("HRA", "peft.tuners.hra.config:HRAConfig", "peft.tuners.hra.model:HRAModel", prefix="hra_")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {".config": ["HRAConfig"], ".layer": ["HRAConv2d", "HRALayer", "HRALinear"], ".model": ["HRAModel"]},
)
