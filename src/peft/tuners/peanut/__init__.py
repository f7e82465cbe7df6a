# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
PEANuT: a small network turns the weight into what is added to it.

Zhong et al., "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", 2024, arXiv:2410.01870.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("PEANUT", "peft.tuners.peanut.config:PeanutConfig", "peft.tuners.peanut.model:PeanutModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["PeanutConfig"],
        ".layer": ["Linear", "PeanutLayer"],
        ".model": ["PeanutModel"],
    },
)
