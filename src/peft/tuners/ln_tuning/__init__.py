# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LayerNorm tuning: normalisation layers are trained in full.

Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", 2023, arXiv:2312.11420.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "LN_TUNING",
    "peft.tuners.ln_tuning.config:LNTuningConfig",
    "peft.tuners.ln_tuning.model:LNTuningModel",
    prefix="ln_tuning_",
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {".config": ["LNTuningConfig"], ".layer": ["LNTuningLayer"], ".model": ["LNTuningModel"]}
)
