# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What `target_modules="all-linear"` stands for in a model."""

from torch import nn

from ..config import PeftConfig
from ..registry import TaskType
from ..utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from .embeddings import output_embedding
from .kinds import gives_features, is_linear
from .matching import ends_like
from .walking import unwrapped, walk


def all_linear_names(model: nn.Module, config: PeftConfig) -> set[str]:
    """
    Find what target_modules="all-linear" stands for.

    That is every linear layer but the model's output head, those that `modules_to_save` trains in full, and those that
    do more than linear layers do.

    Args:
        model: the base model.
        config: its task says whether there is a classification head to leave out.

    Returns:
        Full names of the layers.
    """
    saved = getattr(config, "modules_to_save", None) or ()
    saved = [saved] if isinstance(saved, str) else saved
    linear = {name: unwrapped(module) for name, module in walk(model) if is_linear(unwrapped(module))}
    names = {name for name, layer in linear.items() if not ends_like(saved, name) and gives_features(layer)}
    if not hasattr(model, "get_output_embeddings"):
        return names
    head = output_embedding(model)
    heads = {name for name, module in walk(model) if head is not None and module is head}
    if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        heads |= {name for name in names if name.rpartition(".")[2] in SEQ_CLS_HEAD_NAMES}
    return names - heads


def _maybe_include_all_linear_layers(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """
    Put the names of layers in the place of target_modules="all-linear".

    Args:
        peft_config: a config, which is changed; with other targets it stays as it is.
        model: the base model, or one with adapters.

    Returns:
        The config.
    """
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        peft_config.target_modules = all_linear_names(model, peft_config)
    return peft_config
