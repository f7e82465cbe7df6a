# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""FRoD on a whole model."""

from ...utils.old_names import old_names
from .layer import Frod


FrodModel = Frod.Model


__getattr__ = old_names(__name__)
