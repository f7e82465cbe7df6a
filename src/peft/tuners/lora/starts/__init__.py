# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How LoRA's factors start: strategies by the value of `init_lora_weights`, a file for each kind."""

from .corda import Corda
from .eva import Eva
from .loftq import LoftQ
from .lora_ga import LoraGA
from .mica import Mica
from .olora import Olora
from .pissa import Pissa
from .random import Gaussian, Neutral, Orthogonal, Random
from .registry import Start, changes_base, check_start, find_start, register_start


__all__ = [
    "Corda",
    "Eva",
    "Gaussian",
    "LoftQ",
    "LoraGA",
    "Mica",
    "Neutral",
    "Olora",
    "Orthogonal",
    "Pissa",
    "Random",
    "Start",
    "changes_base",
    "check_start",
    "find_start",
    "register_start",
]
