# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Optimisers that know which parameters are factors of LoRA: LoRA+, LoRA-FA, Riemannian preconditioning."""

from ..utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".lorafa": ["create_lorafa_optimizer"],
        ".loraplus": ["create_loraplus_optimizer"],
        ".riemannian": ["create_riemannian_optimizer"],
    },
)
