# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
BEFT: a vector that is added to the outputs of a layer.

Huang, Balashankar, Aminifar, "BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes", 2025,
arXiv:2509.15974.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("BEFT", "peft.tuners.beft.config:BeftConfig", "peft.tuners.beft.model:BeftModel", is_mixed_compatible=True)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["BeftConfig"],
        ".layer": ["BeftLayer", "Linear"],
        ".model": ["BeftModel"],
    },
)
