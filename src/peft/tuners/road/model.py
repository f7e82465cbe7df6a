# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""RoAd on a whole model."""

from .layer import Road


RoadModel = Road.Model
