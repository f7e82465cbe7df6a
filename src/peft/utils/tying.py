# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.utils.tying`, and where it is."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tying.groups": ["ReachedTie", "TiedGroup", "find_tied_groups", "module_of", "settle_ties"],
    },
)
