# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""GraLoRA on a whole model."""

from .layer import Gralora


GraloraModel = Gralora.Model
