# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Layers that are made from declarations: a class for each rule."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...anatomy.kinds import CONVOLUTIONS, apply_weight, feature_axis, has_outputs_last, is_linear, scale_rows
from ...anatomy.offload import computing_device, tensor_of
from ...config import PeftConfig
from ...layers.activation import ActivationLayer
from ...layers.additive import AdditiveLayer
from ...layers.base_layer import BaseTunerLayer
from ...layers.merging.changes import changes_adapter
from ...layers.merging.layer import take_adapter_out
from ...layers.merging.state import original_weights
from ...layers.new_tensors import check_new_parameters, check_size
from ...layers.replacement import ReplacementLayer
from ...layers.saved_form import SavedForm
from ...layers.weight import WeightLayer
from ...utils.error import PeftNotImplementedError, PeftValueError
from ...utils.quantization_utils import ForwardOnlyQuantizationBackend, resolve_quantization_backend, stored_weight
from .tensors import Frozen, Kept, Shape, Tensors, Trained, TrainedModule, _matrix_shape, as_rows, shape_of


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


# what stands in `made` for a while; no names of tensors
_SPECIFIED, _PREPARED, _PREPARED_BIAS = "(specified)", "(delta)", "(bias)"


class DeclaredLayer(BaseTunerLayer):
    """
    A layer whose tensors and math are declared.

    Attributes:
        declared: the class of functions.
        tensor_names: name in the functions -> attribute.
        group_fields: name of a tensor that a group of layers shares -> value of the settings that names the group.
        dropout_field: field of the config that says how much of the input is dropped, and attribute with the modules
            that do so by adapter name; None for no such dropout.
        settings: adapter name -> config with the values that hold for this layer.
        made: adapter name -> tensors that the config tells.
    """

    declared: ClassVar[type]
    tensor_names: ClassVar[Mapping[str, str]] = {}
    group_fields: ClassVar[Mapping[str, str]] = {}
    dropout_field: ClassVar[str | None] = None
    other_param_names = ("settings", "made")

    @property
    def shape(self) -> Shape:
        """Shape of the base weight as a matrix, (out, in)."""
        return _matrix_shape(self.get_base_layer(), self.in_features, self.out_features, self.rows_before_merge)

    def rows_before_merge(self) -> torch.Tensor:
        """Give the base weight without what is merged as a matrix, (out, in)."""
        return self.as_rows(self.weight_before_merge())

    def tensors(self, adapter: str) -> Tensors:
        """
        Give the tensors of an adapter that this layer has itself.

        Args:
            adapter: name.
        """
        return Tensors(self, adapter)

    @classmethod
    def prepare_adapter(
        cls, base: nn.Module, config: PeftConfig, present: "DeclaredLayer | None" = None, **arguments: Any
    ) -> Mapping[str, Any]:
        """Find the settings, and refuse tensors that cannot be meant; see `BaseTunerLayer.prepare_adapter`."""
        shape = shape_of(base) if present is None else present.shape
        settings = cls.settings_for(shape, config, **arguments)
        weight = stored_weight(base)
        shapes = [shape for spec in cls.specified(shape, settings).values() for shape in spec.shapes]
        check_new_parameters(weight, *shapes, device=computing_device(base, weight))
        return {**arguments, "settings": settings}

    @classmethod
    def settings_for(cls, shape: Shape, config: PeftConfig, names: Sequence[str] = (), **values: Any) -> PeftConfig:
        """
        Give a copy of a config with the values that hold for one layer.

        Args:
            shape: shape of the layer's weight.
            config: the adapter's config.
            names: names of the layer in the model.
            values: values of the config that are others here.
        """
        c = with_values(config, values)
        if hasattr(cls.declared, "values"):
            c.__dict__.update(cls.declared.values(c, names, shape))
        return c

    def update_layer(self, adapter_name: str, config: PeftConfig | None = None, **arguments: Any) -> None:
        """
        Add an adapter; see `BaseTunerLayer.update_layer`.

        Args:
            adapter_name: name.
            config: the adapter's config.
            arguments: see there.
        """
        super().update_layer(adapter_name, config, **arguments)
        self.made.get(adapter_name, {}).pop(_SPECIFIED, None)

    def make_adapter(
        self, adapter_name: str, config: PeftConfig, settings: PeftConfig | None = None, **arguments: Any
    ) -> None:
        """
        Make an adapter's tensors and note its settings.

        Args:
            adapter_name: name.
            config: the adapter's config.
            settings: what `prepare_adapter` has found, if it was asked before.
            arguments: for `prepare_adapter`, which is asked if not.
        """
        if settings is None:
            prepared = self.prepare_adapter(self.get_base_layer(), config, present=self, **arguments)
            settings = prepared.get("settings")
        c = self.settings_for(self.shape, config, **arguments) if settings is None else settings
        self.settings[adapter_name] = c
        if self.dropout_field is not None:
            p = getattr(c, self.dropout_field)
            self._modules[self.dropout_field][adapter_name] = nn.Dropout(p) if p else nn.Identity()
        specified = self.specified(self.shape, c)
        self.made[adapter_name] = {_SPECIFIED: specified}
        for name, spec in specified.items():
            container = self._modules.get(self.tensor_names[name])
            if isinstance(spec, Trained):
                container[adapter_name] = self.new_parameter(*spec.shape)
            elif isinstance(spec, TrainedModule):
                container[adapter_name] = self._placed(spec.make())
            elif container is not None:
                container.put(adapter_name, self._made(spec), isinstance(spec, Kept))
        for name in getattr(self.declared, "frozen", ()):
            if name not in getattr(self.declared, "shared", ()):
                self.frozen(adapter_name, name)

    def _placed(self, module: nn.Module) -> nn.Module:
        """Bring the tensors of a module to where, and trained ones to the type, that the base weight calls for."""
        device = computing_device(self.get_base_layer(), self.stored_weight())
        for part in module.modules():
            for key, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[key] = self.new_parameter(*parameter.shape)
            for key, buffer in part._buffers.items():
                part._buffers[key] = buffer.to(device)
        return module

    def _made(self, spec: Frozen) -> torch.Tensor:
        """Make a tensor that is not trained, where and in the type that the base weight calls for."""
        weight = self.stored_weight()
        device, dtype = computing_device(self.get_base_layer(), weight), self.new_parameter(0).dtype
        if spec.shape is not None:
            check_size(spec.shape, weight, dtype, device)
        with torch.no_grad():
            return spec.made(weight, device, dtype)

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
            specified = made.get(_SPECIFIED) or self.specified(self.shape, self.settings[adapter])
            spec = specified.get(name)
            if spec is None:
                return None
            with torch.inference_mode(False), torch.no_grad():
                tensor = spec.made(self.stored_weight(), like.device, like.dtype)
            made[name] = tensor
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew."""
        return {**self.__dict__, "made": {}}

    @classmethod
    def specified(cls, shape: Shape, c: PeftConfig) -> dict[str, Trained | TrainedModule | Frozen]:
        """
        Give the tensors that an adapter has, by name.

        Args:
            shape: shape of the layer's weight.
            c: the adapter's settings there.
        """
        return {name: spec for name, spec in cls.declared.tensors(shape, c).items() if spec is not None}

    def saved_forms(self, adapter_name: str) -> dict[str, SavedForm]:
        """Give the forms, of tensors in checkpoints, that are declared."""
        if not hasattr(self.declared, "saved_forms"):
            return {}
        forms = self.declared.saved_forms(self.source(adapter_name).settings[adapter_name])
        parts = {name: name.partition(".") for name in forms}  # "A.weight" is a tensor in the module A
        return {"".join((self.tensor_names[parts[name][0]], *parts[name][1:])): form for name, form in forms.items()}

    def optional_keys(self, adapter_name: str) -> tuple[str, ...]:
        """Name the tensors that are declared as such."""
        return tuple(self.tensor_names[name] for name in getattr(self.declared, "optional", ()))

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
        # what was asked to make the tensors is not asked again to start them
        specified = self.made.get(adapter, {}).get(_SPECIFIED) or self.specified(self.shape, c)
        for name, spec in specified.items():
            if isinstance(spec, (Trained, TrainedModule)):
                spec.fill(self._modules[self.tensor_names[name]][adapter])

    @changes_adapter
    def restart(self, adapter: str, **values: Any) -> None:
        """
        Start an adapter anew, from other values than its config has. Tensors that have another size then are replaced.

        Args:
            adapter: name.
            values: the other values, which hold from now on.
        """
        c = with_values(self.settings[adapter], values)
        for name, spec in self.specified(self.shape, c).items():
            if isinstance(spec, Trained) and self._modules[self.tensor_names[name]][adapter].shape != spec.shape:
                self.resize(adapter, name, *spec.shape)
        self.settings[adapter] = c
        self.start(adapter, c)

    def resize(self, adapter: str, name: str, *shape: int) -> None:
        """
        Make room for a tensor of another shape, such as one in a checkpoint. What is merged is taken out before.

        Args:
            adapter: name.
            name: name of the tensor in the functions.
            shape: the new shape.
        """
        container = self._modules[self.tensor_names[name]]
        present = container[adapter]
        take_adapter_out(self, adapter)
        container[adapter] = nn.Parameter(present.data.new_empty(shape), requires_grad=present.requires_grad)

    def as_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Give a weight of the base layer's layout as a matrix, (out, in)."""
        return as_rows(self.get_base_layer(), weight)

    def from_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """Give a matrix, (out, in), in the base layer's layout."""
        base = self.get_base_layer()
        if isinstance(base, CONVOLUTIONS):
            return matrix.reshape(base.weight.shape)
        return matrix.T if has_outputs_last(base) else matrix

    def has_outputs_of_owner(self, adapter: str) -> bool:
        """Say whether the outputs of this layer are the features that an adapter knows as outputs, as its owner's."""
        if adapter not in self._owners:
            return True
        owner = self.source(adapter).get_base_layer()
        return feature_axis(self.get_base_layer(), of_input=False) == feature_axis(owner, of_input=False)


class DeclaredAdditive(DeclaredLayer, AdditiveLayer):
    """Rule of `delta`, of what is added to the `bias`, and of both."""

    has_views_of_owner = True
    delta_takes_weight: ClassVar[bool] = False
    changes_bias: ClassVar[bool] = False
    apply_takes: ClassVar[frozenset[str]] = frozenset()  # what more than usual `apply` is given

    @classmethod
    def prepare_adapter(cls, base: nn.Module, config: PeftConfig, **arguments: Any) -> Mapping[str, Any]:
        """Refuse, too, if what the delta is computed from cannot be read; see `DeclaredLayer.prepare_adapter`."""
        backend = resolve_quantization_backend(base) if cls.delta_takes_weight else None
        if isinstance(backend, ForwardOnlyQuantizationBackend):
            backend.get_base_weight(base)  # refuses
        return super().prepare_adapter(base, config, **arguments)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute what an adapter adds to the base weight, in its layout.

        Args:
            adapter: name.
        """
        weight = (self.rows_before_merge(),) if self.delta_takes_weight else ()
        return self.from_rows(self.declared.delta(Tensors(self, adapter), self.shape, self.settings[adapter], *weight))

    def builds_delta(self, adapter: str, x: torch.Tensor, outputs: torch.Tensor | None = None) -> bool:
        """
        Say whether the forward pass has to build the delta.

        Args:
            adapter: name.
            x: the layer's input.
            outputs: what the weight makes of it, where that is known.
        """
        declared, source = self.declared, self.source(adapter)
        # functions know the weight as the owner has it, which another kind of layer may have transposed
        return (
            not hasattr(declared, "apply")
            or ("y" in self.apply_takes and outputs is None)
            or not is_linear(self.get_base_layer())
            or (source is not self and not is_linear(source.get_base_layer()))
        )

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Add the adapters' terms to the base layer's output, from which some of them follow."""
        if "y" not in self.apply_takes or not self._gives_what_weight_does(adapters):
            return super().adapter_forward(adapters, x, *args, **kwargs)
        result, bias = self.base_layer(x, *args, **kwargs), tensor_of(self.get_base_layer(), "bias")
        dtype, outputs = result.dtype, result if bias is None else result - bias
        for adapter in adapters:
            result = result + self.delta_forward(adapter, x, outputs)
        return result.to(dtype)

    def _gives_what_weight_does(self, adapters: Sequence[str]) -> bool:
        """Say whether what is inside gives what the weight without any adapter does, for the owners' outputs."""
        is_plain = self.base_layer is self.get_base_layer() and not self._merge_state.contributions
        return is_plain and is_linear(self.base_layer) and all(map(self.has_outputs_of_owner, adapters))

    def delta_forward(self, adapter: str, x: torch.Tensor, outputs: torch.Tensor | None = None) -> torch.Tensor:
        """
        Compute what an adapter adds to the output, by way of the delta only where there is no other.

        Args:
            adapter: name.
            x: the layer's input.
            outputs: what the weight makes of it, where that is known.
        """
        if not self.changes_bias:
            return self._weight_term(adapter, x, outputs)
        bias = self.bias_delta(adapter)
        if not self.changes_weight:
            return x.new_zeros(()) if bias is None else bias
        term = self._weight_term(adapter, x, outputs)
        return term if bias is None else term + bias

    def _weight_term(self, adapter: str, x: torch.Tensor, outputs: torch.Tensor | None) -> torch.Tensor:
        source = self.source(adapter)
        drop = None if self.dropout_field is None else source._modules[self.dropout_field]._modules[adapter]
        if drop is not None and not drop.training:
            drop = None
        if hasattr(self.declared, "low_rank") and self._is_embedding() and source._is_embedding():
            return self._look_up(source, adapter, x, drop)
        if self.builds_delta(adapter, x, outputs):
            delta = source.get_delta_weight(adapter)
            if x.is_floating_point():
                x = x.to(delta.dtype) if drop is None else drop(x.to(delta.dtype))
            return apply_weight(self.get_base_layer(), x, delta)
        x = x.to(next(source.adapter_parameters(adapter), x).dtype)
        more = {"training": self.training} if "training" in self.apply_takes else {}
        if "y" in self.apply_takes:
            more["y"] = outputs.to(x.dtype)
        x = x if drop is None else drop(x)
        return self.declared.apply(Tensors(source, adapter), x, source.shape, source.settings[adapter], **more)

    def _is_embedding(self) -> bool:
        return isinstance(self.get_base_layer(), nn.Embedding)

    def _look_up(
        self, source: "DeclaredAdditive", adapter: str, ids: torch.Tensor, drop: nn.Module | None
    ) -> torch.Tensor:
        """Look rows up in the thin factor, A', and not in the whole delta; what is dropped are their entries."""
        base = self.get_base_layer()
        b, a = self.declared.low_rank(Tensors(source, adapter), source.shape, source.settings[adapter])
        rows = F.embedding(ids, a.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        return scale_rows(base, F.linear(rows if drop is None else drop(rows), b))

    def adds_delta(self, adapter: str) -> bool:
        """Say whether the delta is the same whatever else is done to the weight."""
        return not self.delta_takes_weight

    def commutes_with(self, adapter: str, other: BaseTunerLayer, other_adapter: str) -> bool:
        """Adapters of one layer see the weight without any of them, so they add up whatever they see."""
        return other is self or super().commutes_with(adapter, other, other_adapter)

    def bias_delta(self, adapter: str) -> torch.Tensor | None:
        """
        Compute what an adapter adds to this layer's bias.

        Args:
            adapter: name.

        Returns:
            (out,); None if that is nothing.
        """
        if not self.changes_bias or not self.has_outputs_of_owner(adapter):
            return None
        source = self.source(adapter)
        return self.declared.bias(
            Tensors(source, adapter), source.shape, source.settings[adapter], self._bias_before_merge()
        )

    def _bias_before_merge(self) -> torch.Tensor | None:
        if not self._merge_state.replaces("bias"):
            return tensor_of(self.get_base_layer(), "bias")
        with original_weights([self]):
            return tensor_of(self.get_base_layer(), "bias")

    def prepare_merge(self, adapter: str) -> None:
        """Compute what depends on the weight before others are merged into that."""
        if self.delta_takes_weight:
            source = self.source(adapter)
            source.made.setdefault(adapter, {})[_PREPARED] = source.get_delta_weight(adapter)
            if self.changes_bias:
                self.made.setdefault(adapter, {})[_PREPARED_BIAS] = self.bias_delta(adapter)

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Add the delta, the one that was prepared if there is one."""
        delta = self.made.get(adapter, {}).pop(_PREPARED, None)
        if delta is not None:
            weight.add_(delta.to(weight.device, weight.dtype))
        elif self.changes_weight:
            super().merge_weight_(adapter, weight)

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Subtract the delta."""
        if self.changes_weight:
            super().unmerge_weight_(adapter, weight)

    def merged_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Add to the bias, what was prepared if there is something."""
        delta = self.made.get(adapter, {}).pop(_PREPARED_BIAS, None)
        delta = self.bias_delta(adapter) if delta is None else delta
        bias = tensor_of(self.get_base_layer(), "bias")
        return {} if delta is None else {"bias": bias + delta.to(bias)}

    def bias_after(self, adapter: str, bias: torch.Tensor) -> torch.Tensor:
        """Add to a bias."""
        delta = self.bias_delta(adapter)
        return bias if delta is None else bias + delta.to(bias)

    def check_mergeable(self, adapter_name: str) -> None:
        """
        Refuse an adapter that adds to a bias that is not there.

        Args:
            adapter_name: name.

        Raises:
            PeftValueError: if the layer has no bias.
        """
        super().check_mergeable(adapter_name)
        if self.changes_bias and tensor_of(self.get_base_layer(), "bias") is None:
            if self.bias_delta(adapter_name) is not None:
                raise PeftValueError(
                    f"adapter {adapter_name!r} adds to the bias of a layer, and the layer has no bias to merge it "
                    "into; keep the adapter unmerged, or leave out layers without a bias"
                )

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether the delta can be computed while it is merged; if not, the weight that it comes from is kept."""
        return not self.delta_takes_weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether the delta is that of a matrix, and not one of full rank that its weight tells."""
        is_matrix = is_linear(self.get_base_layer()) or isinstance(self.get_base_layer(), nn.Embedding)
        return is_matrix and not self.delta_takes_weight and not self.changes_bias


class DeclaredTerm(DeclaredAdditive):
    """Rule of `apply` alone: what is added to the output depends on the call or the batch, and is no weight's."""

    is_mergeable = False

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Refuse: there is no weight."""
        raise self._no_weight(adapter)

    def check_mergeable(self, adapter_name: str) -> None:
        """Refuse."""
        raise self._no_weight(adapter_name)

    def _no_weight(self, adapter: str) -> PeftNotImplementedError:
        return PeftNotImplementedError(
            f"what adapter {adapter!r} ({self.declared.__name__}) adds to outputs depends on the call, and cannot be "
            "merged into a weight; keep it unmerged"
        )

    def adds_delta(self, adapter: str) -> bool:
        """There is none."""
        return False

    def builds_delta(self, adapter: str, x: torch.Tensor, outputs: torch.Tensor | None = None) -> bool:
        """There is none."""
        return False

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """There is no delta."""
        return False


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
    group_fields: ClassVar[Mapping[str, str]] = {}
    dropout_field: ClassVar[str | None] = None
