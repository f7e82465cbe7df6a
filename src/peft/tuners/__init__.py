# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Methods: one package each, which enters itself into the registry."""

from .._lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".lora.config": [
            "ArrowConfig",
            "BdLoraConfig",
            "EvaConfig",
            "KasaConfig",
            "LoftQConfig",
            "LoraConfig",
            "LoraGAConfig",
            "LoraRuntimeConfig",
            "MontecloraConfig",
            "VeloraConfig",
        ],
        ".lora.model": ["LoraModel"],
    },
)
