# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`peft doctor`: whether this environment, and a model, will do what their user expects."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ._output import table


HELP = "check this environment: which peft is imported, what other packages ask of it, devices; and a model's ties"
EXAMPLES = """\
  peft doctor
  peft doctor ./llama-70b
  peft doctor --json
"""
# packages that decide which paths there are
_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy")
_OPTIONAL = ("bitsandbytes", "torchao", "hqq", "triton", "trl", "diffusers", "sentence-transformers", "deepspeed")
_SETTINGS = ("PEFT_ENSURE_WEIGHT_TYING", "PEFT_DISABLE_FUSED")


@dataclass
class Check:
    """
    One thing that was looked at.

    Attributes:
        what: the thing.
        found: what it is.
        problem: what will go wrong, and what to do; None if nothing will.
    """

    what: str
    found: str
    problem: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="folder of a transformers model, to look at its ties"
    )


def run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Look at everything; 1 if something will go wrong."""
    checks = [*check_package(), *check_packages(), *check_caps(), *check_processor(), *check_accelerator()]
    checks += check_settings()
    if arguments.model is not None:
        checks += check_model(arguments.model)
    return int(any(check.problem for check in checks)), {"checks": [asdict(check) for check in checks]}


def as_text(result: dict[str, Any]) -> str:
    """Write the result for people: what was found, and below what will go wrong."""
    checks = result["checks"]
    text = table(["", "checked", "found"], ([_mark(check), check["what"], check["found"]] for check in checks))
    problems = [f"{check['what']}: {check['problem']}" for check in checks if check["problem"]]
    return "\n\n".join([text, *(problems or ["nothing was found that will go wrong"])])


def _mark(check: dict[str, Any]) -> str:
    return "!!" if check["problem"] else "ok"


# ------------------------------------------------------------------------------------------ this package
def check_package() -> Iterator[Check]:
    """Which `peft` is imported, and is it the one that is installed?"""
    import peft

    folder = os.path.dirname(os.path.abspath(peft.__file__))
    yield Check("peft is imported from", folder)
    installed = _version("peft")
    found = f"{peft.__version__} (installed: {installed or 'none'})"
    problem = None
    if installed is None:
        problem = (
            "it is on the path, but not installed, so programs that ask for its version will not find it; install it "
            "with pip"
        )
    elif installed != peft.__version__:
        problem = (
            "another peft is installed than the one that is imported: uninstall both (pip uninstall peft, until it "
            "finds none) and install the one that you want"
        )
    elif "tied" not in peft.__version__:
        problem = "this is not the fork in which tied weights stay tied; install that in its place"
    yield Check("version", found, problem)


# ------------------------------------------------------------------------------------------ other packages
def check_packages() -> Iterator[Check]:
    """The versions of what the package stands on, and of what it works with."""
    yield Check("python", platform.python_version())
    for name in _PACKAGES:
        version = _version(name)
        problem = None if version else f"it is missing, and peft needs it: pip install {name}"
        yield Check(name, version or "missing", problem or _unmet(name, version))
    present = [f"{name} {version}" for name in _OPTIONAL if (version := _version(name))]
    yield Check("works with", ", ".join(present) or "none of the optional packages")


def check_caps() -> Iterator[Check]:
    """The packages that ask for a `peft` of their own, since installing one of them later brings that back."""
    from packaging.requirements import InvalidRequirement, Requirement

    own = _version("peft")
    for distribution in sorted(importlib.metadata.distributions(), key=lambda one: (one.name or "").lower()):
        for text in distribution.requires or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            if requirement.name != "peft" or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            fits = own is None or requirement.specifier.contains(own, prereleases=True)
            problem = None
            if not fits:
                problem = (
                    f"it asks for peft{requirement.specifier} and {own} is installed; installing or upgrading it "
                    "would bring the released package back. Install peft last, with --no-deps"
                )
            asked = str(requirement.specifier) or "any version"
            yield Check(f"{distribution.name} {distribution.version}", f"asks for peft: {asked}", problem)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unmet(name: str, version: str | None) -> str | None:
    """Say that a package is older than what this one needs."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("peft") or () if _version("peft") else ():
        requirement = Requirement(text)
        if requirement.name == name and version and not requirement.specifier.contains(version, prereleases=True):
            return f"peft needs {requirement}, found {version}: pip install --upgrade {name}"
    return None


# ------------------------------------------------------------------------------------------ devices
def check_processor() -> Iterator[Check]:
    """What the processor can do, which has an influence on how quantised layers keep their codes."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    yield Check("processor", f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads")
    if _version("bitsandbytes") and torch.cpu._is_avx512_bf16_supported():
        yield Check(
            "4 bit layers on this processor",
            "bitsandbytes reorders their codes in the first forward pass without gradients; peft reads both orders",
        )


def check_accelerator() -> Iterator[Check]:
    """Which accelerator there is, and whether the paths for it can be used."""
    import torch

    if not torch.cuda.is_available():
        yield Check("accelerator", "none that torch can use: everything is computed on the CPU")
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield Check("accelerator", ", ".join(names))
    yield Check("bfloat16", "yes" if torch.cuda.is_bf16_supported() else "no: use float16 and a gradient scaler")
    has_triton = importlib.util.find_spec("triton") is not None
    yield Check("Triton", "yes" if has_triton else "no: what has a kernel is computed by torch's own operations")


def check_settings() -> Iterator[Check]:
    """Environment variables that change what the package does."""
    found = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    yield Check("settings", ", ".join(f"{name}={value}" for name, value in found.items()) or "none")
    if sys.flags.optimize:
        yield Check("python -O", "on", "assertions of other packages are off, and their errors come late")


# ------------------------------------------------------------------------------------------ a model
def check_model(path: str) -> Iterator[Check]:
    """What is tied in a model, and whether its files agree."""
    from ..anatomy.skeletons import build_skeleton
    from ..config import PeftConfig
    from ..tying.groups import find_tied_groups

    skeleton = build_skeleton(path, PeftConfig())
    groups = find_tied_groups(skeleton)
    says = getattr(skeleton.config.get_text_config(), "tie_word_embeddings", None)
    yield Check("tie_word_embeddings", str(says))
    for group in groups:
        yield Check("tied", " = ".join(group.members), _contradiction(path, group.members))
    if not groups:
        yield Check("tied", "nothing")


def _contradiction(path: str, members: tuple[str, ...]) -> str | None:
    """Compare what the files hold under the names of a tie."""
    from ..utils.error import PeftPathError
    from ._tensor_files import BaseFiles

    try:
        files = BaseFiles.open(path)
    except PeftPathError:  # a config alone
        return None
    present = [name for name in members if name in files.where]
    first, *others = (files.shards[files.where[name]].read(name) for name in present) if len(present) > 1 else [None]
    if all(other.equal(first) for other in others):
        return None
    return (
        f"the files hold {' and '.join(map(repr, present))} with different values, and the config ties them: one of "
        "them is lost when the model is loaded. Set tie_word_embeddings to false in config.json to keep both"
    )
