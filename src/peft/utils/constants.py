# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""File names, shorthands and the tables of default target modules (data, read on first use)."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from .old_names import find_old_name


WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
QUESTION_ANSWERING_HEAD_NAMES = ["qa_outputs"]

INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"
# state space models of transformers, and the layers in them whose weights fused kernels read without calling them
MAMBA_MODEL_TYPES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
MAMBA_FUSED_LAYERS = ("out_proj", "conv1d")

DUMMY_MODEL_CONFIG = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20

# float8 weights cannot be computed with; what is added to them is computed in a wider type
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


@lru_cache(maxsize=1)
def _target_module_tables() -> dict[str, dict[str, Any]]:
    """Read `data/target_modules.json`: constant name -> model type -> default target modules."""
    data = json.loads(Path(__file__).with_name("data").joinpath("target_modules.json").read_text(encoding="utf-8"))
    tables = dict(data["tables"])
    for name, (model, changes) in data["like"].items():
        merged = {**data["tables"][model], **changes}
        tables[name] = {model_type: targets for model_type, targets in merged.items() if targets is not None}
    return tables


def __getattr__(name: str) -> Any:
    if name == "ALLOWED_COMPUTE_DTYPES":  # the one constant that needs torch
        import torch

        return (torch.float16, torch.bfloat16, torch.float32)
    tables = _target_module_tables() if name.startswith("TRANSFORMERS_MODELS_TO_") else {}
    return tables[name] if name in tables else find_old_name(__name__, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_target_module_tables()])
