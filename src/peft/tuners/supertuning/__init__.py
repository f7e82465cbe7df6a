# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Super-Tuning: the entries of largest magnitude are trained.

"Super-Tuning: From Activation-Aware Pruning to Sparse Fine-Tuning", 2026, arXiv:2607.09287.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "SUPERTUNING", "peft.tuners.supertuning.config:SupertuningConfig", "peft.tuners.supertuning.model:SupertuningModel"
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["SupertuningConfig"],
        ".layer": ["Linear", "SupertuningLayer"],
        ".model": ["SupertuningModel"],
    },
)
