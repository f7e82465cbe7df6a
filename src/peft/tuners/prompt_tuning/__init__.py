# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Prompt tuning: learned embeddings in front of those of the inputs.

Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, arXiv:2104.08691.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "PROMPT_TUNING",
    "peft.tuners.prompt_tuning.config:PromptTuningConfig",
    "peft.tuners.prompt_tuning.model:PromptEmbedding",
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {".config": ["PromptTuningConfig", "PromptTuningInit"], ".model": ["PromptEmbedding"]},
)
