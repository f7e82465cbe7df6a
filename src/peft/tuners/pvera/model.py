# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""PVeRA on a whole model."""

from .layer import Pvera


PveraModel = Pvera.Model
