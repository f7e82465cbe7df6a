# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: where the functions are that the released package has here."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"peft.tuners.osf.maths": ["decompose_weight_matrix", "project_gradient_to_orthogonal_space"]}
)
