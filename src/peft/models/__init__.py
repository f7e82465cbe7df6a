# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`PeftModel`, one subclass per task, mixed models, status and card."""

from . import tasks  # noqa: F401  (its classes enter themselves, and PeftModel looks them up)
