# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""An adapter together with the base model that its config names."""

import dataclasses
import importlib
import os
from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn

from .anatomy.embeddings import input_embedding, without_adapters_around
from .checkpoints.load_report import LoadReport, PeftLoadError
from .checkpoints.vocabulary import embeddings_of
from .config import PeftConfig
from .models import tasks
from .models.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from .utils.constants import TOKENIZER_CONFIG_NAME
from .utils.error import PeftError, PeftPathError, PeftValueError
from .utils.hub import check_file_exists_on_hf_hub


# where the file of an adapter is; the base model is looked for elsewhere
_PLACE_OF_ADAPTER = ("subfolder",)
# how files are had from the hub, which goes for both
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
_ADAPTER_OPTIONS = (
    "autocast_adapter_dtype",
    "ephemeral_gpu_offload",
    "key_mapping",
    "low_cpu_mem_usage",
)


class _InstantiatedError(PeftError, OSError):
    """A class that only loads models was called."""


def get_default_import_allowlist() -> list[str]:
    """
    List the libraries from which a config may have the class of its base model imported.

    Example:

        >>> from peft.auto import get_default_import_allowlist
        >>> "transformers" in get_default_import_allowlist()
        True
    """
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """
    Say whether a module belongs to a library that may be imported.

    Args:
        allowlist: names of libraries or modules; what lies inside them belongs to them.
        parent_name: full name of the module.

    Example:

        >>> from peft.auto import check_import_allowlist
        >>> check_import_allowlist(["transformers"], "transformers.models.llama")
        True
        >>> check_import_allowlist(["transformers"], "transformers_of_somebody_else")
        False
    """
    return any(parent_name == allowed or parent_name.startswith(f"{allowed}.") for allowed in allowlist)


class _BaseAutoPeftModel:
    _target_class: type | None = None
    _target_peft_class: type[PeftModel] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise _InstantiatedError(f"{name} only loads models; call {name}.from_pretrained(folder of the adapter)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        *,
        strict: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """
        Load an adapter and the base model that its config names.

        The vocabulary of the base model is brought to the size that it had when the adapter was trained. Rows in the
        checkpoint say which that is; if there are none, a tokenizer that was saved with the adapter and has more
        tokens than the base model.

        Args:
            pretrained_model_name_or_path: folder of the adapter, or hub id.
            adapter_name: name to give the adapter.
            is_trainable: let it be trained; otherwise it is frozen and the model is in eval mode.
            config: config to use instead of the one in the folder.
            revision: revision of the adapter on the hub. That of the base model stands in the config.
            import_allowlist: libraries from which the class of a base model without a task may be imported; those of
                `get_default_import_allowlist` if left out.
            strict: refuse a checkpoint that does not fit in every respect.
            ignore_mismatched_sizes: leave out tensors of another shape.
            kwargs: for the base model's `from_pretrained` (`dtype`, `device_map`, ...); `subfolder` of the adapter;
                `token`, `cache_dir`, ... for the hub; `autocast_adapter_dtype`, `low_cpu_mem_usage`, `key_mapping`,
                ... as in `PeftModel.from_pretrained`.

        Returns:
            A `PeftModel` of the class that belongs to the task.

        Raises:
            PeftValueError: if the adapter has another task, or does not say its base model; if the class of the base
                model would be imported from a library that is not allowed.
            PeftPathError: if there is no adapter.

        Example:

            >>> import tempfile
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
            >>> base, adapter = tempfile.mkdtemp(), tempfile.mkdtemp()
            >>> GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)).save_pretrained(base)
            >>> config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
            >>> get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).save_pretrained(adapter)
            >>> type(AutoPeftModelForCausalLM.from_pretrained(adapter)).__name__
            'PeftModelForCausalLM'
        """
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        place = {name: kwargs.pop(name) for name in _PLACE_OF_ADAPTER if name in kwargs}
        if revision is not None:
            place["revision"] = revision
        options = {name: kwargs.pop(name) for name in _ADAPTER_OPTIONS if name in kwargs}
        options.update(strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes)
        name = os.fspath(pretrained_model_name_or_path)
        if config is None:
            config = PeftConfig.from_pretrained(name, **place, **hub)
        cls._check_task(config)
        if config.base_model_name_or_path is None:
            raise PeftPathError(
                f"the config of {name!r} does not say its base model (base_model_name_or_path); load the base model "
                "yourself, and use PeftModel.from_pretrained(base, adapter)"
            )
        # where there is no task, the adapter's tensors fit the class that it was trained on, whatever is asked for
        named = cls._target_class if config.task_type is not None else None
        target = named or _class_from_mapping(config, import_allowlist)
        base = target.from_pretrained(config.base_model_name_or_path, revision=config.revision or "main", **kwargs)
        before = _shapes_of_embeddings(base)
        _grow_vocabulary(base, name, {**place, **hub}, bool(kwargs.get("trust_remote_code", False)))
        after = _shapes_of_embeddings(base)

        def load() -> PeftModel:
            return cls._target_peft_class.from_pretrained(
                base, name, adapter_name, is_trainable, config=config, **options, **place, **hub
            )

        try:
            model = load()
        except PeftLoadError as error:  # nothing was changed
            rows = _rows_in_checkpoint(base, error.report)
            if rows is None:
                raise
            base.resize_token_embeddings(rows)
            after = _shapes_of_embeddings(base)
            model = load()
        resized = {key: (shape, after[key]) for key, shape in before.items() if after[key] != shape}
        report = model.load_reports[adapter_name]
        model.load_reports[adapter_name] = dataclasses.replace(report, resized={**resized, **report.resized})
        return model

    @classmethod
    def _check_task(cls, config: PeftConfig) -> None:
        """Refuse an adapter whose task is another one."""
        if config.task_type is None:
            return
        expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]
        if cls._target_peft_class is not expected:
            raise PeftValueError(
                f"the adapter's task is {getattr(config.task_type, 'value', config.task_type)}; use "
                f"Auto{expected.__name__} instead of {cls.__name__}"
            )


def _class_from_mapping(config: PeftConfig, import_allowlist: Sequence[str] | None) -> type:
    """Find the class of a base model without a task, from a library that is allowed."""
    mapping = config.auto_mapping or {}
    library, class_name = mapping.get("parent_library"), mapping.get("base_model_class")
    if not isinstance(library, str) or not isinstance(class_name, str):
        raise PeftValueError(
            "the adapter has neither a task nor a note on the class of its base model (auto_mapping); load the base "
            "model yourself, and use PeftModel.from_pretrained(base, adapter)"
        )
    allowed = get_default_import_allowlist() if import_allowlist is None else import_allowlist
    if not check_import_allowlist(allowed, library):
        raise PeftValueError(
            f"the adapter's config wants {class_name} imported from {library!r}, which is none of "
            f"{', '.join(allowed)}. Importing runs code: if you trust it, pass import_allowlist=[{library!r}]"
        )
    found = getattr(importlib.import_module(library), class_name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "from_pretrained")):
        raise PeftValueError(f"{library}.{class_name} is no class of models that can be loaded")
    return found


def _shapes_of_embeddings(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Give the shapes of a model's embeddings, by their names in the base model without adapters."""
    shapes = {name: tuple(parameter.shape) for name, parameter in embeddings_of(model).values()}
    return {name: shape for name, shape in shapes.items() if name.endswith(".weight")}


def _grow_vocabulary(base: nn.Module, name: str, place: dict[str, Any], trust_remote_code: bool) -> None:
    """Give a base model room for the tokens that a tokenizer has which was saved with the adapter."""
    if _rows_of(base) is None or not _has_tokenizer(name, place):
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **place)
    if len(tokenizer) > _rows_of(base):
        base.resize_token_embeddings(len(tokenizer))


def _rows_of(base: nn.Module) -> int | None:
    """Say how many tokens the vocabulary of a model has that can be resized; None if there is none."""
    embedding = without_adapters_around(input_embedding(base))
    weight = getattr(embedding, "weight", None)
    return None if weight is None or not hasattr(base, "resize_token_embeddings") else weight.shape[0]


def _rows_in_checkpoint(base: nn.Module, report: LoadReport | None) -> int | None:
    """
    Find out how many tokens the vocabulary had in training, from the shapes that do not fit.

    Returns:
        The number, if each of these shapes differs in the number of tokens and in nothing else; else None.
    """
    rows = _rows_of(base)
    found = set()
    for there, here in (report.mismatched if report is not None else {}).values():
        differ = [pair for pair in zip(there, here, strict=False) if pair[0] != pair[1]]
        if len(there) != len(here) or len(differ) != 1 or differ[0][1] != rows:
            return None
        found.add(differ[0][0])
    return found.pop() if len(found) == 1 else None


def _has_tokenizer(name: str, place: dict[str, Any]) -> bool:
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, place.get("subfolder") or "", TOKENIZER_CONFIG_NAME))
    return bool(check_file_exists_on_hf_hub(name, TOKENIZER_CONFIG_NAME, **place))


class AutoPeftModel(_BaseAutoPeftModel):
    """An adapter without a task, and its base model; see `from_pretrained`."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """An adapter for generating text, and its base model; see `from_pretrained`."""

    _target_class = transformers.AutoModelForCausalLM
    _target_peft_class = tasks.PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """An adapter for generating text from text, and its base model; see `from_pretrained`."""

    _target_class = transformers.AutoModelForSeq2SeqLM
    _target_peft_class = tasks.PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """An adapter for classifying texts, and its base model; see `from_pretrained`."""

    _target_class = transformers.AutoModelForSequenceClassification
    _target_peft_class = tasks.PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """An adapter for classifying tokens, and its base model; see `from_pretrained`."""

    _target_class = transformers.AutoModelForTokenClassification
    _target_peft_class = tasks.PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """An adapter for finding answers in texts, and its base model; see `from_pretrained`."""

    _target_class = transformers.AutoModelForQuestionAnswering
    _target_peft_class = tasks.PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """An adapter for a model that gives features, and its base model; see `from_pretrained`."""

    _target_class = transformers.AutoModel
    _target_peft_class = tasks.PeftModelForFeatureExtraction
