# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Models without weights, which show the structure of models and take no memory.

They are copied from models that are there, or built from the configs of those that are in a folder.
"""

import copy
import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..registry import TaskType
from ..utils.error import PeftPathError, PeftValueError
from ..utils.files import read_json
from ..utils.same_tensor import identity_of


AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def without_storage(model: nn.Module) -> nn.Module:
    """
    Copy a model with its adapters, ties and all, but with every parameter and buffer on the meta device.

    Args:
        model: any model.
    """
    return copy_without_storage(model)[0]


def copy_without_storage(model: nn.Module) -> tuple[nn.Module, dict[int, torch.Tensor]]:
    """
    Do what `without_storage` does, and say what each tensor of the copy stands for.

    Args:
        model: any model.

    Returns:
        The copy; id of one of its tensors -> tensor of the model.
    """
    instead: dict[int, torch.Tensor] = {}
    originals: dict[int, torch.Tensor] = {}
    made: dict[Hashable, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        key = (isinstance(tensor, nn.Parameter), identity_of(tensor))
        if key not in made:
            empty = torch.empty_like(tensor, device="meta")
            made[key] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        instead[id(tensor)] = made[key]
        originals.setdefault(id(made[key]), tensor)
    return copy.deepcopy(model, instead), originals


def build_skeleton(path: str, config: PeftConfig) -> nn.Module:
    """
    Build a base model on the meta device.

    Args:
        path: folder of a transformers model, or its `config.json`.
        config: config of the adapter, which says for which task the model is.

    Raises:
        PeftPathError: if there is no model config.
        PeftValueError: if transformers cannot build such a model.
    """
    import transformers

    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise PeftPathError(f"there is no file {file!r}")
    kind = read_json(file).get("model_type")
    try:
        with _quiet(transformers):
            model_config = transformers.AutoConfig.from_pretrained(file, local_files_only=True)
            model_cls = _model_class(transformers, model_config, config)
            with torch.device("meta"):
                build = getattr(model_cls, "from_config", None) or model_cls._from_config
                model = build(model_config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PeftValueError(
            f"transformers cannot build the model that {file!r} describes (model_type={kind!r}): {error}"
        ) from error
    if os.path.isdir(path):
        model.config.name_or_path = model.name_or_path = path
    return model.eval()


def _model_class(transformers: Any, model_config: Any, config: PeftConfig) -> Any:
    """Choose the class: of the adapter's task, else the one that the adapter names, else the one of the base model."""
    architecture = next(iter(getattr(model_config, "architectures", None) or ()), None)
    own = getattr(transformers, architecture or "", None)
    if config.task_type is not None:
        auto_cls = getattr(transformers, AUTO_CLASSES[TaskType(config.task_type)])
        mapped = auto_cls._model_mapping.get(type(model_config), None)
        choices = mapped if isinstance(mapped, (list, tuple)) else [mapped]
        return own if own in choices or mapped is None else auto_cls
    named = (config.auto_mapping or {}).get("base_model_class")
    return getattr(transformers, named or "", None) or own or transformers.AutoModel


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from talking about a model without weights."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def model_config_path(path: str) -> str:
    """
    Give the path of a model's config.

    Raises:
        PeftPathError: if there is none.
    """
    file = os.path.join(path, "config.json")
    if not os.path.isfile(file):
        found = sorted(os.listdir(path))[:10] if os.path.isdir(path) else "no such folder"
        raise PeftPathError(f"no config.json in {path!r} (found: {found}); give the folder of a transformers model")
    return file
