# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.utils.loftq_utils`, and where it is."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tuners.lora.loftq": ["replace_lora_weights_loftq"],
        "peft.tuners.lora.starts.loftq": ["loftq_init"],
    },
)
