# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
`BaseTuner` puts a method's layers into a model: match, plan, create, replace, finish.

`BaseTunerLayer` and the rules of methods live in the room `layers`.
"""

import copy
import dataclasses
from abc import ABC
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..anatomy.all_linear import all_linear_names
from ..anatomy.kinds import can_use_weight, gives_features, is_quantized_linear
from ..anatomy.matching import (
    Targets,
    check_target_module_exists,
    ends_like,
    find_targets,
    layer_index,
    lies_in,
    matching_entry,
    names_in_text,
    near_names,
    pattern_lookup,
    patterns_without_use,
)
from ..anatomy.offload import refuse_offloaded
from ..anatomy.parameters import check_stacks, find_parameters
from ..anatomy.view import viewing
from ..anatomy.walking import adapter_modules, base_modules, base_parameters, names_of_modules, stack_of, unwrapped
from ..config import PeftConfig
from ..layers.activation import ActivationLayer
from ..layers.adapter_names import check_adapter_name
from ..layers.additive import AdditiveLayer
from ..layers.base_layer import BaseTunerLayer
from ..layers.merging.checks import check_adapters_to_merge
from ..layers.merging.layer import unmerge_layers
from ..layers.merging.model import merge_layers
from ..layers.merging.sharing import note_sharing
from ..layers.merging.state import original_weights
from ..layers.new_tensors import making_tensors
from ..layers.replacement import ReplacementLayer
from ..layers.shared_tensors import SharedParameters
from ..layers.training_wrapper import AuxiliaryTrainingWrapper
from ..layers.weight import WeightLayer
from ..prompts.encoder import BasePromptEncoder
from ..surgery.replication import clone_module, replicate_layers
from ..surgery.saved_modules import check_additional_trainable_modules, set_additional_trainable_modules
from ..surgery.shield import shield_tie_weights, unshield_tie_weights
from ..surgery.slots import Slots, without_collecting
from ..surgery.switching import (
    cast_adapter_dtype,
    delete_adapter,
    is_trained,
    remove_adapter,
    set_adapter,
    set_requires_grad,
)
from ..surgery.transaction import all_or_nothing
from ..tying.groups import find_tied_groups, module_of
from ..tying.record import (
    ReachedTie,
    explaining_tie,
    find_followers,
    find_following_parameters,
    keep_ties,
    refuse_excluded,
)
from ..tying.settle import one_object_each, settle_ties
from ..utils.constants import (
    DUMMY_MODEL_CONFIG,
    DUMMY_TARGET_MODULES,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    SEQ_CLS_HEAD_NAMES,
    UPCAST_DTYPES,
)
from ..utils.error import (
    NoMatchingPeftModuleError,
    PeftNotImplementedError,
    PeftTypeError,
    PeftValueError,
)
from ..utils.near_names import FEW, did_you_mean, explain_unknown_adapters
from ..utils.quantization_utils import accompany_layer, get_quantization_kwargs, resolve_quantization_backend
from ..utils.warning import warn
from ..utils.wrapped_names import plain_name, with_plain_names


__all__ = [
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SEQ_CLS_HEAD_NAMES",
    "UPCAST_DTYPES",
    "ActivationLayer",
    "AdditiveLayer",
    "BasePromptEncoder",
    "BaseTuner",
    "BaseTunerLayer",
    "ReplacementLayer",
    "WeightLayer",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "clone_module",
    "delete_adapter",
    "replicate_layers",
    "set_adapter",
    "set_requires_grad",
]


class BaseTuner(nn.Module, ABC):
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
        layer_parts: kind of base layer -> names of the layers inside it that are adapted along with it.
        parameter_layer_cls: layer for a parameter of any module, for methods with `target_parameters`.
        target_module_mapping: model type -> default targets.
        pattern_fields: config field, such as the rank -> config field with the values for modules where it differs.
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
    layer_parts: dict[type[nn.Module], tuple[str, ...]] = {}
    parameter_layer_cls: type[BaseTunerLayer] | None = None
    target_module_mapping: dict[str, Any] = {}
    pattern_fields: dict[str, str] = {}

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
            if new:
                self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
            if present and new:
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
        return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)

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

        Args:
            adapter_name: its name.
            peft_config: its config; it is not changed.
            low_cpu_mem_usage: make its tensors on the meta device.
            autocast_adapter_dtype: keep them in float32 where the base is in half precision.
        """
        with all_or_nothing(self):
            self.peft_config[adapter_name] = copy.copy(peft_config)
            self.inject_adapter(self.model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

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
        with all_or_nothing(self, model):
            self._prepare_model(model, adapter_name)
            with viewing(model):
                self._inject(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _prepare_model(self, model: nn.Module, adapter_name: str) -> None:
        """
        Change the base model before anything is planned; methods extend it. What it changes is put back on refusal.

        Args:
            model: the base model.
            adapter_name: name of the adapter, whose config is in `peft_config`.
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
        config = self.peft_config[adapter_name]
        _forget_wrappers(config)
        check_adapter_name(adapter_name, self.prefix)
        remove_adapter(model, adapter_name)
        self._check_new_adapter_config(adapter_name, config)
        self._resolve_targets(model, config)
        modules = names_of_modules(model)
        parameters = self._matched_parameters(modules, config, state_dict)
        modules = {name: module for name, module in modules.items() if name}
        all_names: dict[int, list[str]] = {}
        for name, module in modules.items():
            all_names.setdefault(id(module), []).append(name)
        matched = self._matched_names(modules, config, state_dict, parameters)
        refuse_offloaded(model, config, matched)
        with original_weights(self._layers()):
            self._check_tied_modules(model, config)
        names = with_ties(matched, config.target_modules_to_tie or {})
        self._check_targets(model, config, names)
        targets = {name: modules[name] for name in self._with_parts(names, modules, all_names)}
        parameters = {name: modules[module_of(name)] for name in self._parameters_with_ties(parameters, config)}
        check_stacks(parameters, targets.values())
        check_additional_trainable_modules(model, config)
        self._check_patterns(config, [*modules, *parameters])
        making = making_tensors(on_meta=low_cpu_mem_usage, full_precision=autocast_adapter_dtype)
        with one_object_each(model), making:
            self._place_layers(model, adapter_name, config, {**targets, **parameters}, all_names, set(parameters))
            set_additional_trainable_modules(
                model, config, self.get_model_config(model), adapter_name, adapter_name in self.active_adapters
            )
        self.targeted_module_names = names if config.ensure_weight_tying else matched
        self.targeted_parameter_names = list(parameters)
        self._finish(adapter_name, config)

    def _check_new_adapter_config(self, adapter_name: str, config: PeftConfig) -> None:
        """Refuse a config that cannot stand beside those that the model has. To be extended by methods."""
        bias = [name for name, other in self.peft_config.items() if getattr(other, "bias", "none") != "none"]
        if len(self.peft_config) > 1 and getattr(config, "bias", "none") != "none" and bias != [adapter_name]:
            raise PeftValueError(
                f"adapter {adapter_name!r} trains the base model's biases (bias={config.bias!r}), and so does "
                f"{bias[0]!r}; biases exist once. Use bias='none' for all adapters but one"
            )
        allowed = dict.fromkeys(("none", "all", f"{config.peft_type.lower()}_only", f"{self.prefix}only"))
        if getattr(config, "bias", "none") not in allowed:
            raise PeftNotImplementedError(f"bias={config.bias!r} is not known; choose one of {', '.join(allowed)}")

    def _resolve_targets(self, model: nn.Module, config: PeftConfig) -> None:
        """Replace a target that was left out, or a shorthand, by the names of modules."""
        if config.target_modules is None and self._needs_targets(config):
            model_type = self.get_model_config(model).get("model_type")
            if model_type not in self.target_module_mapping:
                raise PeftValueError(
                    f"target_modules was left out, and there is no default for model type {model_type!r}; name the "
                    "modules to adapt, or use target_modules='all-linear'"
                )
            targets = self.target_module_mapping[model_type]
            config.target_modules = targets if isinstance(targets, str) else set(targets)
        elif config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            config.target_modules = all_linear_names(model, config)

    def _needs_targets(self, config: PeftConfig) -> bool:
        """Say whether a config without `target_modules` gets the default ones."""
        return not getattr(config, "target_parameters", None)

    def _matched_parameters(
        self, modules: dict[str, nn.Module], config: PeftConfig, state_dict: dict[str, torch.Tensor] | None
    ) -> list[str]:
        """Find the parameters to adapt; keys of a state dict name their modules only."""
        wanted = getattr(config, "target_parameters", None)
        if not wanted or self.parameter_layer_cls is None:
            return []
        found = find_parameters(modules, wanted, others=bool(config.target_modules) or state_dict is not None)
        if state_dict is None:
            return list(found)
        present = self._modules_in_state_dict(state_dict)
        return [name for name in found if module_of(name) in present]

    @staticmethod
    def _parameters_with_ties(names: list[str], config: PeftConfig) -> list[str]:
        """Add the parameters that follow others; wrappers of one module keep their order where they can."""
        ties = config.target_parameters_to_tie or {}
        order = list(dict.fromkeys([*names, *ties.values(), *ties]))
        early = {name for name in ties if order.index(name) < order.index(ties[name])}
        return [name for name in order if name not in early] + [name for name in order if name in early]

    def _with_parts(
        self, names: list[str], modules: dict[str, nn.Module], all_names: dict[int, list[str]]
    ) -> list[str]:
        """Add layers that are adapted along with the one that they stand in; they go by its names too."""
        everything = dict.fromkeys(names)
        for name in names:
            base = unwrapped(modules[name])
            parts = next((parts for kind, parts in self.layer_parts.items() if isinstance(base, kind)), ())
            for part in parts:
                everything[f"{name}.{part}"] = None
                all_names[id(modules[f"{name}.{part}"])] += all_names[id(modules[name])]
        return list(everything)

    def _matched_names(
        self,
        modules: dict[str, nn.Module],
        config: PeftConfig,
        state_dict: dict[str, torch.Tensor] | None,
        parameters: list[str],
    ) -> list[str]:
        """Find the modules to adapt, and refuse or warn about what matches nothing."""
        candidates = list(modules)
        if state_dict is not None:
            return self._names_in_state_dict(candidates, state_dict, parameters)
        if config.target_modules == DUMMY_TARGET_MODULES:
            return []
        targets = find_targets(config, candidates)
        saved = _as_names(getattr(config, "modules_to_save", None))
        if saved:  # what is trained in full needs no adapter
            _warn_of_targets_in_full(saved, targets.names)
            targets.names = [name for name in targets.names if not lies_in(saved, name)]
        if not targets.names and config.target_modules is not None and not parameters:
            raise NoMatchingPeftModuleError(self._explain_no_match(config, targets, candidates))
        for entry in targets.unmatched[:FEW]:
            near = near_names(entry, candidates)
            warn(f"target_modules entry {entry!r} matches no module{did_you_mean(near)}")
        if len(targets.unmatched) > FEW:
            warn(f"{len(targets.unmatched) - FEW} more entries of target_modules match no module")
        if targets.absent_layers is not None:
            warn(f"layers_to_transform: {_explain_absent_layers(*targets.absent_layers)}")
        if getattr(config, "exclude_modules", None) and not targets.excluded:
            entries = _as_names(config.exclude_modules)
            near = dict.fromkeys(name for entry in sorted(entries)[:FEW] for name in near_names(entry, targets.names))
            warn(
                f"exclude_modules={config.exclude_modules!r} leaves out nothing that target_modules matches"
                f"{did_you_mean(near)}"
            )
        # a module that has several names is one target, under the first of them
        first = {}
        for name, module in modules.items():
            first.setdefault(id(module), name)
        return list(dict.fromkeys(first[id(modules[name])] for name in targets.names))

    def _modules_in_state_dict(self, state_dict: dict[str, torch.Tensor]) -> set[str]:
        """Give the names, without adapters, of the modules whose adapters a state dict holds."""
        marker = f".{self.prefix}"
        keys = [plain_name(k) for k in state_dict if not k.endswith(self.tuner_layer_cls.shared_layer_names)]
        layers = {key.partition(marker)[0].removeprefix("base_model.model.") for key in keys if marker in key}
        return {".".join(part for part in layer.split(".") if part != "base_layer") for layer in layers}

    def _names_in_state_dict(
        self, candidates: list[str], state_dict: dict[str, torch.Tensor], parameters: list[str]
    ) -> list[str]:
        wanted = self._modules_in_state_dict(state_dict) - {module_of(name) for name in parameters}
        names = [name for name in candidates if name in wanted]
        if not names and not parameters:
            raise NoMatchingPeftModuleError(
                f"none of the {len(state_dict)} keys of the state dict names a module of the model; the first keys "
                f"are {', '.join(list(state_dict)[:3])}"
            )
        if len(names) < len(wanted):
            missing = sorted(wanted - set(names))
            warn(
                f"the state dict has tensors for {len(missing)} modules that the model lacks: {', '.join(missing[:5])}"
            )
        return names

    def _explain_no_match(self, config: PeftConfig, targets: Targets, candidates: list[str]) -> str:
        if targets.excluded:
            return (
                f"target_modules matches {len(targets.excluded)} modules, and exclude_modules="
                f"{config.exclude_modules!r} leaves all of them out; make one of the two narrower"
            )
        wanted = config.target_modules
        entries = [wanted] if isinstance(wanted, str) else sorted(wanted)
        near = {name: None for entry in entries[:FEW] for name in near_names(entry, candidates)}
        hints = [f"names that come near: {', '.join(near)}"]
        if not near:
            hints = [f"the model has {', '.join(candidates[:8])} ..."]
        listed = names_in_text(wanted) if isinstance(wanted, str) else []
        if listed:
            hints = [f"a string is taken as a regular expression; as a list of names it would be {listed}"]
        if targets.absent_layers is not None:
            hints = [_explain_absent_layers(*targets.absent_layers)]
        for pattern in list(_as_names(getattr(config, "layers_pattern", None)))[:FEW]:
            if all(layer_index(name, pattern) is None for name in candidates):
                near = did_you_mean(near_names(pattern, candidates, most=1))
                hints = [f"no list of layers is named {pattern!r}{near}"]
        default = self.target_module_mapping.get(self.get_model_config(self.model).get("model_type"))
        if default is not None and default != wanted:
            hints.append(f"the default for this type of model is {default!r}")
        details = "".join(
            f", {name}={getattr(config, name)!r}"
            for name in ("layers_to_transform", "layers_pattern", "modules_to_save")
            if getattr(config, name, None) is not None
        )
        return f"no module to adapt: target_modules={wanted!r}{details} matches nothing; {'; '.join(hints)}"

    def _check_patterns(self, config: PeftConfig, names: list[str]) -> None:
        """
        Check values that hold for some modules only, such as ranks.

        Args:
            config: the adapter's config.
            names: full names of modules and targeted parameters.

        Raises:
            PeftValueError: for a rank that is none.
        """
        for field, patterns_field in self.pattern_fields.items():
            patterns = getattr(config, patterns_field) or {}
            for pattern, value in patterns.items() if field == "r" else ():
                if not isinstance(value, int) or value <= 0:
                    raise PeftValueError(f"{patterns_field}[{pattern!r}] must be a positive integer, found {value!r}")
            for pattern in patterns_without_use(patterns, names)[:FEW]:
                near = did_you_mean(near_names(pattern, names))
                warn(f"{patterns_field} entry {pattern!r} matches no module{near}")

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """
        Find out what the config does to tied weights, before anything is changed.

        With `ensure_weight_tying`, the modules that have to follow others are recorded in `modules_to_tie` and
        `target_modules_to_tie`; without it, ties that are going to be lost cause a warning.

        Args:
            model: the base model.
            peft_config: config with resolved targets; what is found out is recorded on it.

        Raises:
            PeftValueError: if a tie cannot be kept.
        """
        kept = keep_ties(model, peft_config, lambda tie: self._ties_unasked(peft_config, tie))
        targeted = [tie for tie in kept if tie.targeted]
        refuse_excluded(peft_config, targeted)
        self._check_ties_of_targets(model, peft_config, targeted)
        peft_config.modules_to_tie = find_followers(tie for tie in kept if tie.saved)
        peft_config.token_modules_to_tie = find_followers(tie for tie in kept if tie.tokens)
        peft_config.target_modules_to_tie = find_followers(
            targeted, can_own=lambda name: self._layer_class(model.get_submodule(name)) is not None
        )
        peft_config.target_parameters_to_tie = find_following_parameters(kept)

    def _ties_unasked(self, config: PeftConfig, tie: ReachedTie) -> bool:
        """
        Say whether a tie is kept although the config does not ask for it.

        A token that is trained in the embedding is one token, so it is trained in what is tied to it.
        """
        return tie.trains_the_same_tokens

    def _check_ties_of_targets(self, model: nn.Module, config: PeftConfig, ties: list[ReachedTie]) -> None:
        """
        Refuse targets that are to stay tied where the method cannot do that. Methods may extend it.

        Raises:
            PeftValueError: if no member can have the adapter, or one cannot use the weight of another.
        """
        for tie in ties:
            modules = {module_of(m): unwrapped(model.get_submodule(module_of(m))) for m in tie.group.members}
            useless = [name for name, module in modules.items() if not can_use_weight(module)]
            if all(self._layer_class(module) is None for module in modules.values()):
                useless = list(modules)
            if useless:
                kinds = ", ".join(f"{name!r} ({type(modules[name]).__name__})" for name in useless)
                raise UnsupportedLayerError(
                    f"ensure_weight_tying=True cannot be kept for {', '.join(map(repr, tie.group.members))}: "
                    f"{type(self).__name__} cannot adapt {kinds}. Narrow target_modules, use another method, such as "
                    "LoRA, or list the modules in modules_to_save to train them in full, as one"
                )

    def _check_targets(self, model: nn.Module, config: PeftConfig, names: list[str]) -> None:
        """Warn about or refuse targets, before anything is changed. Methods may extend it."""
        return

    def _place_layers(
        self,
        model: nn.Module,
        adapter_name: str,
        config: PeftConfig,
        targets: dict[str, nn.Module],
        all_names: dict[int, list[str]],
        parameters: Collection[str] = (),
    ) -> None:
        """
        Create the layers for all targets, then put them into the model.

        Targets are modules by their full names, or their parameters by the names in `parameters`.
        """
        arguments_for = self._layer_arguments_for(config)
        ties = {**(config.target_modules_to_tie or {}), **(config.target_parameters_to_tie or {})}
        layers: dict[str, BaseTunerLayer] = {}
        created: list[tuple[nn.Module, BaseTunerLayer]] = []
        shared = self._shared_containers()

        def names_of(target: str) -> list[str]:
            names = all_names[id(targets[target])]
            return [f"{name}.{target.rpartition('.')[2]}" for name in names] if target in parameters else names

        if shared:
            self.make_shared(adapter_name, config, {name: unwrapped(module) for name, module in targets.items()})
        outermost: dict[int, nn.Module] = {}
        for name, module in targets.items():
            key = name.rpartition(".")[2] if name in parameters else None
            arguments = arguments_for(names_of(ties.get(name, name)))
            if name in ties:  # owners come first, so it is there
                arguments["owner"] = layers[ties[name]]
            present = self._present_layer(module, key)
            if present is not None:
                if key is None:
                    self._check_kind(module, name, arguments.get("owner"))
                with explaining_tie(name, ties, config):
                    present.update_layer(adapter_name, config=config, **arguments)
                if not module.training:
                    module.train(False)
                layers[name] = present
            else:
                arguments.update({"shared": shared} if shared else {})
                arguments.update({"parameter_name": key} if key is not None else {})
                inner = outermost.get(id(module), module)
                with explaining_tie(name, ties, config):
                    layers[name] = self._create_layer(inner, name, adapter_name, config, arguments)
                created.append((inner, layers[name]))
                outermost[id(module)] = layers[name]
        slots = Slots(model) if created else None
        for module, layer in created:
            if not module.training:
                layer.train(False)
            layer._active_adapter = self.active_adapters
            slots.replace(module, layer)

    def _present_layer(self, module: nn.Module, parameter: str | None) -> BaseTunerLayer | None:
        """Find the layer that adapts a module, or a parameter of it, for other adapters already."""
        if parameter is not None:
            return next((layer for layer in stack_of(module) if layer.parameter_name == parameter), None)
        # one method's layers may derive from another's, as AdaLoRA's do from LoRA's
        kinds = tuple(self.layer_classes.values()) or self.tuner_layer_cls
        return next((layer for layer in stack_of(module) if isinstance(layer, kinds)), None)

    def _layer_arguments_for(self, config: PeftConfig) -> Callable[[list[str]], dict[str, Any]]:
        """Give a function from the names of a target to what its layer is made with beside the config."""
        lookups = {
            field: (getattr(config, field), pattern_lookup(getattr(config, patterns)))
            for field, patterns in self.pattern_fields.items()
        }
        return lambda names: {field: lookup(names, default) for field, (default, lookup) in lookups.items()}

    def make_shared(self, adapter_name: str, config: PeftConfig, targets: dict[str, nn.Module]) -> None:
        """
        Make the tensors of an adapter that all of its layers share. Supplied by methods that have some.

        Args:
            adapter_name: name.
            config: the adapter's config.
            targets: full name -> layer of the base model.
        """

    def _shared_containers(self) -> dict[str, nn.Module]:
        """Give the containers of what all layers share; they stand on the tuner and on each layer."""
        names = self.tuner_layer_cls.shared_layer_names
        if not names:
            return {}
        layer = next((layer for layer in self._layers() if isinstance(layer, self.tuner_layer_cls)), None)
        for name in names:
            if layer is not None:
                self._modules[name] = layer._modules[name]
            elif name not in self._modules:
                self._modules[name] = self.tuner_layer_cls.container_classes.get(name, SharedParameters)()
        return {name: self._modules[name] for name in names}

    def _layer_class(self, target: nn.Module) -> type[BaseTunerLayer] | None:
        """Find the layer for a kind of base layer."""
        base = unwrapped(target)
        found = next((layer_cls for kind, layer_cls in self.layer_classes.items() if isinstance(base, kind)), None)
        # linear layers of some libraries for quantisation do not derive from torch's
        return self.layer_classes.get(nn.Linear) if found is None and is_quantized_linear(base) else found

    def _check_kind(self, target: nn.Module, name: str, owner: BaseTunerLayer | None) -> None:
        """
        Refuse kinds of base layers that the method cannot adapt; one that follows another layer need not be adapted.

        Raises:
            UnsupportedLayerError: in that case.
        """
        if owner is None and self._layer_class(target) is None:
            supported = ", ".join(kind.__name__ for kind in self.layer_classes)
            raise UnsupportedLayerError(
                f"{type(self).__name__} cannot adapt {name!r}, which is a {type(unwrapped(target)).__name__}; it "
                f"adapts {supported}. Narrow target_modules, or list the module in modules_to_save to train it in full"
            )
        if issubclass(self._layer_class(target) or object, (AdditiveLayer, WeightLayer, ActivationLayer)):
            self._check_output(unwrapped(target), name)

    @staticmethod
    def _check_output(layer: nn.Module, name: str) -> None:
        """
        Refuse layers that give something else than their kind does: adapters would be added to it, or scale it.

        Raises:
            UnsupportedLayerError: in that case.
        """
        if not gives_features(layer):
            raise UnsupportedLayerError(
                f"{name!r} is a {type(layer).__name__}, which is no mere linear layer: its forward pass gives more "
                f"than its {layer.out_features} output features. Leave it out of target_modules; LoRA can adapt its "
                f"weight by name, with target_parameters={[name.rpartition('.')[2] + '.weight']}"
            )

    def _create_layer(
        self, target: nn.Module, name: str, adapter_name: str, config: PeftConfig, arguments: dict[str, Any]
    ) -> BaseTunerLayer:
        """Make the layer for one target. Methods declare `layer_classes` and seldom override this."""
        owner = arguments.get("owner")
        if "parameter_name" in arguments:
            return self.parameter_layer_cls(target, adapter_name, config=config, **arguments)
        self._check_kind(target, name, owner)
        layer_cls = self._layer_class(target) or type(owner)
        return layer_cls(target, adapter_name, config=config, **arguments)

    def _finish(self, adapter_name: str, config: PeftConfig) -> None:
        """Freeze the base model and let the active adapters be trained."""
        shield_tie_weights(self.model)
        note_sharing(self.model)
        quantization = get_quantization_kwargs(self.model)
        for layer in self.model.modules() if quantization else ():
            if isinstance(layer, BaseTunerLayer) and layer.quantization_backend is not None:
                layer.quantization_backend = resolve_quantization_backend(layer.get_base_layer(), **quantization)
        for module in base_modules(self.model):
            accompany_layer(module)
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.requires_grad = False
        active = adapter_name in self.active_adapters
        set_requires_grad(self.model, adapter_name, active and not config.inference_mode)
        for name in self.active_adapters:
            other = self._config_of(name)
            if not other.inference_mode and getattr(other, "bias", "none") != "none":
                self._train_biases(other.bias)

    def _config_of(self, adapter_name: str) -> PeftConfig:
        if adapter_name not in self.peft_config:
            raise PeftValueError(explain_unknown_adapters([adapter_name], self.peft_config))
        return self.peft_config[adapter_name]

    def _train_biases(self, which: str) -> None:
        """Let biases of the base model be trained: all of them, or those of adapted layers."""
        if which == "all":
            for name, parameter in base_parameters(self.model):
                # the original of a module that is trained in full takes no part in the forward pass
                if (name == "bias" or name.endswith(".bias")) and ".original_module." not in name:
                    parameter.requires_grad_(True)
        else:
            for layer in self._layers():
                if getattr(layer, "bias", None) is not None:
                    layer.bias.requires_grad_(True)

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
        for name in _as_names(adapter_name):
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
        on = [module for _, module in adapter_modules(self.model) if not module.disable_adapters]
        if on:
            self.disable_adapter_layers()
        try:
            yield
        finally:
            for module in on:
                module.enable_adapters(True)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter. If it was the only active one, another one becomes active, with a warning.

        What is trained of the others stays so. The one that becomes active is trained if the one that is gone was,
        unless its config says that it is there for inference.

        Raises:
            PeftValueError: if there is no adapter of that name.
        """
        self._config_of(adapter_name)
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
        unmerge_layers(self._layers())

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
        if safe_merge:  # what wrappers would refuse later is refused while nothing is merged yet
            for _, module in adapter_modules(self.model):
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.unload_and_optionally_merge_module(True, True, adapter_names)
        merge_layers(self.model, adapter_names, safe_merge, progressbar, for_good=True)
        self._warn_of_unknown(adapter_names)
        return self._unload(merge=True, safe_merge=safe_merge, adapter_names=adapter_names)

    def unload(self) -> nn.Module:
        """
        Take everything of this package out of the model and give the base model back as it was.

        Biases that were trained (`bias="all"`) are part of the base model and stay; modules that were trained in full
        stay with them then, so that the result is not half of one model and half of another.
        """
        unmerge_layers(self._layers())
        biases = [name for name in self.active_adapters if getattr(self.peft_config[name], "bias", "none") != "none"]
        return self._unload(merge=bool(biases), safe_merge=False, adapter_names=None)

    def _unload(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        with original_weights(self._layers()):
            groups = find_tied_groups(self.model)
        slots = Slots(self.model)
        # outermost first: an adapter module that another one wraps comes to light when the outer one is taken off
        for _, module in list(adapter_modules(self.model)):
            if isinstance(module, AuxiliaryTrainingWrapper):
                slots.replace(module, module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names))
            else:
                slots.replace(module, module.base_layer)
        if merge:
            names = self.active_adapters if adapter_names is None else adapter_names
            configs = [self.peft_config[name] for name in names if name in self.peft_config]
            kept = {name for config in configs for ties in _recorded_ties(config) for name in (*ties, *ties.values())}
            settle_ties(self.model, groups, kept)
        for module in self.model.modules():
            accompany_layer(module, leave=True)
        self.model.__dict__.pop("peft_config", None)
        unshield_tie_weights(self.model)
        return self.model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether an adapter can be converted to LoRA."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in self._layers())


def _forget_wrappers(config: PeftConfig) -> None:
    """Write names in a config as they are without what torch.compile or FSDP puts around modules."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = with_plain_names(value)
        if plain is not value:
            setattr(config, field.name, plain)


def _recorded_ties(config: PeftConfig) -> list[dict[str, str]]:
    recorded = (config.modules_to_tie, config.target_modules_to_tie, config.token_modules_to_tie)
    return [ties for ties in recorded if ties]


def _as_names(names: str | Collection[str] | None) -> Collection[str]:
    return [names] if isinstance(names, str) else names or ()


def _explain_absent_layers(absent: list[int], last: int) -> str:
    return f"there is no layer {', '.join(map(str, absent))}; the indices of the model's layers go from 0 to {last}"


def _warn_of_targets_in_full(saved: Collection[str], targets: list[str]) -> None:
    """Warn of targets that `modules_to_save` takes by a part of their names only, which is easily overlooked."""
    lookup = set(saved)
    names = [name for name in targets if ends_like(saved, name) and matching_entry(lookup, name) is None]
    if names:
        entry = next(entry for entry in saved if ends_like([entry], names[0]))
        warn(
            f"target_modules reaches {', '.join(map(repr, names[:FEW]))}, whose names end with the modules_to_save "
            f"entry {entry!r}; what that reaches is trained in full and gets no adapter. Leave them out of "
            "target_modules"
        )


def with_ties(names: list[str], ties: dict[str, str]) -> list[str]:
    """
    Add the modules that have to be adapted because of a tie.

    Args:
        names: full names of targets.
        ties: follower -> module that it follows.

    Returns:
        All names; whatever is followed comes before its followers.
    """
    if not ties:
        return names
    everything = dict.fromkeys([*names, *ties.values()])
    return [name for name in everything if name not in ties] + list(ties)


class UnsupportedLayerError(PeftValueError, PeftTypeError):
    """A target whose kind of layer the method cannot adapt."""
