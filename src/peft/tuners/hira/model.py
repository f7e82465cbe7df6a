# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""HiRA on a whole model."""

from .layer import Hira


HiraModel = Hira.Model
