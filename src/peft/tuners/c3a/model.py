# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""C3A on a whole model."""

from ...utils.old_names import old_names
from .layer import C3A


C3AModel = C3A.Model


__getattr__ = old_names(__name__)
