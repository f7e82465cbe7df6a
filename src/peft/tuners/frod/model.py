# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""FRoD on a whole model."""

from .layer import Frod


FrodModel = Frod.Model
