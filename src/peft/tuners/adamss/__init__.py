# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
AdaMSS: clusters of rows with a small low-rank change each.

Zheng et al., "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", NeurIPS 2025.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("ADAMSS", "peft.tuners.adamss.config:AdamssConfig", "peft.tuners.adamss.model:AdamssModel")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["AdamssConfig"],
        ".layer": ["AdamssLayer", "Linear"],
        ".model": ["AdamssModel"],
    },
)
