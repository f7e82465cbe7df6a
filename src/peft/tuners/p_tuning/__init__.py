# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
P-tuning: learned embeddings that a small network computes while they are trained.

Liu et al., "GPT Understands, Too", 2021, arXiv:2103.10385.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method("P_TUNING", "peft.tuners.p_tuning.config:PromptEncoderConfig", "peft.tuners.p_tuning.model:PromptEncoder")

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {".config": ["PromptEncoderConfig", "PromptEncoderReparameterizationType"], ".model": ["PromptEncoder"]},
)
