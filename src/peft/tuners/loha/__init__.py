# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoHa: low-rank Hadamard products.

Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", 2021,
arXiv:2108.06098; Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
2023, arXiv:2309.14859.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "LOHA",
    "peft.tuners.loha.config:LoHaConfig",
    "peft.tuners.loha.model:LoHaModel",
    prefix="hada_",
    is_mixed_compatible=True,
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["LoHaConfig"],
        ".layer": ["Conv1d", "Conv2d", "Linear", "LoHaLayer"],
        ".model": ["LoHaModel"],
    },
)
