# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA's layers: one class per kind of base layer, each a few lines on top of the additive rule."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ...anatomy.kinds import embed, features, stores_weight_transposed
from ...anatomy.offload import computing_device
from ...anatomy.walking import unwrapped
from ...layers.base_layer import BaseTunerLayer
from ...layers.fused.path import FusedLayer
from ...layers.fused.terms import LowRank
from ...layers.merging.changes import changes_adapter
from ...layers.merging.checks import check_adapters_to_merge
from ...layers.new_tensors import check_new_parameters
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ...utils.quantization_utils import stored_weight
from .config import LoraConfig, LoraGAConfig
from .conv import OnConvolution
from .mixed_batch import MixedBatches
from .starts import Start, find_start
from .variants import LoraVariant, find_variant, make_variant, variants_by_field
from .variants.layer import VariantLayer
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


# arguments of a forward pass that are for variants of LoRA and not for the base layer
VARIANT_KWARG_KEYS = ["alora_offsets"]


class LoraLayer(MixedBatches, VariantLayer):
    """
    What LoRA's layers share: a product of two factors, how it starts, and what variants make of it.

    Args:
        base_layer: the layer to adapt.
        ephemeral_gpu_offload: use the accelerator for start-up computations only.
        kwargs: kept for callers of the released package.
    """

    # whether the adapted weight is one matrix, which files of plain LoRA have factors for
    adapts_matrix: bool = False
    # adapters of which the factor that gives the output is never trained
    _with_fixed_output: Set[str] = frozenset()

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        super().__init__(base_layer)
        self.__dict__.update(ephemeral_gpu_offload=ephemeral_gpu_offload, cast_input_dtype_enabled=True, variants={})

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """LoRA on a matrix is LoRA, and its variants say whether they are; see `BaseTunerLayer`."""
        variant = self.variants.get(adapter_name)
        return self.adapts_matrix and (variant is None or variant.supports_lora_conversion())

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> type[LoraVariant] | None:
        """
        Find the variant of LoRA that a config asks for.

        Args:
            config: an adapter's config.
            kwargs: not used; kept for callers of the released package.

        Raises:
            PeftValueError: if it asks for two at once.
        """
        return find_variant(config)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant]]:
        """The variants that this kind of layer has, by the fields of a config that ask for them."""
        return {(name,): variant for name, variant in variants_by_field().items() if variant.supports(self)}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """
        Add an adapter, with the arguments in the order of the released package; see `BaseTunerLayer.update_layer`.

        Args:
            adapter_name: name.
            r: rank, positive.
            lora_alpha: numerator of the scaling.
            config: the adapter's config.
            kwargs: `owner`, the layer to follow, whose base layer holds the same weight; nothing is made here then.

        Raises:
            PeftValueError: if `r` is not positive.
        """
        super().update_layer(adapter_name, config, r=r, lora_alpha=lora_alpha, **kwargs)

    @classmethod
    def prepare_adapter(
        cls, base: nn.Module, config: LoraConfig, present: BaseTunerLayer | None = None, **arguments: Any
    ) -> Mapping[str, Any]:
        """
        Refuse ranks, starts and variants that the layer cannot have; see `BaseTunerLayer.prepare_adapter`.

        Raises:
            PeftValueError: if the rank is not positive, or too large.
        """
        parameter_name = arguments.get("parameter_name")
        if find_variant(config) is not None:
            make_variant(cls._without_adapter(base, parameter_name), "", config, arguments.get("target_name"))
        cls._refuse(base, arguments["r"], config, parameter_name)
        name = parameter_name or cls.weight_name
        weight = stored_weight(base) if name == "weight" else getattr(base, name)
        if weight is not None:
            shapes = cls._factor_shapes(base, arguments["r"], parameter_name)
            check_new_parameters(weight, *shapes, device=computing_device(base, weight))
        return arguments

    @classmethod
    def _without_adapter(cls, base: nn.Module, parameter_name: str | None) -> "LoraLayer":
        """Make a layer without any adapter around a base layer, which does not notice, for variants to look at."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        if parameter_name is not None:
            layer.__dict__.update(parameter_name=parameter_name, weight_name=parameter_name)
        LoraLayer.__init__(layer, base)
        return layer

    @classmethod
    def _refuse(cls, base: nn.Module, r: int, config: LoraConfig, parameter_name: str | None) -> None:
        """Refuse factors that a layer cannot have; kinds of layers add to it."""
        if not isinstance(r, int) or r <= 0:
            raise PeftValueError(f"the rank r must be a positive integer, found {r!r}")

    @classmethod
    def _factor_shapes(cls, base: nn.Module, r: int, parameter_name: str | None) -> Iterator[tuple[int, ...]]:
        """Yield the shapes of the factors of a rank, if it is known how wide the layer is."""
        inputs, outputs = features(base)
        if inputs is not None and outputs is not None:
            yield from ((r, inputs), (outputs, r))

    def make_adapter(self, adapter_name: str, config: LoraConfig, r: int, lora_alpha: float, **kwargs: Any) -> None:
        """
        Make the tensors of an adapter, without values, and note its settings.

        Args:
            adapter_name: name.
            config: the adapter's config.
            r: rank, positive.
            lora_alpha: numerator of the scaling.
            kwargs: `target_name`, the full name of the target, for variants; others are kept for callers of the
                released package.

        Raises:
            PeftValueError: if `r` is not positive.
        """
        variant = make_variant(self, adapter_name, config, kwargs.get("target_name"))
        self._refuse(self.get_base_layer(), r, config, self.parameter_name)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        for name in ("use_dora", "use_rslora", "lora_bias"):
            getattr(self, name)[adapter_name] = getattr(config, name)
        if find_start(config.init_lora_weights).keeps_output_factor:
            self.__dict__.setdefault("_with_fixed_output", set()).add(adapter_name)
        self.scaling[adapter_name] = self._configured_scaling(adapter_name)
        self.lora_dropout[adapter_name] = make_dropout(config)
        self._make_factors(adapter_name, r, config)
        if variant is not None:
            self.variants[adapter_name] = variant
            variant.make(self, adapter_name, config)

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        """Make the factors of an adapter, without values; those of a linear layer, unless a subclass has others."""
        self._make_linear_factors(adapter, r, config.lora_bias)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """
        Freeze adapters or let them be trained, but for factors that never are; see `BaseTunerLayer.set_requires_grad`.

        Args:
            adapter_names: one name or several.
            requires_grad: False to freeze.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        super().set_requires_grad(names, requires_grad)
        for name in self._with_fixed_output.intersection(names):
            self.factor_weights(name)[1].requires_grad_(False)

    def remove_adapter(self, adapter_name: str) -> None:
        """
        Remove an adapter's tensors and settings; see `BaseTunerLayer.remove_adapter`.

        Args:
            adapter_name: name.
        """
        super().remove_adapter(adapter_name)
        if adapter_name in self._with_fixed_output:
            self._with_fixed_output.remove(adapter_name)

    def reset_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Start an adapter's factors, as layers of torch do, and then as the config says."""
        start, at_random = find_start(config.init_lora_weights, config), find_start(False)
        if type(start) is not type(at_random):
            at_random.start(self, adapter_name)
            if (bias := self.bias_of_factors(adapter_name)) is not None:
                bias.zero_()
        self._start_factors(adapter_name, start)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """
        Start an adapter's factors anew.

        Args:
            adapter_name: name.
            init_lora_weights: see `LoraConfig`.
        """
        self._start_factors(adapter_name, find_start(init_lora_weights))

    @changes_adapter
    @torch.no_grad()
    def _start_factors(self, adapter_name: str, start: Start) -> None:
        variant = self.variants.get(adapter_name)
        if variant is None:
            start.start(self, adapter_name)
        else:
            variant.start(self, adapter_name, start)

    # ------------------------------------------------------------- starts, by the names of the released package
    @torch.no_grad()
    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Start an adapter by PiSSA; `init_lora_weights` is "pissa" or "pissa_niter_N"."""
        find_start(init_lora_weights).start(self, adapter_name)

    @torch.no_grad()
    def olora_init(self, adapter_name: str) -> None:
        """Start an adapter by OLoRA."""
        find_start("olora").start(self, adapter_name)

    @torch.no_grad()
    def corda_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Start an adapter by CorDA."""
        find_start(init_lora_weights).start(self, adapter_name)

    @torch.no_grad()
    def lora_ga_init(self, adapter_name: str, lora_ga_config: LoraGAConfig | None) -> None:
        """Start an adapter by LoRA-GA."""
        config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=lora_ga_config)
        find_start("lora_ga", config).start(self, adapter_name)

    @torch.no_grad()
    def loftq_init(self, adapter_name: str, config: LoraConfig) -> None:
        """Start an adapter by LoftQ."""
        find_start("loftq", config).start(self, adapter_name)

    @torch.no_grad()
    def mica_init(self, adapter_name: str) -> None:
        """Start an adapter by MiCA."""
        find_start("mica").start(self, adapter_name)

    @torch.no_grad()
    def orthogonal_init(self, adapter_name: str) -> None:
        """Start an adapter with orthogonal halves."""
        find_start("orthogonal").start(self, adapter_name)


def make_dropout(config: LoraConfig) -> nn.Module:
    """Make what drops inputs of factor A, while training."""
    return nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()


# ------------------------------------------------------------------------------------------ the kinds of base layers
class WithAdapter:
    """
    The constructor of LoRA's layers, to be mixed in before `LoraLayer`: a base layer, and an adapter to start with.

    Args:
        base_layer: the layer to adapt.
        adapter_name: adapter to start with.
        config: its config.
        r: its rank.
        lora_alpha: numerator of its scaling.
        kwargs: for `LoraLayer` and for `LoraLayer.update_layer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        super().__init__(base_layer, **kwargs)
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)


class OnLinear:
    """What layers on a matrix have in common: it may be stored as (out, in) or as (in, out)."""

    def _wrap(self, base_layer: nn.Module) -> None:
        super()._wrap(base_layer)
        self.__dict__["fan_in_fan_out"] = stores_weight_transposed(self.get_base_layer())

    @property
    def factor_layout(self) -> tuple[tuple[str, bool], tuple[str, bool]]:
        """The delta is B A for a weight (out, in), and the transpose of it for one (in, out)."""
        return self.layout_for(self.fan_in_fan_out)

    @staticmethod
    def layout_for(fan_in_fan_out: bool) -> tuple[tuple[str, bool], tuple[str, bool]]:
        """
        Give the layout of factors for a matrix; see `LowRankLayer.factor_layout`.

        Args:
            fan_in_fan_out: whether it is stored as (in, out).
        """
        return (("lora_A", True), ("lora_B", True)) if fan_in_fan_out else (("lora_B", False), ("lora_A", False))


class Linear(OnLinear, WithAdapter, FusedLayer, LoraLayer, nn.Module):
    """
    LoRA on `nn.Linear` and on transformers' `Conv1D`; see `WithAdapter`.

    Args:
        base_layer: the layer to adapt.
        adapter_name: adapter to start with.
        config: its config.
        r: its rank.
        lora_alpha: numerator of its scaling.
        is_target_conv_1d_layer: kept for callers of the released package; the layer's class says it.
        kwargs: see `WithAdapter`.
    """

    adapts_matrix = True

    computing_methods = (*FusedLayer.computing_methods, "prepared_input", "output_of")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, **kwargs)

    def token_axes(self, adapter_name: str) -> dict[str, tuple[int, float]] | None:
        """Say which factor of an output head has a row for each token; see `BaseTunerLayer.token_axes`."""
        if adapter_name in self.variants:
            return None
        return {f"lora_B.{adapter_name}.{key}": (0, 0.0) for key, _ in self.lora_B[adapter_name].named_parameters()}

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute scaling * B A x."""
        # the small side is scaled: r features instead of out_features
        hidden = self.lora_A[adapter](self.prepared_input(adapter, x)) * self.scaling[adapter]
        return self.output_of(adapter, hidden)

    def prepared_input(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """
        Give what factor A meets: the input in the factor's type, some of it dropped while training.

        Args:
            adapter: name.
            x: the layer's input, (..., in).
        """
        dtype = self.lora_A[adapter].weight.dtype
        if self.cast_input_dtype_enabled and x.dtype != dtype:
            x = x.to(dtype)
        return self.lora_dropout[adapter](x)

    def output_of(self, adapter: str, hidden: torch.Tensor) -> torch.Tensor:
        """
        Bring what factor A gives to the layer's output by factor B, with its bias if it has one.

        Args:
            adapter: name.
            hidden: (..., r), scaled already.
        """
        b = self.lora_B[adapter]
        if b.bias is None:
            return b(hidden)
        return F.linear(hidden, b.weight, b.bias * self.scaling[adapter])

    def fused_term(self, adapter: str) -> LowRank | None:
        """Declare what an adapter adds; a variant of LoRA says what it makes of that. See `FusedLayer.fused_term`."""
        term = LowRank(adapter, self.lora_A, self.lora_B, self.lora_dropout, self.scaling, self.variants)
        variant = self.variants.get(adapter)
        return term if variant is None else variant.fused_term(self, term)


class Embedding(WithAdapter, LoraLayer, nn.Module):
    """
    LoRA on `nn.Embedding`: the factors are A (r, num_embeddings) and B (embedding_dim, r).

    Args:
        base_layer: the layer to adapt.
        adapter_name: adapter to start with.
        config: its config.
        r: its rank.
        lora_alpha: numerator of its scaling.
        init_lora_weights: kept for callers of the released package; the config says it.
        kwargs: see `WithAdapter`.
    """

    is_embedding = True
    adapts_matrix = True
    fan_in_fan_out = False
    factor_names = ("lora_embedding_A", "lora_embedding_B")
    factor_layout = (("lora_embedding_A", True), ("lora_embedding_B", True))

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        init_lora_weights: bool | str = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, **kwargs)

    @classmethod
    def _refuse(cls, base: nn.Module, r: int, config: LoraConfig, parameter_name: str | None) -> None:
        super()._refuse(base, r, config, parameter_name)
        if config.lora_bias:
            raise PeftValueError("lora_bias=True does not work on an embedding, which has no bias; leave it out")

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        self.lora_embedding_A[adapter] = self.new_parameter(r, self.in_features)
        self.lora_embedding_B[adapter] = self.new_parameter(self.out_features, r)

    def token_axes(self, adapter_name: str) -> dict[str, tuple[int, float]] | None:
        """Say which factor has a column for each token; see `BaseTunerLayer.token_axes`."""
        return None if adapter_name in self.variants else {f"lora_embedding_A.{adapter_name}": (1, 0.0)}

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Look up rows of A and bring them to full width; dropout has no meaning for token ids."""
        left, right = self.delta_factors(adapter)
        return (embed(self.get_base_layer(), x, left) * self.scaling[adapter]) @ right


class _ConvNd(OnConvolution, WithAdapter, LoraLayer, nn.Module):
    """LoRA on a convolution, of a rank that is a multiple of its groups; see `OnConvolution` and `WithAdapter`."""


class Conv1d(_ConvNd):
    """LoRA on `nn.Conv1d`."""


class Conv2d(_ConvNd):
    """LoRA on `nn.Conv2d`."""


class Conv3d(_ConvNd):
    """LoRA on `nn.Conv3d`."""


class MultiheadAttention(OnAttention, WithAdapter, LoraLayer, nn.Module):
    """LoRA on the projection of queries, keys and values in `nn.MultiheadAttention`; see `OnAttention`."""

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


class ParamWrapper(OnParameter, WithAdapter, LoraLayer, nn.Module):
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
        kwargs: see `WithAdapter`.
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
        **kwargs: Any,
    ) -> None:
        self.__dict__.update(parameter_name=parameter_name, weight_name=parameter_name)
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, **kwargs)


# kind of base layer -> its layer; the first that fits is taken
LAYER_CLASSES: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Embedding: Embedding,
    Conv1D: Linear,
    NonDynamicallyQuantizableLinear: OutputProjection,  # which nn.MultiheadAttention has
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.MultiheadAttention: MultiheadAttention,
}


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
    base = unwrapped(target)
    layer_cls = next((layer_cls for kind, layer_cls in LAYER_CLASSES.items() if isinstance(base, kind)), None)
    return None if layer_cls is None else layer_cls(target, adapter_name, config=config, **kwargs)


__getattr__ = old_names(__name__)
