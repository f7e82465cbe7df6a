# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Methods as declarations: a config and pure functions of tensors, out of which the classes of layers and model are made.

`@method` reads the functions of a class, takes the rule that they belong to, and makes the classes; see there.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy.kinds import CONVOLUTIONS, apply_weight, features, has_outputs_last, is_linear
from ..anatomy.offload import computing_device
from ..config import PeftConfig
from ..layers.activation import ActivationLayer
from ..layers.additive import AdditiveLayer
from ..layers.base_layer import BaseTunerLayer
from ..layers.buffer_dict import BufferDict
from ..layers.new_tensors import check_size, new_parameter
from ..layers.replacement import ReplacementLayer
from ..layers.shared_tensors import SharedBuffers
from ..layers.weight import WeightLayer
from ..registry import register_peft_method
from ..utils.quantization_utils import stored_weight
from .base import BaseTuner


# ------------------------------------------------------------------------------------------- what functions are given
class Shape(tuple):
    """
    Shape of a weight as a matrix, (out, in), whatever the kind of layer; kernels are counted among the inputs.

    Args:
        out: rows of the matrix, output features.
        inputs: columns, input features.
        layer: the base layer.
    """

    layer: nn.Module

    def __new__(cls, out: int, inputs: int, layer: nn.Module) -> "Shape":
        """Make a pair that knows its layer."""
        shape = super().__new__(cls, (out, inputs))
        shape.layer = layer
        return shape

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel; empty for layers that are not convolutions."""
        return self.layer.kernel_size if isinstance(self.layer, CONVOLUTIONS) else ()

    @property
    def groups(self) -> int:
        """Number of groups of a convolution, 1 for other layers."""
        return getattr(self.layer, "groups", 1)

    @property
    def features(self) -> tuple[int, int]:
        """Numbers of output and input features; of convolutions, of channels."""
        if isinstance(self.layer, CONVOLUTIONS):
            return self.layer.out_channels, self.layer.in_channels
        return self[0], self[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the base layer stores its weight."""
        return stored_weight(self.layer).dtype


def shape_of(layer: nn.Module) -> Shape:
    """
    Give the shape of a layer's weight as a matrix.

    Args:
        layer: a layer of the base model.
    """
    return _matrix_shape(layer, *features(layer))


def _matrix_shape(layer: nn.Module, inputs: int, outputs: int) -> Shape:
    if isinstance(layer, CONVOLUTIONS):
        inputs = inputs // layer.groups * math.prod(layer.kernel_size)
    return Shape(outputs, inputs, layer)


class Tensors:
    """
    The tensors, and modules of tensors, of one adapter in one layer; None for one that the adapter does not have.

    Args:
        layer: the layer that has them.
        adapter: name.
    """

    __slots__ = ("_adapter", "_layer")

    def __init__(self, layer: "DeclaredLayer", adapter: str) -> None:
        self._layer, self._adapter = layer, adapter

    def __getattr__(self, name: str) -> Any:
        attribute = self._layer.tensor_names.get(name)
        if attribute is None:
            raise AttributeError(f"{type(self._layer).__name__} declares no tensor {name!r}")
        # what nn.Module does to find attributes would cost more than small layers take to compute
        layer, adapter = self._layer, self._adapter
        container = layer._modules.get(attribute)
        if container is None:
            return layer.frozen(adapter, name)
        found = container._parameters.get(adapter)
        if found is None:
            found = container._buffers.get(adapter)
        return container._modules.get(adapter) if found is None else found


@dataclass(frozen=True)
class Trained:
    """
    A tensor that is trained and saved.

    Attributes:
        shape: its shape.
        start: what it starts with: a number, or a function that writes into the tensor, such as `nn.init.normal_`.
    """

    shape: tuple[int, ...]
    start: float | Callable[[torch.Tensor], Any] = 0.0

    def fill(self, tensor: torch.Tensor) -> None:
        """Give a tensor the values that it starts with."""
        self.start(tensor) if callable(self.start) else tensor.fill_(self.start)


@dataclass(frozen=True)
class TrainedModule:
    """
    Trained tensors in a module of their own, for methods whose checkpoints have keys such as `oft_R.weight`.

    Attributes:
        make: gives the module; its parameters are replaced by ones of the device and type that the layer calls for.
        start: writes into its parameters what they start with.
    """

    make: Callable[[], nn.Module]
    start: Callable[[nn.Module], Any]

    def fill(self, module: nn.Module) -> None:
        """Give the module's parameters the values that they start with."""
        self.start(module)


@dataclass(frozen=True)
class Frozen:
    """
    A tensor that is made anew from the config whenever it is needed, such as from a seed: not trained, not saved.

    Attributes:
        make: gives the tensor, on the CPU. What is a floating point number gets the type of the adapter.
    """

    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Kept(Frozen):
    """A tensor that is saved, but not trained."""


# ----------------------------------------------------------------------------------------------------------- settings
class SettingsView(MutableMapping):
    """
    One value of the settings of all adapters of a layer, by adapter name.

    Args:
        layer: the layer.
        field: name of the value.
    """

    def __init__(self, layer: "DeclaredLayer", field: str) -> None:
        self._settings, self._field = layer.settings, field

    def __getitem__(self, adapter: str) -> Any:
        return getattr(self._settings[adapter], self._field)

    def __setitem__(self, adapter: str, value: Any) -> None:
        setattr(self._settings[adapter], self._field, value)

    def __delitem__(self, adapter: str) -> None:
        del self._settings[adapter]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __repr__(self) -> str:
        return repr(dict(self))


def setting(field: str) -> property:
    """
    Give an attribute of layers that shows one value of their settings by adapter name.

    Args:
        field: name of the value.
    """
    return property(lambda layer: SettingsView(layer, field))


def with_values(config: PeftConfig, values: Mapping[str, Any]) -> PeftConfig:
    """
    Give a copy of a config with other values; it is not checked anew.

    Args:
        config: any config.
        values: name -> value; names need not be fields.
    """
    copied = object.__new__(type(config))
    copied.__dict__.update(config.__dict__, **values)
    return copied


# ------------------------------------------------------------------------------------------------------------- layers
class DeclaredLayer(BaseTunerLayer):
    """
    A layer whose tensors and math are declared.

    Attributes:
        declared: the class of functions.
        tensor_names: name in the functions -> attribute.
        dropout_field: field of the config that says how much of the input is dropped; None for no such dropout.
        settings: adapter name -> config with the values that hold for this layer.
        made: adapter name -> tensors that the config tells.
    """

    declared: ClassVar[type]
    tensor_names: ClassVar[Mapping[str, str]] = {}
    dropout_field: ClassVar[str | None] = None
    other_param_names = ("settings", "made")

    @property
    def shape(self) -> Shape:
        """Shape of the base weight as a matrix, (out, in)."""
        return _matrix_shape(self.get_base_layer(), self.in_features, self.out_features)

    def tensors(self, adapter: str) -> Tensors:
        """
        Give the tensors of an adapter that this layer has itself.

        Args:
            adapter: name.
        """
        return Tensors(self, adapter)

    def make_adapter(self, adapter_name: str, config: PeftConfig, names: Sequence[str] = (), **values: Any) -> None:
        """
        Make an adapter's tensors and note its settings.

        Args:
            adapter_name: name.
            config: the adapter's config.
            names: names of this layer in the model.
            values: values of the config that are others here.
        """
        c = with_values(config, values)
        if hasattr(self.declared, "values"):
            c.__dict__.update(self.declared.values(c, names, self.shape))
        self.settings[adapter_name] = c
        for name, spec in self.specified(c):
            container = self._modules.get(self.tensor_names[name])
            if isinstance(spec, Trained):
                container[adapter_name] = self.new_parameter(*spec.shape)
            elif isinstance(spec, TrainedModule):
                module = container[adapter_name] = spec.make()
                for key, parameter in module._parameters.items():
                    module._parameters[key] = self.new_parameter(*parameter.shape)
            elif isinstance(spec, Kept):
                made = spec.make().to(computing_device(self.get_base_layer(), self.stored_weight()))
                container[adapter_name] = made.to(self.new_parameter(0).dtype) if made.is_floating_point() else made
        for name in getattr(self.declared, "frozen", ()):
            if name not in getattr(self.declared, "shared", ()):
                self.frozen(adapter_name, name)

    def frozen(self, adapter: str, name: str) -> torch.Tensor | None:
        """
        Give a tensor that the config tells, where and in the type that the adapter's trained ones are.

        It is kept while these stay as they are, and is no part of the layer's state: copies and pickles make it anew.

        Args:
            adapter: name of an adapter that this layer has itself.
            name: name of the tensor in the functions.
        """
        like, made = next(self.adapter_parameters(adapter)), self.made.setdefault(adapter, {})
        tensor = made.get(name)
        if (
            tensor is None
            or tensor.device != like.device
            or (tensor.is_floating_point() and tensor.dtype != like.dtype)
        ):
            spec = self.declared.tensors(self.shape, self.settings[adapter]).get(name)
            if spec is None:
                return None
            with torch.inference_mode(False), torch.no_grad():
                tensor = spec.make()
                tensor = tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
            made[name] = tensor
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew."""
        return {**self.__dict__, "made": {}}

    def specified(self, c: PeftConfig) -> Iterator[tuple[str, Trained | TrainedModule | Frozen]]:
        """Yield the tensors that an adapter has, by name."""
        return ((name, spec) for name, spec in self.declared.tensors(self.shape, c).items() if spec is not None)

    def reset_adapter(self, adapter_name: str, config: PeftConfig) -> None:
        """Give the trained tensors the values that they start with."""
        self.start(adapter_name, self.settings[adapter_name])

    @torch.no_grad()
    def start(self, adapter: str, c: PeftConfig) -> None:
        """
        Start an adapter anew.

        Args:
            adapter: name.
            c: what its start is taken from.
        """
        for name, spec in self.specified(c):
            if isinstance(spec, (Trained, TrainedModule)):
                spec.fill(self._modules[self.tensor_names[name]][adapter])

    def as_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Give a weight of the base layer's layout as a matrix, (out, in)."""
        return (
            weight.T if has_outputs_last(self.get_base_layer()) else weight.flatten(1) if weight.dim() > 2 else weight
        )

    def from_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """Give a matrix, (out, in), in the base layer's layout."""
        base = self.get_base_layer()
        if isinstance(base, CONVOLUTIONS):
            return matrix.reshape(base.weight.shape)
        return matrix.T if has_outputs_last(base) else matrix


_PREPARED = "(delta)"  # of `made`; no name of a tensor


class DeclaredAdditive(DeclaredLayer, AdditiveLayer):
    """Rule of `delta`."""

    has_views_of_owner = True
    delta_takes_weight: ClassVar[bool] = False

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute what an adapter adds to the base weight, in its layout.

        Args:
            adapter: name.
        """
        weight = (self.as_rows(self.weight_before_merge()),) if self.delta_takes_weight else ()
        return self.from_rows(self.declared.delta(Tensors(self, adapter), self.shape, self.settings[adapter], *weight))

    def builds_delta(self, adapter: str, x: torch.Tensor) -> bool:
        """
        Say whether the forward pass has to build the delta.

        Args:
            adapter: name.
            x: the layer's input.
        """
        declared, source = self.declared, self.source(adapter)
        # functions know the weight as the owner has it, which another kind of layer may have transposed
        return (
            not hasattr(declared, "apply")
            or not is_linear(self.get_base_layer())
            or (source is not self and not is_linear(source.get_base_layer()))
        )

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """
        Compute what an adapter adds to the output, by way of the delta only where there is no other.

        Args:
            adapter: name.
            x: the layer's input.
        """
        source = self.source(adapter)
        c = source.settings[adapter]
        p = getattr(c, self.dropout_field) if self.dropout_field is not None and self.training else 0.0
        if self.builds_delta(adapter, x):
            delta = source.get_delta_weight(adapter)
            if x.is_floating_point():
                x = F.dropout(x.to(delta.dtype), p) if p else x.to(delta.dtype)
            return apply_weight(self.get_base_layer(), x, delta)
        x = x.to(next(source.adapter_parameters(adapter)).dtype)
        return self.declared.apply(Tensors(source, adapter), F.dropout(x, p) if p else x, source.shape, c)

    def adds_delta(self, adapter: str) -> bool:
        """Say whether the delta is the same whatever else is done to the weight."""
        return not self.delta_takes_weight

    def prepare_merge(self, adapter: str) -> None:
        """Compute a delta that depends on the weight before others are merged into that."""
        if self.delta_takes_weight:
            self.made.setdefault(adapter, {})[_PREPARED] = self.get_delta_weight(adapter)

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Add the delta, the one that was prepared if there is one."""
        delta = self.made.get(adapter, {}).pop(_PREPARED, None)
        if delta is None:
            super().merge_weight_(adapter, weight)
        else:
            weight.add_(delta.to(weight.device, weight.dtype))

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether the delta can be computed while it is merged; if not, the weight that it comes from is kept."""
        return not self.delta_takes_weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether the delta is that of a linear layer, which LoRA can approximate."""
        return is_linear(self.get_base_layer())


class DeclaredWeight(DeclaredLayer, WeightLayer):
    """Rule of `weight`."""

    def transform_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the adapted weight."""
        return self.from_rows(
            self.declared.weight(Tensors(self, adapter), self.as_rows(weight), self.settings[adapter])
        )

    def inverse_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Compute the weight that was adapted, if the method has an inverse."""
        if not hasattr(self.declared, "inverse"):
            return super().inverse_weight(adapter, weight)
        return self.from_rows(
            self.declared.inverse(Tensors(self, adapter), self.as_rows(weight), self.settings[adapter])
        )

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether the method has an inverse."""
        return hasattr(self.declared, "inverse")


class DeclaredActivation(DeclaredLayer, ActivationLayer):
    """Rule of `scale`; `of_input(c)` says whether it is the inputs that are scaled."""

    def feature_scale(self, adapter: str) -> torch.Tensor:
        """Give the factors, one per feature."""
        return self.declared.scale(Tensors(self, adapter), self.shape, self.settings[adapter])

    def scales_input(self, adapter: str) -> bool:
        """Say whether the factors belong to the input."""
        of_input = getattr(self.declared, "of_input", None)
        return of_input is not None and of_input(self.settings[adapter])


class DeclaredReplacement(ReplacementLayer):
    """Rule of methods without functions, which train a copy of the layer."""

    declared: ClassVar[type]
    tensor_names: ClassVar[Mapping[str, str]] = {}
    dropout_field: ClassVar[str | None] = None


# -------------------------------------------------------------------------------------------------------------- model
class DeclaredModel(BaseTuner):
    """
    A model with the layers of a declared method in it; the arguments are those of `BaseTuner`.

    Attributes:
        declared: the class of functions.
    """

    declared: ClassVar[type]

    def _check_new_adapter_config(self, adapter_name: str, config: PeftConfig) -> None:
        super()._check_new_adapter_config(adapter_name, config)
        if hasattr(self.declared, "check"):
            others = [c for name, c in self.peft_config.items() if name != adapter_name and type(c) is type(config)]
            self.declared.check(config, others)

    def _layer_arguments_for(self, config: PeftConfig) -> Callable[[list[str]], dict[str, Any]]:
        values_for = super()._layer_arguments_for(config)
        return lambda names: {"names": names, **values_for(names)}

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

    @torch.no_grad()
    def make_shared(self, adapter_name: str, config: PeftConfig, targets: dict[str, nn.Module]) -> None:
        """
        Make the tensors of an adapter that all of its layers share.

        Args:
            adapter_name: name.
            config: the adapter's config.
            targets: full name -> layer of the base model.
        """
        layers = [layer for layer in targets.values() if self._layer_class(layer) is not None]
        if not layers:  # a target that cannot be adapted is refused when its turn comes
            return
        largest = max(map(stored_weight, layers), key=torch.Tensor.numel)
        first = stored_weight(layers[0])
        device, dtype = computing_device(layers[0], first), new_parameter(first, 0).dtype
        shapes = [shape_of(layer) for layer in layers]
        for name, spec in self.declared.shared_tensors(shapes, config).items():
            container = self._modules[self.tuner_layer_cls.tensor_names[name]]
            if isinstance(spec, Trained):  # made for real always: a checkpoint may lack what all layers share
                check_size(spec.shape, largest, dtype, device)
                parameter = nn.Parameter(torch.empty(*spec.shape, dtype=dtype, device=device))
                spec.fill(parameter)
                container[adapter_name] = parameter
            else:
                container.persistent = isinstance(spec, Kept)
                made = spec.make()
                check_size(tuple(made.shape), largest, made.dtype, device)
                container[adapter_name] = made.to(device, dtype if made.is_floating_point() else made.dtype)


# ---------------------------------------------------------------------------------------------------------- declaring
RULES: dict[str, type[BaseTunerLayer]] = {
    "delta": DeclaredAdditive,
    "weight": DeclaredWeight,
    "scale": DeclaredActivation,
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
    rule: type[BaseTunerLayer] | None = None,
    model: type[DeclaredModel] = DeclaredModel,
    is_mixed_compatible: bool = False,
) -> Callable[[type], type]:
    """
    Make a method out of a class of pure functions.

    The class says the names of its tensors, `trained`, `frozen`, `kept` and `modules` (of tensors), and those of them
    that all layers of a model share in `shared`. Its functions take no `self`:

        tensors(shape, c)               name -> `Trained`, `Frozen`, `Kept`, `TrainedModule`; None if not needed
        delta(t, shape, c)              W + delta: (out, in); `delta(t, shape, c, w)` is given the base weight as well
        weight(t, w, c)                 f(W): (out, in); `inverse(t, w, c)` where there is one
        scale(t, shape, c)              factors of the outputs, or of the inputs where `of_input(c)` says so
        apply(t, x, shape, c)           optional: what the delta adds to the output of a linear layer, without it
        values(c, names, shape)         optional: more values for a target of these names, put into `c`
        shared_tensors(shapes, c)       what all layers share, from the shapes of all targets
        penalty(t, c)                   optional: what is added to the model's loss, for each layer
        after_step(model, c, step)      optional: what `model.after_step(step)` does for each active adapter
        check(c, others)                optional: refuse a config, alone or beside those of other adapters

    `shape` is the `Shape` of the weight, `c` the config with the values that hold for this layer, `t` the `Tensors`.
    A class without `delta`, `weight` and `scale` trains a copy of the layer, which stands in its one trained name.

    Args:
        name: name of the method; in upper case it is the value of `peft_type`.
        config_cls: class of its config.
        prefix: what the names of its tensors start with in layers and checkpoints; the name and `_` if left out.
        kinds: kind of base layer -> name of the class for it; linear layers if left out.
        patterns: field of the config -> field with the values for modules where it differs.
        targets: model type -> default targets.
        dropout: field of the config that says how much of the input is dropped while training.
        settings: attribute of layers -> value of `c` that it shows by adapter name.
        names: name of a tensor -> its attribute, where that is not the prefix and the name.
        rule: class of layers to derive from, where it is not one of those that the functions tell.
        model: class of models to derive from.
        is_mixed_compatible: whether its adapters may be active beside those of other methods.

    Returns:
        A decorator. The class gets the classes that are made as attributes: `Model`, `Layer` and those for kinds.
    """
    prefix = f"{name.lower()}_" if prefix is None else prefix

    def declare(declared: type) -> type:
        declared.Layer, layers = _layer_classes(declared, kinds or _linear_kinds(declared), rule)
        own = {tensor: (names or {}).get(tensor, prefix + tensor) for tensor in _tensor_names(declared)}
        _declare_tensors(declared.Layer, declared, own)
        declared.Layer.dropout_field = dropout
        for attribute, field in (settings or {}).items():
            setattr(declared.Layer, attribute, setting(field))
        attributes = {
            "declared": declared,
            "prefix": prefix,
            "tuner_layer_cls": declared.Layer,
            "layer_classes": layers,
            "target_module_mapping": targets or {},
            "pattern_fields": dict(patterns or {}),
        }
        declared.Model = _make_class(declared, "Model", f"{declared.__name__}Model", (model,), attributes)
        if not declared.__module__.startswith(f"{__package__}."):  # the package's own methods enter themselves
            register_peft_method(
                name=name,
                config_cls=config_cls,
                model_cls=declared.Model,
                prefix=prefix,
                is_mixed_compatible=is_mixed_compatible,
            )
        return declared

    return declare


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
    layer.shared_layer_names = tuple(attributes[name] for name in attributes if name in shared)
    buffers = {
        attributes[name]: SharedBuffers if name in shared else partial(BufferDict, persistent=True)
        for name in attributes
        if name not in trained and (name in shared or name not in frozen)
    }
    buffers.update({attributes[name]: nn.ModuleDict for name in getattr(declared, "modules", ())})
    copies = dict.fromkeys(layer.adapter_layer_names, nn.ModuleDict) if issubclass(layer, ReplacementLayer) else {}
    layer.container_classes = {**layer.container_classes, **buffers, **copies}
    if hasattr(declared, "delta"):
        layer.delta_takes_weight = "w" in inspect.signature(declared.delta).parameters
