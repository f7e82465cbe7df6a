# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""DeLoRA on a whole model."""

from .layer import Delora


DeloraModel = Delora.Model
