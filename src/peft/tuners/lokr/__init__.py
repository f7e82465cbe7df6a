# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoKr: low-rank Kronecker products.

Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2023,
arXiv:2309.14859; Edalati et al., "KronA: Parameter Efficient Tuning with Kronecker Adapter", 2022, arXiv:2212.10650.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "LOKR",
    "peft.tuners.lokr.config:LoKrConfig",
    "peft.tuners.lokr.model:LoKrModel",
    prefix="lokr_",
    is_mixed_compatible=True,
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["LoKrConfig"],
        ".layer": ["Conv1d", "Conv2d", "Linear", "LoKrLayer"],
        ".model": ["LoKrModel"],
    },
)
