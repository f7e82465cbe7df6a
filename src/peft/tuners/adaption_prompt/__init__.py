# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Adaption prompt (LLaMA-Adapter): the top attention modules also attend to a few trained tokens, behind a gate.

Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", 2023,
arXiv:2303.16199.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "ADAPTION_PROMPT",
    "peft.tuners.adaption_prompt.config:AdaptionPromptConfig",
    "peft.tuners.adaption_prompt.model:AdaptionPromptModel",
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {".config": ["AdaptionPromptConfig"], ".layer": ["AdaptedAttention"], ".model": ["AdaptionPromptModel"]},
)
