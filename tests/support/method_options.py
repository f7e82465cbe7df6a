# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What the methods need to fit tiny layers, in one place for all tests that run over every registered method."""

from typing import Any

from torch import nn

from peft.registry import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, ReplacementLayer


# fields of the config, for layers that are 16 wide
OPTIONS: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 4, "num_subspaces": 3},
    "ADALORA": {"init_r": 2, "target_r": 1, "total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4, "init_weights": True},
    "DEFT": {"r": 2},
    "DELORA": {"r": 2},
    "FOURIERFT": {"n_frequency": 24, "init_weights": True},
    "GLORA": {"r": 2},
    "FROD": {"sparse_rate": 0.1, "progressbar": False},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 2},
    "HRA": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 2},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "LORA": {"r": 2},
    "MISS": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 4},
    "OSF": {"effective_rank": 4},
    "POLY": {"r": 2, "n_skills": 2},
    "PSOFT": {"r": 2},
    "PVERA": {"r": 4},
    "PEANUT": {"r": 2, "depth": 1},
    "RANDLORA": {"r": 4, "randlora_alpha": 8},
    "TINYLORA": {"u": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9, "r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5, 7]},
    "UNILORA": {"r": 2, "theta_d_length": 16, "save_indices": True},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 4},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 24},
}
# fields without which a config cannot be made
REQUIRED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "CARTRIDGE": {"num_virtual_tokens": 2},
    "CPT": {"task_type": "CAUSAL_LM"},
    "XLORA": {"hidden_size": 8, "adapters": {}},
}
# what a second adapter of the same model needs to be otherwise
SECOND: dict[str, dict[str, Any]] = {
    "ADALORA": {"inference_mode": True},
    "TRAINABLE_TOKENS": {"token_indices": [4, 6]},
}


# methods that train rows of embeddings and heads, and so are no methods for linear layers
OF_ROWS = ("TRAINABLE_TOKENS",)
# methods that adapt whole blocks of a transformer, and have tests of their own
OF_BLOCKS = ("SHADOW",)


def layered_methods() -> list[str]:
    """Name every registered method that puts layers into a model."""
    found = [str(getattr(key, "value", key)) for key in PEFT_TYPE_TO_TUNER_MAPPING]
    classes = {name: PEFT_TYPE_TO_TUNER_MAPPING[name] for name in found}
    # one without layers of its own is X-LoRA, which weighs those of LoRA
    tuners = [name for name, cls in classes.items() if issubclass(cls, BaseTuner) and cls.layer_classes]
    return [name for name in tuners if name not in OF_BLOCKS]


def is_mergeable(method: str) -> bool:
    """Say whether there is a weight for what a method, or a variant of it, does."""
    return PEFT_TYPE_TO_TUNER_MAPPING[method.partition("-")[0]].tuner_layer_cls.is_mergeable


def keeps_weight(method: str) -> bool:
    """Say whether a method adds to the bias of a layer only, and so leaves the weight, and what shares it, alone."""
    layer = PEFT_TYPE_TO_TUNER_MAPPING[method.partition("-")[0]].tuner_layer_cls
    return getattr(layer, "changes_bias", False) and not layer.changes_weight


def mergeable_methods() -> list[str]:
    """Name those of them whose adapters can be merged."""
    return [name for name in layered_methods() if is_mergeable(name)]


def linear_methods() -> list[str]:
    """Name those of them that adapt the weight or the bias of a linear layer, and do not replace it by a copy."""
    classes = {name: PEFT_TYPE_TO_TUNER_MAPPING[name] for name in mergeable_methods() if name not in OF_ROWS}
    return [
        name
        for name, cls in classes.items()
        if issubclass(nn.Linear, tuple(cls.layer_classes)) and not issubclass(cls.tuner_layer_cls, ReplacementLayer)
    ]
