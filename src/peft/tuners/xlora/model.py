# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""X-LoRA on a whole model."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ...anatomy.walking import adapter_modules
from ...checkpoints.read_file import load_peft_weights
from ...checkpoints.state_dict import load_tensors
from ...config import PeftConfig
from ...layers.adapter_module import AdapterModule
from ...layers.call_context import call_with, calling, current_call
from ...layers.new_tensors import making_tensors
from ...surgery.transaction import all_or_nothing
from ...utils.error import PeftNotImplementedError, PeftTypeError, PeftValueError
from ...utils.near_names import explain_unknown_adapters
from ...utils.old_names import old_names
from ...utils.warning import warn
from ..base import BaseTuner
from ..lora.layer import LoraLayer
from ..lora.model import LoraModel
from .classifier import XLoraClassifier
from .config import XLoraConfig
from .layer import Experts, Routing, XLoraEmbeddingLayer, XLoraLayer, XLoraLinearLayer, few_largest
from .log import ScalingsLog


# what keys of a LoRA adapter's file begin with, also where it was saved as part of an X-LoRA model
_PREFIX = re.compile(r"^base_model\.(lora_model\.)?model\.")


class XLoraModel(AdapterModule, BaseTuner):
    """
    A model with LoRA experts in it, and a classifier that weighs them (Buehler, Buehler 2024, arXiv:2402.07148).

    Each call computes the model twice: with the same weight for every expert, which gives the classifier hidden
    states, and with the weights that it makes of them. The experts are LoRA adapters named "0", "1", ... in the order
    of the names that the config gives them: files keep no other order.

    Args:
        model: the base model; it is changed in place.
        config: an `XLoraConfig`, or adapter name -> config.
        adapter_name: name of the adapter.
        torch_device: where the experts' files are read to; the CPU if left out.
        ephemeral_gpu_offload: has no effect; starts of experts are not computed.
        autocast_adapter_dtype: keep the experts in float32 where the base is in half precision.
        kwargs: `low_cpu_mem_usage`, to make the experts without storage until their files are read; `token`,
            `cache_dir` and other options for the hub.

    Attributes:
        lora_model: the base model with the experts in it.
        internal_xlora_classifier: the classifier.
        xlora_config: the config; setters change it.

    Raises:
        PeftValueError: without experts, for experts that are no plain LoRA, and for a model that keeps a cache.

    Example:

        >>> import tempfile
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft import LoraConfig, XLoraConfig, get_peft_model
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=16, use_cache=False, **sizes))
        >>> folder = tempfile.mkdtemp()
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
        >>> model.save_pretrained(folder)
        >>> base = model.unload()
        >>> config = XLoraConfig(hidden_size=8, adapters={"one": folder, "two": folder}, task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)
        >>> _ = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> model.get_latest_scalings().shape
        torch.Size([1, 3, 1, 2])
    """

    _base_names = ("lora_model",)
    prefix = "xlora_"
    tuner_layer_cls = LoraLayer

    def __init__(
        self,
        model: nn.Module,
        config: XLoraConfig | dict[str, XLoraConfig],
        adapter_name: str,
        torch_device: str | None = None,
        ephemeral_gpu_offload: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.xlora_config = copy.copy(config[adapter_name] if isinstance(config, dict) else config)
        folders = in_order(self.xlora_config.adapters or {})
        names = [str(number) for number in range(len(folders))]
        _check(model, self.xlora_config, names, adapter_name)
        self.adapter_name = adapter_name
        self.experts = Experts(names)
        self.scalings = ScalingsLog()
        first, low_cpu_mem_usage = next(model.parameters()), kwargs.pop("low_cpu_mem_usage", False)
        with all_or_nothing(model), making_tensors(full_precision=autocast_adapter_dtype):
            read = _read_experts(dict(zip(names, folders, strict=True)), torch_device or "cpu", kwargs)
            self.lora_model = _with_experts(model, read, low_cpu_mem_usage)
            layers = _weigh_experts(self.lora_model, self.experts)
            device = next(layers[0].adapter_parameters(names[0]), first).device
            sizes = len(names), len(layers)
            self.internal_xlora_classifier = XLoraClassifier(self.xlora_config, *sizes, device, first.dtype)
            self.set_adapter(adapter_name, inference_mode=self.xlora_config.inference_mode)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """Forward what this lacks to the LoRA model and the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "lora_model" or "_modules" not in self.__dict__:  # while unpickling
                raise
            return getattr(self.lora_model, name)

    # ------------------------------------------------------------------------------------------------- basic access
    @property
    def model(self) -> nn.Module:
        """The base model, with the experts in it."""
        return self.lora_model.model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """This adapter's config, and those of the experts, by name."""
        return {self.adapter_name: self.xlora_config, **self.lora_model.peft_config}

    @property
    def adapters_to_save(self) -> list[str]:
        """Names of the adapters that are saved: this one. The experts are where the config says."""
        return [self.adapter_name]

    @property
    def active_adapter(self) -> str | list[str]:
        """Names of the experts, which are all active."""
        return self.lora_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """Names of the experts, which are all active."""
        return self.lora_model.active_adapters

    @property
    def available_adapters(self) -> set[str]:
        """Name of this adapter."""
        return {self.adapter_name}

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield what is trained: the classifier, and the experts if the config says so."""
        if adapter_name == self.adapter_name:
            yield from self.internal_xlora_classifier.parameters()
            if self.xlora_config.use_trainable_adapters:
                for _, layer in adapter_modules(self.lora_model):
                    for expert in self.experts.names:
                        yield from layer.adapter_parameters(expert)

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield the same for checkpoints: keys are those of the state dict."""
        if adapter_name != self.adapter_name:
            return
        keys = [f"internal_xlora_classifier.{key}" for key in self.internal_xlora_classifier.state_dict()]
        if self.xlora_config.use_trainable_adapters:
            for name, layer in adapter_modules(self.lora_model):
                live = [key for expert in self.experts.names for _, key in layer.adapter_keys(expert)]
                keys += [f"lora_model.{name}.{key}" for key in live]
        yield from zip(keys, keys, strict=True)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A mixture that differs from token to token is no LoRA."""
        return False

    # ------------------------------------------------------------------------------------------------------ switching
    def _check_name(self, adapter_name: str, known: tuple[str, ...]) -> None:
        if adapter_name not in known:
            raise PeftValueError(explain_unknown_adapters([adapter_name], list(known)))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Let the adapter be trained, or freeze it; there is one, and its experts are always active.

        Args:
            adapter_name: its name.
            inference_mode: freeze it.

        Raises:
            PeftValueError: for another name.
        """
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self._check_name(name, (self.adapter_name,))
        self.lora_model.set_adapter(self.experts.names, inference_mode=True)
        self.set_requires_grad(self.adapter_name, not inference_mode)

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Switch classifier and experts off inside a context; the model computes what the base model does."""
        was_off = self._disable_adapters
        if not was_off:
            self.enable_adapters(False)
        try:
            with self.lora_model.adapters_disabled():
                yield
        finally:
            if not was_off:
                self.enable_adapters(True)

    def enable_adapter_layers(self) -> None:
        """Switch classifier and experts on."""
        self.lora_model.enable_adapter_layers()
        self.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Switch them off; the model then computes what the base model does, once."""
        self.enable_adapters(False)
        self.lora_model.disable_adapter_layers()

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a second adapter."""
        raise PeftNotImplementedError(
            "a model has one X-LoRA adapter, with one classifier for all its experts; name more experts in `adapters`"
        )

    _inject = add_adapter

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Refuse to go on with a part of the adapter.

        Raises:
            PeftNotImplementedError: always.
        """
        raise PeftNotImplementedError("an X-LoRA adapter cannot be taken apart; unload() gives the base model")

    def unload(self) -> nn.Module:
        """Give the base model back as it was."""
        return self.lora_model.unload()

    # --------------------------------------------------------------------------------------------------- forward pass
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Call the base model twice.

        Args:
            args: for the base model; the first one is its `input_ids`.
            kwargs: likewise, `input_ids` or `inputs_embeds` among them.

        Returns:
            What the second pass gives.
        """
        if self._disable_adapters:
            return self.lora_model(*args, **kwargs)
        self._refuse_names()
        routing = Routing(factor=self.xlora_config.global_scaling_weight)
        return call_with(partial(self._route_and_call, routing), args, kwargs, notes={self.experts: routing})

    def _route_and_call(self, routing: Routing, *args: Any, **kwargs: Any) -> Any:
        self._route(routing, args, kwargs)
        return self.lora_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """
        Generate with the base model, without a cache: each step weighs the experts for all tokens anew.

        Args:
            args: for the base model's `generate`.
            kwargs: likewise.
        """
        base = self.model
        kwargs["use_cache"] = False
        if self._disable_adapters:
            return base.generate(*args, **kwargs)
        self._refuse_names()
        routing = Routing(factor=self.xlora_config.global_scaling_weight)

        def route(module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
            call = current_call()  # other threads' calls are not meant
            if call is not None and call.notes.get(self.experts) is routing and not routing.is_measuring:
                self._route(routing, args, kwargs or {})

        with calling(notes={self.experts: routing}):
            handle = base.register_forward_pre_hook(route, with_kwargs=True)
            try:
                return base.generate(*args, **kwargs)
            finally:
                handle.remove()

    @staticmethod
    def _refuse_names() -> None:
        call = current_call()
        if call is not None and call.adapter_names is not None:
            XLoraLayer.refuse_adapter_names()

    def _route(self, routing: Routing, args: tuple, kwargs: dict[str, Any]) -> None:
        """Compute the model once with even weights, and note what the classifier makes of it."""
        config, classifier = self.xlora_config, self.internal_xlora_classifier
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        given = embeds if ids is None else ids
        if given is None:
            raise PeftValueError("X-LoRA weighs the tokens of a call; give input_ids or inputs_embeds")
        even = classifier.layers[0].weight.new_full((1, 1, 1, 1), config.scaling_pass_value)
        even = even.expand(*given.shape[:2], classifier.n_layers, classifier.n_classes)
        routing.weights, routing.is_measuring = self._few(even), True
        try:
            with torch.no_grad():
                outputs = self.lora_model(*args, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        finally:
            routing.is_measuring = False
        found = classifier(outputs.hidden_states[-1])
        self.scalings.note(found)
        routing.weights = self._few(found)

    def _few(self, weights: torch.Tensor) -> torch.Tensor:
        return few_largest(weights, self.xlora_config.top_k_lora, self.xlora_config.enable_softmax_topk)

    # ------------------------------------------------------------------------------------------------------- settings
    def set_topk_lora(self, value: int | None) -> None:
        """
        Say how many experts a token keeps.

        Args:
            value: how many; None for all.

        Raises:
            PeftValueError: if there are not so many.
        """
        _check_top_k(value, len(self.experts.names))
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """
        Say what all experts are multiplied by.

        Args:
            weight: the factor.
        """
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """Give what all experts are multiplied by."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """
        Say which weight every expert has in the first pass.

        Args:
            value: the weight; None for 1 / (number of experts).
        """
        self.xlora_config.scaling_pass_value = 1 / len(self.experts.names) if value is None else value

    def get_latest_scalings(self) -> torch.Tensor | None:
        """Give the weights of the latest call, (batch, length, layers, experts); None before the first one."""
        return self.scalings.latest

    def enable_scalings_logging(self) -> None:
        """Keep the weights of every call from now on."""
        self.scalings.is_kept = True

    def disable_scalings_logging(self) -> None:
        """Keep no more of them; those that were kept stay."""
        self.scalings.is_kept = False

    def clear_scalings_log(self) -> None:
        """Drop those that were kept."""
        self.scalings.kept.clear()

    def get_scalings_log(self) -> list[torch.Tensor]:
        """Give a new list of those that were kept."""
        return list(self.scalings.kept)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
        """Give them by the length of their sequences: length -> (positions in the log, weights)."""
        return self.scalings.by_length()


# ------------------------------------------------------------------------------------------------------------ making
def _check(model: nn.Module, config: XLoraConfig, names: list[str], adapter_name: str) -> None:
    """Refuse what cannot work, before anything is read or changed."""
    if not names:
        raise PeftValueError("X-LoRA needs experts; name their folders in `adapters` of its config")
    if adapter_name in names:
        raise PeftValueError(f"the experts are named {', '.join(names)}; give the X-LoRA adapter another name")
    if getattr(getattr(model, "config", None), "use_cache", False):
        raise PeftValueError(
            "X-LoRA weighs all tokens of a sequence anew in each call, so the model must not keep a cache; set "
            "model.config.use_cache = False"
        )
    _check_top_k(config.top_k_lora, len(names))
    if config.ensure_weight_tying:
        warn("ensure_weight_tying has no effect on X-LoRA: the configs of its experts say which targets stay tied")


def _check_top_k(top_k: int | None, count: int) -> None:
    if top_k is not None and top_k > count:
        raise PeftValueError(f"top_k_lora={top_k} is more than the {count} experts that there are")


def in_order(adapters: dict[str, str]) -> list[str]:
    """
    Give the folders of experts in the order of their names, numbers by their value.

    Args:
        adapters: name -> folder.
    """
    numbered = all(name.isdecimal() for name in adapters)
    return [adapters[name] for name in sorted(adapters, key=int if numbered else str)]


def _read_experts(
    folders: dict[str, str], device: str, options: dict[str, Any]
) -> dict[str, tuple[PeftConfig, dict[str, torch.Tensor]]]:
    """Read LoRA adapters from their folders: their configs, and tensors by their names in the base model."""
    read = {}
    for name, folder in folders.items():
        config = PeftConfig.from_pretrained(folder, **options)
        if config.peft_type != "LORA":
            raise PeftTypeError(f"experts of X-LoRA are LoRA adapters, and {folder!r} holds one of {config.peft_type}")
        config.inference_mode = True
        tensors = load_peft_weights(folder, device=device, **options)
        read[name] = config, {_PREFIX.sub("", key): tensor for key, tensor in tensors.items()}
    return read


def _with_experts(model: nn.Module, read: dict[str, tuple], low_cpu_mem_usage: bool) -> LoraModel:
    """Put LoRA adapters that were read into a model."""
    lora_model = None
    for name, (config, tensors) in read.items():
        if lora_model is None:
            lora_model = LoraModel(model, {name: config}, name, low_cpu_mem_usage=low_cpu_mem_usage)
        else:
            lora_model.add_adapter(name, config, low_cpu_mem_usage)
        load_tensors(model, tensors, name, strict=True)
    return lora_model


def _weigh_experts(lora_model: LoraModel, experts: Experts) -> list[LoraLayer]:
    """Let each expert of each layer be weighed; give the layers, in the order of the weights."""
    layers = [module for module in lora_model.modules() if isinstance(module, LoraLayer)]
    for number, layer in enumerate(layers):
        kind = XLoraEmbeddingLayer if isinstance(layer.get_base_layer(), nn.Embedding) else XLoraLinearLayer
        layer.variants.update(
            {name: kind(layer, name, experts, number) for name in experts.names if layer.has_adapter(name)}
        )
    return layers


__getattr__ = old_names(__name__)
