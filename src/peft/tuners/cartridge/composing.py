# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Several cartridges put together into one, whose text is that of all."""

import copy
import os
from collections.abc import Sequence

import torch

from ...checkpoints.read_file import load_peft_weights
from ...checkpoints.write_file import write_peft_weights
from ...config import PeftConfig
from ...registry import PeftType
from ...utils.error import PeftValueError
from ...utils.files import replacing_adapter


# what has to be the same for keys and values to fit
_SAME = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
_PROMPT = "prompt_embeddings"


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike], *, output_path: str | os.PathLike, safe_serialization: bool = True
) -> None:
    """
    Write an adapter that has the virtual tokens of several cartridges.

    Frozen tokens of all come first, so that they stay frozen. Attention does not see in which order keys and values
    stand, unless it has a bias for distances.

    Args:
        adapter_paths: folders of cartridges for one base model, at least two.
        output_path: folder for the new one; it is made if it is missing.
        safe_serialization: write safetensors; False writes a pickle.

    Raises:
        PeftValueError: for fewer than two, another method, or cartridges that differ in base model, task or sizes.
    """
    if len(adapter_paths) < 2:
        raise PeftValueError(f"adapter_paths must name two cartridges or more, found {adapter_paths}")
    configs = [PeftConfig.from_pretrained(os.fspath(path)) for path in adapter_paths]
    for path, config in zip(adapter_paths, configs, strict=True):
        _check_fits(configs[0], config, path)
    tables = [_read_table(path, config) for path, config in zip(adapter_paths, configs, strict=True)]
    frozen = [table[: config.num_frozen_tokens] for table, config in zip(tables, configs, strict=True)]
    trained = [table[config.num_frozen_tokens :] for table, config in zip(tables, configs, strict=True)]
    composed = copy.copy(configs[0])
    composed.num_virtual_tokens = sum(config.num_virtual_tokens for config in configs)
    composed.num_frozen_tokens = sum(config.num_frozen_tokens for config in configs)
    os.makedirs(output_path, exist_ok=True)
    with replacing_adapter(output_path) as new:
        write_peft_weights(new, {_PROMPT: torch.cat([*frozen, *trained])}, safe_serialization, False)
        composed.save_pretrained(new)


def _check_fits(first: PeftConfig, config: PeftConfig, path: str | os.PathLike) -> None:
    if config.peft_type != PeftType.CARTRIDGE:
        raise PeftValueError(f"{os.fspath(path)!r} is no cartridge: its method is {config.peft_type.value}")
    bases = {first.base_model_name_or_path, config.base_model_name_or_path} - {None}
    names = [*(["base_model_name_or_path"] if len(bases) > 1 else []), *_SAME]
    different = [name for name in names if getattr(config, name) != getattr(first, name)]
    if different:
        pairs = ", ".join(f"{name}: {getattr(first, name)!r} and {getattr(config, name)!r}" for name in different)
        raise PeftValueError(f"{os.fspath(path)!r} does not fit the first cartridge, they differ in {pairs}")


def _read_table(path: str | os.PathLike, config: PeftConfig) -> torch.Tensor:
    tensors = load_peft_weights(os.fspath(path), device="cpu")
    table = tensors.get(_PROMPT)
    if table is None or table.dim() != 2 or len(table) != config.num_virtual_tokens:
        found = "none" if table is None else f"one of shape {tuple(table.shape)}"
        raise PeftValueError(
            f"{os.fspath(path)!r} should hold {_PROMPT} with {config.num_virtual_tokens} rows, found {found}"
        )
    return table
