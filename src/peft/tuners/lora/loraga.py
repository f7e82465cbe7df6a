# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: LoRA-GA, as the released package has it in one module."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tuners.lora.calibration.lora_ga": ["preprocess_loraga"],
        "peft.tuners.lora.config": ["LoraConfig"],
        "peft.tuners.lora.model": ["LoraModel"],
    },
)
