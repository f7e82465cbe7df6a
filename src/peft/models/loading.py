# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Reading adapters from folders or from the hub into models."""

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..anatomy.walking import adapter_modules
from ..checkpoints.keys import adapter_key_map, bias_key_map
from ..checkpoints.load_report import LoadResult
from ..checkpoints.read_file import load_peft_weights
from ..checkpoints.state_dict import load_tensors
from ..checkpoints.tied_members import config_for_members, name_tied_targets
from ..config import PeftConfig
from ..configs.differences import config_differences
from ..layers.new_tensors import making_tensors
from ..registry import PEFT_TYPE_TO_PREFIX_MAPPING
from ..surgery.transaction import all_or_nothing
from ..utils.constants import SAFETENSORS_WEIGHTS_NAME
from ..utils.error import PeftPathError, PeftRuntimeError, PeftValueError
from ..utils.files import state_of_config
from .wrapper import ModelWrapper


# how often an adapter is read anew because it was replaced while it was read
_READINGS = 10


def load_model(
    make: Callable[..., ModelWrapper],
    model: nn.Module,
    model_id: str | os.PathLike,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: dict[str, str] | None = None,
    *,
    strict: bool = False,
    ignore_mismatched_sizes: bool = False,
    adapters: dict[str, str] | None = None,
    **hub_options: Any,
) -> ModelWrapper:
    """
    Put an adapter from a folder or from the hub into a base model; see `PeftModel.from_pretrained`.

    Args:
        make: called as `PeftModel` is, with the base model, the config and the name of the adapter.
        model: the base model; it is changed in place, or not at all if anything is refused.
        model_id: folder, or hub id.
        adapter_name: name to give the adapter.
        is_trainable: let it be trained.
        config: config to use instead of the one in the folder.
        autocast_adapter_dtype: keep its tensors in float32 where the base is in half precision.
        ephemeral_gpu_offload: use the accelerator for start-up computations only.
        low_cpu_mem_usage: make its tensors without storage.
        key_mapping: regular expression -> replacement for keys of the checkpoint.
        strict: refuse a checkpoint that does not fit in every respect.
        ignore_mismatched_sizes: leave out tensors of another shape.
        adapters: name of each expert -> folder, instead of what the config of X-LoRA says.
        hub_options: `subfolder`, `revision`, `token`, ...

    Returns:
        What `make` has made, with the adapter's tensors.

    Raises:
        PeftPathError: if there is no adapter at `model_id`.
        PeftLoadError: if its tensors do not fit.
        PeftValueError: if its files are damaged; if a prompt is to be trained.
    """
    if config is not None and not isinstance(config, PeftConfig):
        raise PeftValueError(f"config must be a PeftConfig, found a {type(config).__name__}")
    # older classes of transformers say themselves what their modules were called before
    key_mapping = key_mapping or getattr(model, "_checkpoint_conversion_mapping", None)
    # files are read before the model is touched
    config, weights = _read_adapter(model_id, hub_options, config, "cpu", key_mapping)
    config = _for_this_run(config, model_id, is_trainable, ephemeral_gpu_offload)
    if adapters is not None:
        if not hasattr(config, "adapters"):
            raise PeftValueError(
                f"adapters= names the experts of X-LoRA, and {os.fspath(model_id)!r} has none; leave it out"
            )
        config.adapters = adapters
    config = config_for_members(config, model, weights, PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type])
    with all_or_nothing(model):
        with making_tensors(from_checkpoint=True):
            made = make(
                model,
                config,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
        _fill_adapter(made, adapter_name, weights, strict, ignore_mismatched_sizes)
        if not is_trainable:
            made.eval()
    return made


def load_adapter(
    model: ModelWrapper,
    model_id: str | os.PathLike,
    adapter_name: str,
    is_trainable: bool = False,
    torch_device: str | None = None,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: dict[str, str] | None = None,
    *,
    strict: bool = False,
    ignore_mismatched_sizes: bool = False,
    **hub_options: Any,
) -> LoadResult:
    """
    Put an adapter from a folder or from the hub beside those that a model has; see `PeftModel.load_adapter`.

    Args:
        model: the model; it stays as it was if anything is refused.
        model_id: folder, or hub id.
        adapter_name: name to give the adapter; one of that name is filled anew.
        is_trainable: let it be trained.
        torch_device: where its file is read to.
        autocast_adapter_dtype: keep its tensors in float32 where the base is in half precision.
        ephemeral_gpu_offload: use the accelerator for start-up computations only.
        low_cpu_mem_usage: make its tensors without storage.
        key_mapping: regular expression -> replacement for keys of the checkpoint.
        strict: refuse a checkpoint that does not fit in every respect.
        ignore_mismatched_sizes: leave out tensors of another shape.
        hub_options: as in `load_model`.

    Returns:
        What became of each tensor.

    Raises:
        PeftPathError: if there is no adapter at `model_id`.
        PeftLoadError: if its tensors do not fit.
        PeftValueError: if `is_trainable` asks to go on with a prompt whose network is not in the file.
    """
    present = model.peft_config.get(adapter_name)
    if present is not None and is_trainable and "prompt_encoder" in model._modules:
        model.prompt_encoder.check_training_goes_on(adapter_name)
    config, weights = _read_adapter(
        model_id, hub_options, None, torch_device or "cpu", key_mapping, present is not None
    )
    if config is not None:
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
        config = config_for_members(config, model.get_base_model(), weights, prefix)
    settings = {}
    if config and present:  # as it would be saved
        settings = config_differences(config, name_tied_targets(present, model.get_base_model(), weights))
    with all_or_nothing(model):
        if present is None:
            config = _for_this_run(config, model_id, is_trainable, ephemeral_gpu_offload)
            with making_tensors(from_checkpoint=True):
                model.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
        result = _fill_adapter(model, adapter_name, weights, strict, ignore_mismatched_sizes, settings)
        if is_trainable:
            model._tuner.set_requires_grad(adapter_name)
        else:
            model.eval()
    return result


def _read_adapter(
    model_id: str | os.PathLike,
    options: dict[str, Any],
    config: PeftConfig | None,
    device: str,
    key_mapping: dict[str, str] | None,
    can_lack_config: bool = False,
) -> tuple[PeftConfig | None, dict[str, torch.Tensor]]:
    """Read a config, unless there is one, and tensors: those of one save, should somebody save meanwhile."""
    name = os.fspath(model_id)
    folder = os.path.join(name, options.get("subfolder") or "")
    for _ in range(_READINGS):
        before = state_of_config(folder)
        found = _read_config(name, options, can_lack_config) if config is None else config
        tensors = load_peft_weights(name, device=device, key_mapping=key_mapping, **options)
        if config is not None or state_of_config(folder) == before:
            return found, tensors
    raise PeftRuntimeError(f"{folder!r} was saved to again and again while it was read; load it when that has ended")


def _read_config(name: str, options: dict[str, Any], can_be_missing: bool) -> PeftConfig | None:
    try:
        return PeftConfig.from_pretrained(name, **options)
    except PeftPathError:
        if can_be_missing:  # if it is the adapter that is missing, reading its tensors will say so
            return None
        raise


def _for_this_run(
    config: PeftConfig, model_id: str | os.PathLike, is_trainable: bool, ephemeral_gpu_offload: bool
) -> PeftConfig:
    """Copy a config, with the settings of this run."""
    if config.is_prompt_learning and is_trainable:
        raise PeftValueError(
            "a saved prompt cannot be loaded with is_trainable=True, since what computed it is not in the file. To "
            "train it further, make a new adapter with get_peft_model and fill it with load_adapter of the same name"
        )
    config = copy.copy(config)
    config.inference_mode = not is_trainable
    config.loaded_from = config.loaded_from or os.fspath(model_id)  # callers may have brought a config of their own
    if hasattr(config, "runtime_config"):
        config.runtime_config = dataclasses.replace(config.runtime_config, ephemeral_gpu_offload=ephemeral_gpu_offload)
    return config


def _fill_adapter(
    model: ModelWrapper,
    adapter_name: str,
    weights: dict[str, torch.Tensor],
    strict: bool,
    ignore_mismatched_sizes: bool,
    settings: dict[str, tuple[Any, Any]] | None = None,
) -> LoadResult:
    """Put a checkpoint's tensors into an adapter; those that get nothing and have no storage start anew."""
    if not weights:
        raise PeftRuntimeError(f"{SAFETENSORS_WEIGHTS_NAME} holds no tensor at all; save the adapter again")
    result = load_tensors(model, weights, adapter_name, ignore_mismatched_sizes, strict, settings=settings)
    for _, module in adapter_modules(model):
        if any(parameter.is_meta for parameter in module.adapter_parameters(adapter_name)):
            module.fill_missing(adapter_name, model.peft_config[adapter_name])
    own = adapter_key_map(model, adapter_name)
    own.update(bias_key_map(model, adapter_name, getattr(model.peft_config[adapter_name], "bias", "none")))
    wanted = {place.key for place in own.values()}
    about_adapter = LoadResult([key for key in result.missing_keys if key in wanted], result.unexpected_keys)
    about_adapter.report = result.report
    return about_adapter
