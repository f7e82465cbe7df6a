# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""From a config to a plan: what an adapter reaches, and what is refused. Nothing is changed here."""

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy.all_linear import all_linear_names
from ..anatomy.kinds import can_use_weight, gives_features, is_quantized_linear, stores_weight_transposed
from ..anatomy.matching import (
    Targets,
    check_target_module_exists,
    find_targets,
    layer_index,
    lies_in,
    names_in_text,
    near_names,
    pattern_lookup,
    patterns_without_use,
    shortest_endings,
)
from ..anatomy.offload import refuse_offloaded
from ..anatomy.parameters import check_stacks, find_parameters
from ..anatomy.view import ModelView
from ..anatomy.walking import unwrapped
from ..config import PeftConfig
from ..layers.activation import ActivationLayer
from ..layers.adapter_names import check_adapter_name
from ..layers.additive import AdditiveLayer
from ..layers.base_layer import BaseTunerLayer
from ..layers.merging.sharing import merging_layers
from ..layers.merging.state import original_weights
from ..layers.weight import WeightLayer
from ..surgery.saved_modules import check_additional_trainable_modules
from ..tying.groups import module_of
from ..tying.record import (
    ReachedTie,
    explaining_tie,
    find_followers,
    find_following_parameters,
    keep_ties,
    refuse_excluded,
)
from ..utils.constants import (
    DUMMY_TARGET_MODULES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
)
from ..utils.error import (
    NoMatchingPeftModuleError,
    PeftNotImplementedError,
    PeftTypeError,
    PeftValueError,
)
from ..utils.near_names import FEW, did_you_mean
from ..utils.quantization_utils import resolve_quantization_backend
from ..utils.warning import PeftRuntimeWarning, warn
from ..utils.wrapped_names import plain_name, with_plain_names
from .plan import AdapterPlan, Target, in_order
from .target_warnings import as_names, compare_with_targets, explain_absent_layers, warn_of_targets_in_full


class Targeting:
    """
    What a tuner knows about targets. A method refines what differs for it.

    See `BaseTuner` for the attributes that methods declare.
    """

    _check_target_module_exists = staticmethod(check_target_module_exists)

    def plan_adapter(
        self,
        view: ModelView,
        adapter_name: str,
        config: PeftConfig,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> AdapterPlan:
        """
        Work out what putting an adapter into a model would do; neither the model nor the config is changed.

        Args:
            view: the model, looked at.
            adapter_name: name of the adapter.
            config: its config.
            state_dict: adapter tensors; if given, the modules named by its keys are adapted.

        Returns:
            The plan, which can be carried out.

        Raises:
            NoMatchingPeftModuleError: if nothing matches.
            PeftValueError: for whatever the config asks for and the model does not allow.
        """
        check_adapter_name(adapter_name, self.prefix)
        self._check_new_adapter_config(config)
        model, config = view.model, copy.copy(config)
        _forget_wrappers(config)
        self._resolve_targets(model, config)
        modules = view.names_of_modules()
        parameters = self._matched_parameters(modules, config, state_dict)
        modules = {name: module for name, module in modules.items() if name}
        found = self._matched_names(modules, config, state_dict, parameters)
        _shorten_targets(config, list(modules))
        refuse_offloaded(model, config, found.names)
        # the first of two stages: what has to follow what is recorded, whatever the order of names
        with original_weights(merging_layers(model)):
            self._check_tied_modules(model, config)
        ties = config.target_modules_to_tie or {}
        names = with_ties(found.names, ties)
        self._check_targets(model, config, names)
        self._believe_layers(config, [modules[name] for name in names])
        parts = self._parts(names, modules)
        whole = {name: modules[name] for name in dict.fromkeys([*names, *parts])}
        # a client's hook may send the layer to another module, which is checked then
        is_checked = not self._hook_is_replaced()
        classes = {
            name: self._check_kind(module, name, follows=name in ties) if is_checked else self._layer_class(module)
            for name, module in whole.items()
        }
        single = {name: modules[module_of(name)] for name in self._parameters_with_ties(parameters, config)}
        check_stacks(single, whole.values())
        additional = check_additional_trainable_modules(model, config)
        self._check_patterns(config, [*modules, *single])
        return AdapterPlan(
            adapter_name,
            config,
            self._plan_targets(config, modules, whole, classes, parts, single, is_checked),
            matched=tuple(found.names),
            names=tuple(names),
            excluded=tuple(found.excluded),
            unmatched=tuple(found.unmatched),
            additional=additional,
            all_names=tuple(modules),
        )

    def _plan_targets(
        self,
        config: PeftConfig,
        modules: dict[str, nn.Module],
        whole: dict[str, nn.Module],
        classes: dict[str, type[BaseTunerLayer] | None],
        parts: dict[str, str],
        single: dict[str, nn.Module],
        is_checked: bool,
    ) -> tuple[Target, ...]:
        """
        Say with what the layer of each target will be made.

        Args:
            config: config with resolved targets and recorded ties.
            modules: full name -> module of the model.
            whole: the same for those that get a layer.
            classes: what layer each of them gets; None for what cannot be adapted itself.
            parts: those among them that are adapted along with another one -> that one, by whose names they go too.
            single: full name of a parameter that gets a layer -> module that holds it.
            is_checked: whether it is known what becomes of each target, so that what cannot be is refused.
        """
        all_names: dict[int, list[str]] = {}
        for name, module in modules.items():
            all_names.setdefault(id(module), []).append(name)
        for part, name in parts.items():
            all_names[id(modules[part])] += all_names[id(modules[name])]
        owners = {**(config.target_modules_to_tie or {}), **(config.target_parameters_to_tie or {})}
        reached = {**whole, **single}

        def names_of(target: str) -> list[str]:
            names = all_names[id(reached[target])]
            return [f"{name}.{target.rpartition('.')[2]}" for name in names] if target in single else names

        arguments_for = self._layer_arguments_for(config)
        own = in_order((name for name in reached if name not in owners), modules)
        layers = {name: unwrapped(reached[name]) for name in own}
        from_all = self._arguments_from_all(config, layers)
        self.check_shared(config, layers)
        targets = []
        for name, module in reached.items():
            owner = owners.get(name)
            arguments = arguments_for(names_of(name if owner is None else owner))
            arguments = {**arguments, **from_all.get(name, {})}
            if name in single:
                key, layer_class = name.rpartition(".")[2], self.parameter_layer_cls
            else:  # what cannot be adapted itself can follow
                key, layer_class = None, classes[name] or classes.get(owner)
            if is_checked:
                with explaining_tie(name, owners, config) if owners else nullcontext():
                    if owner is not None:
                        layer_class.check_following(unwrapped(module), unwrapped(reached[owner]))
                    else:
                        arguments = self._prepared(config, name, module, key, layer_class, arguments)
            targets.append(Target(name, module, key, layer_class, MappingProxyType(arguments), owner))
        return tuple(targets)

    def _prepared(
        self,
        config: PeftConfig,
        name: str,
        module: nn.Module,
        parameter: str | None,
        layer_class: type[BaseTunerLayer],
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        """Refuse a target for which no adapter can be made; see `Target`, and `BaseTunerLayer.prepare_adapter`."""
        present = self._present_layer(module, parameter)
        if parameter is None:
            return layer_class.prepare_adapter(unwrapped(module), config, present=present, **arguments)
        named = {**arguments, "parameter_name": parameter}
        layer_class.prepare_adapter(unwrapped(module), config, present=present, **named)
        return arguments

    def _layer_arguments_for(self, config: PeftConfig) -> Callable[[list[str]], dict[str, Any]]:
        """Give a function from the names of a target to what its layer is made with beside the config."""
        lookups = {
            field: (getattr(config, field), pattern_lookup(getattr(config, patterns)))
            for field, patterns in self.pattern_fields.items()
        }
        return lambda names: {field: lookup(names, default) for field, (default, lookup) in lookups.items()}

    def _arguments_from_all(self, config: PeftConfig, targets: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """
        Give what single layers are made with that depends on all of them. Supplied by methods that have some.

        Args:
            config: the adapter's config.
            targets: full name -> layer of the base model, in the model's order and without followers.

        Returns:
            Full name -> arguments.
        """
        return {}

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """
        Refuse a config that cannot stand beside those that the model has. To be extended by methods.

        Args:
            config: the new one, as it is in `peft_config`.
        """
        which = getattr(config, "bias", "none")
        names = {
            id(other): name for name, other in self.peft_config.items() if getattr(other, "bias", "none") != "none"
        }
        new = names.pop(id(config), None)
        if which != "none" and names:
            raise PeftValueError(
                f"adapter {new!r} trains the base model's biases (bias={which!r}), and so does "
                f"{next(iter(names.values()))!r}; biases exist once. Use bias='none' for all adapters but one"
            )
        # files of the released package have other names than that of the method before `_only`
        if which not in ("none", "all") and not (isinstance(which, str) and which.endswith("_only")):
            method = f"{config.peft_type.lower()}_only"
            raise PeftNotImplementedError(f"bias={which!r} is not known; choose one of none, all, {method}")

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

    def _parts(self, names: list[str], modules: dict[str, nn.Module]) -> dict[str, str]:
        """Find layers that are adapted along with the one that they stand in: full name -> that of the other."""
        found = {}
        for name in names if self.layer_parts else ():
            base = unwrapped(modules[name])
            parts = next((parts for kind, parts in self.layer_parts.items() if isinstance(base, kind)), ())
            found.update({f"{name}.{part}": name for part in parts})
        return found

    def _matched_names(
        self,
        modules: dict[str, nn.Module],
        config: PeftConfig,
        state_dict: dict[str, torch.Tensor] | None,
        parameters: list[str],
    ) -> Targets:
        """Find the modules to adapt, and refuse or warn about what matches nothing."""
        candidates = list(modules)
        if state_dict is not None:
            found = Targets(self._names_in_state_dict(candidates, state_dict, parameters))
            compare_with_targets(config, modules, found.names)
            return found
        if config.target_modules == DUMMY_TARGET_MODULES:
            return Targets()
        targets = find_targets(config, candidates)
        if self._check_target_module_exists is not check_target_module_exists:  # clients replace it
            targets.names = [name for name in targets.names if self._check_target_module_exists(config, name)]
        saved = as_names(getattr(config, "modules_to_save", None))
        if saved:  # what is trained in full needs no adapter
            warn_of_targets_in_full(saved, targets.names)
            targets.names = [name for name in targets.names if not lies_in(saved, name)]
        if not targets.names and config.target_modules is not None and not parameters:
            raise NoMatchingPeftModuleError(self._explain_no_match(config, targets, candidates))
        for entry in targets.unmatched[:FEW]:
            near = near_names(entry, candidates)
            warn(f"target_modules entry {entry!r} matches no module{did_you_mean(near)}", PeftRuntimeWarning)
        if len(targets.unmatched) > FEW:
            more = len(targets.unmatched) - FEW
            warn(f"{more} more entries of target_modules match no module", PeftRuntimeWarning)
        if targets.absent_layers is not None:
            warn(f"layers_to_transform: {explain_absent_layers(*targets.absent_layers)}")
        if getattr(config, "exclude_modules", None) and not targets.excluded:
            entries = as_names(config.exclude_modules)
            near = dict.fromkeys(name for entry in sorted(entries)[:FEW] for name in near_names(entry, targets.names))
            warn(
                f"exclude_modules={config.exclude_modules!r} leaves out nothing that target_modules matches"
                f"{did_you_mean(near)}"
            )
        # a module that has several names is one target, under the first of them
        first = {}
        for name, module in modules.items():
            first.setdefault(id(module), name)
        targets.names = list(dict.fromkeys(first[id(modules[name])] for name in targets.names))
        return targets

    def _modules_in_state_dict(self, state_dict: dict[str, torch.Tensor]) -> set[str]:
        """Give the names, without adapters, of the modules whose adapters a state dict holds."""
        marker = f".{self.prefix}"
        shared = set(self.tuner_layer_cls.shared_layer_names)
        keys = [plain_name(key) for key in state_dict if shared.isdisjoint(key.split("."))]
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
            hints = [explain_absent_layers(*targets.absent_layers)]
        for pattern in list(as_names(getattr(config, "layers_pattern", None)))[:FEW]:
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
                warn(f"{patterns_field} entry {pattern!r} matches no module{near}", PeftRuntimeWarning)

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
            adaptable = [name for name, module in modules.items() if self._layer_class(module) is not None]
            if not adaptable:
                useless = list(modules)
            elif not self.tuner_layer_cls.is_mergeable:  # others follow by what the adapter makes of the weight
                useless = [name for name in modules if name not in adaptable]
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

    def _believe_layers(self, config: PeftConfig, targets: list[nn.Module]) -> None:
        """Set `fan_in_fan_out` to what the linear targets say, where all of them say the same; others have no say."""
        layers = map(unwrapped, targets)
        transposed = {stores_weight_transposed(layer) for layer in layers if isinstance(layer, (nn.Linear, Conv1D))}
        if hasattr(config, "fan_in_fan_out") and transposed == {not config.fan_in_fan_out}:
            config.fan_in_fan_out = not config.fan_in_fan_out
            warn(
                f"fan_in_fan_out={not config.fan_in_fan_out} does not fit the targets, which store their weights as "
                f"{'(in, out)' if config.fan_in_fan_out else '(out, in)'}; {config.fan_in_fan_out} is used"
            )

    def _layer_class(self, target: nn.Module) -> type[BaseTunerLayer] | None:
        """Find the layer for a kind of base layer."""
        base = unwrapped(target)
        found = next((layer_cls for kind, layer_cls in self.layer_classes.items() if isinstance(base, kind)), None)
        # linear layers of some libraries for quantisation do not derive from torch's
        if found is None and is_quantized_linear(base):
            found = self.layer_classes.get(nn.Linear)
        if self.quantized_layer_classes and found is self.layer_classes.get(nn.Linear):
            backend = resolve_quantization_backend(base)
            return found if backend is None else self.quantized_layer_classes.get(backend.name, found)
        return found

    def _check_kind(self, target: nn.Module, name: str, follows: bool) -> type[BaseTunerLayer] | None:
        """
        Refuse kinds of base layers that the method cannot adapt; one that follows another layer need not be adapted.

        Returns:
            The layer for it; None if it can only follow.

        Raises:
            UnsupportedLayerError: in that case.
        """
        layer_class = self._layer_class(target)
        if not follows and layer_class is None:
            supported = ", ".join(kind.__name__ for kind in self.layer_classes)
            raise UnsupportedLayerError(
                f"{type(self).__name__} cannot adapt {name!r}, which is a {type(unwrapped(target)).__name__}; it "
                f"adapts {supported}. Narrow target_modules, or list the module in modules_to_save to train it in full"
            )
        if issubclass(layer_class or object, (AdditiveLayer, WeightLayer, ActivationLayer)):
            self._check_output(unwrapped(target), name)
        return layer_class

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


def _shorten_targets(config: PeftConfig, names: list[str]) -> None:
    """
    Write a long list of targets as the fewest endings of names that reach the same modules.

    A config that lists each layer by its full name is long, slow to match, and fits no model that has other numbers of
    layers, or stands inside of another one.
    """
    wanted = config.target_modules
    if wanted is None or isinstance(wanted, str) or len(wanted) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return
    found = find_targets(config, names)
    excluded = set(found.excluded)
    config.target_modules = shortest_endings(found.names, [name for name in names if name not in excluded])
    if find_targets(config, names).names != found.names:  # full names pass by the choice of layers
        config.target_modules = wanted


def _forget_wrappers(config: PeftConfig) -> None:
    """Write names in a config as they are without what torch.compile or FSDP puts around modules."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = with_plain_names(value)
        if plain is not value:
            setattr(config, field.name, plain)


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
