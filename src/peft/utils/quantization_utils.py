# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Base layers whose weights are quantised: one registry of backends.

A backend says which layers are its own, what their weight is as a dense matrix, and how a changed matrix is quantised
again. Layers of all methods work on all backends: they add to what the base layer computes, and where they need the
weight itself they ask the backend. Layers are recognised by the names of their classes, so no library is imported
before a model uses it.
"""

import copy
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .bnb_reordering import in_first_order, leave_order, may_reorder, watch_order
from .error import PeftNotImplementedError, PeftTypeError


class QuantizedWeightError(PeftNotImplementedError, PeftTypeError):
    """Something that needs a weight as a dense matrix, or quantised anew, where that cannot be had."""


class QuantizationBackend(ABC):
    """
    What is to be known about the layers of one library for quantisation.

    Attributes:
        name: name for people.
        layer_type: kind of its layers.
        supports_merge: whether a weight can be quantised anew after something was merged into it.
        stored_name: attribute of a layer that holds its quantised weight.
        casts_inputs: whether its layers take inputs of any floating type.
    """

    name = ""
    layer_type = "linear"
    supports_merge = False
    stored_name = "weight"
    casts_inputs = False

    @property
    def backend_name(self) -> str:
        """The name, as reports on a model have it."""
        return self.name

    @abstractmethod
    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """
        Compute the weight as a dense matrix.

        Args:
            base_layer: a layer of this backend.

        Returns:
            (out_features, in_features), for embeddings (num_embeddings, width), in the type that was quantised.
        """

    @abstractmethod
    def requantize(self, base_layer: nn.Module, weight: torch.Tensor) -> dict[str, Any]:
        """
        Quantise a matrix as the weight of a layer is quantised; the layer itself stays as it is.

        Args:
            base_layer: a layer of this backend.
            weight: of the shape that `get_base_weight` gives.

        Returns:
            Attribute of the layer -> what it has to be for the layer to use that matrix.
        """

    def features(self, base_layer: nn.Module) -> tuple[int | None, int | None]:
        """
        Give the numbers of input and output features of a linear layer.

        Args:
            base_layer: a layer of this backend.
        """
        in_features = getattr(base_layer, "in_features", getattr(base_layer, "infeatures", None))
        return in_features, getattr(base_layer, "out_features", getattr(base_layer, "outfeatures", None))

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        """
        Quantise a matrix and let the base layer of an adapter layer use it.

        Args:
            peft_layer: the adapter layer.
            weight_data: of the shape that `get_base_weight` gives.
        """
        base = peft_layer.get_base_layer()
        for name, value in self.requantize(base, weight_data).items():
            setattr(base, name, value)

    def check_mergeable(self, base_layer: nn.Module) -> None:
        """
        Refuse to merge into a layer whose weight cannot be quantised anew.

        Args:
            base_layer: a layer of this backend.

        Raises:
            QuantizedWeightError: in that case.
        """
        return

    def accompany(self, base_layer: nn.Module) -> None:
        """
        Do to a layer what it needs while there are adapters in its model, on itself or elsewhere.

        Args:
            base_layer: a layer of this backend.
        """
        return

    def release(self, base_layer: nn.Module) -> None:
        """
        Take back what `accompany` did.

        Args:
            base_layer: a layer of this backend.
        """
        return

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        """
        Give a layer's output in a form that can be changed in place.

        Args:
            x: the output.
        """
        return x


class Bnb4bitBackend(QuantizationBackend):
    """bitsandbytes, 4 bits per weight: `Linear4bit`, `Embedding4bit`."""

    name = "bnb 4bit"
    supports_merge = True
    casts_inputs = True
    _settings = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """Compute the weight as a dense matrix; see `QuantizationBackend`."""
        return dequantize_bnb_weight(base_layer.weight)

    def requantize(self, base_layer: nn.Module, weight: torch.Tensor) -> dict[str, Any]:
        """Quantise a matrix with the settings of the present one; see `QuantizationBackend`."""
        present = base_layer.weight
        settings = {name: present.__dict__[name] for name in self._settings if name in present.__dict__}
        new = type(present)(weight.to("cpu"), requires_grad=False, **settings)
        return {"weight": new.to(present.device)}  # which is what quantises it

    def accompany(self, base_layer: nn.Module) -> None:
        """Keep gradients from being lost on some processors; see `bnb_reordering.py`."""
        if may_reorder(base_layer):
            watch_order(base_layer)

    def release(self, base_layer: nn.Module) -> None:
        """Take it back; see `QuantizationBackend`."""
        leave_order(base_layer)

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        """Copy the output, which autograd does not let change in place."""
        return x.clone()


class Bnb8bitBackend(QuantizationBackend):
    """bitsandbytes, LLM.int8(): `Linear8bitLt`, `Embedding8bit`."""

    name = "bnb 8bit"
    supports_merge = True
    casts_inputs = True

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """Compute the weight as a dense matrix; see `QuantizationBackend`."""
        return dequantize_bnb_weight(base_layer.weight, getattr(base_layer, "state", None))

    def requantize(self, base_layer: nn.Module, weight: torch.Tensor) -> dict[str, Any]:
        """Quantise a matrix; see `QuantizationBackend`."""
        present = base_layer.weight
        new = type(present)(weight.to("cpu"), requires_grad=False, has_fp16_weights=False).to(present.device)
        if not hasattr(base_layer, "state"):
            return {"weight": new}
        state = copy.copy(base_layer.state)  # the layer moves codes and scales there in its first forward pass
        state.CB = state.SCB = None
        return {"weight": new, "state": state}


class HqqBackend(QuantizationBackend):
    """HQQ: `HQQLinear`."""

    name = "hqq"
    supports_merge = True
    stored_name = "W_q"

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """Compute the weight as a dense matrix; see `QuantizationBackend`."""
        return base_layer.dequantize()

    def requantize(self, base_layer: nn.Module, weight: torch.Tensor) -> dict[str, Any]:
        """Quantise a matrix with the settings of the present one; see `QuantizationBackend`."""
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        config = {**copy.deepcopy(base_layer.quant_config), "offload_meta": base_layer.offload_meta}
        new = type(base_layer)(dense, config, compute_dtype=base_layer.compute_dtype, device=str(base_layer.device))
        return {"W_q": new.W_q, "meta": new.meta}


class TorchaoBackend(QuantizationBackend):
    """
    torchao: layers of torch whose weight is one of torchao's tensors.

    Args:
        get_apply_tensor_subclass: gives the torchao config that the model was quantised with; without it the weight
            can be read, but not quantised anew.
    """

    name = "torchao"
    supports_merge = True

    def __init__(self, get_apply_tensor_subclass: Callable[[], Any] | None) -> None:
        self.get_apply_tensor_subclass = get_apply_tensor_subclass

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """Compute the weight as a dense matrix; see `QuantizationBackend`."""
        return base_layer.weight.dequantize()

    def check_mergeable(self, base_layer: nn.Module) -> None:
        """
        Refuse where it is not known how the layer was quantised.

        Raises:
            QuantizedWeightError: in that case.
        """
        config = self.get_apply_tensor_subclass and self.get_apply_tensor_subclass()
        if config is None or "Fqn" in type(config).__name__:
            found = "the model does not say with which config" if config is None else "by a config that goes by names"
            raise QuantizedWeightError(
                f"the weight of a {type(base_layer).__name__} layer is quantised by torchao, and {found}, so nothing "
                "can be merged into it; load the model with quantization_config=TorchAoConfig(...) with one config "
                "for all layers, or keep the adapter unmerged"
            )

    def requantize(self, base_layer: nn.Module, weight: torch.Tensor) -> dict[str, Any]:
        """Quantise a matrix with the config of the model; see `QuantizationBackend`."""
        from torchao.quantization import quantize_

        self.check_mergeable(base_layer)
        dense = copy.copy(base_layer)
        dense.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
        holder = nn.Sequential(dense)
        quantize_(holder, self.get_apply_tensor_subclass(), filter_fn=lambda module, name: module is dense)
        return {"weight": nn.Parameter(holder[0].weight, requires_grad=False)}


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """
    A library of whose layers nothing is known but how to call them.

    Args:
        backend_name: name of the library.
        stored_name: attribute of a layer that holds its quantised weight.
    """

    def __init__(self, backend_name: str = "", *, stored_name: str = "qweight") -> None:
        self.name, self.stored_name = backend_name, stored_name

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """Refuse; see `QuantizationBackend`."""
        raise QuantizedWeightError(
            f"the weight of {self.name} layers ({type(base_layer).__name__}) cannot be had as a dense matrix, which "
            "is needed here; use a method that only adds to outputs, such as LoRA without use_dora, or load the base "
            "model without quantisation"
        )

    def requantize(self, base_layer: nn.Module, weight: torch.Tensor) -> dict[str, Any]:
        """Refuse; see `QuantizationBackend`."""
        return self.check_mergeable(base_layer)

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        """Refuse; see `QuantizationBackend`."""
        self.check_mergeable(peft_layer)

    def check_mergeable(self, base_layer: nn.Module) -> None:
        """
        Refuse to merge.

        Raises:
            QuantizedWeightError: always.
        """
        raise QuantizedWeightError(
            f"nothing can be merged into {self.name} layers ({type(base_layer).__name__}), whose weights cannot be "
            "quantised anew; keep the adapter unmerged, or merge it into the base model loaded without quantisation"
        )


class EetqBackend(ForwardOnlyQuantizationBackend):
    """EETQ: `EetqLinear`, of the library or of transformers."""

    def features(self, base_layer: nn.Module) -> tuple[int, int]:
        """Read the numbers from the weight, which is stored as (in, out)."""
        rows, columns = base_layer.weight.shape
        return rows, columns


# backend, package that the class of a layer comes from, and pattern of the class's name
_BACKENDS: tuple[tuple[QuantizationBackend, str, str], ...] = (
    (Bnb4bitBackend(), "bitsandbytes", "(Linear|Embedding)4bit"),
    (Bnb8bitBackend(), "bitsandbytes", "Linear8bitLt|Embedding8bit"),
    (HqqBackend(), "hqq", "HQQLinear"),
    (ForwardOnlyQuantizationBackend("awq"), "gptqmodel", "(?i).*awq.*linear"),
    (ForwardOnlyQuantizationBackend("awq"), "awq", "WQLinear.*"),
    (ForwardOnlyQuantizationBackend("gptq"), "gptqmodel", ".*Linear"),
    (ForwardOnlyQuantizationBackend("gptq"), "auto_gptq", ".*QuantLinear"),
    (ForwardOnlyQuantizationBackend("aqlm", stored_name="codes"), "aqlm", "QuantizedLinear"),
    (EetqBackend("eetq", stored_name="weight"), "eetq", "EetqLinear"),
    (EetqBackend("eetq", stored_name="weight"), "transformers", "EetqLinear"),
    (ForwardOnlyQuantizationBackend("inc", stored_name="weight"), "neural_compressor", "Patched.*Linear.*"),
)


@functools.cache
def _backend_of_class(layer_cls: type) -> QuantizationBackend | None:
    """Find the backend that a class of layers belongs to, by its name or that of a class that it derives from."""
    for kind in layer_cls.__mro__:
        package = kind.__module__.partition(".")[0]
        for backend, home, pattern in _BACKENDS:
            if package == home and re.fullmatch(pattern, kind.__name__):
                return backend
    return None


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """
    Find the backend that a layer is quantised by.

    Args:
        base_layer: a layer of a base model.
        kwargs: what `get_quantization_kwargs` gives for the model.

    Returns:
        The backend; None for layers that are not quantised.

    Example:

        >>> from torch import nn
        >>> from peft.utils import resolve_quantization_backend
        >>> print(resolve_quantization_backend(nn.Linear(2, 2)))
        None
    """
    weight = getattr(base_layer, "weight", None)
    if type(weight).__module__.partition(".")[0] == "torchao":
        return TorchaoBackend(kwargs.get("get_apply_tensor_subclass"))
    backend = _backend_of_class(type(base_layer))
    if backend is not None and getattr(weight, "has_fp16_weights", False):  # LLM.int8() can also train such weights
        return None
    if backend is None and isinstance(weight, torch.Tensor) and _holds_codes(weight, type(base_layer)):
        return ForwardOnlyQuantizationBackend(type(base_layer).__module__.partition(".")[0], stored_name="weight")
    return backend


def accompany_layer(layer: nn.Module, leave: bool = False) -> None:
    """
    Do to a layer what its backend needs while there are adapters in its model.

    Args:
        layer: any layer of a base model.
        leave: take it back.
    """
    backend = _backend_of_class(type(layer))
    if backend is not None:
        backend.release(layer) if leave else backend.accompany(layer)


def _holds_codes(weight: torch.Tensor, layer_cls: type) -> bool:
    """Say whether a weight is of a type that a layer outside of torch must hold the key to: one byte, or integer."""
    is_code = weight.dtype.itemsize < 2 or not (weight.is_floating_point() or weight.is_complex())
    return is_code and layer_cls.__module__.partition(".")[0] != "torch"


def stored_weight(layer: nn.Module) -> torch.Tensor | None:
    """
    Give the tensor that holds the weight of a layer, quantised or not.

    Args:
        layer: a layer of a base model.
    """
    backend = resolve_quantization_backend(layer)
    return getattr(layer, "weight" if backend is None else backend.stored_name, None)


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """
    Find what backends have to know about a model as a whole.

    Args:
        model: a base model.

    Returns:
        Arguments for `resolve_quantization_backend`.
    """
    config = get_quantization_config(model, "torchao")
    return {} if config is None else {"get_apply_tensor_subclass": config.get_apply_tensor_subclass}


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """
    Give the config that transformers has quantised a model with.

    Args:
        model: a base model.
        method: name of the library, such as `"gptq"`.

    Returns:
        The config; None if the model is not quantised by that library.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    found = getattr(quantizer, "quantization_config", None) or getattr(
        getattr(model, "config", None), "quantization_config", None
    )
    return found if getattr(found, "quant_method", None) == method else None


def quantization_extra_repr(module: nn.Module) -> str:
    """
    Say in the representation of an adapter layer how its base layer is quantised.

    Args:
        module: the adapter layer.
    """
    backend = getattr(module, "quantization_backend", None)
    return "" if backend is None else f"quantization_backend={backend.name!r}"


def is_gptqmodel_quant_linear(module: nn.Module | None) -> bool:
    """
    Say whether a module is a quantised linear layer of gptqmodel.

    Args:
        module: any module, or None.
    """
    return _is_of(module, "gptq", "awq")


def is_gptqmodel_awq_layer(module: nn.Module | None) -> bool:
    """
    Say whether a module is a linear layer of gptqmodel that is quantised by AWQ.

    Args:
        module: any module, or None.
    """
    return _is_of(module, "awq")


def get_gptqmodel_quant_linear(gptq_quantization_config: Any, device_map: Any = None) -> type[nn.Module] | None:
    """
    Find the class that gptqmodel has for the linear layers of a model that is quantised by GPTQ.

    Args:
        gptq_quantization_config: the model's config of quantisation (transformers' `GPTQConfig`).
        device_map: device of the layers, or name of a module -> device.

    Returns:
        The class; None without a config.
    """
    if gptq_quantization_config is None:
        return None
    from optimum.gptq import GPTQQuantizer

    # what transformers asks, too, when it loads such a model
    quantizer = GPTQQuantizer.from_dict(gptq_quantization_config.to_dict_optimum())
    quantizer.select_quant_linear(device_map=device_map)
    return quantizer.quant_linear


def _is_of(module: nn.Module | None, *names: str) -> bool:
    """Say whether the class of a module comes from gptqmodel and belongs to a backend of one of these names."""
    backend = _backend_of_class(type(module))
    from_there = any(kind.__module__.partition(".")[0] == "gptqmodel" for kind in type(module).__mro__)
    return from_there and backend is not None and backend.name in names


def get_bnb_param_type(param: nn.Parameter) -> str | bool:
    """
    Say how bitsandbytes has quantised a parameter.

    Args:
        param: any parameter.

    Returns:
        `"4bit"`, `"8bit"`, or False.
    """
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)


@torch.no_grad()
def dequantize_bnb_weight(weight: nn.Parameter, state: Any = None) -> torch.Tensor:
    """
    Compute the dense matrix that bitsandbytes has quantised.

    Args:
        weight: a parameter; one that is not quantised is given back.
        state: `state` of the layer, which has the scales of 8-bit weights after its first forward pass.

    Returns:
        (out_features, in_features) in the type that was quantised; float32 for 8-bit weights.

    Raises:
        PeftTypeError: if `weight` is no parameter.
    """
    if not isinstance(weight, nn.Parameter):
        raise PeftTypeError(f"weight must be a torch.nn.Parameter, found {type(weight).__name__}")
    kind = get_bnb_param_type(weight)
    if kind == "4bit" and weight.quant_state is not None:
        from bitsandbytes import functional

        return functional.dequantize_4bit(*in_first_order(weight))
    scales = getattr(weight, "SCB", None) if getattr(weight, "SCB", None) is not None else getattr(state, "SCB", None)
    if kind == "8bit" and scales is not None:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(weight.data, scales)
    return weight


def dequantize_module_weight(module: nn.Module) -> torch.Tensor:
    """
    Give the weight of a layer as a dense matrix, quantised or not.

    Args:
        module: a layer of a base model.

    Returns:
        The parameter itself if it is not quantised.

    Raises:
        QuantizedWeightError: if the backend cannot do that.
    """
    backend = resolve_quantization_backend(module)
    return module.weight if backend is None else backend.get_base_weight(module)
