# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
`BaseTuner` puts a method's layers into a model: match, plan, create, replace, finish.

`BaseTunerLayer` and the rules of methods live in the room `layers`.
"""

import copy
import dataclasses
from abc import ABC
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..anatomy.view import view_of, viewing
from ..anatomy.walking import adapter_modules, is_adapter_module
from ..checkpoints.sizes import count_saved
from ..config import PeftConfig
from ..layers.base_layer import BaseTunerLayer
from ..layers.merging.layer import unmerge_layers
from ..layers.merging.model import call_replaced, merge_layers
from ..layers.merging.state import original_weights
from ..layers.new_tensors import making_tensors
from ..layers.training_wrapper import AuxiliaryTrainingWrapper
from ..layers.undo import who_undoes
from ..surgery.shield import unshield_tie_weights
from ..surgery.slots import Slots, without_collecting
from ..surgery.switching import (
    delete_adapter,
    is_trained,
    remove_adapter,
    set_adapter,
    set_requires_grad,
)
from ..surgery.transaction import all_or_nothing
from ..tying.groups import find_tied_groups
from ..tying.settle import settle_declared, settle_ties
from ..utils.constants import (
    DUMMY_MODEL_CONFIG,
)
from ..utils.error import (
    PeftValueError,
)
from ..utils.former_methods import OF_THE_HOOK, explain_former_method, warn_of_former_steps
from ..utils.near_names import explain_unknown_adapters
from ..utils.quantization_utils import accompany_layer
from ..utils.warning import warn
from .placing import Placing
from .targets import Targeting


class BaseTuner(Targeting, Placing, nn.Module, ABC):
    """
    A model with the layers of one method in it.

    A method subclasses it and declares `prefix`, `tuner_layer_cls`, `layer_classes` and `target_module_mapping`. What
    a layer is made with beside the config comes from `pattern_fields`, or from `_layer_arguments_for`; tensors that
    all layers share are made in `make_shared`.

    Args:
        model: the base model; it is changed in place.
        peft_config: config, or adapter name -> config; without any, nothing is injected yet.
        adapter_name: name of the adapter to inject now.
        low_cpu_mem_usage: make the adapter's tensors on the meta device, to be filled by loading a checkpoint.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Attributes:
        prefix: what the names of the method's tensors start with.
        tuner_layer_cls: what all of its layers are.
        layer_classes: kind of base layer -> layer.
        quantized_layer_classes: name of a backend for quantisation -> layer, where it has a class of its own.
        layer_parts: kind of base layer -> names of the layers inside it that are adapted along with it.
        parameter_layer_cls: layer for a parameter of any module, for methods with `target_parameters`.
        target_module_mapping: model type -> default targets.
        pattern_fields: config field, such as the rank -> config field with the values for modules where it differs.
        uses_shared_state: whether adapters need more than their layers, so that they cannot be injected into a model
            without a `PeftModel` around it.
        in_mixed_model: whether tuners of other methods work on the model too; nobody hands out ranks then.
        model: the base model, with adapter layers in it.
        peft_config: adapter name -> config as it applies to this model.
        targeted_module_names: full names of the modules that were adapted by the last injection.
        targeted_parameter_names: full names of the parameters that were.

    Raises:
        NoMatchingPeftModuleError: if the model has no module that the config targets.
        PeftValueError: for adapter names and targets that cannot work. A refused injection changes nothing.
    """

    prefix: str
    tuner_layer_cls: type[BaseTunerLayer]
    layer_classes: dict[type[nn.Module], type[BaseTunerLayer]] = {}
    quantized_layer_classes: dict[str, type[BaseTunerLayer]] = {}
    layer_parts: dict[type[nn.Module], tuple[str, ...]] = {}
    parameter_layer_cls: type[BaseTunerLayer] | None = None
    target_module_mapping: dict[str, Any] = {}
    pattern_fields: dict[str, str] = {}
    uses_shared_state: bool = False
    in_mixed_model: bool = False

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        new = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        self.model = model
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        # an earlier injection into the same model has left its configs on it
        present = model.__dict__.get("peft_config")
        if present and new:
            becomes = "replaced" if set(new) <= set(present) else "put beside them"
            warn(
                f"the model holds adapters already ({', '.join(present)}); {', '.join(new)} is {becomes}. Call "
                "unload() first to start from the base model"
            )
        # configs say how an adapter applies to this model, so the caller's object, which may be used for another
        # model too, is left alone
        self.peft_config = {**(present or {}), **{name: copy.copy(config) for name, config in new.items()}}
        self.active_adapter: str | list[str] = adapter_name
        with all_or_nothing(model):
            has_layers = who_undoes().has_noted(is_adapter_module)
            if new:
                self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
            if new and has_layers:  # those of adapters that are gone know of none that is active
                self.set_adapter(adapter_name, inference_mode=self.peft_config[adapter_name].inference_mode)
            model.peft_config = self.peft_config

    # ------------------------------------------------------------------------------------------------- basic access
    def __getattr__(self, name: str) -> Any:
        """Forward what the tuner lacks to the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "_modules" not in self.__dict__:  # while unpickling
                raise
            if (former := explain_former_method(type(self), name)) is not None and not hasattr(self.model, name):
                raise former from None
            return getattr(self.model, name)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        active = self.active_adapter
        return [active] if isinstance(active, str) else list(active)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model."""
        return self.model(*args, **kwargs)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Give the model's config as a dictionary; `{"model_type": "custom"}` for models without one."""
        config = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        if dataclasses.is_dataclass(config):
            return dataclasses.asdict(config)
        if isinstance(config, Mapping):
            return dict(config)
        return {**DUMMY_MODEL_CONFIG, **getattr(config, "__dict__", {})}  # whatever the model calls its config

    def _layers(self) -> Iterator[BaseTunerLayer]:
        """Yield the adapter layers."""
        return (module for _, module in adapter_modules(self.model) if isinstance(module, BaseTunerLayer))

    # ------------------------------------------------------------------------------------------------------ injecting
    @without_collecting
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """
        Put another adapter beside those that the model has; if it is refused, the model stays as it was.

        It is not active at first, unless it is the only one.

        Args:
            adapter_name: its name.
            peft_config: its config; it is not changed.
            low_cpu_mem_usage: make its tensors on the meta device.
            autocast_adapter_dtype: keep them in float32 where the base is in half precision.
        """
        with all_or_nothing(self):
            is_only_one = not self.peft_config
            self.peft_config[adapter_name] = copy.copy(peft_config)
            self.inject_adapter(self.model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            if is_only_one:
                self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    @without_collecting
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Put an adapter, whose config is in `peft_config`, into the model; one of the same name is removed first.

        If anything is refused, the model stays as it was.

        Args:
            model: the base model.
            adapter_name: name of the adapter.
            autocast_adapter_dtype: keep the adapter's tensors in float32 where the base is in half precision.
            low_cpu_mem_usage: make the tensors on the meta device.
            state_dict: adapter tensors; if given, the modules named by its keys are adapted.

        Raises:
            NoMatchingPeftModuleError: if nothing matches.
            PeftValueError: if the name or a target cannot work.
        """
        # a client's own hook may call what it has taken over along with it
        warn_of_former_steps(type(self), OF_THE_HOOK if self._hook_is_replaced() else ())
        with all_or_nothing(self, model):
            self._prepare_model(self.peft_config[adapter_name], model)
            with viewing(model):
                self._inject(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """
        Change the base model before anything is planned; methods extend it. What it changes is put back on refusal.

        Args:
            peft_config: the new adapter's config.
            model: the base model.
        """

    def _inject(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, torch.Tensor] | None,
    ) -> None:
        """Do what `inject_adapter` does; methods extend it. What it changes before it raises is put back."""
        remove_adapter(model, adapter_name)
        with making_tensors(on_meta=low_cpu_mem_usage):  # which take no memory that might be short then
            plan = self.plan_adapter(view_of(model), adapter_name, self.peft_config[adapter_name], state_dict)
        self.peft_config[adapter_name] = plan.config
        self.place(plan, autocast_adapter_dtype, low_cpu_mem_usage)

    def _config_of(self, adapter_name: str) -> PeftConfig:
        if adapter_name not in self.peft_config:
            raise PeftValueError(explain_unknown_adapters([adapter_name], self.peft_config))
        return self.peft_config[adapter_name]

    def config_to_save(self, adapter_name: str) -> PeftConfig:
        """
        Give a copy of an adapter's config that describes what is saved. To be extended by methods.

        Args:
            adapter_name: name.
        """
        return copy.copy(self._config_of(adapter_name))

    # ------------------------------------------------------------------------------------------------------ switching
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the adapters that are used; others are frozen.

        Args:
            adapter_name: one name or several.
            inference_mode: freeze the chosen ones too.

        Raises:
            PeftValueError: for a name that the model does not have.
        """
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name or ():
            self._config_of(name)
        set_adapter(self.model, adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """
        Freeze adapters or let them be trained, without a change to which are active.

        Args:
            adapter_names: one name or several.
            requires_grad: False to freeze.
        """
        set_requires_grad(self.model, adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on."""
        for _, module in adapter_modules(self.model):
            module.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Switch the adapters off; the model then computes what the base model does."""
        for name in self.active_adapters:
            bias = getattr(self.peft_config.get(name), "bias", "none")
            if bias != "none":
                warn(
                    f"adapter {name!r} was trained with bias={bias!r}: biases are changed in the base model itself, "
                    "so switching the adapter off does not give the base model's outputs"
                )
        unmerge_layers(self._layers())  # all at once: layers that share a weight would each be left with a copy
        for _, module in adapter_modules(self.model):
            module.enable_adapters(False)

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Switch the adapters off inside a context; what was off before stays off afterwards."""
        modules = [module for _, module in adapter_modules(self.model)]
        off = {id(module) for module in modules if module.disable_adapters}
        if len(off) == len(modules):
            yield
            return
        self.disable_adapter_layers()
        try:
            yield
        finally:
            for _, module in adapter_modules(self.model):  # those that have been added meanwhile too
                if id(module) not in off:
                    module.enable_adapters(True)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter. If it was the only active one, another one becomes active, with a warning.

        What is trained of the others stays so. The one that becomes active is trained if the one that is gone was,
        unless its config says that it is there for inference.

        Raises:
            PeftValueError: if there is no adapter of that name, or it is merged.
        """
        self._config_of(adapter_name)
        self._refuse_merged([adapter_name])
        was_trained = is_trained(self.model, adapter_name)
        delete_adapter(self.model, adapter_name, self.prefix)
        del self.peft_config[adapter_name]
        if adapter_name not in self.active_adapters:
            return
        remaining = [name for name in self.active_adapters if name != adapter_name]
        self.active_adapter = remaining[0] if len(remaining) == 1 else remaining
        if not remaining and self.peft_config:
            first, config = next(iter(self.peft_config.items()))
            warn(f"the active adapter {adapter_name!r} was deleted; {first!r} is active now")
            self.set_adapter(first, inference_mode=config.inference_mode or not was_trained)

    def _refuse_merged(self, adapter_names: Iterable[str]) -> None:
        """Refuse to delete what is merged: whether the weights are to keep it is for the caller to say."""
        merged = {name for layer in self._layers() for name in layer.merged_adapters}
        kept = [name for name in adapter_names if name in merged]
        if kept:
            raise PeftValueError(
                f"adapter {kept[0]!r} is merged, so it is not clear whether the base weights are to keep it; nothing "
                "was deleted. Call unmerge_adapter() first, or merge_and_unload() to keep it for good"
            )

    # -------------------------------------------------------------------------------------------------------- merging
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        Merge adapters into the base weights; the layers stay, so it can be undone.

        Args:
            adapter_names: which adapters; the active ones if left out.
            safe_merge: refuse the merge, before anything is changed, if an entry would not be finite.

        Raises:
            PeftValueError: if `safe_merge` finds entries that are not finite.
        """
        merge_layers(self.model, adapter_names, safe_merge)
        self._warn_of_unknown(adapter_names)

    def _warn_of_unknown(self, adapter_names: list[str] | None) -> None:
        unknown = [name for name in adapter_names or () if name not in self.peft_config]
        if unknown:
            warn(f"nothing to merge: {explain_unknown_adapters(unknown, self.peft_config)}")

    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the base weights."""
        if not any(layer.merged for layer in self._layers()):
            warn("no adapter is merged, so there is nothing to unmerge")
        unmerge_layers(call_replaced(self._layers(), "unmerge"))

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """
        Merge adapters and give the base model back, without any layers of this package.

        Args:
            progressbar: show progress.
            safe_merge: refuse the merge, before anything is changed, if an entry would not be finite.
            adapter_names: which adapters; the active ones if left out.

        Returns:
            The base model, of its own class, with changed weights.

        Raises:
            PeftValueError: if `safe_merge` finds entries that are not finite.
        """
        return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """
        Take everything of this package out of the model and give the base model back as it was.

        Biases that were trained (`bias="all"`) are part of the base model and stay; modules that were trained in full
        stay with them then, so that the result is not half of one model and half of another.
        """
        return self._unload_and_optionally_merge(merge=False)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """
        Do what `merge_and_unload` and `unload` do. Clients replace it.

        Args:
            merge: merge adapters before they are taken out.
            progressbar: show progress.
            safe_merge: see `merge_and_unload`.
            adapter_names: which adapters; the active ones if left out.
        """
        if not merge:
            unmerge_layers(self._layers())
            biases = [
                name for name in self.active_adapters if getattr(self.peft_config[name], "bias", "none") != "none"
            ]
            return self._unload(merge=bool(biases), safe_merge=False, adapter_names=None)
        if safe_merge:  # what wrappers would refuse later is refused while nothing is merged yet
            for _, module in adapter_modules(self.model):
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.unload_and_optionally_merge_module(True, True, adapter_names)
        merge_layers(self.model, adapter_names, safe_merge, progressbar, for_good=True)
        self._warn_of_unknown(adapter_names)
        return self._unload(merge=True, safe_merge=safe_merge, adapter_names=adapter_names)

    def _unload(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        with original_weights(self._layers()):
            groups = find_tied_groups(self.model)
        slots = Slots(self.model)
        changed = set()
        # outermost first: an adapter module that another one wraps comes to light when the outer one is taken off
        for _, module in list(adapter_modules(self.model)):
            if isinstance(module, AuxiliaryTrainingWrapper):
                base = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            else:
                base = module.base_layer
            slots.replace(module, base)
            changed.add(id(base))
        if merge:
            names = self.active_adapters if adapter_names is None else adapter_names
            configs = [self.peft_config[name] for name in names if name in self.peft_config]
            kept = {name for config in configs for ties in _recorded_ties(config) for name in (*ties, *ties.values())}
            settle_ties(self.model, groups, kept)
            settle_declared(self.model, changed)
        for module in self.model.modules():
            accompany_layer(module, leave=True)
        self.model.__dict__.pop("peft_config", None)
        unshield_tie_weights(self.model)
        return self.model

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """
        Count what a checkpoint of an adapter holds, in units of 4 bytes.

        Args:
            adapter: name.

        Returns:
            Number of the method's own parameters (integers count as the bytes that they take), and number of other
            parameters that are trained, such as biases and modules of `modules_to_save`.
        """
        self._config_of(adapter)
        return count_saved(self, adapter, self.prefix)

    def print_savable_parameters(self) -> None:
        """Print what a checkpoint of each active adapter holds; see `get_nb_savable_parameters`."""
        for adapter in self.active_adapters:
            own, other = self.get_nb_savable_parameters(adapter)
            method = self.peft_config[adapter].peft_type
            print(f"{method} parameters to save (as float32): {own:,} || all parameters to save: {own + other:,}")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether an adapter can be converted to LoRA."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in self._layers())


def _recorded_ties(config: PeftConfig) -> list[dict[str, str]]:
    recorded = (config.modules_to_tie, config.target_modules_to_tie, config.token_modules_to_tie)
    return [ties for ties in recorded if ties]
