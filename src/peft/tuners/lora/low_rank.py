# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Layers that add a product of two factors to their weight, whatever the factors start with and are used for."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...anatomy.offload import tensor_of
from ...layers.additive import AdditiveLayer
from ...layers.scaling import Scaled
from ...utils.error import PeftRuntimeError
from ..families.ranks import RankAxis, WithinRoom
from .factors import NO_FACTORS, Factor, FactorDict, TiedFactor, TiedSettings
from .maths import add_product_


class LowRankLayer(Scaled, AdditiveLayer):
    """
    W + scaling * B A, with A (r, in) and B (out, r).

    Subclasses keep the factors in `lora_A` and `lora_B`, or in `lora_embedding_A` and `lora_embedding_B`.

    Args:
        base_layer: the layer to adapt.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
    _settings = ("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias")
    is_embedding = False
    # the attributes that hold the factor that meets the input and the one that gives the output
    factor_names = ("lora_A", "lora_B")
    has_views_of_owner = True
    bias_name = "bias"
    # The same for the two matrices whose product is the delta, left one first, and whether they are held transposed.
    # Subclasses say it if their weight is no (out, in), or the factors are not those of a linear layer.
    factor_layout: tuple[tuple[str, bool], tuple[str, bool]] = (("lora_B", False), ("lora_A", False))

    def __init__(self, base_layer: nn.Module) -> None:
        self._wrap(base_layer)
        self._make_containers()

    def _make_containers(self) -> None:
        self.__dict__.update({name: {} for name in self._settings})
        self.__dict__.update(dict.fromkeys(self.adapter_layer_names, NO_FACTORS))
        self._modules["lora_dropout"] = nn.ModuleDict()
        for name in self.factor_names:
            del self.__dict__[name]
            self._modules[name] = FactorDict() if self.is_embedding else nn.ModuleDict()

    # ---------------------------------------------------------------------------------------------------- the factors
    def container(self, name: str, kind: type[nn.Module] = nn.ModuleDict) -> nn.Module:
        """
        Give the container for tensors that a variant of LoRA has beside the factors; it is made when it is needed.

        Args:
            name: attribute that holds the tensors by adapter name.
            kind: `nn.ModuleDict`, where modules hold the tensors, or `nn.ParameterDict`.
        """
        if name not in self._modules:
            self.__dict__.pop(name, None)
            self._modules[name] = kind()
            if name not in self.adapter_layer_names:
                self.__dict__["adapter_layer_names"] = (*self.adapter_layer_names, name)
        return self._modules[name]

    def setting(self, name: str) -> dict[str, Any]:
        """
        Give the mapping for a setting that a variant of LoRA has by adapter name; it is made when it is needed.

        Args:
            name: attribute that holds it.
        """
        if name not in self.__dict__:
            self.__dict__[name] = {}
            self.__dict__["other_param_names"] = (*self.other_param_names, name)
        return self.__dict__[name]

    def _make_linear_factors(self, adapter: str, r: int, with_bias: bool) -> None:
        """Make the factors of a weight that is a matrix, or a row of matrices: (r, in) and (out, r)."""
        bias = self.new_parameter(self.out_features) if with_bias else None
        self.lora_A[adapter] = Factor(self.new_parameter(r, self.in_features))
        self.lora_B[adapter] = Factor(self.new_parameter(self.out_features, r), bias)

    def follow(self, adapter_name: str, owner: "LowRankLayer") -> None:
        """
        Take an adapter from another layer: factors and settings here are views of the owner's.

        Args:
            adapter_name: name.
            owner: the layer that has the factors.
        """
        super().follow(adapter_name, owner)
        for name in self._settings:
            self.__dict__[name] = TiedSettings(self.__dict__[name], self._owners, name)
        for side, (name, transposed) in enumerate(self.factor_layout):
            getattr(self, name)[adapter_name] = TiedFactor(owner, adapter_name, side, transposed)
        # of its own, since what it drops is dropped here
        self.lora_dropout[adapter_name] = copy.deepcopy(owner.lora_dropout[adapter_name]).train(self.training)

    def adapter_aliases(self, adapter_name: str) -> Iterator[tuple[str, str, bool]]:
        """Yield the keys of factors that this layer takes from an owner; see `BaseTunerLayer.adapter_aliases`."""
        if adapter_name not in self._owners:
            return
        owner = self._owners[adapter_name]
        for (name, transposed), (owned, owned_transposed) in zip(self.factor_layout, owner.factor_layout, strict=True):
            saved = name if self.is_embedding else f"{name}.weight"
            live = f"{owned}.{adapter_name}" + ("" if owner.is_embedding else ".weight")
            yield saved, live, transposed != owned_transposed

    def rank_axis(self, name: str) -> RankAxis:
        """
        Say where a factor of this layer has its ranks.

        Args:
            name: attribute that holds the factor.
        """
        return RankAxis(0 if name.endswith("_A") else 1)

    def saved_forms(self, adapter_name: str) -> dict[str, WithinRoom]:
        """Save factors that have room for greater ranks without it; see `BaseTunerLayer.saved_forms`."""
        source, forms = self.source(adapter_name), {}
        for name, _ in self.factor_layout:
            place = source.rank_axis(name)
            factor = self._factor(name, adapter_name)
            room = factor.shape[place.axis] if source.is_whole(adapter_name, name, factor) else 0
            if room > place.length(source.r[adapter_name]):
                key = name if self.is_embedding else f"{name}.weight"
                forms[key] = WithinRoom(place, source.r[adapter_name], room)
        return forms

    def is_whole(self, adapter_name: str, key: str, tensor: torch.Tensor) -> bool:
        """Say whether a factor is a matrix with entries; see `AdapterModule.is_whole`."""
        is_factor = key.startswith(tuple(name for name, _ in self.factor_layout)) and not key.endswith(".bias")
        return not is_factor or not self.r[adapter_name] or (tensor.dim() > 1 and tensor.numel() > 0)

    def _factor(self, name: str, adapter: str) -> torch.Tensor:
        value = self._modules[name][adapter]
        return value.weight if isinstance(value, nn.Module) else value

    def factor_weights(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the factor that meets the input, (r, in), and the one that gives the output, (out, r)."""
        into, out = self.factor_names
        return self._factor(into, adapter), self._factor(out, adapter)

    def factors_written_out(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the same two as the matrices that they stand for, whatever form they are kept in."""
        into, out = self.factor_names
        return self._written_out(into, adapter), self._written_out(out, adapter)

    def keeps_matrices(self, adapter: str) -> bool:
        """Say whether an adapter's factors are kept as the matrices whose product is the delta without scaling."""
        return True

    def delta_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Give two matrices whose product is the delta without its scaling, in the layout of the base weight.

        Returns:
            (rows, r) and (r, columns), views of the factors where these are kept as matrices.
        """
        factors = (self._written_out(name, adapter) for name, _ in self.factor_layout)
        left, right = (w.T if t else w for w, (_, t) in zip(factors, self.factor_layout, strict=True))
        return left, right

    def _written_out(self, name: str, adapter: str) -> torch.Tensor:
        """Give the matrix that a factor stands for, which is the factor itself unless it is kept in another form."""
        return self._factor(name, adapter)

    def bias_of_factors(self, adapter: str) -> nn.Parameter | None:
        """Give factor B's own bias; None for adapters without one."""
        return self.lora_B[adapter].bias if self.lora_bias.get(adapter) else None

    # ----------------------------------------------------------------------------------------------------- the delta
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        Compute scaling * B A in the layout of the base weight.

        Args:
            adapter: name.
        """
        left, right = self.delta_factors(adapter)
        return (left @ right) * self.scaling[adapter]

    def add_delta_(self, adapter: str, weight: torch.Tensor, sign: float) -> None:
        """Add the delta without ever holding it whole."""
        left, right = self.delta_factors(adapter)
        add_product_(left, right, weight, sign * self.scaling[adapter])

    def adapted(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Compute the layer with adapters, each on top of those before.

        Args:
            adapters: names; none for the base layer.
            x: its input.
            args: other arguments of the base layer.
            kwargs: likewise.

        Returns:
            The output, in the type of the base layer's.
        """
        return self.adapter_forward(adapters, x, *args, **kwargs) if adapters else self.base_layer(x, *args, **kwargs)

    # -------------------------------------------------------------------------------------------------- B's own bias
    def check_mergeable(self, adapter_name: str) -> None:
        """
        Refuse an adapter with a bias on a layer without one.

        Raises:
            PeftRuntimeError: in that case.
        """
        if self.lora_bias.get(adapter_name) and getattr(self.get_base_layer(), self.bias_name, None) is None:
            raise PeftRuntimeError(
                f"adapter {adapter_name!r} was made with lora_bias=True, and the "
                f"{type(self.get_base_layer()).__name__} layer has no bias to merge it into; keep the adapter unmerged"
            )

    def merged_bias(self, adapter: str, bias: torch.Tensor) -> torch.Tensor:
        """Add factor B's bias to a bias of the base layer."""
        return torch.add(bias, self.lora_B[adapter].bias.to(bias), alpha=self.scaling[adapter])

    def bias_with(self, adapters: list[str]) -> torch.Tensor | None:
        """
        Give the base layer's bias with those that adapters may have.

        Args:
            adapters: names.
        """
        bias = tensor_of(self.get_base_layer(), self.bias_name)
        for adapter in adapters:
            if self.lora_bias[adapter]:
                own = self.lora_B[adapter].bias * self.scaling[adapter]
                bias = own if bias is None else bias + own.to(bias)
        return bias

    def bias_after(self, adapter: str, bias: torch.Tensor) -> torch.Tensor:
        """Add factor B's bias, if it has one, to a bias of the base layer."""
        return self.merged_bias(adapter, bias) if self.lora_bias.get(adapter) else bias

    def merged_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Add factor B's bias to the base layer's."""
        if not self.lora_bias[adapter]:
            return {}
        return {self.bias_name: self.merged_bias(adapter, tensor_of(self.get_base_layer(), self.bias_name))}

    # ------------------------------------------------------------------------------------------------------- scaling
    def _configured_scaling(self, adapter: str) -> float:
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora[adapter] else r)
