# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Which optional packages there are, and which version of transformers. Answers are kept; nothing here imports torch.

Layers of quantised models are recognised by their classes (`quantization_utils.py`), so the package itself asks none
of this of bitsandbytes and its like. It is for those who write against the package.
"""

from functools import lru_cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from packaging.version import Version

from .error import PeftImportError


def _is_there(package: str) -> bool:
    return find_spec(package) is not None


def _version_of(package: str) -> Version:
    """Read the version of a package; one that says none, such as a checkout, counts as new enough for anything."""
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return Version("9999")


def _is_new_enough(package: str, least: str) -> bool:
    """
    Say whether a package is there.

    Raises:
        PeftImportError: if it is there, but older than it must be.
    """
    if not _is_there(package):
        return False
    found = _version_of(package)
    if found < Version(least):
        raise PeftImportError(
            f"{package} {found} is installed, and {least} or newer is needed; run pip install --upgrade {package}, or "
            "uninstall it if nothing needs it"
        )
    return True


@lru_cache
def is_bnb_available() -> bool:
    """Say whether bitsandbytes is installed."""
    return _is_there("bitsandbytes")


@lru_cache
def is_bnb_4bit_available() -> bool:
    """Say whether bitsandbytes is installed and has layers of 4 bits per weight."""
    return is_bnb_available() and hasattr(import_module("bitsandbytes").nn, "Linear4bit")


@lru_cache
def is_optimum_available() -> bool:
    """Say whether optimum is installed."""
    return _is_there("optimum")


@lru_cache
def is_gptqmodel_available() -> bool:
    """
    Say whether gptqmodel is installed.

    Raises:
        PeftImportError: if it, or optimum, which transformers needs beside it, is too old or missing.
    """
    if not _is_new_enough("gptqmodel", "7.0.0"):
        return False
    if not _is_new_enough("optimum", "1.24.0"):
        raise PeftImportError("gptqmodel is installed, and optimum, which is needed beside it, is not; install it")
    return True


@lru_cache
def is_torchao_available() -> bool:
    """
    Say whether torchao is installed.

    Raises:
        PeftImportError: if it is too old.
    """
    return _is_new_enough("torchao", "0.16.0")


@lru_cache
def is_torchao_ge_v0_18_0() -> bool:
    """Say whether torchao is installed, in version 0.18.0 or newer."""
    return _is_there("torchao") and _version_of("torchao") >= Version("0.18.0")


@lru_cache
def is_aqlm_available() -> bool:
    """Say whether AQLM is installed."""
    return _is_there("aqlm")


@lru_cache
def is_eetq_available() -> bool:
    """Say whether EETQ is installed."""
    return _is_there("eetq")


@lru_cache
def is_hqq_available() -> bool:
    """Say whether HQQ is installed."""
    return _is_there("hqq")


@lru_cache
def is_inc_available() -> bool:
    """Say whether Intel's Neural Compressor is installed."""
    return _is_there("neural_compressor")


@lru_cache
def is_diffusers_available() -> bool:
    """Say whether diffusers is installed."""
    return _is_there("diffusers")


@lru_cache
def is_te_available() -> bool:
    """Say whether Transformer Engine is installed."""
    return _is_there("transformer_engine")


@lru_cache
def is_te_pytorch_available() -> bool:
    """Say whether Transformer Engine is installed with what it has for torch, which it lacks without a compiler."""
    if not is_te_available():
        return False
    try:
        import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError):  # its libraries, which need a GPU's
        return False
    return True


@lru_cache
def is_torch_tpu_available(check_device: bool = True) -> bool:
    """
    Say whether torch can compute on TPUs.

    Args:
        check_device: ask whether there is one, too.
    """
    if not _is_there("torch_xla"):
        return False
    if not check_device:
        return True
    try:
        import_module("torch_xla.core.xla_model").xla_device()
    except RuntimeError:
        return False
    return True


@lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """
    Say whether torch can compute on Intel's GPUs.

    Args:
        check_device: ask whether there is one that can be used, too.
    """
    torch = import_module("torch")
    if not hasattr(torch, "xpu") or not torch.xpu.is_available():
        return False
    if check_device:
        try:
            torch.zeros(1, device="xpu")
        except (RuntimeError, AssertionError):
            return False
    return True


_TRANSFORMERS = _version_of("transformers")
is_transformers_le_4_53 = Version("4.54.0.dev0") > _TRANSFORMERS
is_transformers_ge_v5 = Version("5.0.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_1_0 = Version("5.1.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_4_0 = Version("5.4.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_6_0 = Version("5.6.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_13_0 = Version("5.13.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_17_0 = Version("5.17.0.dev0") <= _TRANSFORMERS


def __getattr__(name: str) -> Any:
    if name == "is_transformers_dtensor_tp":  # looked for in transformers, whose import takes a while
        return _is_there("transformers.distributed") and _is_there("transformers.distributed.tensor_parallel")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
