# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`PeftModel`: a base model with adapters. Its subclasses per task are in `tasks.py`."""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn

from ..anatomy.embeddings import checkpoints_activations, input_embedding, let_output_require_grad
from ..anatomy.matching import ends_like
from ..anatomy.walking import adapter_modules
from ..checkpoints.load_report import LoadResult
from ..config import PeftConfig
from ..layers.call_context import current_call, remember
from ..layers.new_tensors import making_tensors
from ..prompts.computing import compute_prompt
from ..prompts.inputs import call_with_prompt, generate_with_prompt
from ..prompts.learning import PromptEncoders
from ..registry import PEFT_TYPE_TO_TUNER_MAPPING, TaskType
from ..surgery.saved_modules import newly_started_heads
from ..surgery.transaction import all_or_nothing
from ..utils.error import PeftPathError, PeftTypeError, PeftValueError
from ..utils.hub import push_folder
from ..utils.warning import warn
from .card import write_model_card
from .loading import load_adapter, load_model
from .per_sample import adapter_per_sample
from .saving import save_adapters
from .wrapper import ModelWrapper


# task -> class, entered by the classes themselves; a model without a task is a plain PeftModel
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type["PeftModel"]] = {}


class PeftModel(ModelWrapper):
    """
    A base model with one or more adapters.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how; it is not changed.
        adapter_name: name of the adapter.
        autocast_adapter_dtype: keep the adapter's tensors in float32 where the base is in half precision.
        low_cpu_mem_usage: make them on the meta device, to be filled by loading a checkpoint.

    Attributes:
        base_model: the tuner, which holds the base model; with prompt learning the base model itself.
        peft_config: adapter name -> config as it applies to this model.
        active_adapter: name of the active adapter, or names if there are several or none. To set it is to call
            `base_model.set_adapter`.
        load_reports: adapter name -> `LoadReport`, for adapters that were loaded from a checkpoint.

    Raises:
        NoMatchingPeftModuleError: if nothing in the model matches what the config targets.
        PeftValueError: if a target or the name cannot work.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, PeftModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> PeftModel(net, LoraConfig(r=2, target_modules=["0"])).get_nb_trainable_parameters()
        (16, 36)
    """

    # modules that a task's models have on top and that are trained in full
    _head_names: Sequence[str] = ()

    def __init_subclass__(cls, task: TaskType | None = None, **kwargs: Any) -> None:
        """Enter the class of a task: `class Model(PeftModel, task="...")`."""
        super().__init_subclass__(**kwargs)
        if task is not None:
            MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(task).value] = cls

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names"}
        config = self._with_heads(peft_config, model)
        _warn_of_wrong_task(model, config)
        with all_or_nothing(model):
            if config.is_prompt_learning:
                self.base_model = model
                self.prompt_encoder = PromptEncoders(model)
                self.prompt_encoder.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
                self.word_embeddings = self.prompt_encoder.word_embeddings
            else:
                tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
                with making_tensors(full_precision=autocast_adapter_dtype):
                    self.base_model = tuner_cls(
                        model, {adapter_name: config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
                    )
            if checkpoints_activations(model):
                self.prepare_model_for_gradient_checkpointing(model)

    @classmethod
    def _with_heads(cls, peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
        """Give the config with the task's heads among the modules that are trained in full."""
        if not cls._head_names or not hasattr(peft_config, "modules_to_save"):
            return peft_config
        config = copy.copy(peft_config)
        own = list(config.modules_to_save or ())
        config.modules_to_save = own + [name for name in cls._head_names if name not in own]
        if config.loaded_from is None:  # a config that was saved names everything that there are tensors for
            new = [name for name in newly_started_heads(model) if not ends_like(config.modules_to_save, name)]
            config.modules_to_save += new
        return config

    # ------------------------------------------------------------------------------------------------- basic access
    @property
    def _tuner(self) -> Any:
        """What manages the adapters: the tuner around the base model, or the prompts that are put in front of it."""
        return self._modules.get("prompt_encoder", self.base_model)

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter, or names if there are several or none."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @active_adapter.setter
    def active_adapter(self, value: str | list[str]) -> None:
        self._tuner.set_adapter(value)

    @property
    def active_peft_config(self) -> PeftConfig:
        """Config of the active adapter, of the first one if there are several."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter takes part in the forward pass."""
        modules = [module for _, module in adapter_modules(self)]
        return any(
            not module.disable_adapters and module.available_adapters & set(module.active_adapters)
            for module in modules
        )

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train in full; None if there are none."""
        names = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """Type of the base model's parameters, where the model says it."""
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        """Give the base model, with adapter layers in it."""
        return self.base_model if "prompt_encoder" in self._modules else self.base_model.model

    # --------------------------------------------------------------------------------------------------- forward pass
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Call the base model.

        Args:
            args: passed on.
            kwargs: passed on, but for `adapter_names`: one adapter name per sample of the batch, `"__base__"` for
                none.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None and current_call() is None:
            return self._call_base(args, kwargs)
        with adapter_per_sample(self, adapter_names) as call:
            outputs = self._call_base(args, kwargs)
            if torch.is_grad_enabled():
                remember(call, outputs)
            return outputs

    def _call_base(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if "prompt_encoder" in self._modules:
            return call_with_prompt(self.prompt_encoder, args, kwargs)
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """
        Generate with the base model.

        Args:
            args: for the base model's `generate`.
            kwargs: likewise, but for `adapter_names`; see `forward`.
        """
        with adapter_per_sample(self, kwargs.pop("adapter_names", None), copies=True):
            if "prompt_encoder" in self._modules:
                return generate_with_prompt(self.prompt_encoder, args, kwargs)
            return self.base_model.generate(*args, **kwargs)

    def get_prompt(
        self, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
    ) -> Any:
        """
        Compute what the active adapter puts in front of inputs.

        Args:
            batch_size: number of samples.
            task_ids: (batch,) for methods with several tasks.
            max_cache_len: has no effect; caches grow as they are used.

        Returns:
            Virtual tokens (batch, tokens, width); for prefix tuning a cache that holds keys and values.
        """
        return compute_prompt(self._prompts(), batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """
        Give the prompt of an adapter as it stands in a checkpoint.

        Args:
            adapter_name: its name.

        Returns:
            (tokens, width) on the CPU.
        """
        self._check_names([adapter_name])
        return self._prompts()[adapter_name].finished_table().detach().cpu()

    def _prompts(self) -> PromptEncoders:
        if "prompt_encoder" not in self._modules:
            raise PeftTypeError(f"{_text(self.peft_type)} puts no prompt in front of inputs")
        return self.prompt_encoder

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """
        Let gradients flow through a frozen embedding, without which checkpointed layers would get none.

        Args:
            model: the base model.
        """
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif (embedding := input_embedding(model)) is not None:
            let_output_require_grad(embedding)
        return model

    # ------------------------------------------------------------------------------------------------------- counting
    # -------------------------------------------------------------------------------------------------- adapter names
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """
        Put another adapter beside those that the model has. It is not active at first, unless it is the only one.

        Args:
            adapter_name: its name.
            peft_config: what to adapt and how, for the same method; it is not changed.
            low_cpu_mem_usage: make its tensors on the meta device.
            autocast_adapter_dtype: keep them in float32 where the base is in half precision.

        Raises:
            PeftValueError: if the name is taken or the method another one; the model stays as it was.
        """
        if peft_config.peft_type != self.peft_type:
            raise PeftValueError(
                f"the model's adapters are of method {_text(self.peft_type)}, {adapter_name!r} would be "
                f"{_text(peft_config.peft_type)}; PeftMixedModel can hold several methods"
            )
        self._check_name_is_free(adapter_name)
        config = self._with_heads(peft_config, self.get_base_model())
        self._tuner.add_adapter(
            adapter_name,
            config,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """
        Choose the adapter that is used; others are frozen.

        Args:
            adapter_name: its name. To activate several, call `base_model.set_adapter`.
            inference_mode: freeze it too.

        Raises:
            PeftValueError: if there is no adapter of that name.
            PeftTypeError: for anything but one name.
        """
        if not isinstance(adapter_name, str):
            raise PeftTypeError(
                f"set_adapter takes one name, found {adapter_name!r}; base_model.set_adapter takes several"
            )
        self._check_names([adapter_name])
        self._tuner.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter. If it was active, another one becomes active.

        Args:
            adapter_name: its name.

        Raises:
            PeftValueError: if there is no adapter of that name, or it is merged.
        """
        self._check_names([adapter_name])
        self._tuner.delete_adapter(adapter_name)
        self.load_reports.pop(adapter_name, None)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """
        Freeze adapters or let them be trained, without a change to which are active.

        Args:
            adapter_names: one name or several.
            requires_grad: False to freeze.

        Raises:
            PeftTypeError: with prompt learning, where the prompt that is in use is the one that is trained.
        """
        if "prompt_encoder" in self._modules:
            raise PeftTypeError(
                "set_requires_grad is about adapters in layers, and the model has prompts; set_adapter(name, "
                "inference_mode=...) says whether the one that it puts to use is trained"
            )
        self._tuner.set_requires_grad(adapter_names, requires_grad)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """
        Say whether an adapter can be converted to LoRA.

        Args:
            adapter_name: its name.
        """
        return self._tuner.supports_lora_conversion(adapter_name)

    # --------------------------------------------------------------------------------------------------------- saving
    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        deduplicate_tied: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Write adapters: tensors, config and model card. The adapter "default" goes to the folder itself, others to
        folders of their names below it. Each file replaces an older one only when it is whole.

        Args:
            save_directory: folder; it is made if it is missing.
            safe_serialization: write safetensors; False writes a pickle.
            selected_adapters: names to write; all if left out.
            save_embedding_layers: also write the base weights of the embeddings; "auto" does so if they
                differ from those of the published base model, as after resizing the vocabulary.
            is_main_process: False to write nothing, on all processes of a run but one.
            path_initial_model_for_weight_conversion: folder with a LoRA adapter as it was before training. What was
                trained from it is written as plain LoRA of twice the rank, which fits the base model as it was before
                the start of the adapter changed its weights (PiSSA, OLoRA).
            state_dict: tensors of the model, if they had to be gathered from several processes.
            deduplicate_tied: write a tensor that tied modules share once, under the key of the module that owns it
                (release 0.21.2 needs all keys).
            kwargs: ignored.

        Raises:
            PeftPathError: if the path is a file.
            PeftValueError: if there is no adapter of a name in `selected_adapters`, or it cannot be converted.
        """
        if os.path.isfile(save_directory):
            raise PeftPathError(f"{os.fspath(save_directory)!r} is a file; adapters are saved into a folder")
        names = selected_adapters
        if names is None:  # parts of an adapter, such as experts, have configs too
            names = getattr(self._tuner, "adapters_to_save", None) or list(self.peft_config)
        self._check_names(names)
        if is_main_process:
            save_adapters(
                self,
                save_directory,
                names,
                safe_serialization=safe_serialization,
                save_embedding_layers=save_embedding_layers,
                path_initial=path_initial_model_for_weight_conversion,
                state_dict=state_dict,
                deduplicate_tied=deduplicate_tied,
            )

    def push_to_hub(self, repo_id: str, *, deduplicate_tied: bool = False, **kwargs: Any) -> CommitInfo:
        """
        Save the adapters and upload them to the hub. The text of a model card that is there is kept.

        Args:
            repo_id: id of the repository; it is made if it is missing.
            deduplicate_tied: as in `save_pretrained`.
            kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr` and `tags`, as
                for any model; others are for `save_pretrained`.

        Returns:
            The commit; as a string it is its address.
        """
        return push_folder(self, repo_id, deduplicate_tied=deduplicate_tied, **kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """
        Write a model card, or bring the one that is there up to date.

        Args:
            output_dir: folder.
        """
        configs = list(self.peft_config.values())
        write_model_card(output_dir, self.get_base_model(), configs, self.get_nb_trainable_parameters)

    # -------------------------------------------------------------------------------------------------------- loading
    @classmethod
    def from_pretrained(
        cls,
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
        **kwargs: Any,
    ) -> "PeftModel":
        """
        Put an adapter from a folder or from the hub into a base model.

        Args:
            model: the base model; it is changed in place.
            model_id: folder, or hub id.
            adapter_name: name to give the adapter.
            is_trainable: let it be trained; otherwise it is frozen and the model is in eval mode.
            config: config to use instead of the one in the folder.
            autocast_adapter_dtype: keep its tensors in float32 where the base is in half precision.
            ephemeral_gpu_offload: use the accelerator for start-up computations only.
            low_cpu_mem_usage: make its tensors without storage, so that they are allocated once.
            key_mapping: regular expression -> replacement for keys of the checkpoint; what the base model's
                `_checkpoint_conversion_mapping` says if left out.
            strict: refuse a checkpoint that does not fit in every respect, instead of warning about missing and
                unexpected tensors.
            ignore_mismatched_sizes: leave out tensors of another shape.
            kwargs: `subfolder`, `revision`, `token`, ... for the hub; `adapters`, name of each expert -> folder, for
                X-LoRA whose experts are elsewhere than its config says.

        Returns:
            A `PeftModel` of the class that belongs to the config's task. Its `load_reports` say what became of each
            tensor.

        Raises:
            PeftPathError: if there is no adapter at `model_id`.
            PeftKeyError: if its method is not known.
            PeftLoadError: if its tensors do not fit the model or are not finite.
            PeftValueError: if its files are damaged; if a prompt is to be trained.
        """
        return load_model(
            peft_model_for_task if cls is PeftModel else cls,
            model,
            model_id,
            adapter_name,
            is_trainable,
            config,
            autocast_adapter_dtype,
            ephemeral_gpu_offload,
            low_cpu_mem_usage,
            key_mapping,
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **kwargs,
        )

    def load_adapter(
        self,
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
        **kwargs: Any,
    ) -> LoadResult:
        """
        Put an adapter from a folder or from the hub beside those that the model has. It is not active at first.

        Args:
            model_id: folder, or hub id.
            adapter_name: name to give the adapter; if there is one of that name, its tensors are replaced, and its
                config stays; a warning names what the file's config sets otherwise.
            is_trainable: let it be trained, although it is not active; otherwise the model is put in eval mode.
            torch_device: where its file is read to.
            autocast_adapter_dtype: keep its tensors in float32 where the base is in half precision.
            ephemeral_gpu_offload: use the accelerator for start-up computations only.
            low_cpu_mem_usage: make its tensors without storage, so that they are allocated once.
            key_mapping: regular expression -> replacement for keys of the checkpoint.
            strict: refuse a checkpoint that does not fit in every respect.
            ignore_mismatched_sizes: leave out tensors of another shape.
            kwargs: options for the hub, as in `from_pretrained`.

        Returns:
            `missing_keys`, those of this adapter that the file lacks, and `unexpected_keys`. Its `report` is the one
            that stands in `load_reports` then.

        Raises:
            PeftPathError: if there is no adapter at `model_id`.
            PeftLoadError: if its tensors do not fit the model; the model stays as it was.
            PeftValueError: if `is_trainable` asks to go on with a prompt whose network is not in the file.
        """
        return load_adapter(
            self,
            model_id,
            adapter_name,
            is_trainable,
            torch_device,
            autocast_adapter_dtype,
            ephemeral_gpu_offload,
            low_cpu_mem_usage,
            key_mapping,
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **kwargs,
        )


def peft_model_for_task(model: nn.Module, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> PeftModel:
    """
    Make a `PeftModel` of the class that belongs to the config's task.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how.
        args: for the class.
        kwargs: likewise.
    """
    model_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    return model_cls(model, peft_config, *args, **kwargs)


def _text(peft_type: Any) -> str:
    return getattr(peft_type, "value", str(peft_type))


def _warn_of_wrong_task(model: nn.Module, config: PeftConfig) -> None:
    has_encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    wanted = {TaskType.SEQ_2_SEQ_LM: True, TaskType.CAUSAL_LM: False}.get(config.task_type)
    if has_encoder is not None and wanted is not None and has_encoder != wanted:
        right = TaskType.SEQ_2_SEQ_LM if has_encoder else TaskType.CAUSAL_LM
        warn(
            f"the task is {_text(config.task_type)}, but {type(model).__name__} has "
            f"{'an encoder and a decoder' if has_encoder else 'a decoder only'}; did you mean {right.value}?"
        )
