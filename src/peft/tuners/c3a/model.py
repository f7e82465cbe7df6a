# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""C3A on a whole model."""

from .layer import C3A


C3AModel = C3A.Model
