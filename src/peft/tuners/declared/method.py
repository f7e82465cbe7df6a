# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`@method`, which makes the classes of layers and of the model."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...config import PeftConfig
from ...configs.checks import check_plain_types, check_share
from ...layers.base_layer import BaseTunerLayer
from ...layers.buffer_dict import BufferDict
from ...layers.replacement import ReplacementLayer
from ...layers.shared_tensors import SharedBuffers, SharedGroups, SharedParameters
from ...registry import register_peft_method
from ...utils.error import PeftConfigError
from ..base import BaseTuner
from .either import DeclaredEither
from .layers import (
    DeclaredActivation,
    DeclaredAdditive,
    DeclaredReplacement,
    DeclaredTerm,
    DeclaredWeight,
)
from .mixing import DeclaredMixing
from .shared import SharedPlace
from .tensors import Shape, Tensors, shape_of
from .views import frozen_tensor, setting


OWN_METHODS = f"{__package__.rpartition('.')[0]}."


class DeclaredModel(BaseTuner):
    """
    A model with the layers of a declared method in it; the arguments are those of `BaseTuner`.

    Attributes:
        declared: the class of functions.
        fields_in_common: fields of the config that all adapters of the method agree in.
    """

    declared: ClassVar[type]
    fields_in_common: ClassVar[tuple[str, ...]] = ()

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        for field in self.fields_in_common:
            values = {name: getattr(c, field) for name, c in self.peft_config.items() if type(c) is type(config)}
            if any(value != getattr(config, field) for value in values.values()):
                raise PeftConfigError(
                    f"{field} must be the same for all {config.peft_type} adapters of a model, found {values}"
                )
        if hasattr(self.declared, "check"):
            others = [c for c in self.peft_config.values() if c is not config and type(c) is type(config)]
            self.declared.check(config, others)
        check_plain_types(config)
        dropout = self.tuner_layer_cls.dropout_field
        if dropout is not None:
            check_share(config, dropout)

    def _layer_arguments_for(self, config: PeftConfig) -> Callable[[list[str]], dict[str, Any]]:
        values_for = super()._layer_arguments_for(config)
        return lambda names: {"names": names, **values_for(names)}

    def _shapes(self, targets: dict[str, nn.Module]) -> dict[str, Shape]:
        """Give the shapes of the targets that can be adapted; others are refused when their turn comes."""
        return {name: shape_of(layer) for name, layer in targets.items() if self._layer_class(layer) is not None}

    def _arguments_from_all(self, config: PeftConfig, targets: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """Give the values for single targets that depend on all of them."""
        if not hasattr(self.declared, "values_of_all"):
            return super()._arguments_from_all(config, targets)
        return dict(self.declared.values_of_all(self._shapes(targets), config))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Call the base model; the penalty of a method that has one is added to its loss.

        Args:
            args: passed on.
            kwargs: passed on.
        """
        outputs = super().forward(*args, **kwargs)
        loss = getattr(outputs, "loss", None)
        if hasattr(self.declared, "penalty") and isinstance(loss, torch.Tensor):
            outputs.loss = loss + self.penalty().to(loss)
        return outputs

    def penalty(self) -> torch.Tensor:
        """Sum what the method wants to be small, over the layers and the active adapters."""
        terms = [
            self.declared.penalty(layer.tensors(adapter), layer.settings[adapter])
            for layer in self._layers()
            for adapter in layer.adapters_to_apply()
            if layer.source(adapter) is layer  # what another layer follows counts once
        ]
        return sum(term.to(terms[0].device) for term in terms) if terms else torch.zeros(())

    def after_step(self, step: int) -> None:
        """
        Let the method do what its schedule says; to be called after each step of the optimiser.

        Args:
            step: number of the step.
        """
        for adapter in self.active_adapters if hasattr(self.declared, "after_step") else ():
            self.declared.after_step(self, self.peft_config[adapter], step)

    def check_shared(self, config: PeftConfig, targets: dict[str, nn.Module]) -> None:
        """
        Refuse tensors that layers share, if they cannot be meant.

        Args:
            config: the adapter's config.
            targets: full name -> layer of the base model.
        """
        shapes = self._shapes(targets) if self.tuner_layer_cls.shared_layer_names else {}
        if not shapes:
            return
        place, groups = SharedPlace.of(shapes.values()), self.tuner_layer_cls.group_fields
        for name, specs in self.declared.shared_tensors(shapes, config).items():
            for spec in specs.values() if name in groups else (specs,):
                place.check(spec)

    @torch.no_grad()
    def make_shared(self, adapter_name: str, config: PeftConfig, targets: dict[str, nn.Module]) -> None:
        """
        Make the tensors of an adapter that its layers share.

        Args:
            adapter_name: name.
            config: the adapter's config.
            targets: full name -> layer of the base model.
        """
        shapes = self._shapes(targets)
        if not shapes:
            return
        place = SharedPlace.of(shapes.values())
        for name, specs in self.declared.shared_tensors(shapes, config).items():
            container = self._modules[self.tuner_layer_cls.tensor_names[name]]
            if name not in self.tuner_layer_cls.group_fields:
                place.put(container, adapter_name, specs)
                continue
            trained = name in getattr(self.declared, "trained", ())
            for group, spec in specs.items():
                place.put(*self._place_in_group(container, adapter_name, str(group), trained), spec)

    def _place_in_group(
        self, container: nn.ModuleDict, adapter_name: str, group: str, trained: bool
    ) -> tuple[nn.Module, str]:
        """Give the container of a tensor that a group of layers shares, and the tensor's name there."""
        if adapter_name not in container:
            container[adapter_name] = SharedParameters() if trained else SharedBuffers()
        return container[adapter_name], group


# ---------------------------------------------------------------------------------------------------------- declaring
RULES: dict[str, type[BaseTunerLayer]] = {
    "transforms": DeclaredEither,
    "delta": DeclaredAdditive,
    "bias": DeclaredAdditive,
    "mix": DeclaredMixing,
    "weight": DeclaredWeight,
    "scale": DeclaredActivation,
    "apply": DeclaredTerm,
}


def method(
    name: str,
    config_cls: type[PeftConfig],
    *,
    prefix: str | None = None,
    kinds: Mapping[type[nn.Module], str] | None = None,
    patterns: Mapping[str, str] | None = None,
    targets: Mapping[str, Any] | None = None,
    dropout: str | None = None,
    settings: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    in_common: Sequence[str] = (),
    rule: type[BaseTunerLayer] | None = None,
    model: type[DeclaredModel] = DeclaredModel,
    is_mixed_compatible: bool = False,
) -> Callable[[type], type]:
    """
    Make a method out of a class of pure functions.

    The class says the names of its tensors, `trained`, `frozen`, `kept` and `modules` (of tensors), and of those
    that checkpoints may lack, `optional`. Its functions take no `self`:

        tensors(shape, c)               name -> `Trained`, `Frozen`, `Kept`, `TrainedModule`; None if not needed
        delta(t, shape, c)              W + delta: (out, in); `delta(t, shape, c, w)` is given the base weight as well
        bias(t, shape, c, b)            b + this: (out,), or None; b is the base layer's bias, None if it has none
        low_rank(t, shape, c)           W + B A: B (out, r) and A (r, in), in place of `delta` and `apply`; embeddings,
                                        (in, out) = (tokens, width), look up columns of A
        weight(t, w, c)                 f(W): (out, in); `inverse(t, w, c)` where there is one
        mix(t, y, c)                    M W and M b: y (..., out) -> M y; with `unmix(t, y, c)` and `can_unmix(t, c)`
        transforms(c)                   whether an adapter is of `weight`, where there is `delta` too, which others add
        scale(t, shape, c)              factors of the outputs, or of the inputs where `of_input(c)` says so
        apply(t, x, shape, c)           optional: what the delta adds to the output of a linear layer, without it;
                                        `apply(..., training)` is told whether the layer is in training, and
                                        `apply(..., y)` what the weight makes of x
        values(c, names, shape)         optional: more values for a target of these names, put into `c`
        values_of_all(targets, c)       optional: name of a target -> such values that depend on all targets
        shared_tensors(targets, c)      tensors that layers share, in the order in which they are made
        saved_forms(c)                  optional: name -> `SavedForm`, of tensors that checkpoints hold in another form
        penalty(t, c)                   optional: what is added to the model's loss, for each layer
        after_step(model, c, step)      optional: what `model.after_step(step)` does for each active adapter
        check(c, others)                optional: refuse a config, alone or beside those of other adapters

    `shape` is the `Shape` of the weight, `c` the config with the values that hold for this layer, `t` the `Tensors`.
    `targets` maps the full names of the adapter's own targets to their shapes, in the model's order: no other adapter
    and no layer that follows a tied one counts.

    Tensors that layers share are named in `shared` too. A name in `groups` (name of the tensor -> value of `c`) is
    shared by those layers alone for which that value is the same, and `shared_tensors` gives a dictionary for it,
    group -> tensor; `t.v` is the one of the layer's group. Checkpoints hold them once, `base_model.toy_v` or
    `base_model.toy_v.GROUP`; those in `repeated` under each layer too. Tensors that are shared and not trained, and
    those in `kept`, are buffers, and it is saved what is `Kept`: `(Kept if c.save_them else Frozen)(make)` lets the
    config decide. In half precision they are rounded like the base weight where they are `rounded`.

    A class with `apply` alone adds a term to outputs that no weight stands for, since it depends on the call
    (`layers.call_context`) or on the batch; it is never merged. One without any of these functions trains a copy of
    the layer, which stands in its one trained name.

    Args:
        name: name of the method; in upper case it is the value of `peft_type`.
        config_cls: class of its config.
        prefix: what the names of its tensors start with in layers and checkpoints; the name and `_` if left out.
        kinds: kind of base layer -> name of the class for it; linear layers if left out.
        patterns: field of the config -> field with the values for modules where it differs.
        targets: model type -> default targets.
        dropout: field of the config that says how much of the input is dropped while training; the attribute of layers
            with that name has the modules that do so by adapter name, so it is none of `settings`.
        settings: attribute of layers -> value of `c` that it shows by adapter name.
        names: name of a tensor -> its attribute, where that is not the prefix and the name.
        in_common: fields of the config that all adapters of the method in a model have to agree in.
        rule: class of layers to derive from, where it is not one of those that the functions tell.
        model: class of models to derive from.
        is_mixed_compatible: whether its adapters may be active beside those of other methods.

    Returns:
        A decorator. The class gets the classes that are made as attributes: `Model`, `Layer` and those for kinds.
    """
    prefix = f"{name.lower()}_" if prefix is None else prefix

    def declare(declared: type) -> type:
        if hasattr(declared, "low_rank"):
            _use_low_rank(declared)
        declared.Layer, layers = _layer_classes(declared, kinds or _linear_kinds(declared), rule)
        own = {tensor: (names or {}).get(tensor, prefix + tensor) for tensor in _tensor_names(declared)}
        _declare_tensors(declared.Layer, declared, own)
        if dropout is not None:
            _declare_dropout(declared.Layer, dropout)
        for attribute, field in (settings or {}).items():
            setattr(declared.Layer, attribute, setting(field))
        attributes = {
            "declared": declared,
            "prefix": prefix,
            "tuner_layer_cls": declared.Layer,
            "layer_classes": layers,
            "target_module_mapping": targets or {},
            "pattern_fields": dict(patterns or {}),
            "fields_in_common": tuple(in_common),
        }
        declared.Model = _make_class(declared, "Model", f"{declared.__name__}Model", (model,), attributes)
        if not declared.__module__.startswith(OWN_METHODS):  # they enter themselves, without loading torch
            register_peft_method(
                name=name,
                config_cls=config_cls,
                model_cls=declared.Model,
                prefix=prefix,
                is_mixed_compatible=is_mixed_compatible,
            )
        return declared

    return declare


def _declare_dropout(layer: type[BaseTunerLayer], field: str) -> None:
    """Note on the class of layers that modules drop the input; trainers look for such to switch them off."""
    layer.dropout_field = field
    layer.other_param_names = (*layer.other_param_names, field)
    layer.container_classes = {**layer.container_classes, field: nn.ModuleDict}


def _use_low_rank(declared: type) -> None:
    """Add what follows from `low_rank`: the delta, and the way around it."""

    def delta(t: Tensors, shape: Shape, c: PeftConfig) -> torch.Tensor:
        b, a = declared.low_rank(t, shape, c)
        return b @ a

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: PeftConfig) -> torch.Tensor:
        b, a = declared.low_rank(t, shape, c)
        return F.linear(F.linear(x, a), b)

    declared.delta, declared.apply = delta, apply


def _tensor_names(declared: type) -> tuple[str, ...]:
    return tuple(name for kind in ("trained", "modules", "kept", "frozen") for name in getattr(declared, kind, ()))


def _linear_kinds(declared: type) -> dict[type[nn.Module], str]:
    return dict.fromkeys((nn.Linear, Conv1D), f"{declared.__name__}Linear")


def _make_class(declared: type, place: str, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
    """Make a class that stands in the declared one, where pickle finds it."""
    doc = {"__doc__": f"{name}: {(declared.__doc__ or '').strip()}".rstrip(": ")}
    where = {"__module__": declared.__module__, "__qualname__": f"{declared.__qualname__}.{place}"}
    return type(name, bases, {**doc, **attributes, **where})


def _layer_classes(
    declared: type, kinds: Mapping[type[nn.Module], str], rule: type[BaseTunerLayer] | None
) -> tuple[type[BaseTunerLayer], dict[type[nn.Module], type[BaseTunerLayer]]]:
    """Make the class that all layers of a method share, and those for kinds of layers."""
    base = rule or next((RULES[function] for function in RULES if hasattr(declared, function)), DeclaredReplacement)
    name = f"{declared.__name__}Layer"
    layer = _make_class(declared, "Layer", name, (base, nn.Module), {"declared": declared})
    classes = {name: layer}
    for kind in kinds.values():
        if kind not in classes:
            classes[kind] = _make_class(declared, kind, kind, (layer,), {})
            setattr(declared, kind, classes[kind])
    return layer, {kind: classes[kind_name] for kind, kind_name in kinds.items()}


def _declare_tensors(layer: type[BaseTunerLayer], declared: type, attributes: dict[str, str]) -> None:
    """Note on the class of layers which containers of tensors they have."""
    shared, frozen, trained = (getattr(declared, kind, ()) for kind in ("shared", "frozen", "trained"))
    own = [name for name in attributes if name not in shared]
    layer.tensor_names = attributes
    layer.adapter_layer_names = tuple(attributes[name] for name in own if name not in frozen)
    for name in own:
        if name in frozen:
            setattr(layer, attributes[name], frozen_tensor(name))
    layer.shared_layer_names = tuple(attributes[name] for name in attributes if name in shared)
    layer.repeated_layer_names = tuple(attributes[name] for name in getattr(declared, "repeated", ()))
    layer.group_fields = dict(getattr(declared, "groups", {}))
    buffers = {
        attributes[name]: SharedBuffers if name in shared else partial(BufferDict, persistent=True)
        for name in attributes
        if name not in trained and (name in shared or name not in frozen)
    }
    buffers.update({attributes[name]: SharedGroups for name in layer.group_fields})
    buffers.update({attributes[name]: nn.ModuleDict for name in getattr(declared, "modules", ())})
    copies = dict.fromkeys(layer.adapter_layer_names, nn.ModuleDict) if issubclass(layer, ReplacementLayer) else {}
    layer.container_classes = {**layer.container_classes, **buffers, **copies}
    if issubclass(layer, DeclaredAdditive):
        layer.changes_weight, layer.changes_bias = hasattr(declared, "delta"), hasattr(declared, "bias")
    if hasattr(declared, "delta"):
        layer.delta_takes_weight = "w" in inspect.signature(declared.delta).parameters
    if hasattr(declared, "apply"):
        layer.apply_takes = frozenset(inspect.signature(declared.apply).parameters) & {"training", "y"}
