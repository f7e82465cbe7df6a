# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
PVeRA: VeRA whose inner activations are drawn from a learned normal distribution.

Fillioux et al., "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation", 2025, arXiv:2512.07703.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "PVERA", "peft.tuners.pvera.config:PveraConfig", "peft.tuners.pvera.model:PveraModel", prefix="pvera_lambda_"
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {".config": ["PveraConfig"], ".layer": ["Linear", "PveraLayer"], ".model": ["PveraModel"]}
)
