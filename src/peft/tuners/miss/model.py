# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""MiSS on a whole model."""

from .layer import Miss


MissModel = Miss.Model
