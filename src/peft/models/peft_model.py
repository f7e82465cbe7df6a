# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`PeftModel`: a base model with adapters. Its subclasses per task are in `task_models.py`."""

import copy
import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers.utils.hub import PushToHubMixin

from ..anatomy.embeddings import input_embedding, let_output_require_grad, without_adapters_around
from ..anatomy.matching import ends_like
from ..anatomy.walking import adapter_modules
from ..checkpoints.load_report import LoadReport, LoadResult
from ..checkpoints.save_and_load import (
    collect_tensors,
    load_peft_weights,
    load_tensors,
    refuse_without_storage,
    write_peft_weights,
)
from ..checkpoints.tied_members import config_for_members
from ..config import PeftConfig, config_differences
from ..layers.call_context import Call, calling, current_call, remember
from ..layers.new_tensors import making_tensors
from ..mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from ..prompts.inputs import call_with_prompt, generate_with_prompt
from ..prompts.learning import PromptEncoders
from ..surgery.saved_modules import AuxiliaryTrainingWrapper, newly_started_heads
from ..surgery.transaction import all_or_nothing
from ..tuners.base import BaseTuner, BaseTunerLayer
from ..tuners.lora.plain_lora import convert_on_save
from ..utils.constants import DUMMY_MODEL_CONFIG, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..utils.error import PeftNotImplementedError, PeftPathError, PeftRuntimeError, PeftTypeError, PeftValueError
from ..utils.files import replacing_adapter, state_of_config
from ..utils.hub import push_folder
from ..utils.near_names import explain_unknown_adapters
from ..utils.peft_types import PeftType, TaskType
from ..utils.warning import warn
from .card import write_model_card
from .status import TunerLayerStatus, TunerModelStatus, count_parameters, get_layer_status, get_model_status


# at home in task_models.py; see `__getattr__` below
_TASK_MODELS = (
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
)

# how often an adapter is read anew because it was replaced while it was read
_READINGS = 10

__all__ = [
    "DUMMY_MODEL_CONFIG",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "TunerLayerStatus",
    "TunerModelStatus",
    "get_layer_status",
    "get_model_status",
    *_TASK_MODELS,
]


class PeftModel(PushToHubMixin, nn.Module):
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

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        if peft_config.is_adaption_prompt:
            raise PeftNotImplementedError(f"{peft_config.peft_type} is not part of this version")
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names"}
        self.load_reports: dict[str, LoadReport] = {}
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
            if _checkpoints_activations(model):
                self.prepare_model_for_gradient_checkpointing(model)

    def _with_heads(self, peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
        """Give the config with the task's heads among the modules that are trained in full."""
        if not self._head_names or not hasattr(peft_config, "modules_to_save"):
            return peft_config
        config = copy.copy(peft_config)
        own = list(config.modules_to_save or ())
        config.modules_to_save = own + [name for name in self._head_names if name not in own]
        if config.loaded_from is None:  # a config that was saved names everything that there are tensors for
            new = [name for name in newly_started_heads(model) if not ends_like(config.modules_to_save, name)]
            config.modules_to_save += new
        return config

    # ------------------------------------------------------------------------------------------------- basic access
    def __getattr__(self, name: str) -> Any:
        """Forward what the wrapper lacks to the tuner and the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "_modules" not in self.__dict__:  # while unpickling
                raise
            return getattr(self.base_model, name)

    @property
    def _tuner(self) -> Any:
        """What manages the adapters: the tuner around the base model, or the prompts that are put in front of it."""
        return self._modules.get("prompt_encoder", self.base_model)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> config as it applies to this model."""
        return self._tuner.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self._tuner.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self._tuner.active_adapters

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
        with self._adapter_per_sample(adapter_names) as call:
            outputs = self._call_base(args, kwargs)
            if torch.is_grad_enabled():
                remember(call, outputs)
            return outputs

    def _call_base(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if "prompt_encoder" in self._modules:
            return call_with_prompt(self.prompt_encoder, args, kwargs)
        return self.base_model(*args, **kwargs)

    def _forward_task(self, named: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """Call the base model with those of a task's arguments that were given."""
        named = {name: value for name, value in named.items() if value is not None}
        return PeftModel.forward(self, **named, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """
        Generate with the base model.

        Args:
            args: for the base model's `generate`.
            kwargs: likewise, but for `adapter_names`; see `forward`.
        """
        with self._adapter_per_sample(kwargs.pop("adapter_names", None), copies=True):
            if "prompt_encoder" in self._modules:
                return generate_with_prompt(self.prompt_encoder, args, kwargs)
            return self.get_base_model().generate(*args, **kwargs)

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
        return self._prompts().prompt(batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """
        Give the prompt of an adapter as it stands in a checkpoint.

        Args:
            adapter_name: its name.

        Returns:
            (tokens, width) on the CPU.
        """
        self._check_name(adapter_name)
        return self._prompts()[adapter_name].finished_table().detach().cpu()

    def _prompts(self) -> PromptEncoders:
        if "prompt_encoder" not in self._modules:
            raise PeftTypeError(f"{_text(self.peft_type)} puts no prompt in front of inputs")
        return self.prompt_encoder

    def _adapter_per_sample(
        self, adapter_names: Sequence[str] | None, copies: bool = False
    ) -> AbstractContextManager[Call]:
        """
        Begin a call in which each sample of the batch has an adapter of its own.

        Args:
            adapter_names: one name per sample; None for the active adapters, whatever a call around this one says.
            copies: whether samples may come several times in a row, as with beams.
        """
        if adapter_names is None:
            return calling(adapter_names=None, modules=())
        if "prompt_encoder" in self._modules:
            raise PeftValueError("adapter_names does not work with prompt learning: one prompt is used at a time")
        modules = [module for _, module in adapter_modules(self)]
        self._check_adapter_per_sample(adapter_names, modules)
        return calling(adapter_names=list(adapter_names), modules=frozenset(map(id, modules)), repeats=copies)

    def _check_adapter_per_sample(self, adapter_names: Sequence[str], modules: list[nn.Module]) -> None:
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise PeftValueError(
                "adapter_names takes names of adapters, and '__base__' for none: "
                f"{explain_unknown_adapters(unknown, self.peft_config)}"
            )
        if self.training:
            raise PeftValueError("adapter_names works for inference only; call eval() first")
        whole = [m for m in modules if isinstance(m, BaseTunerLayer) and not m.supports_mixed_batch]
        if whole:
            raise PeftValueError(
                f"adapter_names does not work on {type(whole[0]).__name__}, whose adapters change one weight for all "
                "samples; give each adapter a batch of its own"
            )
        if any(isinstance(module, BaseTunerLayer) and module.merged for module in modules):
            raise PeftValueError("adapter_names does not work while adapters are merged; call unmerge_adapter() first")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """
        Switch all adapters off inside a context; the model computes what the base model does.

        Example:

            >>> import torch
            >>> from peft import LoraConfig, get_peft_model
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
            >>> x = torch.ones(1, 4)
            >>> expected = net(x)
            >>> model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
            >>> with model.disable_adapter():
            ...     torch.equal(model(x), expected)
            True
        """
        with self._tuner.adapters_disabled():
            yield

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
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """
        Count parameters; one that several modules share counts once.

        Returns:
            Trainable parameters, all parameters.
        """
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """
        Print how many parameters are trained.

        Example:

            >>> import torch
            >>> from peft import LoraConfig, get_peft_model
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
            >>> get_peft_model(net, LoraConfig(r=2, target_modules=["0"])).print_trainable_parameters()
            trainable params: 16 || all params: 36 || trainable%: 44.4444
        """
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Say in which state each adapter layer and training wrapper is; see `peft.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Say in which state the adapters are; see `peft.get_model_status`."""
        return get_model_status(self)

    # -------------------------------------------------------------------------------------------------- adapter names
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """
        Put another adapter beside those that the model has. It is not active at first.

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
        if adapter_name in self.peft_config:
            raise PeftValueError(f"there is an adapter named {adapter_name!r} already; delete it or use another name")
        config = self._with_heads(peft_config, self.get_base_model())
        self._tuner.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)

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
        self._check_name(adapter_name)
        self._tuner.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter. If it was active, another one becomes active.

        Args:
            adapter_name: its name.

        Raises:
            PeftValueError: if there is no adapter of that name.
        """
        self._check_name(adapter_name)
        self._tuner.delete_adapter(adapter_name)
        self.load_reports.pop(adapter_name, None)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """
        Freeze adapters or let them be trained, without a change to which are active.

        Args:
            adapter_names: one name or several.
            requires_grad: False to freeze.
        """
        self._tuner.set_requires_grad(adapter_names, requires_grad)

    def _check_name(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise PeftValueError(explain_unknown_adapters([adapter_name], self.peft_config))

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
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            self._check_name(name)
        if not is_main_process:
            return
        contents = {name: collect_tensors(self, state_dict, name, save_embedding_layers) for name in names}
        configs = {name: self._config_to_save(name) for name in names}
        for name, tensors in contents.items():
            refuse_without_storage(tensors)
            if path_initial_model_for_weight_conversion is not None:
                contents[name], configs[name] = convert_on_save(
                    tensors, configs[name], path_initial_model_for_weight_conversion
                )
        os.makedirs(save_directory, exist_ok=True)
        write_model_card(self, save_directory)
        for name, tensors in contents.items():
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            os.makedirs(folder, exist_ok=True)
            with replacing_adapter(folder) as new:
                write_peft_weights(new, tensors, safe_serialization, deduplicate_tied)
                configs[name].save_pretrained(new)

    def _config_to_save(self, adapter_name: str) -> PeftConfig:
        """Give an adapter's config as it is written: frozen, and with a note on a base model without a task."""
        config = copy.copy(self.peft_config[adapter_name])
        config.inference_mode = True
        base = without_adapters_around(self.get_base_model())  # the class of what is compiled, not torch.compile's
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        if config.task_type is None:
            config.auto_mapping = {
                "base_model_class": type(base).__name__,
                "parent_library": type(base).__module__,
            }
        return config

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
        write_model_card(self, output_dir)

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
            key_mapping: regular expression -> replacement for keys of the checkpoint.
            strict: refuse a checkpoint that does not fit in every respect, instead of warning about missing and
                unexpected tensors.
            ignore_mismatched_sizes: leave out tensors of another shape.
            kwargs: `subfolder`, `revision`, `token`, ... for the hub.

        Returns:
            A `PeftModel` of the class that belongs to the config's task. Its `load_reports` say what became of each
            tensor.

        Raises:
            PeftPathError: if there is no adapter at `model_id`.
            PeftKeyError: if its method is not known.
            PeftLoadError: if its tensors do not fit the model or are not finite.
            PeftValueError: if its files are damaged; if a prompt is to be trained.
        """
        if config is not None and not isinstance(config, PeftConfig):
            raise PeftValueError(f"config must be a PeftConfig, found a {type(config).__name__}")
        # files are read before the model is touched
        config, weights = _read_adapter(model_id, kwargs, config, "cpu", key_mapping)
        config = _for_this_run(config, model_id, is_trainable, ephemeral_gpu_offload)
        config = config_for_members(config, model, weights, PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type])
        model_cls = cls
        if cls is PeftModel:
            from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

            model_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, cls)
        with all_or_nothing(model):
            peft_model = model_cls(
                model,
                config,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            peft_model._fill_adapter(adapter_name, weights, strict, ignore_mismatched_sizes)
            if not is_trainable:
                peft_model.eval()
        return peft_model

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
            `missing_keys` and `unexpected_keys`; see `set_peft_model_state_dict`. Its `report` is the one that stands
            in `load_reports` then.

        Raises:
            PeftPathError: if there is no adapter at `model_id`.
            PeftLoadError: if its tensors do not fit the model; the model stays as it was.
            PeftValueError: if `is_trainable` asks to go on with a prompt whose network is not in the file.
        """
        present = self.peft_config.get(adapter_name)
        if present is not None and is_trainable and "prompt_encoder" in self._modules:
            self.prompt_encoder.check_training_goes_on(adapter_name)
        config, weights = _read_adapter(
            model_id, kwargs, None, torch_device or "cpu", key_mapping, present is not None
        )
        if config is not None:
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
            config = config_for_members(config, self.get_base_model(), weights, prefix)
        settings = config_differences(config, present) if config and present else {}
        with all_or_nothing(self):
            if present is None:
                config = _for_this_run(config, model_id, is_trainable, ephemeral_gpu_offload)
                self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
            result = self._fill_adapter(adapter_name, weights, strict, ignore_mismatched_sizes, settings)
            if is_trainable:
                self._tuner.set_requires_grad(adapter_name)
            else:
                self.eval()
        return result

    def _fill_adapter(
        self,
        adapter_name: str,
        weights: dict[str, torch.Tensor],
        strict: bool,
        ignore_mismatched_sizes: bool,
        settings: dict[str, tuple[Any, Any]] | None = None,
    ) -> LoadResult:
        """Put a checkpoint's tensors into an adapter; those that get nothing and have no storage start anew."""
        if not weights:
            raise PeftRuntimeError(f"{SAFETENSORS_WEIGHTS_NAME} holds no tensor at all; save the adapter again")
        result = load_tensors(self, weights, adapter_name, ignore_mismatched_sizes, strict, settings=settings)
        for _, module in adapter_modules(self):
            if any(parameter.is_meta for parameter in module.adapter_parameters(adapter_name)):
                module.fill_missing(adapter_name, self.peft_config[adapter_name])
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


def _checkpoints_activations(model: nn.Module) -> bool:
    # transformers 5 has renamed the property
    name = "is_activation_checkpointing"
    return bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing", False))


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


def __getattr__(name: str) -> Any:
    """Give the classes per task, which code outside imports from here; they are built on `PeftModel`."""
    if name in _TASK_MODELS:
        from ..models import tasks as task_models

        return getattr(task_models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
