# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""SHiRA on a whole model."""

from .layer import Shira


ShiraModel = Shira.Model
