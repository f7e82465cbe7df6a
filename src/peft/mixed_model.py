# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.mixed_model`, and where it is."""

from .utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.config": ["PeftConfig"],
        "peft.models.mixed": ["PeftMixedModel"],
        "peft.models.peft_model": ["PeftModel"],
        "peft.tuners.mixed.model": ["MixedModel"],
        "peft.utils.constants": ["DUMMY_MODEL_CONFIG"],
    },
)
