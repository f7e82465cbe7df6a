# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA's layers: one class per kind of base layer, each a few lines on top of the additive rule."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...anatomy.kinds import embed, stores_weight_transposed
from ...anatomy.offload import tensor_of
from ...anatomy.walking import unwrapped
from ...layers.additive import AdditiveLayer
from ...layers.base_layer import BaseTunerLayer
from ...layers.merging.changes import changes_adapter
from ...layers.merging.checks import check_adapters_to_merge
from ...layers.scaling import Scaled
from ...utils.error import PeftRuntimeError, PeftValueError
from .config import LoraConfig
from .conv import OnConvolution
from .initialization import StartMethods, find_initialization
from .mixed_batch import MixedBatches
from .room import RankAxis, WithinRoom
from .variants import LoraVariant, make_variant
from .whole_weight import OnAttention, OnOutputProjection, OnParameter, warn_of_dropout


__all__ = [
    "BaseTunerLayer",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "LoraVariant",
    "MultiheadAttention",
    "OutputProjection",
    "ParamWrapper",
    "check_adapters_to_merge",
]

# rows of a merged weight that are computed at a time where the factors have another type than the weight
MERGE_ROWS = 4096


class Factor(nn.Linear):
    """
    A linear layer around a weight that is made elsewhere, so that nothing is drawn at random twice.

    Args:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        out_features, in_features = weight.shape
        self.__dict__.update(in_features=in_features, out_features=out_features)
        self._parameters.update(weight=weight, bias=bias)


class TiedFactor(nn.Module):
    """
    A factor of an adapter that follows another layer: a view of the owner's factor, without a parameter.

    Args:
        owner: the layer that has the factors.
        adapter: name of the adapter.
        side: which of the owner's two delta factors.
        transposed: whether this layer keeps the factor the other way round.
    """

    bias = None

    def __init__(self, owner: "LoraLayer", adapter: str, side: int, transposed: bool):
        super().__init__()
        # in a tuple, so that the owner does not become a submodule
        self._owner = (owner,)
        self.adapter, self.side, self.transposed = adapter, side, transposed

    @property
    def weight(self) -> torch.Tensor:
        """The factor as the owner has it at this moment, on the owner's storage."""
        weight = self._owner[0].delta_factors(self.adapter)[self.side]
        return weight.T if self.transposed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the factor as a linear layer would."""
        return F.linear(x, self.weight)


class FactorDict(nn.ParameterDict):
    """Factors by adapter name as tensors, be they parameters or views of an owner's."""

    def __getitem__(self, key: str) -> torch.Tensor:
        value = super().__getitem__(key)
        return value.weight if isinstance(value, TiedFactor) else value


class TiedSettings(dict):
    """
    Settings by adapter name; those of an adapter that follows another layer are read from there.

    Args:
        settings: the layer's own settings.
        owners: adapter name -> layer that is followed.
        name: attribute that holds these settings.
    """

    def __init__(self, settings: dict[str, Any], owners: dict[str, "LoraLayer"], name: str):
        super().__init__(settings)
        self.owners, self.name = owners, name

    def __missing__(self, adapter: str) -> Any:
        return getattr(self.owners[adapter], self.name)[adapter]


class _NoFactors(Mapping):
    """What a layer has in place of the factors of another kind of layer: nothing, and nothing can be put there."""

    def __getitem__(self, adapter: str) -> Any:
        raise KeyError(adapter)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __reduce__(self) -> str:
        return "NO_FACTORS"


NO_FACTORS = _NoFactors()


class LoraLayer(StartMethods, MixedBatches, Scaled, AdditiveLayer):
    """
    What LoRA's layers share: W + scaling * B A, with A (r, in) and B (out, r).

    Subclasses keep the factors in `lora_A` and `lora_B`, or in `lora_embedding_A` and `lora_embedding_B`.

    Args:
        base_layer: the layer to adapt.
        ephemeral_gpu_offload: use the accelerator for start-up computations only.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
    _settings = ("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias")
    is_embedding = False
    has_views_of_owner = True
    bias_name = "bias"
    # The attributes that hold the two matrices whose product is the delta, left one first, and whether they hold them
    # transposed. Subclasses say it for their layout of the weight.
    factor_layout: tuple[tuple[str, bool], tuple[str, bool]]

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        self._wrap(base_layer)
        self.__dict__.update({name: {} for name in self._settings})
        self.__dict__.update(dict.fromkeys(self.adapter_layer_names, NO_FACTORS))
        # strategies of the adapters that are not plain LoRA
        variants: dict[str, LoraVariant] = {}
        self.__dict__.update(
            ephemeral_gpu_offload=ephemeral_gpu_offload, cast_input_dtype_enabled=True, variants=variants
        )
        self._modules["lora_dropout"] = nn.ModuleDict()
        for name in sorted(name for name, _ in self.factor_layout):
            del self.__dict__[name]
            self._modules[name] = FactorDict() if self.is_embedding else nn.ModuleDict()

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: LoraConfig,
        *,
        owner: "LoraLayer | None" = None,
        **kwargs: Any,
    ) -> None:
        """
        Make the tensors of an adapter.

        Args:
            adapter_name: name.
            r: rank, positive.
            lora_alpha: numerator of the scaling.
            config: the adapter's config.
            owner: layer to follow, whose base layer holds the same weight; nothing is made here then.

        Raises:
            PeftValueError: if `r` is not positive.
        """
        if owner is not None:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
            self.follow(adapter_name, owner)
            return
        if not isinstance(r, int) or r <= 0:
            raise PeftValueError(f"the rank r must be a positive integer, found {r!r}")
        find_initialization(config.init_lora_weights)
        variant = make_variant(self, adapter_name, config)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_dora[adapter_name] = config.use_dora
        self.use_rslora[adapter_name] = config.use_rslora
        self.lora_bias[adapter_name] = config.lora_bias
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._make_factors(adapter_name, r, config)
        if variant is not None:
            self.variants[adapter_name] = variant
            variant.make(self, adapter_name, config)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._trainable_adapters.add(adapter_name)

    def container(self, name: str) -> nn.ModuleDict:
        """
        Give the container for tensors that a variant of LoRA has beside the factors; it is made when it is needed.

        Args:
            name: attribute that holds the tensors by adapter name, each as a module.
        """
        if name not in self._modules:
            self.__dict__.pop(name, None)
            self._modules[name] = nn.ModuleDict()
            if name not in self.adapter_layer_names:
                self.__dict__["adapter_layer_names"] = (*self.adapter_layer_names, name)
        return self._modules[name]

    def remove_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter's tensors and settings; see `BaseTunerLayer.remove_adapter`.

        Args:
            adapter_name: name.
        """
        super().remove_adapter(adapter_name)
        variant = self.variants.pop(adapter_name, None)
        if variant is not None:
            variant.detach(adapter_name)

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        """Make the uninitialised factors of an adapter."""
        raise NotImplementedError

    def _make_linear_factors(self, adapter: str, r: int, with_bias: bool) -> None:
        """Make the factors of a weight that is a matrix, or a row of matrices: (r, in) and (out, r)."""
        bias = self.new_parameter(self.out_features) if with_bias else None
        if bias is not None:
            nn.init.zeros_(bias)
        self.lora_A[adapter] = Factor(self.new_parameter(r, self.in_features))
        self.lora_B[adapter] = Factor(self.new_parameter(self.out_features, r), bias)

    def follow(self, adapter_name: str, owner: "LoraLayer") -> None:
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
        if adapter_name in owner.variants:
            self.variants[adapter_name] = owner.variants[adapter_name]

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield keys of an adapter's tensors; see `BaseTunerLayer.adapter_keys`."""
        variant = self.variants.get(adapter_name)
        for saved, live in super().adapter_keys(adapter_name):
            yield saved if variant is None else variant.saved_key(saved), live

    def adapter_aliases(self, adapter_name: str) -> Iterator[tuple[str, str, bool]]:
        """Yield the keys of factors that this layer takes from an owner; see `BaseTunerLayer.adapter_aliases`."""
        if adapter_name not in self._owners:
            return
        owner = self._owners[adapter_name]
        for (name, transposed), (owned, owned_transposed) in zip(self.factor_layout, owner.factor_layout, strict=True):
            saved = name if self.is_embedding else f"{name}.weight"
            live = f"{owned}.{adapter_name}" + ("" if owner.is_embedding else ".weight")
            yield saved, live, transposed != owned_transposed
        if adapter_name in self.variants:
            yield from self.variants[adapter_name].adapter_aliases(self, adapter_name)

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
            room = self._factor(name, adapter_name).shape[place.axis]
            if room != place.length(source.r[adapter_name]):
                key = name if self.is_embedding else f"{name}.weight"
                forms[key] = WithinRoom(place, source.r[adapter_name], room)
        return forms

    def _factor(self, name: str, adapter: str) -> torch.Tensor:
        value = getattr(self, name)[adapter]
        return value.weight if isinstance(value, nn.Module) else value

    def factor_weights(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the factor that meets the input, (r, in), and the one that gives the output, (out, r)."""
        into, out = sorted(name for name, _ in self.factor_layout)
        return self._factor(into, adapter), self._factor(out, adapter)

    def delta_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Give two matrices whose product is the delta without its scaling, in the layout of the base weight.

        Returns:
            (rows, r) and (r, columns), views of the factors.
        """
        factors = (self._factor(name, adapter) for name, _ in self.factor_layout)
        left, right = (w.T if t else w for w, (_, t) in zip(factors, self.factor_layout, strict=True))
        return left, right

    @changes_adapter
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """
        Start an adapter's factors anew.

        Args:
            adapter_name: name.
            init_lora_weights: see `LoraConfig`.
        """
        variant = self.variants.get(adapter_name)
        with torch.no_grad():
            if variant is None:
                self.start_factors(adapter_name, init_lora_weights)
            else:
                variant.start(self, adapter_name, init_lora_weights)

    def start_factors(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """
        Start the two factors of an adapter, and nothing else that it may have.

        Args:
            adapter_name: name.
            init_lora_weights: see `LoraConfig`.
        """
        find_initialization(init_lora_weights)(self, adapter_name)

    def reset_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Start an adapter's factors anew, as the config says."""
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)

    # --------------------------------------------------------------------------------------------------- the variants
    def adapter_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer with adapters that it has; see `AdditiveLayer.adapter_forward`."""
        if not self.variants:
            return super().adapter_forward(adapters, x, *args, **kwargs)
        return self.adapted(adapters, x, *args, **kwargs)

    def adapted(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Compute the layer with adapters, of which some may be other than plain LoRA, each on top of those before.

        Args:
            adapters: names; none for the base layer.
            x: its input.
            args: other arguments of the base layer.
            kwargs: likewise.

        Returns:
            The output, in the type of the base layer's.
        """
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        *earlier, adapter = adapters
        variant = self.variants.get(adapter)
        if variant is not None:
            return variant.forward(self, adapter, x, earlier, *args, **kwargs)
        result = self.adapted(earlier, x, *args, **kwargs)
        return (result + self.delta_forward(adapter, x)).to(result.dtype)

    def forward_rows(
        self, adapter: str, rows: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute some samples of a batch with one adapter; see `BaseTunerLayer.forward_rows`."""
        if adapter in self.variants:
            return self.variants[adapter].forward_rows(self, adapter, rows, x, *args, **kwargs)
        return super().forward_rows(adapter, rows, x, *args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        """Switch between training and evaluation; see `torch.nn.Module.train`."""
        for variant in self.variants.values():
            variant.forget()
        return super().train(mode)

    def prepare_merge(self, adapter: str) -> None:
        """Let a variant compute what it needs the unchanged weight for; see `BaseTunerLayer.prepare_merge`."""
        if adapter in self.variants:
            self.variants[adapter].prepare_merge(self, adapter)

    def merge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Add the delta, or what a variant has in its place."""
        if adapter in self.variants:
            self.variants[adapter].merge_weight_(self, adapter, weight)
        else:
            super().merge_weight_(adapter, weight)

    def unmerge_weight_(self, adapter: str, weight: torch.Tensor) -> None:
        """Subtract the delta, or undo what a variant has done in its place."""
        if adapter in self.variants:
            self.variants[adapter].unmerge_weight_(self, adapter, weight)
        else:
            super().unmerge_weight_(adapter, weight)

    def adds_delta(self, adapter: str) -> bool:
        """Say whether the adapter is plain LoRA; a variant may do something else with the weight."""
        return adapter not in self.variants

    def can_unmerge(self, adapter: str) -> bool:
        """Say whether the adapter can be taken out of a weight again; plain LoRA can."""
        return adapter not in self.variants or self.variants[adapter].can_unmerge()

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
        self.add_product_(left, right, weight, sign * self.scaling[adapter])

    @staticmethod
    def add_product_(left: torch.Tensor, right: torch.Tensor, matrix: torch.Tensor, scale: float) -> None:
        """
        Add a product of two matrices to a third one in place.

        Args:
            left: (rows, r).
            right: (r, columns).
            matrix: (rows, columns), may be of another type.
            scale: multiple of the product to add.
        """
        if left.dtype == matrix.dtype and left.device == matrix.device:
            matrix.addmm_(left, right, alpha=scale)
            return
        left, right = left.to(matrix.device), right.to(matrix.device)
        for start in range(0, matrix.shape[0], MERGE_ROWS):
            rows = slice(start, start + MERGE_ROWS)
            matrix[rows] += (left[rows] @ right).mul_(scale).to(matrix.dtype)

    # -------------------------------------------------------------------------------------------------- its own bias
    def check_mergeable(self, adapter_name: str) -> None:
        """
        Refuse an adapter with a bias on a layer without one, and what a variant cannot merge.

        Raises:
            PeftRuntimeError: in the first case.
        """
        if adapter_name in self.variants:
            self.variants[adapter_name].check_mergeable(self, adapter_name)
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


class Linear(LoraLayer, nn.Module):
    """
    LoRA on `nn.Linear` and on transformers' `Conv1D`.

    Args:
        base_layer: the layer to adapt.
        adapter_name: adapter to start with.
        config: its config.
        r: its rank.
        lora_alpha: numerator of its scaling.
        is_target_conv_1d_layer: kept for callers of the released package; the layer's class says it.
        owner: layer to follow; see `LoraLayer.update_layer`.
        kwargs: for `LoraLayer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        *,
        owner: LoraLayer | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.fan_in_fan_out = stores_weight_transposed(unwrapped(base_layer))
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config, owner=owner)

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        self._make_linear_factors(adapter, r, config.lora_bias)

    @property
    def factor_layout(self) -> tuple[tuple[str, bool], tuple[str, bool]]:
        """The delta is B A for a weight (out, in), and the transpose of it for one (in, out)."""
        return (("lora_A", True), ("lora_B", True)) if self.fan_in_fan_out else (("lora_B", False), ("lora_A", False))

    def token_axes(self, adapter_name: str) -> dict[str, tuple[int, float]] | None:
        """Say which factor of an output head has a row for each token; see `BaseTunerLayer.token_axes`."""
        if adapter_name in self.variants:
            return None
        return {f"lora_B.{adapter_name}.{key}": (0, 0.0) for key, _ in self.lora_B[adapter_name].named_parameters()}

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute scaling * B A x."""
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        if self.cast_input_dtype_enabled and x.dtype != a.weight.dtype:
            x = x.to(a.weight.dtype)
        hidden = a(self.lora_dropout[adapter](x))
        # the small side is scaled: r features instead of out_features
        hidden = hidden * self.scaling[adapter]
        if b.bias is None:
            return b(hidden)
        return F.linear(hidden, b.weight, b.bias * self.scaling[adapter])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """LoRA is LoRA, and its variants say it."""
        variant = self.variants.get(adapter_name)
        return variant is None or variant.supports_lora_conversion()


class Embedding(LoraLayer, nn.Module):
    """
    LoRA on `nn.Embedding`: the factors are A (r, num_embeddings) and B (embedding_dim, r).

    Args:
        base_layer: the layer to adapt.
        adapter_name: adapter to start with.
        config: its config.
        r: its rank.
        lora_alpha: numerator of its scaling.
        init_lora_weights: kept for callers of the released package; the config says it.
        owner: layer to follow; see `LoraLayer.update_layer`.
        kwargs: for `LoraLayer`.
    """

    is_embedding = True
    factor_layout = (("lora_embedding_A", True), ("lora_embedding_B", True))

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        init_lora_weights: bool | str = True,
        *,
        owner: LoraLayer | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config, owner=owner)

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        if config.lora_bias:
            raise PeftValueError("lora_bias=True does not work on an embedding, which has no bias; leave it out")
        self.lora_embedding_A[adapter] = self.new_parameter(r, self.in_features)
        self.lora_embedding_B[adapter] = self.new_parameter(self.out_features, r)

    def token_axes(self, adapter_name: str) -> dict[str, tuple[int, float]] | None:
        """Say which factor has a column for each token; see `BaseTunerLayer.token_axes`."""
        return None if adapter_name in self.variants else {f"lora_embedding_A.{adapter_name}": (1, 0.0)}

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Look up rows of A and bring them to full width; dropout has no meaning for token ids."""
        left, right = self.delta_factors(adapter)
        return (embed(self.get_base_layer(), x, left) * self.scaling[adapter]) @ right


class _ConvNd(OnConvolution, LoraLayer, nn.Module):
    """
    LoRA on a convolution; see `OnConvolution`.

    Args:
        base_layer: the layer to adapt.
        adapter_name: adapter to start with.
        config: its config.
        r: its rank, a multiple of the base layer's groups.
        lora_alpha: numerator of its scaling.
        owner: layer to follow; see `LoraLayer.update_layer`.
        kwargs: for `LoraLayer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        *,
        owner: LoraLayer | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config, owner=owner)


class Conv1d(_ConvNd):
    """LoRA on `nn.Conv1d`."""


class Conv2d(_ConvNd):
    """LoRA on `nn.Conv2d`."""


class Conv3d(_ConvNd):
    """LoRA on `nn.Conv3d`."""


class MultiheadAttention(OnAttention, LoraLayer, nn.Module):
    """
    LoRA on the projection of queries, keys and values in `nn.MultiheadAttention`; see `OnAttention`.

    Args:
        base_layer: the layer to adapt.
        adapter_name: adapter to start with.
        config: its config.
        r: its rank.
        lora_alpha: numerator of its scaling.
        owner: layer to follow; see `LoraLayer.update_layer`.
        kwargs: for `LoraLayer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        *,
        owner: LoraLayer | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.__dict__.update(in_features=self.embed_dim, out_features=3 * self.embed_dim)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config, owner=owner)

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Compute attention with the active adapters.

        Args:
            query: as the base layer takes it.
            args: its other arguments: keys, values, masks.
            kwargs: likewise.
        """
        return OnAttention.forward(self, query, *args, **kwargs)


class OutputProjection(OnOutputProjection, Linear):
    """LoRA on the `out_proj` of `nn.MultiheadAttention`; see `OnOutputProjection`."""

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        warn_of_dropout(config)
        super()._make_factors(adapter, r, config)


class ParamWrapper(OnParameter, LoraLayer, nn.Module):
    """
    LoRA on a parameter that a module holds directly, such as the experts of a layer; see `OnParameter`.

    Several parameters of one module have a wrapper each, one around the other.

    Args:
        base_layer: the module, or the wrapper for another parameter of it.
        adapter_name: adapter to start with.
        parameter_name: name of the parameter in the module.
        config: the adapter's config.
        r: its rank.
        lora_alpha: numerator of its scaling.
        is_target_conv_1d_layer: kept for callers of the released package; has no effect.
        owner: layer to follow; see `LoraLayer.update_layer`.
        kwargs: for `LoraLayer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        *,
        owner: LoraLayer | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.parameter_name = self.weight_name = parameter_name
        LoraLayer.__init__(self, base_layer, **kwargs)
        *experts, rows, columns = self.get_base_weight().shape if self.get_base_weight().dim() > 1 else (1, 1)
        self.__dict__.update(num_experts=experts[0] if experts else 1, out_features=rows, in_features=columns)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config, owner=owner)


def dispatch_default(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    """
    Make the LoRA layer for a layer of a float model.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config.
        parameter_name: kept for callers of the released package.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer, or None if LoRA has none for that kind.
    """
    from .model import LoraModel

    base = unwrapped(target)
    for kind, layer_cls in LoraModel.layer_classes.items():
        if isinstance(base, kind):
            return layer_cls(target, adapter_name, config=config, **kwargs)
    return None
