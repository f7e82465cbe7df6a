# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.utils.tying_report`, and where it is."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.anatomy.skeletons": ["copy_without_storage", "without_storage"],
        "peft.planning": ["plan_weight_tying"],
        "peft.tying.report": ["TyingReport", "TyingRow", "weight_tying_report"],
    },
)
