# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""WaveFT on a whole model."""

from .layer import WaveFT


WaveFTModel = WaveFT.Model
