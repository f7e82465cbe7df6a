# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.adalora.gptq`, and where it is."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tuners.adalora.quantized": ["SVDQuantLinear"],
        "peft.tuners.adalora.config": ["AdaLoraConfig"],
        "peft.tuners.adalora.layer": ["AdaLoraLayer"],
    },
)
