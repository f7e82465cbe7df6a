# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""GLoRA on a whole model."""

from .layer import Glora


GloraModel = Glora.Model
