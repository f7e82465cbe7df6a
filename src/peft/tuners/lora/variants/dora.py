# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
DoRA: magnitude and direction of a weight are learned apart.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv:2402.09353.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ....anatomy.kinds import along_features, can_use_weight, feature_axis
from ....layers.fused.terms import LowRank
from ....utils.error import PeftRuntimeError, PeftValueError
from ....utils.integrations import gather_params_ctx
from ....utils.kept_values import KeptValue
from ....utils.old_names import old_names
from ..config import LoraConfig
from ..low_rank import LowRankLayer
from ..maths import squares_added
from ..starts import Start
from ..whole_weight import OnWholeWeight
from .base import LoraVariant
from .dora_layers import LAYER_OF_KIND, DoraLinearLayer
from .registry import register_variant


# Whether norms are kept from one forward pass to the next; `peft.helpers.DoraCaching` changes it. Torch does not count
# writes through `.data`, so a norm can be out of date without a sign of it, and only who asks for it has it kept.
ENABLE_DORA_CACHING = False

# how often caching was switched; nothing is kept from one time to the next
_switched = 0


def switch_caching(enabled: bool) -> None:
    """
    Say whether norms are kept; what was kept before is not used again.

    Args:
        enabled: whether they are.
    """
    global ENABLE_DORA_CACHING, _switched
    ENABLE_DORA_CACHING = enabled
    _switched += 1


def cache_decorator(cache_key: str) -> Callable[[Callable], Callable]:
    """
    Make a decorator that keeps what a method gives, by adapter, while caching is on and the module in eval mode.

    Args:
        cache_key: name for what is kept; the method takes `adapter_name`.
    """

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            kept = self.__dict__.setdefault("_kept", {})
            if self.training or not ENABLE_DORA_CACHING:
                kept.clear()
                return method(self, *args, **kwargs)
            key = (cache_key, kwargs.get("adapter_name"))
            if key not in kept:
                kept[key] = method(self, *args, **kwargs)
            return kept[key]

        return wrapped

    return decorate


# numbers of a weight in half precision that are merged at a time
_MERGED_AT_A_TIME = 1 << 22


@register_variant("use_dora")
class Dora(LoraVariant):
    """
    DoRA: m * (W + scaling * B A) / ||W + scaling * B A||, with a magnitude m per output feature.

    The norm is that of the direction of each output feature, taken with the base weight alone, whichever adapters
    are active besides, and is a constant in the gradient (section 4.3 of the paper).
    """

    name = "DoRA (use_dora)"
    # Neither is part of the object's state, so that copies and pickles start without.
    _norm: KeptValue | None = None
    _norm_before_merge: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    @classmethod
    def supports(cls, layer: LowRankLayer) -> bool:
        """Say whether the layer is one of the kinds that apply their weight to an input."""
        return can_use_weight(layer.get_base_layer()) and not isinstance(layer, OnWholeWeight)

    def make(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        """Make the magnitudes."""
        dimensions = 2 + len(getattr(layer.get_base_layer(), "kernel_size", ()))
        shape = (1, layer.out_features, *[1] * (dimensions - 2)) if dimensions > 2 else (layer.out_features,)
        base = layer.get_base_layer()
        kind = next((kind for kind in LAYER_OF_KIND if isinstance(base, kind)), None)
        magnitude = LAYER_OF_KIND.get(kind, DoraLinearLayer)(bool(getattr(layer, "fan_in_fan_out", False)))
        magnitude.weight = layer.new_parameter(*shape)
        layer.container("lora_magnitude_vector")[adapter] = magnitude

    def start(self, layer: LowRankLayer, adapter: str, start: Start) -> None:
        """Start the factors, and the magnitudes so that the weight is W + scaling * B A at first."""
        magnitude = layer.lora_magnitude_vector[adapter].weight
        is_known = not (magnitude.is_meta or layer.get_base_weight().is_meta)
        # where the start takes B A out of W, the sum is what W was
        norm = weight_norm(layer, None) if is_known and start.changes_base else None
        start.start(layer, adapter)
        if is_known:
            norm = weight_norm(layer, adapter) if norm is None else norm
            magnitude.copy_(norm.view_as(magnitude))

    def saved_key(self, key: str) -> str:
        """Leave the name of the parameter out, as checkpoints do."""
        return key.removesuffix(".weight") if key.startswith("lora_magnitude_vector") else key

    def adapter_aliases(self, layer: LowRankLayer, adapter: str) -> Iterator[tuple[str, str, bool]]:
        """Yield the magnitudes, for layers whose output features are those of the owner."""
        if not _meets_input(layer, adapter):
            yield "lora_magnitude_vector", f"lora_magnitude_vector.{adapter}.weight", False

    def forget(self) -> None:
        """Drop norms that were kept."""
        self._norm = None

    def scale(self, layer: LowRankLayer, adapter: str) -> torch.Tensor:
        """
        Compute what each feature of W + scaling * B A is multiplied by: magnitude over norm, (out,).

        Args:
            layer: the layer that has the adapter's tensors.
            adapter: name.
        """
        return layer.lora_magnitude_vector[adapter].weight.flatten() / self._norm_of(layer, adapter)

    def _norm_of(self, layer: LowRankLayer, adapter: str) -> torch.Tensor:
        """Compute the norm, or take the one that was kept; that needs to be asked for, and is for evaluation only."""
        if layer.training or not ENABLE_DORA_CACHING:
            return weight_norm(layer, adapter)
        tensors, numbers = (layer.stored_weight(), *layer.delta_factors(adapter)), (layer.scaling[adapter], _switched)
        if not KeptValue.is_possible(tensors):
            return weight_norm(layer, adapter)
        norm = None if self._norm is None else self._norm.get(tensors, numbers)
        if norm is None:
            with torch.inference_mode(False):
                norm = weight_norm(layer, adapter)
            self._norm = KeptValue(norm, tensors, numbers)
        return norm

    # ------------------------------------------------------------------------------------------------------- forward
    def forward(
        self, layer: LowRankLayer, adapter: str, x: torch.Tensor, earlier: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Scale the outputs, or the inputs where a tied owner's output features are inputs here.

        That is how a follower of another kind computes with the owner's weight, without that weight being built.
        """
        source, base = layer.source(adapter), layer.get_base_layer()
        scale = self.scale(source, adapter)
        on_input = _meets_input(layer, adapter)
        if on_input and not isinstance(base, nn.Embedding):
            x = (x * along_features(base, scale)).to(x.dtype)
            return super().forward(layer, adapter, x, earlier, *args, **kwargs)
        before = layer.adapted(earlier, x, *args, **kwargs)
        result = before + layer.delta_forward(adapter, x)
        bias = layer.bias_with(earlier)
        if on_input:  # each token has a factor
            result = result * F.embedding(x, scale.unsqueeze(-1))
        elif bias is None:
            result = result * along_features(base, scale)
        else:  # which is in the result already, and is not scaled
            result = torch.addcmul(along_features(base, bias - bias * scale), result, along_features(base, scale))
        return result.to(before.dtype)

    def fused_term(self, layer: LowRankLayer, term: LowRank) -> LowRank:
        """Declare that the sum is scaled to the magnitudes; see `LoraVariant.fused_term`."""
        norm = partial(self._norm_of, layer, term.adapter)
        return replace(term, strategy=self, magnitude=layer.lora_magnitude_vector, norm=norm)

    def forward_rows(self, layer: LowRankLayer, adapter: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Refuse an adapter per sample.

        Raises:
            PeftValueError: always, as release 0.21.2 does.
        """
        raise PeftValueError(
            f"adapter_names holds {adapter!r}, and does not work with DoRA (use_dora); compute a batch per adapter"
        )

    # ------------------------------------------------------------------------------------------------------- merging
    def prepare_merge(self, layer: LowRankLayer, adapter: str) -> None:
        """Compute the norm while the base weight is itself."""
        self._norm_before_merge = weight_norm(layer, adapter, weight=layer.weight_before_merge())

    def merge_weight_(self, layer: LowRankLayer, adapter: str, weight: torch.Tensor) -> None:
        """Replace the weight by the scaled sum, some rows at a time."""
        norm, self._norm_before_merge = self._norm_before_merge, None
        if norm is None:
            norm = weight_norm(layer, adapter, weight=layer.weight_before_merge())
        scale = layer.lora_magnitude_vector[adapter].weight.flatten() / norm
        scale = scale.to(weight.device)
        left, right = (factor.to(weight.device) for factor in layer.delta_factors(adapter))
        is_last = feature_axis(layer.get_base_layer(), of_input=False) == 1
        matrix = weight.flatten(1)  # a copy, if the weight is stored otherwise
        count = max(1, _MERGED_AT_A_TIME // max(1, matrix.shape[1]))
        for start in range(0, matrix.shape[0], count):
            rows = slice(start, start + count)
            total = torch.addmm(matrix[rows].to(left.dtype), left[rows], right, alpha=layer.scaling[adapter])
            matrix[rows] = total.mul_(scale if is_last else scale[rows].unsqueeze(1))
        if matrix.data_ptr() != weight.data_ptr():
            weight.copy_(matrix.view(weight.shape))

    def unmerge_weight_(self, layer: LowRankLayer, adapter: str, weight: torch.Tensor) -> None:
        """There is no way back but the copy that is kept."""
        raise PeftRuntimeError("a merged DoRA adapter cannot be computed out of a weight")

    def can_unmerge(self) -> bool:
        """Ask for a copy of the weight, which is then restored bit for bit."""
        return False


def _meets_input(layer: LowRankLayer, adapter: str) -> bool:
    """Say whether the features that have a magnitude are input features of a layer: one that follows another kind."""
    owner = layer.source(adapter).get_base_layer()
    return feature_axis(owner, of_input=False) != feature_axis(layer.get_base_layer(), of_input=False)


def _by_feature(layer: LowRankLayer, matrix: torch.Tensor) -> torch.Tensor:
    """Turn a matrix of the base weight's layout so that each output feature is a row."""
    return matrix.T if feature_axis(layer.get_base_layer(), of_input=False) == 1 else matrix.flatten(1)


@torch.no_grad()
def base_squares(layer: LowRankLayer, weight: torch.Tensor) -> torch.Tensor:
    """
    Compute the squared norm of each output feature of a weight.

    Args:
        layer: says how the weight is laid out.
        weight: the base weight.

    Returns:
        (out,) in float32 at least.
    """
    with gather_params_ctx(weight):
        rows = _by_feature(layer, weight)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square_()


@torch.no_grad()
def weight_norm(
    layer: LowRankLayer,
    adapter: str | None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Compute ||W + s B A|| for each output feature, without B A; see `squares_added`.

    Args:
        layer: the layer that has the adapter's tensors.
        adapter: name; None for the norm of W alone.
        weight: W; the base weight if left out, without what is merged.

    Returns:
        (out,) in float32 at least, and never 0.
    """
    weight = layer.weight_before_merge() if weight is None else weight
    squares = base_squares(layer, weight)
    if adapter is not None:
        with gather_params_ctx(weight), torch.autocast(weight.device.type, enabled=False):
            squares = squares + _squares_added(layer, adapter, weight, squares.dtype)
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt_()


def _squares_added(layer: LowRankLayer, adapter: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute what B A adds to the squared norms."""
    scaling, groups = layer.scaling[adapter], getattr(layer.get_base_layer(), "groups", 1)
    b, a = (factor.to(weight.device, dtype) for factor in layer.delta_factors(adapter))
    if feature_axis(layer.get_base_layer(), of_input=False) == 1:  # each output feature shall be a row
        b, a = a.T, b.T
    return squares_added(_by_feature(layer, weight), b, a, scaling, groups)


__getattr__ = old_names(__name__)
