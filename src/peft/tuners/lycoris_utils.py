# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.lycoris_utils`, and where it is."""

from ..utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tuners.base": ["BaseTuner"],
        "peft.tuners.families.lycoris": ["LycorisConfig", "LycorisLayer", "LycorisTuner"],
        "peft.layers.base_layer": ["BaseTunerLayer"],
        "peft.config": ["PeftConfig"],
        "peft.layers.merging.checks": ["check_adapters_to_merge"],
    },
)
