# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Prefix tuning: learned keys and values in front of those of every attention layer.

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, arXiv:2101.00190.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "PREFIX_TUNING",
    "peft.tuners.prefix_tuning.config:PrefixTuningConfig",
    "peft.tuners.prefix_tuning.model:PrefixEncoder",
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {".config": ["PrefixTuningConfig"], ".model": ["PrefixEncoder"]},
)
