# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What clients with environments of their own import, replace and look up is there; `make test-clients` runs them."""

import importlib
import json
from pathlib import Path

import pytest


RECORDED = json.loads((Path(__file__).parent / "client_imports.json").read_text())

# Clients import these for releases that had them; release 0.21.2 lacks them too.
OF_OLD_RELEASES = {("peft", "BoneConfig")}
# Methods and starts that are still to come bring these.
TO_COME = {
    ("peft", "AdaptionPromptConfig"),
    ("peft.optimizers", "create_loraplus_optimizer"),
    ("peft.tuners.lora.tp_layer", "LoraParallelLinear"),
}


def resolves(module: str, name: str) -> bool:
    """Do as an import statement does: a name is an attribute or a submodule."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    if not name or hasattr(found, name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("client", RECORDED)
def test_imports_of_clients_work(client):
    wanted = {(module, name) for module, names in RECORDED[client].items() for name in (names or [""])}
    missing = {path for path in wanted - OF_OLD_RELEASES if not resolves(*path)}
    assert not missing - TO_COME, sorted(missing - TO_COME)


def test_what_is_to_come_is_not_there_yet():
    """When it is, the list gets shorter."""
    assert not [path for path in TO_COME if resolves(*path)]
