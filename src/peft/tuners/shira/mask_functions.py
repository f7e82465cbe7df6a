# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: functions that choose entries."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(__name__, {"peft.tuners.shira.maths": ["random_mask"]})
