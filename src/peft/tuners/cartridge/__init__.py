# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Cartridges: keys and values of virtual tokens for every layer, which start from the cache of a real text.

Eyuboglu et al., "Cartridges: Lightweight and general-purpose long context representations via self-study", 2025,
arXiv:2506.06266.
"""

from ...registry import add_method
from ...utils.lazy import lazy_exports


add_method(
    "CARTRIDGE",
    "peft.tuners.cartridge.config:CartridgeConfig",
    "peft.tuners.cartridge.model:CartridgeEncoder",
)

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {".config": ["CartridgeConfig"], ".model": ["CartridgeEncoder"]},
)
