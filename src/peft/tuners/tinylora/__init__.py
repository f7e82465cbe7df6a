# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
TinyLoRA: a few trained numbers mix fixed directions between the first singular vectors of a weight.

Morris et al., "Learning to Reason in 13 Parameters", 2026, arXiv:2602.04118.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("TINYLORA", "peft.tuners.tinylora.config:TinyLoraConfig", "peft.tuners.tinylora.model:TinyLoraModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["TinyLoraConfig"],
        ".layer": ["Embedding", "Linear", "TinyLoraLayer"],
        ".model": ["TinyLoraModel"],
    },
)
