# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Writing the adapters of a model to a folder: tensors, config and model card."""

import os
from collections.abc import Sequence

import torch

from ..anatomy.embeddings import without_adapters_around
from ..anatomy.view import viewing
from ..checkpoints.checks import refuse_without_storage
from ..checkpoints.keys import keys_in_parts
from ..checkpoints.state_dict import collect_tensors
from ..checkpoints.tied_members import name_tied_targets
from ..checkpoints.write_file import write_peft_weights
from ..config import PeftConfig
from ..utils.error import PeftValueError
from ..utils.files import replacing_adapter
from ..utils.near_names import FEW
from ..utils.warning import warn
from ..utils.wrapped_names import plain_name, renamed
from .wrapper import ModelWrapper


def save_adapters(
    model: ModelWrapper,
    folder: str | os.PathLike,
    adapter_names: Sequence[str],
    *,
    safe_serialization: bool = True,
    save_embedding_layers: str | bool = "auto",
    path_initial: str | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    deduplicate_tied: bool = False,
) -> None:
    """
    Write adapters; see `PeftModel.save_pretrained`. Nothing is written if one of them is refused.

    Args:
        model: the model.
        folder: folder; it is made if it is missing.
        adapter_names: which adapters.
        safe_serialization: write safetensors, not a pickle.
        save_embedding_layers: also write the base weights of the embeddings, or "auto".
        path_initial: folder with the adapter as it was before training, to be converted to one that fits the base
            model as it was before the start of the adapter changed its weights.
        state_dict: tensors of the model, if they had to be gathered from several processes.
        deduplicate_tied: write a tensor that tied modules share once.

    Raises:
        PeftValueError: if an adapter cannot be converted.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict  # once for all that is asked of it
    with viewing(model):
        contents = {name: collect_tensors(model, state_dict, name, save_embedding_layers) for name in adapter_names}
        configs = {name: _config_to_save(model, name, tensors) for name, tensors in contents.items()}
        for name, tensors in contents.items():
            refuse_without_storage(tensors)
            _warn_of_parts(model, name, state_dict)
            if path_initial is not None:
                contents[name], configs[name] = _without_start(model, tensors, configs[name], path_initial)
    os.makedirs(folder, exist_ok=True)
    model.create_or_update_model_card(folder)
    for name, tensors in contents.items():
        own_folder = folder if name == "default" else os.path.join(folder, name)
        os.makedirs(own_folder, exist_ok=True)
        with replacing_adapter(own_folder) as new:
            write_peft_weights(new, tensors, safe_serialization, deduplicate_tied)
            configs[name].save_pretrained(new)


def _warn_of_parts(model: ModelWrapper, adapter_name: str, state_dict: dict[str, torch.Tensor] | None) -> None:
    """Say that what is saved of an adapter is a part of it."""
    parts = keys_in_parts(model, adapter_name, renamed(state_dict or model.state_dict(), plain_name))
    if parts:
        warn(
            f"{len(parts)} tensors of adapter {adapter_name!r} have no entries, or are one row of numbers where a "
            f"matrix belongs ({', '.join(parts[:FEW])}{' ...' if len(parts) > FEW else ''}): it is what "
            "one process holds. Gather the tensors first, as accelerate's get_state_dict does, and pass them as "
            "state_dict"
        )


def _config_to_save(model: ModelWrapper, adapter_name: str, tensors: dict[str, torch.Tensor]) -> PeftConfig:
    """
    Give an adapter's config as it is written: frozen, with a note on a base model without a task.

    It names all targets that there are tensors for.
    """
    config = model._tuner.config_to_save(adapter_name)
    config = name_tied_targets(config, model.get_base_model(), tensors)
    config.inference_mode = True
    base = without_adapters_around(model.get_base_model())  # the class of what is compiled, not torch.compile's
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        config.auto_mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    return config


def _without_start(
    model: ModelWrapper, tensors: dict[str, torch.Tensor], config: PeftConfig, path_initial: str
) -> tuple[dict[str, torch.Tensor], PeftConfig]:
    """Let the method take out of an adapter what it took from the base model when it started."""
    convert = getattr(type(model._tuner), "convert_on_save", None)
    if convert is None:
        raise PeftValueError(
            f"path_initial_model_for_weight_conversion works for LoRA, found {type(config).__name__}; leave it out"
        )
    return convert(tensors, config, path_initial)
