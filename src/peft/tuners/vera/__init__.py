# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
VeRA: random projections that all layers share, and trained vectors between them.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", 2023, arXiv:2310.11454.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("VERA", "peft.tuners.vera.config:VeraConfig", "peft.tuners.vera.model:VeraModel", prefix="vera_lambda_")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {".config": ["VeraConfig"], ".layer": ["Linear", "VeraLayer"], ".model": ["VeraModel"]}
)
