# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The environment that holds the released package, and the machine that all this runs on."""

import os
import platform
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
RELEASED_VERSION = "0.21.2"
RELEASED_VENV = ROOT / ".venv-released"


def released_python(folder: Path = RELEASED_VENV) -> Path:
    """
    Give the interpreter of the environment with the released package; the environment is made if it is missing.

    Args:
        folder: where it is.
    """
    python = folder / "bin" / "python"
    complete = folder / ".installed"
    if not complete.exists():
        print(f"making {folder.name} with peft {RELEASED_VERSION}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", CONSTRAINTS]
        # torch by itself, so that the build is the one that the package under development is measured with
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, f"peft=={RELEASED_VERSION}", "transformers", "scikit-learn"], check=True)
        complete.touch()
    return python


def machine() -> dict[str, str]:
    """Describe the machine: processor, number of cores, load by others in the last minute."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {"processor": _processor(), "cores": str(os.cpu_count()), "system": platform.platform(), "load": load}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
