# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adapters of several methods in one model."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(__name__, {".model": ["COMPATIBLE_TUNER_TYPES", "MixedModel"]})
