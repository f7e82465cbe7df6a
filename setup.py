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
QUANTIZATION = ["bitsandbytes", "hqq", "torchao"]  # those that a CPU can run
CLIENTS = ["datasets", "diffusers", "sentence-transformers", "trl"]
TEST = ["hypothesis", "matplotlib", "pytest", "pytest-xdist", "scikit-learn", "setuptools>=70.1"]
EXTRAS = {
    "export": EXPORT,
    "quantization": QUANTIZATION,
    "quality": ["import-linter", "ruff"],
    "test": [*TEST, *EXPORT, *QUANTIZATION, *CLIENTS],
    # The model of the demo comes from two more packages, which the Makefile installs without their dependencies.
    "demo": ["matplotlib", "scikit-learn"],
}

setup(
    name="peft",
    version=read_version(),
    description="Parameter-efficient fine-tuning in which tied weights stay tied",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"peft": ["py.typed", "utils/data/*.json", "tuners/waveft/filters.json"]},
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=[
        "accelerate",
        "huggingface_hub",
        "numpy",
        "packaging",
        "psutil",
        "regex",
        "safetensors",
        "torch",
        "tqdm",
        "transformers>=4.53",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["peft = peft.cli:main"]},
)
