# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Probes of optional packages: what is there, what is too old, and that answers are kept."""

import sys
from importlib import metadata
from types import ModuleType

import pytest
from packaging.version import Version

from peft import import_utils
from peft.utils import optional_packages
from peft.utils.error import PeftImportError


PACKAGES = {
    "is_bnb_available": "bitsandbytes",
    "is_optimum_available": "optimum",
    "is_aqlm_available": "aqlm",
    "is_eetq_available": "eetq",
    "is_hqq_available": "hqq",
    "is_inc_available": "neural_compressor",
    "is_diffusers_available": "diffusers",
    "is_te_available": "transformer_engine",
}
PROBES = [name for name in import_utils.__all__ if callable(getattr(import_utils, name))]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that certain packages, with their versions, are all that is installed."""
    versions: dict[str, str] = {}

    def version(package):
        return versions[package] if versions[package] else metadata.distribution("no such package")

    monkeypatch.setattr(optional_packages, "find_spec", lambda name: versions.get(name) and object())
    monkeypatch.setattr(optional_packages.metadata, "version", version)
    for name in PROBES:
        getattr(import_utils, name).cache_clear()
    yield versions
    for name in PROBES:
        getattr(import_utils, name).cache_clear()


@pytest.mark.parametrize("probe", PACKAGES)
def test_a_package_is_there_or_not(installed, probe):
    assert getattr(import_utils, probe)() is False
    installed[PACKAGES[probe]] = "1.0"
    assert getattr(import_utils, probe)() is False, "the answer is kept"
    getattr(import_utils, probe).cache_clear()
    assert getattr(import_utils, probe)() is True


def test_layers_of_4_bits_are_looked_for(installed, monkeypatch):
    installed["bitsandbytes"] = "0.30"
    module = ModuleType("bitsandbytes")
    module.nn = ModuleType("bitsandbytes.nn")
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    assert not import_utils.is_bnb_4bit_available()
    import_utils.is_bnb_4bit_available.cache_clear()
    module.nn.Linear4bit = object
    assert import_utils.is_bnb_4bit_available()


def test_an_old_torchao_is_refused(installed):
    installed["torchao"] = "0.15.0"
    with pytest.raises(PeftImportError, match=r"torchao 0\.15\.0 is installed, and 0\.16\.0 or newer is needed"):
        import_utils.is_torchao_available()
    assert not import_utils.is_torchao_ge_v0_18_0()
    installed["torchao"] = "0.18.1"
    import_utils.is_torchao_ge_v0_18_0.cache_clear()
    assert import_utils.is_torchao_available() and import_utils.is_torchao_ge_v0_18_0()


@pytest.mark.parametrize(
    "versions, problem",
    [
        ({"gptqmodel": "6.9.0", "optimum": "2.0"}, r"gptqmodel 6\.9\.0 is installed"),
        ({"gptqmodel": "7.0.0", "optimum": "1.23"}, r"optimum 1\.23 is installed"),
        ({"gptqmodel": "7.0.0"}, "optimum, which is needed beside it, is not"),
    ],
)
def test_gptqmodel_needs_optimum(installed, versions, problem):
    assert not import_utils.is_gptqmodel_available()
    import_utils.is_gptqmodel_available.cache_clear()
    installed.update(versions)
    with pytest.raises(ImportError, match=problem):
        import_utils.is_gptqmodel_available()
    installed.update(gptqmodel="7.0.0", optimum="1.24.0")
    assert import_utils.is_gptqmodel_available()


def test_parts_that_cannot_be_loaded_are_not_there(installed, monkeypatch):
    installed["transformer_engine"] = "1.0"
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    assert import_utils.is_te_available() and not import_utils.is_te_pytorch_available()


def test_devices_are_asked_for(installed, monkeypatch):
    assert not import_utils.is_torch_tpu_available()
    monkeypatch.setattr("torch.xpu.is_available", lambda: True)
    assert import_utils.is_xpu_available() and not import_utils.is_xpu_available(check_device=True)


def test_flags_follow_the_version_of_transformers():
    found = Version(metadata.version("transformers"))
    flags = {name: getattr(import_utils, name) for name in import_utils.__all__ if "_ge_v5" in name}
    for name, flag in flags.items():
        least = ".".join(name.removeprefix("is_transformers_ge_v").split("_"))
        assert flag == (found >= Version(least)), name
    assert import_utils.is_transformers_le_4_53 == (found < Version("4.54"))
