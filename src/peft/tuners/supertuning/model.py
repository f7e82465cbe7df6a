# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Super-Tuning on a whole model."""

from .layer import Supertuning


SupertuningModel = Supertuning.Model
