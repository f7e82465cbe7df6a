# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA on a parameter whose use nothing is known about: the base layer computes with W + delta in the place of W."""

import dataclasses
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...anatomy.offload import onloaded, tensor_of
from ...layers.call_context import alone_with
from ...layers.merging.layer import merge_layer
from ...layers.standing_in import standing_in
from ...utils.error import PeftNotImplementedError, PeftTypeError, PeftValueError
from ...utils.quantization_utils import resolve_quantization_backend
from ...utils.tensor_parallel import _LoraParameterProxy, is_divided
from ...utils.warning import warn
from ..families.ranks import RankAxis
from .config import LoraConfig
from .maths import add_product_
from .starts import find_start


class OnWholeWeight:
    """
    What LoRA's layers have in common that hand their base layer an adapted weight; to be mixed into `LoraLayer`.

    W + delta is computed in each forward pass, stands in the base layer while that computes, and is not kept. The
    base weight itself is never changed. There is no input that could be dropped, and one weight for all samples.
    Threads compute one such layer one after the other, since what stands in its base layer is seen by all of them.
    """

    factor_layout = (("lora_B", False), ("lora_A", False))
    supports_mixed_batch = False

    def adapted_weight(self) -> torch.Tensor:
        """Compute the base weight with the active adapters, in the weight's type."""
        return self._with_deltas(self.adapters_to_apply())

    def adapted_bias(self) -> torch.Tensor | None:
        """Compute the base bias with those that active adapters may have."""
        return self._with_biases(self.adapters_to_apply())

    def _with_deltas(self, adapters: list[str]) -> torch.Tensor:
        weight = self.get_base_weight()
        for adapter in adapters:
            weight = self.source(adapter).plus_delta(adapter, weight)
        return weight

    def _with_biases(self, adapters: list[str]) -> torch.Tensor | None:
        bias = tensor_of(self.get_base_layer(), self.bias_name)
        for adapter in adapters:
            if self.lora_bias[adapter]:
                bias = self.merged_bias(adapter, bias)
        return bias

    def plus_delta(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """
        Give a weight with an adapter's delta added; the weight itself stays as it is.

        Args:
            adapter: name.
            weight: of the base weight's shape and layout.
        """
        left, right = self.delta_factors(adapter)
        if left.dtype == weight.dtype and left.device == weight.device:
            return torch.addmm(weight, left, right, alpha=self.scaling[adapter])
        return weight + self.get_delta_weight(adapter).to(weight)

    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the base layer with W + delta."""
        with self._activate_lora(adapters):
            return self.base_layer(x, *args, **kwargs)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """
        Let W + delta stand in the base layer inside a context. Clients extend it.

        Args:
            active_adapters: names.
        """
        inside = ""
        layer = self.base_layer
        while "base_layer" in layer._modules:  # other adapter layers around the same base layer
            inside += "base_layer."
            layer = layer._modules["base_layer"]
        tensors = {inside + self.weight_name: self._with_deltas(active_adapters)}
        if any(self.lora_bias[adapter] for adapter in active_adapters):
            tensors[inside + self.bias_name] = self._with_biases(active_adapters)
        with (
            onloaded(self.get_base_layer()),
            standing_in(self.base_layer, tensors),
        ):
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Compute the base layer with the active adapters.

        Args:
            args: arguments of the base layer, whatever they are.
            kwargs: likewise.

        Raises:
            PeftTypeError: if it is given an adapter per sample.
        """
        if kwargs.get("adapter_names") is not None:
            raise PeftTypeError(
                f"adapter_names does not work on {type(self).__name__}, whose adapters change one weight for all "
                "samples; give each adapter a batch of its own"
            )
        if not args:
            first = next(iter(inspect.signature(self.get_base_layer().forward).parameters))
            args = (kwargs.pop(first),) if first in kwargs else args
        with alone_with(self.get_base_layer()):
            return super().forward(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """
        Give the base layer back.

        Args:
            merge: merge adapters into it first.
            safe_merge: refuse the merge if an entry would not be finite.
            adapter_names: which adapters; the active ones if left out.
        """
        if merge:
            merge_layer(self, adapter_names, safe_merge)
        return self.base_layer


class OnOutputProjection(OnWholeWeight):
    """
    LoRA on the last projection of `nn.MultiheadAttention`, which reads its weight and never calls it.

    So what the layer gives as its weight is the adapted one. Release 0.21.2 adds this delta twice, once with gradients
    and once without. Adapters have been trained like that, so it is done here too, and 2 * scaling * B A is the delta.
    """

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Compute what the adapter adds to the base weight; gradients are those of the half of it."""
        delta = super().get_delta_weight(adapter)
        return delta + delta.detach()

    def add_delta_(self, adapter: str, weight: torch.Tensor, sign: float) -> None:
        """Add the delta without ever holding it whole."""
        super().add_delta_(adapter, weight, 2 * sign)

    def plus_delta(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Give a weight with the delta added; the weight itself stays as it is."""
        return weight + self.get_delta_weight(adapter).to(weight)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the linear layer with its adapted weight."""
        return nn.functional.linear(x, self.weight, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The weight with the active adapters."""
        return self.adapted_weight()

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias, with those of active adapters."""
        return self.adapted_bias()


class OnAttention(OnWholeWeight):
    """
    LoRA on the projection of queries, keys and values in `nn.MultiheadAttention`.

    The output projection is a layer of its own. Attributes are those of the base layer, for `nn.TransformerEncoder`
    and others that read them.
    """

    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    def _wrap(self, base_layer: nn.Module) -> None:
        super()._wrap(base_layer)
        self.__dict__.update(in_features=self.embed_dim, out_features=3 * self.embed_dim)

    @classmethod
    def _refuse(cls, base: nn.Module, r: int, config: LoraConfig, parameter_name: str | None) -> None:
        super()._refuse(base, r, config, parameter_name)
        if base.in_proj_weight is None:
            raise PeftValueError(
                f"MultiheadAttention with kdim={base.kdim} and vdim={base.vdim} keeps three weights for embed_dim="
                f"{base.embed_dim}; LoRA adapts those with one only. Name the parameters q_proj_weight, k_proj_weight "
                "and v_proj_weight in target_parameters instead"
            )
        if config.lora_bias and base.in_proj_bias is None:
            raise PeftValueError("lora_bias=True needs a MultiheadAttention with bias; leave it out")

    @classmethod
    def _factor_shapes(cls, base: nn.Module, r: int, parameter_name: str | None) -> Iterator[tuple[int, ...]]:
        yield from ((r, base.embed_dim), (3 * base.embed_dim, r))

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        warn_of_dropout(config)
        self._make_linear_factors(adapter, r, config.lora_bias)

    @property
    def in_proj_weight(self) -> torch.Tensor:
        """The weight with the active adapters."""
        return self.adapted_weight()

    @property
    def in_proj_bias(self) -> torch.Tensor | None:
        """The bias, with those of active adapters."""
        return self.adapted_bias()

    def merge_masks(self, *args: Any, **kwargs: Any) -> Any:
        """Join padding and attention masks as the base layer does."""
        return self.get_base_layer().merge_masks(*args, **kwargs)


def _of_base_layer(name: str) -> property:
    return property(lambda self: getattr(self.get_base_layer(), name), doc=f"`{name}` of the base layer.")


for _name in (
    "embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "out_proj", "bias_k", "bias_v",
    "add_zero_attn", "_qkv_same_embed_dim",
):  # fmt: skip
    setattr(OnAttention, _name, _of_base_layer(_name))


def warn_of_dropout(config: LoraConfig) -> None:
    """Warn that dropout does nothing where the adapter changes a weight as a whole."""
    if config.lora_dropout:
        warn(
            f"lora_dropout={config.lora_dropout} has no effect on MultiheadAttention, whose inputs cannot be dropped "
            "for the adapter alone"
        )


class OnParameter(OnWholeWeight):
    """
    LoRA on a parameter that a module holds directly; see `ParamWrapper`.

    A parameter of three dimensions holds a matrix (out, in) per expert, each with a delta of rank r. Factor A has the
    ranks of the first expert first; in factor B those of all experts take turns.
    """

    def _wrap(self, base_layer: nn.Module) -> None:
        super()._wrap(base_layer)
        weight = self.get_base_weight()
        *experts, rows, columns = weight.shape if weight.dim() > 1 else (1, 1)
        self.__dict__.update(num_experts=experts[0] if experts else 1, out_features=rows, in_features=columns)

    def get_param(self) -> nn.Parameter:
        """Give the parameter that is adapted."""
        return self.get_base_weight()

    @classmethod
    def _refuse(cls, base: nn.Module, r: int, config: LoraConfig, parameter_name: str | None) -> None:
        """Refuse, too, what cannot be had without knowing how the parameter is used."""
        super()._refuse(base, r, config, parameter_name)
        backend = resolve_quantization_backend(base)
        if backend is not None:
            raise PeftNotImplementedError(
                f"target_parameters cannot adapt {parameter_name!r} of a {type(base).__name__}, "
                f"which is quantised ({backend.name}); name the module in target_modules instead"
            )
        useless = [
            name for name in ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora") if getattr(config, name)
        ]
        if useless:
            raise PeftValueError(f"{', '.join(useless)} does not work with target_parameters; leave it out")
        start, weight = find_start(config.init_lora_weights, config), getattr(base, parameter_name)
        is_plain = parameter_name == "weight" and type(base) not in (nn.Embedding, Conv1D)
        if start.needs_matrix and not (is_plain and math.prod(weight.shape[:-2]) == 1):
            raise PeftValueError(
                f"init_lora_weights={config.init_lora_weights!r} does not work for {parameter_name!r} in "
                "target_parameters; use True or 'gaussian'"
            )
        if weight.dim() not in (2, 3):
            raise PeftValueError(
                f"target_parameters adapts matrices, and one matrix per expert; {parameter_name!r} has the shape "
                f"{tuple(weight.shape)}. Use modules_to_save to train it in full"
            )
        refusal = start.refusal(base, r) if start.needs_matrix else None
        if refusal is not None:
            raise refusal

    @classmethod
    def _factor_shapes(cls, base: nn.Module, r: int, parameter_name: str | None) -> Iterator[tuple[int, ...]]:
        *experts, rows, columns = getattr(base, parameter_name).shape
        yield from ((r * math.prod(experts), columns), (rows, r * math.prod(experts)))

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        self._make_linear_factors(adapter, r * self.num_experts, with_bias=False)

    def rank_axis(self, name: str) -> RankAxis:
        """Say where a factor of this layer has its ranks; see `LoraLayer.rank_axis`."""
        return dataclasses.replace(super().rank_axis(name), experts=self.num_experts)

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Give the factors of each expert.

        Args:
            adapter_name: name.

        Returns:
            (experts, out, r) and (experts, r, in), views of the factors.
        """
        b, a = self.delta_factors(adapter_name)
        return b.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1), a.unflatten(0, (self.num_experts, -1))

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute what the adapter adds to the parameter, in its shape.

        Args:
            adapter: name.
        """
        left, right = self.get_delta_factors(adapter)
        return (torch.bmm(left, right) * self.scaling[adapter]).view(self.get_base_weight().shape)

    def plus_delta(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """Give the parameter with the delta added; see `OnWholeWeight.plus_delta`."""
        if weight.dim() == 2 and is_divided(weight) == is_divided(self.factor_weights(adapter)[0]):
            return super().plus_delta(adapter, weight)
        left, right = self.get_delta_factors(adapter)
        if is_divided(weight) != is_divided(left):
            return _LoraParameterProxy(self.get_delta_weight(adapter).to(weight.dtype))(weight)
        if left.dtype == weight.dtype and left.device == weight.device:
            return torch.baddbmm(weight, left, right, alpha=self.scaling[adapter])
        return weight + self.get_delta_weight(adapter).to(weight)

    def add_delta_(self, adapter: str, weight: torch.Tensor, sign: float) -> None:
        """Add the delta, an expert at a time."""
        if weight.dim() == 2:
            super().add_delta_(adapter, weight, sign)
            return
        for left, right, matrix in zip(*self.get_delta_factors(adapter), weight, strict=True):
            add_product_(left, right, matrix, sign * self.scaling[adapter])

    def __getattr__(self, name: str) -> Any:
        """Give what the model's own code reads from the module: its attributes, and the adapted parameter."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", ()):  # while unpickling
                raise
            if name == self.weight_name:
                return self.adapted_weight()
            return getattr(self.base_layer, name)

    @property
    def weight(self) -> torch.Tensor:
        """The module's weight, which is the adapted one if that is its name."""
        return self.adapted_weight() if self.weight_name == "weight" else self.base_layer.weight
