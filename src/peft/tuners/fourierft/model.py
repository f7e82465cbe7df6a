# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""FourierFT on a whole model."""

from .layer import FourierFT


FourierFTModel = FourierFT.Model
