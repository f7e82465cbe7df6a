# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`AdaptionPromptModel`: puts trained tokens into the attention modules of a model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...anatomy.view import viewing
from ...anatomy.walking import adapter_modules, base_modules
from ...config import PeftConfig
from ...layers.adapter_names import check_adapter_name
from ...layers.new_tensors import making_tensors
from ...registry import PEFT_TYPE_TO_PREFIX_MAPPING
from ...surgery.slots import Slots
from ...surgery.switching import is_trained
from ...surgery.transaction import all_or_nothing
from ...tying.record import keep_ties
from ...utils.error import PeftValueError
from ...utils.near_names import explain_unknown_adapters
from ...utils.old_names import old_names
from ...utils.warning import warn
from .config import AdaptionPromptConfig
from .layer import _BaseAdaptedAttention
from .targets import find_targets, prepared_copy, wrapper_class


class AdaptionPromptModel(nn.Module):
    """
    A model whose top attention modules also attend to trained tokens (Zhang et al. 2023, arXiv:2303.16199).

    One adapter is used at a time; there is nothing to merge.

    Args:
        model: the base model; it is changed in place.
        configs: adapter name -> config; that of `adapter_name` is used.
        adapter_name: name of the adapter to make now.
        low_cpu_mem_usage: make its tensors on the meta device, to be filled by loading a checkpoint.

    Attributes:
        model: the base model.
        peft_config: adapter name -> config as it applies to this model.

    Raises:
        PeftTypeError: if `adapter_len` or `adapter_layers` is left out.
        PeftValueError: for models of other types, or if nothing fits the config. Nothing is changed then.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft import AdaptionPromptConfig, get_peft_model
        >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> config = AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
        >>> model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), config)
        >>> [name for name, parameter in model.base_model.model.named_parameters() if parameter.requires_grad]
        ['model.layers.1.self_attn.adaption_prompt', 'model.layers.1.self_attn.adaption_gate']
    """

    tuner_layer_cls = _BaseAdaptedAttention

    def __init__(
        self,
        model: nn.Module,
        configs: Mapping[str, AdaptionPromptConfig],
        adapter_name: str,
        *,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self._active_adapter: list[str] = []
        self.add_adapter(adapter_name, configs[adapter_name], low_cpu_mem_usage=low_cpu_mem_usage)

    def __getattr__(self, name: str) -> Any:
        """Forward what this module lacks to the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "_modules" not in self.__dict__:  # while unpickling
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model."""
        return self.model(*args, **kwargs)

    @property
    def active_adapters(self) -> list[str]:
        """Name of the active adapter, in a list."""
        return self._active_adapter

    def _layers(self) -> list[_BaseAdaptedAttention]:
        return [module for _, module in adapter_modules(self.model)]

    # ------------------------------------------------------------------------------------------------------ adapters
    def add_adapter(
        self,
        adapter_name: str,
        config: AdaptionPromptConfig,
        *,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """
        Make the tokens of an adapter; if it is refused, the model stays as it was. The first one is active.

        Args:
            adapter_name: its name.
            config: its config; it is not changed.
            low_cpu_mem_usage: make its tensors on the meta device.
            autocast_adapter_dtype: has no effect, tokens have the type of the attention modules.

        Raises:
            PeftKeyError: if the name cannot be one.
            PeftTypeError: if a number is left out.
            PeftValueError: if the name is taken, or nothing fits the config.
        """
        if adapter_name in self.peft_config:
            raise PeftValueError(f"there is an adapter named {adapter_name!r} already; delete it or use another name")
        check_adapter_name(adapter_name, PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type])
        config = prepared_copy(config, self.model)
        targets = find_targets(self.model, config)
        keep_ties(self.model, config)  # tokens tie nothing; it says so if ties are asked for
        with all_or_nothing(self, self.model), making_tensors(on_meta=low_cpu_mem_usage), viewing(self.model):
            self._place(adapter_name, config, targets)
            for module in base_modules(self.model):
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad = False
            self.peft_config[adapter_name] = config
            if not self._active_adapter:
                self.set_adapter(adapter_name, inference_mode=config.inference_mode)
            else:
                self.set_requires_grad(adapter_name, False)

    def _place(self, adapter_name: str, config: AdaptionPromptConfig, targets: list[nn.Module]) -> None:
        """Put tokens into attention modules, from the lowest one upwards."""
        slots, wrapper_cls = Slots(self.model), wrapper_class(self.model)
        for target in targets:
            if isinstance(target, _BaseAdaptedAttention):
                target.add_adapter(adapter_name, config.adapter_len)
                continue
            wrapper = wrapper_cls(self.model.config.model_type, config.adapter_len, target, adapter_name)
            wrapper.set_adapter(self._active_adapter)
            wrapper.training = target.training
            slots.replace(target, wrapper)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the adapter that is used; others are frozen.

        Args:
            adapter_name: its name.
            inference_mode: freeze it too.

        Raises:
            PeftValueError: for several names, or an unknown one.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        if len(names) != 1:
            raise PeftValueError(f"one adaption prompt is used at a time, found {names}; choose one")
        for layer in self._layers():
            layer.set_adapter(names, inference_mode)
        self._active_adapter = names

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter. If it was active, the first one that remains becomes active, with a warning.

        Args:
            adapter_name: its name.

        Raises:
            PeftValueError: if there is no adapter of that name.
        """
        self._check_names([adapter_name])
        was_trained = is_trained(self.model, adapter_name)
        slots = Slots(self.model)
        for layer in self._layers():
            layer.remove_adapter(adapter_name)
            if not layer.available_adapters:
                slots.replace(layer, layer.model)
        del self.peft_config[adapter_name]
        if adapter_name not in self._active_adapter:
            return
        self._active_adapter = []
        if self.peft_config:
            first, config = next(iter(self.peft_config.items()))
            warn(f"the active adapter {adapter_name!r} was deleted; {first!r} is active now")
            self.set_adapter(first, inference_mode=config.inference_mode or not was_trained)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """
        Freeze adapters or let them be trained, without a change to which is active.

        Args:
            adapter_names: one name or several.
            requires_grad: False to freeze.
        """
        for layer in self._layers():
            layer.set_requires_grad(adapter_names, requires_grad)

    def _check_names(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise PeftValueError(explain_unknown_adapters(unknown, self.peft_config))

    # ----------------------------------------------------------------------------------------------------- switching
    def enable_adapter_layers(self) -> None:
        """Let attention modules attend to the tokens."""
        for layer in self._layers():
            layer.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Let the model compute what the base model does."""
        for layer in self._layers():
            layer.enable_adapters(False)

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Switch the adapters off inside a context; what was off before stays off afterwards."""
        on = [layer for layer in self._layers() if not layer.disable_adapters]
        for layer in on:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in on:
                layer.enable_adapters(True)

    # --------------------------------------------------------------------------------------------------- checkpoints
    def config_to_save(self, adapter_name: str) -> PeftConfig:
        """Give a copy of an adapter's config."""
        return prepared_copy(self.peft_config[adapter_name], self.model)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether an adapter can be converted to LoRA: tokens are no change of weights."""
        return False


__getattr__ = old_names(__name__)
