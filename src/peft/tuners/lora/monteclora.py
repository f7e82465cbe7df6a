# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.lora.monteclora`, and where it is."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tuners.lora.variants.monteclora": ["BufferedMontecloraSampler", "MontecloraSampler"],
        "peft.utils.devices": ["infer_device"],
    },
)
