# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
The prompts of a model: making, saving, switching and deleting them, once for all methods.

Where they go when the model is called is told in `inputs.py`.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..anatomy import embeddings
from ..anatomy.walking import adapter_modules, base_modules
from ..config import PeftConfig, PromptLearningConfig
from ..layers.adapter_module import AdapterModule
from ..layers.adapter_names import check_adapter_name
from ..layers.new_tensors import check_size, making_tensors, on_meta
from ..layers.saved_form import JoinedForm
from ..layers.training_wrapper import AuxiliaryTrainingWrapper
from ..registry import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from ..surgery.saved_modules import check_additional_trainable_modules, set_additional_trainable_modules
from ..surgery.shield import shield_tie_weights
from ..surgery.switching import set_adapter
from ..surgery.transaction import all_or_nothing
from ..tying.record import find_followers, keep_ties
from ..tying.settle import one_object_each
from ..utils.error import PeftError, PeftKeyError, PeftValueError
from ..utils.quantization_utils import accompany_layer
from ..utils.warning import PeftWarning, warn
from .encoder import BasePromptEncoder
from .sizes import complete_config


class PromptEncoders(AdapterModule, nn.ModuleDict):
    """
    The prompts of a model by adapter name. For prompt learning it is what a `BaseTuner` is for other methods.

    Args:
        model: the base model. It is frozen, and not held as a submodule.

    Attributes:
        peft_config: adapter name -> config as it applies to this model.
        word_embeddings: the base model's input embedding.
    """

    # see `checkpoints/keys.py`: prompts stand in a checkpoint without the name that this module has in the model
    _base_names = ()
    _keys_at_top = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["_base_model"] = model
        self.peft_config: dict[str, PeftConfig] = {}
        self._active_adapter: list[str] = []
        self._disable_adapters = False

    # ------------------------------------------------------------------------------------------------- basic access
    @property
    def word_embeddings(self) -> nn.Module | None:
        """The base model's input embedding, without adapters around it; None if it has none, as prefixes need none."""
        try:
            embedding = input_embedding(self._base_model)
        except PeftValueError:
            return None
        while isinstance(embedding, AuxiliaryTrainingWrapper):
            embedding = embedding.original_module
        return embedding

    @property
    def base_weight(self) -> torch.Tensor:
        """A weight of the base model, for the type and the place of what stands beside it."""
        embedding = self.word_embeddings
        return next(self._base_model.parameters()) if embedding is None else embedding.weight

    @property
    def base_model(self) -> nn.Module:
        """The base model."""
        return self._base_model

    @property
    def active_adapters(self) -> list[str]:
        """Name of the active adapter, in a list."""
        return self._active_adapter

    @property
    def available_adapters(self) -> set[str]:
        """Names of all adapters."""
        return set(self._modules)

    @property
    def disable_adapters(self) -> bool:
        """Whether prompts are switched off."""
        return self._disable_adapters

    @property
    def in_use(self) -> bool:
        """Whether there is a prompt to put in front of inputs."""
        return bool(self._active_adapter) and not self._disable_adapters

    @property
    def active_encoder(self) -> BasePromptEncoder:
        """The prompt that is in use."""
        return self[self._active_adapter[0]]

    @property
    def active_config(self) -> PromptLearningConfig:
        """Config of the adapter that is in use."""
        return self.peft_config[self._active_adapter[0]]

    @property
    def loss_inputs(self) -> tuple[str, ...]:
        """Inputs that are for the loss of the method, and not for the base model."""
        return next((encoder.loss_inputs for encoder in self.values()), ())

    # ------------------------------------------------------------------------------------------------------ adapters
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PromptLearningConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """
        Make the prompt of an adapter; if it is refused, the model stays as it was. The first one is active.

        Args:
            adapter_name: its name.
            peft_config: its config; it is not changed.
            low_cpu_mem_usage: make its tensors on the meta device.
            autocast_adapter_dtype: keep copies of base modules in float32 where the base is in half precision. The
                prompt itself always is.

        Raises:
            PeftKeyError: if the name cannot be one, or there is no task type.
            PeftValueError: if the model or the config cannot work.
        """
        with all_or_nothing(self, self._base_model):
            self._add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def _add_adapter(
        self,
        adapter_name: str,
        peft_config: PromptLearningConfig,
        low_cpu_mem_usage: bool,
        autocast_adapter_dtype: bool,
    ) -> None:
        model = self._base_model
        check_adapter_name(adapter_name, PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type])
        if hasattr(self, adapter_name) and adapter_name not in self:
            raise PeftKeyError(
                f"adapter name {adapter_name!r} is an attribute of {type(self).__name__}; choose another"
            )
        config = complete_config(peft_config, model)
        encoder_cls = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        if encoder_cls.fills_cache:
            refuse_checkpointing(model)
        config.modules_to_tie = find_followers(keep_ties(model, config))
        check_additional_trainable_modules(model, config)
        active = not self._active_adapter
        making = making_tensors(on_meta=low_cpu_mem_usage, full_precision=autocast_adapter_dtype)
        with one_object_each(model), making:
            if not encoder_cls.fills_cache:
                input_embedding(model)  # refuses models without one
            encoder = _make_encoder(encoder_cls, config, self.word_embeddings, self.base_weight)
            set_additional_trainable_modules(model, config, {}, adapter_name, activate_adapter=active)
        shield_tie_weights(model)
        self[adapter_name] = encoder.train(model.training)
        self.peft_config[adapter_name] = config
        if active:
            self._active_adapter = [adapter_name]
        for module in base_modules(model):
            accompany_layer(module)
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.requires_grad = False
        self.set_requires_grad(adapter_name, active and not config.inference_mode)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """
        Choose the prompt that is used; others are frozen.

        Args:
            adapter_name: its name.
            inference_mode: freeze it too.

        Raises:
            PeftValueError: for several names, or an unknown one.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1 or names[0] not in self:
            raise PeftValueError(
                f"one prompt is used at a time; choose one of {', '.join(self)}, found {adapter_name!r}"
            )
        set_adapter(self._base_model, names, inference_mode=inference_mode)
        self._active_adapter = names
        for name in self:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """
        Freeze prompts and what is trained beside them, or let them be trained.

        Args:
            adapter_names: one name or several.
            requires_grad: False to freeze.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.forget_trained_before(name)
            for key, parameter in self[name].named_parameters() if name in self else ():
                parameter.requires_grad_(requires_grad and key not in self[name].frozen_names)
        for _, module in adapter_modules(self._base_model):
            module.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Remove a prompt and what was trained beside it. If it was active, another one becomes active, with a warning.

        Args:
            adapter_name: its name.
        """
        was_trained = adapter_name in (self._trained_before or ()) or any(
            parameter.requires_grad for parameter in self.adapter_parameters(adapter_name)
        )
        del self[adapter_name], self.peft_config[adapter_name]
        self.forget_trained_before(adapter_name)
        was_active = adapter_name in self._active_adapter
        remaining = list(self)[:1] if was_active else self._active_adapter
        for _, module in adapter_modules(self._base_model):
            module.delete_adapter(adapter_name, new_active_adapters=remaining)
        if was_active:
            self._active_adapter = []
            if remaining:
                warn(f"the active adapter {adapter_name!r} was deleted; {remaining[0]!r} is active now")
                frozen = self.peft_config[remaining[0]].inference_mode or not was_trained
                self.set_adapter(remaining, inference_mode=frozen)

    def enable_adapters(self, enabled: bool) -> None:
        """
        Switch prompts on or off.

        Args:
            enabled: True to switch on. What was trainable before is trainable again.
        """
        self._disable_adapters = not enabled
        if enabled:
            self.train_as_before()
        else:
            self.freeze_while_off(list(self))

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Switch prompts and what was trained beside them off inside a context."""
        modules = [self, *(module for _, module in adapter_modules(self._base_model))]
        on = [module for module in modules if not module.disable_adapters]
        for module in on:
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in on:
                module.enable_adapters(True)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether an adapter can be converted to LoRA: a prompt is no change of weights."""
        return False

    # ------------------------------------------------------------------------------------------------- checkpoints
    def config_to_save(self, adapter_name: str) -> PromptLearningConfig:
        """Give a copy of an adapter's config."""
        return copy.copy(self.peft_config[adapter_name])

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of a prompt."""
        if adapter_name in self:
            yield from self[adapter_name].parameters()

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield for each tensor of a prompt its key in a checkpoint and its key in this module's state dict."""
        if adapter_name in self:
            form = self[adapter_name].saved_form()
            names = self[adapter_name].saved_names if form is None else form.names
            if form is None:
                yield "prompt_embeddings", f"{adapter_name}.embedding.weight"
            yield from ((name, f"{adapter_name}.{name}") for name in names)

    def joined_forms(self, adapter_name: str) -> dict[str, JoinedForm]:
        """Say how the prompt in a checkpoint stands for several parameters; see `AdapterModule.joined_forms`."""
        form = self[adapter_name].saved_form() if adapter_name in self else None
        return {} if form is None else {"prompt_embeddings": form}

    def adapter_aliases(self, adapter_name: str) -> Iterator[tuple[str, str, bool]]:
        """Yield nothing: no prompt follows another one."""
        yield from ()

    def computed_tensors(
        self, adapter_name: str, state_dict: Mapping[str, torch.Tensor], prefix: str
    ) -> dict[str, torch.Tensor]:
        """
        Compute what stands in a checkpoint in the place of a network.

        Args:
            adapter_name: name.
            state_dict: the model's state dict.
            prefix: what keys of this module start with in it.
        """
        if adapter_name not in self or not self[adapter_name].is_computed:
            return {}
        start = f"{prefix}{adapter_name}."
        own = {key.removeprefix(start): tensor for key, tensor in state_dict.items() if key.startswith(start)}
        if not own.keys() >= self[adapter_name].state_dict().keys():  # a process that was given a part, or nothing
            return {}
        return {"prompt_embeddings": self[adapter_name].finished_table(own)}

    def prepare_to_load(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Make room for a finished prompt where a network computes it now: the prompt in the file is what was asked for.

        Args:
            adapter_name: name.
            tensors: what is going to be loaded.
        """
        encoder = self[adapter_name] if adapter_name in self else None
        if encoder is None or not encoder.is_computed or "prompt_embeddings" not in tensors:
            return
        present = encoder.finished_table()
        if tensors["prompt_embeddings"].shape == present.shape:
            encoder.replace_network(present)
            warn(
                f"the checkpoint holds the finished prompt of adapter {adapter_name!r}, not the network that computed "
                "it, so the network is dropped; make the optimizer after loading if you train on"
            )

    def check_training_goes_on(self, adapter_name: str) -> None:
        """
        Refuse to go on with the training of a prompt from a checkpoint if a network computes it, which is not there.

        Args:
            adapter_name: name.

        Raises:
            PeftValueError: in that case.
        """
        if adapter_name in self and self[adapter_name].is_computed:
            raise PeftValueError(
                f"training of adapter {adapter_name!r} cannot be resumed: a network computes its prompt, and the "
                "checkpoint holds the finished prompt alone, so that an optimizer's state fits no longer. Start anew, "
                "or fill the adapter with load_adapter before the Trainer or the optimizer is made, and train without "
                "resume_from_checkpoint and without is_trainable=True"
            )

    def fill_missing(self, adapter_name: str, config: PeftConfig) -> None:
        """Start tensors of a prompt that a checkpoint has left without storage."""
        for module in self[adapter_name].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    values = torch.empty_like(parameter, device=self.base_weight.device)
                    module._parameters[name] = nn.Parameter(nn.init.normal_(values, std=0.02), parameter.requires_grad)


def _make_encoder(
    encoder_cls: type[BasePromptEncoder], config: PromptLearningConfig, embedding: nn.Module | None, base: torch.Tensor
) -> BasePromptEncoder:
    """Make a prompt in float32, in which training is stable, beside a weight of the base model."""
    on_meta_already = on_meta()
    with torch.device("meta"), making_tensors(on_meta=True), warnings.catch_warnings():
        if not on_meta_already:
            warnings.simplefilter("ignore", PeftWarning)  # what there is to say is said when the prompt is made
        try:
            encoder = encoder_cls.for_model(config, embedding).float()
        except PeftError:
            raise
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise PeftValueError(f"the config asks for a prompt that cannot be made: {error}") from error
    for parameter in encoder.parameters():
        check_size(tuple(parameter.shape), base, torch.float32, "cpu", times_base=64)
    if on_meta_already:
        return encoder
    return encoder_cls.for_model(config, embedding).to(base.device, torch.float32)


def input_embedding(model: nn.Module) -> nn.Module:
    """
    Find the embedding that turns a model's input ids into vectors; with encoder-decoder models, the encoder's.

    Raises:
        PeftValueError: if the model does not say which it is.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    embedding = embeddings.input_embedding(model)
    rows = getattr(getattr(model, "config", None), "vocab_size", None)
    if embedding is None and isinstance(rows, int):
        embedding = embeddings.embedding_of_vocabulary(model, rows)
    if embedding is None:
        raise PeftValueError(
            f"prompt learning needs the input embedding, and {type(model).__name__} has no get_input_embeddings, nor "
            "a weight with a row for each token (vocab_size of its config)"
        )
    return embedding


def refuse_checkpointing(model: nn.Module) -> None:
    """
    Refuse to fill the cache of a model that checkpoints activations, since that model uses no cache in training.

    Raises:
        PeftValueError: if it does.
    """
    if embeddings.checkpoints_activations(model):
        raise PeftValueError(
            "prefix tuning does not work with gradient checkpointing, which uses no cache; call "
            "gradient_checkpointing_disable() on the base model, or use prompt tuning"
        )
