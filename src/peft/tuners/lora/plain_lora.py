# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Plain LoRA from adapters whose start has changed the base weights (PiSSA, OLoRA).

Such an adapter started with factors A0 and B0, and scaling * B0 A0 was taken out of the weight W. What it is now, on
that weight, is a plain adapter of twice the rank on W itself:

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]
"""

import copy
import math
from collections.abc import Mapping

import torch

from ...checkpoints.aliases import split_aliases
from ...checkpoints.read_file import load_peft_weights
from ...config import PeftConfig
from ...utils.error import PeftValueError
from .config import LoraConfig
from .starts import find_start
from .variants import find_variant


# ending of a key -> dimension along which the factor has its rank
_RANK_DIMENSION = {".lora_A.weight": 0, ".lora_embedding_A": 0, ".lora_B.weight": 1, ".lora_embedding_B": 1}


def convert_on_save(
    tensors: Mapping[str, torch.Tensor], config: PeftConfig, path_initial: str
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """
    Convert what is about to be saved of an adapter.

    Args:
        tensors: key in a checkpoint -> tensor.
        config: the adapter's config.
        path_initial: folder, or hub id, with the adapter as it was before training.

    Returns:
        Tensors and config of a plain adapter, for the base model as it was before this adapter was started.

    Raises:
        PeftValueError: if the adapter or its start cannot be converted.
    """
    plain = plain_config(config)  # refuses before a file is read
    return without_start(tensors, load_peft_weights(path_initial, device="cpu")), plain


def without_start(tensors: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Subtract the start of an adapter from it, without leaving the form of factors.

    Args:
        tensors: key in a checkpoint -> tensor, as trained.
        start: the same as it was at first; further keys are left alone.

    Returns:
        The same keys; factors have twice the rank. Tensors that tied modules share are views of one memory, as before.

    Raises:
        PeftValueError: if a factor is missing in `start` or has another shape there.
    """
    kept, aliases = split_aliases(tensors)
    converted = dict(kept)
    for key, tensor in kept.items():
        dimension = next((d for ending, d in _RANK_DIMENSION.items() if key.endswith(ending)), None)
        if dimension is None:
            continue
        if key not in start or start[key].shape != tensor.shape:
            found = f"has shape {tuple(start[key].shape)}" if key in start else "is missing"
            raise PeftValueError(
                f"the initial adapter does not belong to this one: {key!r} {found} there, and has shape "
                f"{tuple(tensor.shape)} here. Give the folder that the adapter was saved to before training"
            )
        first = start[key].to(tensor.device, tensor.dtype)
        converted[key] = torch.cat([tensor, -first if dimension else first], dim=dimension)
    return {
        key: converted[key] if key in converted else aliases[key].read(converted[aliases[key].key]) for key in tensors
    }


def plain_config(config: PeftConfig) -> LoraConfig:
    """
    Make the config of the converted adapter: twice the rank, and the same scaling.

    Args:
        config: config of the adapter; it is not changed.

    Raises:
        PeftValueError: if it is no LoRA adapter, or its scaling cannot be kept.
    """
    if not isinstance(config, LoraConfig):
        raise PeftValueError(
            f"path_initial_model_for_weight_conversion works for LoRA, found {type(config).__name__}; leave it out"
        )
    if not find_start(config.init_lora_weights).is_taken_out:
        raise PeftValueError(
            f"init_lora_weights={config.init_lora_weights!r} rounds the base weights, and no plain LoRA of twice the "
            "rank can tell what they were; save it without path_initial_model_for_weight_conversion"
        )
    variant_cls = find_variant(config)
    if variant_cls is not None and not variant_cls.has_room:
        raise PeftValueError(
            f"path_initial_model_for_weight_conversion doubles ranks, which the tensors of {variant_cls.name} do not "
            "allow; save the adapter without it"
        )
    patterns = config.rank_pattern or config.alpha_pattern
    if config.use_rslora and patterns:
        raise PeftValueError(
            "an adapter with use_rslora=True and rank_pattern or alpha_pattern cannot be converted to plain LoRA; "
            "save it without path_initial_model_for_weight_conversion"
        )
    plain = copy.copy(config)
    growth = math.sqrt(2) if config.use_rslora else 2  # scaling is alpha / sqrt(r), or alpha / r
    plain.r, plain.lora_alpha = 2 * config.r, growth * config.lora_alpha
    plain.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {name: growth * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    plain.init_lora_weights = True
    plain.eva_config = plain.corda_config = plain.lora_ga_config = None  # settings of starts
    return plain
