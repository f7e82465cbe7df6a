# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""DEFT on a whole model."""

from .layer import Deft


DeftModel = Deft.Model
