# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA's layers: one class per kind of base layer, each a few lines on top of the additive rule."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.error import PeftRuntimeError, PeftValueError
from ...utils.warning import warn
from .._kinds import embed, stores_weight_transposed
from .._layer import AdditiveLayer, BaseTunerLayer
from .._merging import check_adapters_to_merge
from .config import LoraConfig
from .initialization import find_initialization


__all__ = ["BaseTunerLayer", "Embedding", "Linear", "LoraConfig", "LoraLayer", "check_adapters_to_merge"]

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
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)


class LoraLayer(AdditiveLayer):
    """
    What LoRA's layers share: W + scaling * B A, with A (r, in) and B (out, r).

    Subclasses keep the factors in `lora_A` and `lora_B`, or in `lora_embedding_A` and `lora_embedding_B`.

    Args:
        base_layer: the layer to adapt.
        ephemeral_gpu_offload: use the accelerator for start-up computations only.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
    is_embedding = False

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        self._wrap(base_layer)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_dora: dict[str, bool] = {}
        self.use_rslora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.ephemeral_gpu_offload = ephemeral_gpu_offload
        self.cast_input_dtype_enabled = True

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """
        Make the tensors of an adapter.

        Args:
            adapter_name: name.
            r: rank, positive.
            lora_alpha: numerator of the scaling.
            config: the adapter's config.

        Raises:
            PeftValueError: if `r` is not positive.
        """
        if not isinstance(r, int) or r <= 0:
            raise PeftValueError(f"the rank r must be a positive integer, found {r!r}")
        start = find_initialization(config.init_lora_weights)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_dora[adapter_name] = config.use_dora
        self.use_rslora[adapter_name] = config.use_rslora
        self.lora_bias[adapter_name] = config.lora_bias
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._make_factors(adapter_name, r, config)
        start(self, adapter_name)
        self._trainable_adapters.add(adapter_name)

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        """Make the uninitialised factors of an adapter."""
        raise NotImplementedError

    def factor_weights(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Give the factor that meets the input, (r, in), and the one that gives the output, (out, r)."""
        raise NotImplementedError

    def delta_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Give two matrices whose product is the delta without its scaling, in the layout of the base weight.

        Returns:
            (rows, r) and (r, columns), views of the factors.
        """
        raise NotImplementedError

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """
        Start an adapter's factors anew.

        Args:
            adapter_name: name.
            init_lora_weights: see `LoraConfig`.
        """
        find_initialization(init_lora_weights)(self, adapter_name)

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
        factor = sign * self.scaling[adapter]
        if left.dtype == weight.dtype and left.device == weight.device:
            weight.addmm_(left, right, alpha=factor)
            return
        left, right = left.to(weight.device), right.to(weight.device)
        for start in range(0, weight.shape[0], MERGE_ROWS):
            rows = slice(start, start + MERGE_ROWS)
            weight[rows] += (left[rows] @ right).mul_(factor).to(weight.dtype)

    # ------------------------------------------------------------------------------------------------------- scaling
    def set_scale(self, adapter: str, scale: float) -> None:
        """
        Set an adapter's scaling to a multiple of the one that its config says.

        Args:
            adapter: name; a layer that does not have it stays as it is.
            scale: multiple.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._configured_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """
        Multiply the scaling of the active adapters.

        Args:
            scale: factor.
        """
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """
        Undo `scale_layer` for the active adapters.

        Args:
            scale: factor to divide by; left out, the scaling becomes the one that the config says.
        """
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                configured = self._configured_scaling(adapter)
                self.scaling[adapter] = configured if scale is None else self.scaling[adapter] / scale

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
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = stores_weight_transposed(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        bias = self.new_parameter(self.out_features) if config.lora_bias else None
        if bias is not None:
            nn.init.zeros_(bias)
        self.lora_A[adapter] = Factor(self.new_parameter(r, self.in_features))
        self.lora_B[adapter] = Factor(self.new_parameter(self.out_features, r), bias)

    def factor_weights(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Give A and B."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

    def delta_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Give B and A for a weight (out, in), their transposes for one (in, out)."""
        a, b = self.factor_weights(adapter)
        return (a.T, b.T) if self.fan_in_fan_out else (b, a)

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

    def check_mergeable(self, adapter_name: str) -> None:
        """
        Refuse an adapter with a bias on a layer without one.

        Raises:
            PeftRuntimeError: in that case.
        """
        if self.lora_bias.get(adapter_name) and self.get_base_layer().bias is None:
            raise PeftRuntimeError(
                f"adapter {adapter_name!r} was made with lora_bias=True, and the "
                f"{type(self.get_base_layer()).__name__} layer has no bias to merge it into; keep the adapter unmerged"
            )

    def merge_into(self, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Add the delta to the weight, and factor B's bias to the bias."""
        super().merge_into(adapter_name, tensors)
        self._add_bias_(adapter_name, tensors, 1.0)

    def unmerge_from(self, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Subtract what was added."""
        super().unmerge_from(adapter_name, tensors)
        self._add_bias_(adapter_name, tensors, -1.0)

    def _add_bias_(self, adapter: str, tensors: dict[str, torch.Tensor], sign: float) -> None:
        if self.lora_bias[adapter]:
            bias = tensors["bias"]
            bias.add_(self.lora_B[adapter].bias.to(bias.device, bias.dtype), alpha=sign * self.scaling[adapter])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """LoRA is LoRA."""
        return True


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
        kwargs: for `LoraLayer`.
    """

    is_embedding = True

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
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        if config.lora_bias:
            raise PeftValueError("lora_bias=True does not work on an embedding, which has no bias; leave it out")
        self.lora_embedding_A[adapter] = self.new_parameter(r, self.in_features)
        self.lora_embedding_B[adapter] = self.new_parameter(self.out_features, r)

    def factor_weights(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Give A and B."""
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def delta_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the transposes: the weight is (num_embeddings, embedding_dim)."""
        a, b = self.factor_weights(adapter)
        return a.T, b.T

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Look up rows of A and bring them to full width; dropout has no meaning for token ids."""
        left, right = self.delta_factors(adapter)
        return (embed(self.get_base_layer(), x, left) * self.scaling[adapter]) @ right


def warn_about_layout(config: LoraConfig, layer: nn.Module) -> None:
    """Warn where `fan_in_fan_out` contradicts the layer; the layer is believed."""
    transposed = stores_weight_transposed(layer)
    if config.fan_in_fan_out != transposed and not isinstance(layer, nn.Embedding):
        warn(
            f"fan_in_fan_out={config.fan_in_fan_out} does not fit a {type(layer).__name__} layer, which stores its "
            f"weight as {'(in, out)' if transposed else '(out, in)'}; {transposed} is used"
        )
        config.fan_in_fan_out = transposed


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

    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for kind, layer_cls in LoraModel.layer_classes.items():
        if isinstance(base, kind):
            return layer_cls(target, adapter_name, config=config, **kwargs)
    return None
