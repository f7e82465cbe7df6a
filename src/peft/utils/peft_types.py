# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: the methods and the tasks, and the registration of further methods."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"peft.registry": ["PeftType", "TaskType", "register_peft_method"]}
)
