# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""PSOFT on a whole model."""

from .layer import Psoft


PsoftModel = Psoft.Model
