# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What clients with environments of their own import, replace and look up is there; `make test-clients` runs them."""

import importlib
import inspect
import json
from pathlib import Path

import pytest

import peft


RECORDED = json.loads((Path(__file__).parent / "client_imports.json").read_text())

# Clients import these for releases that had them; release 0.21.2 lacks them too.
OF_OLD_RELEASES = {("peft", "BoneConfig")}


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
    assert not missing, sorted(missing)


# What clients put functions of their own in the place of, and the arguments that those pass on by position.
REPLACED = [
    (
        "peft.tuners.lora.LoraModel._create_and_replace",
        "peft_config adapter_name target target_name parent current_key",
    ),
    ("peft.tuners.adalora.AdaLoraModel._create_and_replace", "peft_config adapter_name target"),
    ("peft.VeraModel._create_and_replace", "peft_config adapter_name target"),
    ("peft.BOFTModel._create_and_replace", "peft_config adapter_name target"),
    ("peft.FourierFTModel._create_and_replace", "peft_config adapter_name target"),
    ("peft.tuners.lora.LoraModel.__init__", "model peft_config adapter_name"),
    ("peft.tuners.lora.LoraModel._cast_adapter_dtype", "adapter_name autocast_adapter_dtype"),
    ("peft.tuners.lora.layer.ParamWrapper.__init__", "base_layer adapter_name parameter_name config"),
    ("peft.tuners.lora.layer.ParamWrapper.get_param", ""),
    ("peft.tuners.adalora.AdaLoraModel.forward", ""),
    ("peft.tuners.adalora.RankAllocator.mask_to_budget", "model budget"),
    ("peft.tuners.adalora.RankAllocator._element_score", "n"),
    ("peft.tuners.adalora.RankAllocator._combine_ipt", "ipt_E ipt_AB"),
    ("peft.PeftModel.load_adapter", "model_id adapter_name"),
    ("peft.PeftModel.set_adapter", "adapter_name"),
    ("peft.config.PeftConfigMixin.from_pretrained", "pretrained_model_name_or_path subfolder"),
]


@pytest.mark.parametrize("path, arguments", REPLACED, ids=[path for path, _ in REPLACED])
def test_what_clients_replace_takes_their_arguments(path, arguments):
    module, cls, method = path.rsplit(".", 2)
    function = getattr(getattr(importlib.import_module(module), cls), method)
    names = list(inspect.signature(function).parameters)
    assert [name for name in names if name != "self"][: len(arguments.split())] == arguments.split()


def test_options_that_unsloth_looks_for_are_in_the_signature():
    shown = inspect.signature(peft.LoraConfig).parameters
    assert not {"loftq_config", "use_rslora", "ensure_weight_tying", "target_parameters", "use_dora"} - set(shown)
