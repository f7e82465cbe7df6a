# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.adamss.utils`, and where it is."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {"peft.tuners.adamss.maths": ["clustering_Z", "get_trainable_subspaces", "seg_locations", "slice_pca"]},
)
