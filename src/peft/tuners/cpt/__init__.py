# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Context-aware prompt tuning: embeddings of examples that are moved a little, each within a ball of its own.

Blau et al., "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods", 2024,
arXiv:2410.17222.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("CPT", "peft.tuners.cpt.config:CPTConfig", "peft.tuners.cpt.model:CPTEmbedding")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {".config": ["CPTConfig"], ".model": ["CPTEmbedding"]},
)
