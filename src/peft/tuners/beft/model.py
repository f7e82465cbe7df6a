# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""BEFT on a whole model."""

from .layer import Beft


BeftModel = Beft.Model
