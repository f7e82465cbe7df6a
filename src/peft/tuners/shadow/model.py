# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`ShadowModel`: puts shadow layers into a model, and runs the small model beside it."""

import copy as copying
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.utils import ModelOutput

from ...anatomy.embeddings import input_embedding, output_embedding
from ...anatomy.walking import innermost_base_layer, is_adapter_layer
from ...config import PeftConfig
from ...layers.call_context import calling, current_call
from ...layers.new_tensors import copy_module
from ...layers.training_wrapper import AuxiliaryTrainingWrapper
from ...registry import TaskType
from ...utils.caches import CACHE_NAMES, cache_parameter, given_cache
from ...utils.constants import SEQ_CLS_HEAD_NAMES
from ...utils.error import PeftNotImplementedError, PeftValueError
from ...utils.old_names import old_names
from ..base import BaseTuner
from ..plan import AdapterPlan
from .backbone import blocks_of, make_backbone, shares_embeddings, width_of
from .cache import ShadowCache
from .config import ShadowConfig
from .detached import DetachedShadowModel
from .layer import ShadowCarrier, ShadowLayer
from .maths import class_loss, last_token, next_token_loss
from .parts import ShadowParts


_PARTS = ("shadow_backbone", "shadow_projection", "shadow_head")
# what the small model gets as the base model does
_GIVEN_ON = ("attention_mask", "position_ids", "use_cache")
# Tuner -> shadow state and loss of its last call. Not on the tuner, which is copied and pickled.
_last_states: "WeakKeyDictionary[nn.Module, torch.Tensor]" = WeakKeyDictionary()
_last_losses: "WeakKeyDictionary[nn.Module, torch.Tensor]" = WeakKeyDictionary()


class ShadowModel(BaseTuner):
    """
    A frozen model with a small trained one beside it (Li et al. 2026, arXiv:2604.19254).

    One adapter is used at a time, and none can be merged.

    Args:
        model: the base model; it is changed in place.
        peft_config: a `ShadowConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make its tensors on the meta device, to be filled by loading a checkpoint.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Attributes:
        shadow_backbone: adapter name -> the small model.
        shadow_projection: adapter name -> projection of its outputs to the width of the base model.
        shadow_head: adapter name -> trained copy of the head, for classifiers.

    Raises:
        PeftAttributeError: if the model has no list of blocks, or no part to make a small model of.
        PeftValueError: for targets that are no neighbouring blocks.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft import ShadowConfig, get_peft_model
        >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> model = get_peft_model(base, ShadowConfig(r=2, task_type="CAUSAL_LM"))
        >>> len(model.base_model.shadow_backbone["default"].layers)
        1
    """

    prefix = "shadow_"
    tuner_layer_cls = ShadowLayer
    layer_classes = {nn.Module: ShadowLayer}
    uses_shared_state = True

    # ------------------------------------------------------------------------------------------------------ injecting
    def _check_new_adapter_config(self, config: ShadowConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1 and any(_classifies(other) for other in self.peft_config.values()):
            raise PeftValueError("a classifier has one Shadow adapter, since each brings a head; delete it first")

    def _resolve_targets(self, model: nn.Module, config: ShadowConfig) -> None:
        """Take all blocks where targets are left out, or those that `layers_to_transform` chooses."""
        if config.target_modules is not None:
            super()._resolve_targets(model, config)
            return
        name, blocks = blocks_of(model)
        chosen = config.layers_to_transform
        indices = range(len(blocks)) if chosen is None else [chosen] if isinstance(chosen, int) else chosen
        config.target_modules = {f"{name}.{index}" for index in indices}
        config.layers_to_transform = config.layers_pattern = None  # the names say it now

    def _check_targets(self, model: nn.Module, config: ShadowConfig, names: list[str]) -> None:
        """Refuse targets that are no neighbouring blocks: the state goes from one to the next."""
        super()._check_targets(model, config, names)
        lists = {name.rpartition(".")[0] for name in names}
        last = [name.rpartition(".")[2] for name in names]
        blocks = model.get_submodule(lists.pop()) if len(lists) == 1 else None
        if not isinstance(blocks, nn.ModuleList):
            raise PeftValueError(f"Shadow adapts blocks of one list of blocks, found {', '.join(sorted(names))}")
        indices = sorted(map(int, last))
        if indices != list(range(indices[0], indices[0] + len(indices))):
            raise PeftValueError(f"Shadow adapts blocks that are neighbours, found those with the numbers {indices}")

    def _layer_arguments_for(self, config: ShadowConfig) -> Any:
        width = width_of(self.model)
        return lambda names: {"hidden_size": width}

    def _create_layer(self, base: nn.Module, target: Any, adapter_name: str, config: Any, arguments: Any) -> Any:
        return ShadowLayer(base, adapter_name, config=config, **arguments)

    def _place_layers(self, plan: AdapterPlan) -> None:
        """Make the small model first, then what stands in blocks."""
        name, config = plan.adapter_name, plan.config
        for part in _PARTS:
            if part not in self._modules:
                self._modules[part] = ShadowParts()
        backbone, projection, frozen = make_backbone(self.model, config)
        self.shadow_backbone[name], self.shadow_projection[name] = backbone, projection
        self.shadow_backbone.frozen[name] = frozen
        if _classifies(config):
            self.shadow_head[name] = copy_module(self._head()).requires_grad_(True)
        for part in self._shadow_parts():
            part._active_adapter = self.active_adapters
        super()._place_layers(plan)

    def _finish(self, adapter_name: str, config: PeftConfig) -> None:
        super()._finish(adapter_name, config)
        trained = adapter_name in self.active_adapters and not config.inference_mode
        for part in self._shadow_parts():
            part.set_requires_grad(adapter_name, trained)

    def _shadow_parts(self) -> list[ShadowParts]:
        return [self._modules[name] for name in _PARTS if name in self._modules]

    def _head(self) -> nn.Module:
        """Find the head of a classifier, without what is trained in its place."""
        head = next(
            (getattr(self.model, name) for name in SEQ_CLS_HEAD_NAMES[::-1] if hasattr(self.model, name)), None
        )
        if head is None:
            raise PeftValueError(f"{type(self.model).__name__} has no head named {', '.join(SEQ_CLS_HEAD_NAMES)}")
        return head.original_module if isinstance(head, AuxiliaryTrainingWrapper) else head

    # ------------------------------------------------------------------------------------------------------ switching
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the adapter that is used; others are frozen.

        Args:
            adapter_name: its name.
            inference_mode: freeze it too.

        Raises:
            PeftValueError: for several names, or an unknown one.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise PeftValueError(f"one Shadow adapter is used at a time, found {list(adapter_name)}; choose one")
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for part in self._shadow_parts():
            part.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """
        Freeze adapters or let them be trained, without a change to which are active.

        Args:
            adapter_names: one name or several.
            requires_grad: False to freeze.
        """
        super().set_requires_grad(adapter_names, requires_grad)
        for part in self._shadow_parts():
            part.set_requires_grad(adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on."""
        super().enable_adapter_layers()
        for part in self._shadow_parts():
            part.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Switch the adapters off; the model then computes what the base model does."""
        super().disable_adapter_layers()
        for part in self._shadow_parts():
            part.enable_adapters(False)

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Switch the adapters off inside a context; what was off before stays off afterwards."""
        on = [part for part in self._shadow_parts() if not part.disable_adapters]
        with super().adapters_disabled():
            yield
        for part in on:
            part.enable_adapters(True)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter. If it was active, another one becomes active, with a warning.

        Args:
            adapter_name: its name.

        Raises:
            PeftValueError: if there is no adapter of that name.
        """
        super().delete_adapter(adapter_name)
        for part in self._shadow_parts():
            part.remove_adapter(adapter_name)

    # --------------------------------------------------------------------------------------------------- forward pass
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Call the base model, with the small one beside it.

        Args:
            args: for the base model.
            kwargs: likewise.
        """
        return self._with_shadow(self.model, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """
        Generate with the base model, with the small one beside it.

        Args:
            args: for the base model's `generate`.
            kwargs: likewise.
        """
        model, mine, forward = self.model, object(), self.model.forward

        def with_shadow(*args: Any, **kwargs: Any) -> Any:
            call = current_call()
            if call is None or mine not in call.notes:  # another thread's
                return forward(*args, **kwargs)
            return self._with_shadow(forward, args, kwargs)

        # it is asked for what it takes
        with_shadow.__signature__ = inspect.signature(forward)
        before = model.__dict__.get("forward")
        model.__dict__["forward"] = with_shadow
        try:
            with calling(notes={mine: True}):
                return model.generate(*args, **kwargs)
        finally:
            if before is None:
                model.__dict__.pop("forward", None)
            else:
                model.__dict__["forward"] = before

    def _with_shadow(self, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Compute the state of the small model, and then the base model's forward pass with it."""
        name = self._adapter_in_use()
        if name is None:
            return forward(*args, **kwargs)
        parameters = inspect.signature(self.model.forward).parameters
        inputs = {**dict(zip(parameters, args, strict=False)), **kwargs}
        cache, shadow_cache = _taken_apart(inputs)
        state, shadow_cache = self._first_state(name, inputs, shadow_cache)
        if cache is not None:
            inputs[next(key for key in CACHE_NAMES if inputs.get(key) is not None)] = cache
        with calling(notes={ShadowCarrier: ShadowCarrier(None, state)}):
            outputs = forward(**inputs)
        _last_states[self] = state
        self._add_loss(outputs, inputs)
        return _with_both_caches(outputs, shadow_cache)

    def _adapter_in_use(self) -> str | None:
        names = [name for name in self.active_adapters if name in self.shadow_backbone]
        return names[0] if names and not self.shadow_backbone.disable_adapters else None

    def _first_state(self, name: str, inputs: dict[str, Any], cache: Any) -> tuple[torch.Tensor, Any]:
        """Compute the state in front of the first block, and the small model's cache."""
        backbone = self.shadow_backbone[name]
        given = {key: inputs[key] for key in _GIVEN_ON if inputs.get(key) is not None}
        taken = cache_parameter(backbone)
        if cache is not None and taken is not None:
            given[taken] = cache
        if inputs.get("inputs_embeds") is not None:
            given["inputs_embeds"] = inputs["inputs_embeds"]
        elif shares_embeddings(backbone, self.peft_config[name], width_of(self.model)):
            given["inputs_embeds"] = input_embedding(self.model)(inputs["input_ids"])
        else:
            given["input_ids"] = inputs["input_ids"]
        outputs = backbone(**given)
        hidden = outputs[0] if isinstance(outputs, (tuple, ModelOutput)) else outputs
        made = given_cache(outputs) if isinstance(outputs, ModelOutput) else None
        return self.shadow_projection[name](hidden), made

    # ----------------------------------------------------------------------------------------------------------- loss
    def shadow_auxiliary_loss(
        self, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """
        Give the loss of the small model by itself, for what the model was called with last.

        Args:
            labels: as the base model takes them.
            attention_mask: (batch, length), which tells the last token for classifiers.

        Returns:
            The loss; None for other tasks than CAUSAL_LM and SEQ_CLS.
        """
        name, state = self._adapter_in_use(), _last_states.get(self)
        if name is None or state is None:
            raise PeftValueError("there is no shadow state to compute a loss from; call the model first")
        config = self.peft_config[name]
        if _classifies(config):
            head = self.shadow_head[name]
            weight = next(head.parameters())
            return class_loss(head(last_token(state, attention_mask).to(weight.dtype)), labels)
        if config.task_type != TaskType.CAUSAL_LM:
            return None
        head = output_embedding(self.model)
        return next_token_loss(head(state.to(_weight_of(head).dtype)), labels)

    @property
    def last_shadow_loss(self) -> torch.Tensor | None:
        """The loss of the small model in the last call, without gradient; None if there was none."""
        return _last_losses.get(self)

    def _add_loss(self, outputs: Any, inputs: dict[str, Any]) -> None:
        _last_losses.pop(self, None)
        weight = self.peft_config[self.active_adapters[0]].auxiliary_loss_weight
        labels, loss = inputs.get("labels"), getattr(outputs, "loss", None)
        if labels is None or loss is None or not weight > 0:
            return
        own = self.shadow_auxiliary_loss(labels, inputs.get("attention_mask"))
        if own is not None:
            outputs.loss = loss + weight * own.to(loss)
            outputs.shadow_loss = _last_losses[self] = own.detach()

    # ---------------------------------------------------------------------------------------------- taking it off
    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> DetachedShadowModel:
        """
        Give the small model by itself, with the head of the base model.

        Args:
            adapter_name: whose; the active adapter's if left out.
            copy: copy all modules, instead of sharing them with this model.

        Raises:
            PeftValueError: if there is no adapter of that name.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        config = self._config_of(name)
        backbone, projection = self.shadow_backbone[name], self.shadow_projection[name]
        classifies = _classifies(config)
        head = self.shadow_head[name] if classifies else output_embedding(self.model)
        shares = shares_embeddings(backbone, config, width_of(self.model))
        table = input_embedding(self.model) if shares else None
        modules = [backbone, projection, _bare(head), _bare(table)]
        backbone, projection, head, table = copying.deepcopy(modules) if copy else modules
        made = DetachedShadowModel(backbone, projection, head, classifies, table)
        if copy and table is not None:
            made.input_embeddings = table
        return made

    def _refuse_merging(self) -> None:
        raise PeftNotImplementedError("Shadow cannot be merged: no weight of the base model stands for a second model")

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Refuse: no weight stands for a second model."""
        self._refuse_merging()

    def unmerge_adapter(self) -> None:
        """Refuse: no weight stands for a second model."""
        self._refuse_merging()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Refuse: no weight stands for a second model."""
        self._refuse_merging()


def _classifies(config: PeftConfig) -> bool:
    return config.task_type == TaskType.SEQ_CLS


def _bare(module: nn.Module | None) -> nn.Module | None:
    """Give a module of the base model without adapters around it."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    return innermost_base_layer(module) if module is not None and is_adapter_layer(module) else module


def _weight_of(module: nn.Module) -> torch.Tensor:
    return next(module.parameters())


def _taken_apart(inputs: dict[str, Any]) -> tuple[Any, Any]:
    """
    Give the caches of the base model and of the small one among the inputs.

    Raises:
        PeftValueError: if there are tokens in the one that the other lacks.
    """
    cache = given_cache(inputs)
    if isinstance(cache, ShadowCache):
        return cache.base, cache.shadow
    if cache is not None and (cache.get_seq_length() if hasattr(cache, "get_seq_length") else len(cache)):
        raise PeftValueError(
            "the cache holds tokens that the shadow model has not seen; use one that the model has given, or none"
        )
    return cache, None


def _with_both_caches(outputs: Any, shadow_cache: Any) -> Any:
    """Put the cache of the small model beside that of the base model in the outputs."""
    if not isinstance(outputs, ModelOutput) or shadow_cache is None:
        return outputs
    name = next((name for name in CACHE_NAMES if name in outputs.keys() and outputs[name] is not None), None)
    if name is not None:
        outputs[name] = ShadowCache(outputs[name], shadow_cache)
    return outputs


__getattr__ = old_names(__name__)
