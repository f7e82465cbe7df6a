# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""RandLoRA on a whole model."""

from .layer import RandLora


RandLoraModel = RandLora.Model
