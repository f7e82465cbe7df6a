# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: all of `peft.tuners.lora.variants.dora`, the module itself, since clients set a switch in it."""

import sys

from .variants import dora


sys.modules[__name__] = dora
