# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""AdaMSS on a whole model."""

from .layer import Adamss


AdamssModel = Adamss.Model
