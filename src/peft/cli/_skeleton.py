# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Base models without weights, built from their config: what a command needs to know about their structure."""

import os
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..utils.error import PeftPathError, PeftValueError
from ..utils.peft_types import TaskType
from ._tensor_files import read_json


AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def read_adapter_config(path: str) -> PeftConfig:
    """
    Read the config of an adapter.

    Args:
        path: its folder, or the file itself.

    Raises:
        PeftPathError: if there is none; nothing is looked up on a hub.
        PeftError: if it is not valid.
    """
    if os.path.isdir(path):
        return PeftConfig.from_pretrained(path)
    if not os.path.isfile(path):
        raise PeftPathError(f"there is no file {path!r}")
    return PeftConfig.from_file(path)


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
def _quiet(transformers: Any) -> Any:
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
