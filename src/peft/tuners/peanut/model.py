# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""PEANuT on a whole model."""

from .layer import Peanut


PeanutModel = Peanut.Model
