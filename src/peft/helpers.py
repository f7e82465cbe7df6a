# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Small helpers around models with adapters."""

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .anatomy.walking import bare_modules
from .config import PeftConfig
from .layers.merging import taken_out
from .models.peft_model import PeftModel
from .tuners.base import BaseTunerLayer
from .tuners.lora import dora
from .tuners.lora.layer import LoraLayer
from .utils.error import PeftError, PeftTypeError, PeftValueError


__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


# ------------------------------------------------------------------------------------------ signatures
def update_forward_signature(model: PeftModel) -> None:
    """
    Let `model.forward` show the signature of the base model's forward method, where it has none of its own.

    Tools such as transformers' `Trainer` read it to find out which columns of a data set the model takes.

    Args:
        model: the model; its forward method does what it did before.

    Example:

        >>> import inspect
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.helpers import update_forward_signature
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> update_forward_signature(model)
        >>> list(inspect.signature(model.forward).parameters)
        ['input']
    """
    _show_signature(model, "forward", model.get_base_model().forward)


def update_generate_signature(model: PeftModel) -> None:
    """
    Let `model.generate` show the signature of the base model's generate method, where it has none of its own.

    Args:
        model: the model; without a generate method in the base model nothing is done.
    """
    base = getattr(model.get_base_model(), "generate", None)
    if base is not None:
        _show_signature(model, "generate", base)


def update_signature(model: PeftModel, method: str = "all") -> None:
    """
    Let methods of a model show the signatures that the base model's methods have.

    Args:
        model: the model.
        method: "forward", "generate" or "all".

    Raises:
        PeftValueError: for any other method.
    """
    if method not in ("forward", "generate", "all"):
        raise PeftValueError(f"method={method!r} is not known; choose 'forward', 'generate' or 'all'")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _show_signature(model: PeftModel, name: str, base: Callable) -> None:
    present = getattr(model, name)
    kinds = {parameter.kind for parameter in inspect.signature(present).parameters.values()}
    if kinds - {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return  # it says itself what it takes
    own = getattr(type(model), name)

    # a function of the model, not a bound method, so that a copy of the model calls its own
    @functools.wraps(base)
    def with_signature(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    with_signature.__signature__ = _with_self(inspect.signature(base))
    setattr(model, name, MethodType(with_signature, model))


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    others = list(signature.parameters.values())
    positional_only = [p for p in others if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    return signature.replace(parameters=[itself, *positional_only, *others[len(positional_only) :]])


# ------------------------------------------------------------------------------------------ files
def check_if_peft_model(model_name_or_path: str | os.PathLike) -> bool:
    """
    Say whether an adapter is to be found in a folder or on the hub.

    Args:
        model_name_or_path: folder, or hub id.

    Example:

        >>> from peft.helpers import check_if_peft_model
        >>> check_if_peft_model("/no/such/folder")
        False
    """
    try:
        PeftConfig.from_pretrained(os.fspath(model_name_or_path))
    except (PeftError, OSError, ValueError, KeyError, TypeError):
        return False
    return True


# ------------------------------------------------------------------------------------------ layers
@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """
    Multiply the scaling of all LoRA adapters inside a context.

    Args:
        model: a model with LoRA layers; adapters that are merged are merged anew.
        multiplier: factor; 0 switches the adapters off, values between let them take part.

    Raises:
        PeftTypeError: if the factor is not a number.
        PeftValueError: if the model has no LoRA layer.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.helpers import rescale_adapter_scale
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(net, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
        >>> with rescale_adapter_scale(model, 0.5):
        ...     print(net[0].scaling["default"])
        0.5
        >>> net[0].scaling["default"]
        1.0
    """
    if not isinstance(multiplier, (int, float)):
        raise PeftTypeError(f"multiplier must be a number, found {type(multiplier).__name__}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise PeftValueError("the model has no LoRA layer whose scaling could be changed")
    # in tied layers the scaling is the owner's, which is among the layers too; what stands in the table is their own
    before = [dict(layer.scaling) for layer in layers]
    with _merged_taken_out(layers):
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update({name: value * multiplier for name, value in scaling.items()})
    try:
        yield
    finally:
        with _merged_taken_out(layers):
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update((name, value) for name, value in scaling.items() if name in layer.scaling)


@contextmanager
def _merged_taken_out(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in {name: None for layer in layers for name in layer.merged_adapters}:
            stack.enter_context(taken_out(layers, name))
        yield


class DoraCaching:
    """
    Says whether DoRA's layers keep the norms of their weights while a model is in eval mode.

    They do not by default. Where they do, a norm is kept for as long as base weight, factors and scaling stay as they
    are, and takes one number per output feature. Writes through `.data` are the exception: torch does not count them,
    so who keeps norms must not write like that. In a context the setting holds until its end; a call changes it for
    good. Nothing is kept beyond the change of a setting.

    Args:
        enabled: False to compute norms in each forward pass.

    Example:

        >>> from peft.helpers import DoraCaching
        >>> from peft.tuners.lora import dora
        >>> with DoraCaching():
        ...     dora.ENABLE_DORA_CACHING
        True
        >>> dora.ENABLE_DORA_CACHING
        False
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(dora.ENABLE_DORA_CACHING)
        dora.switch_caching(self.enabled)

    def __exit__(self, type: Any, value: Any, traceback: Any) -> None:
        dora.switch_caching(self._before.pop())

    def __call__(self, enabled: bool = True) -> None:
        """
        Change the setting until it is changed again.

        Args:
            enabled: whether norms are kept.
        """
        dora.switch_caching(enabled)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """
    Let adapter layers take their inputs as they come inside a context, instead of casting them to their own type.

    It is meant for models that cast layer by layer, as diffusers' layerwise casting does.

    Args:
        model: a model with adapter layers.
        active: False to do nothing.
    """
    layers = [
        module
        for module in model.modules()
        if active and isinstance(module, BaseTunerLayer) and hasattr(module, "cast_input_dtype_enabled")
    ]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


# ------------------------------------------------------------------------------------------ choosing targets
class KappaTuneSelector:
    """
    Chooses the layers to adapt by the condition numbers of their weights: KappaTune (arXiv:2506.16289).

    A weight with a small condition number, the ratio of its greatest to its smallest singular value, spreads over all
    directions; it is less specialised, and changing it costs less of what the model knows.

    Args:
        model: the base model.
        max_dim_size_to_analyze: weights with a greater side are passed over, since they take long.
        moe_param_suffixes: endings of names of parameters that hold the matrices of several experts, (experts, rows,
            columns); their condition number is the mean over the experts.
        show_progress: show a progress bar.

    Example:

        >>> import torch
        >>> from peft.helpers import KappaTuneSelector
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 100.0]]))
        >>> _ = net[1].weight.data.copy_(torch.eye(2))
        >>> KappaTuneSelector(net, show_progress=False).get_best_targets(num_modules=1)
        ['1']
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: Sequence[str] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = tuple(
            moe_param_suffixes or (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
        )
        self.show_progress = show_progress

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """
        Give names of linear layers, that with the smallest condition number first.

        Args:
            top_p: share of the layers, at least one layer.
            num_modules: number of layers, if `top_p` is left out.
            threshold: greatest condition number, if both are left out.
        """
        return _choose(self._module_numbers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """
        Give names of parameters with the matrices of experts, that with the smallest condition number first.

        Args:
            top_p: share of the parameters, at least one.
            num_modules: number of parameters, if `top_p` is left out.
            threshold: greatest condition number, if both are left out.
        """
        return _choose(self._parameter_numbers, top_p, num_modules, threshold)

    @functools.cached_property
    def _module_numbers(self) -> dict[str, float]:
        weights = {name: m.weight for name, m in bare_modules(self.model) if isinstance(m, nn.Linear)}
        return self._condition_numbers(weights, dimensions=2)

    @functools.cached_property
    def _parameter_numbers(self) -> dict[str, float]:
        parameters = {
            f"{name}.{key}": parameter
            for name, module in bare_modules(self.model)
            for key, parameter in module._parameters.items()
            if parameter is not None and f".{name}.{key}".endswith(self.moe_param_suffixes)
        }
        return self._condition_numbers(parameters, dimensions=3)

    @torch.no_grad()
    def _condition_numbers(self, weights: dict[str, torch.Tensor], dimensions: int) -> dict[str, float]:
        numbers = {}
        for name, weight in tqdm(weights.items(), desc="condition numbers", disable=not self.show_progress):
            fits = weight.dim() == dimensions and max(weight.shape[-2:]) <= self.max_dim_size_to_analyze
            if fits and weight.is_floating_point() and not weight.is_meta:
                matrices = weight.float().unsqueeze(0) if dimensions == 2 else weight
                numbers[name] = sum(map(_condition_number, matrices)) / len(matrices)
        return numbers


def _condition_number(matrix: torch.Tensor) -> float:
    singular = torch.linalg.svdvals(matrix.float())
    return (singular[0] / singular[-1]).item() if singular[-1] > 0 else math.inf


def _choose(
    numbers: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    names = sorted(numbers, key=numbers.__getitem__)
    if top_p is not None:
        return names[: max(1, int(top_p * len(names)))]
    if num_modules is not None:
        return names[:num_modules]
    return names if threshold is None else [name for name in names if numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """
    Choose targets for a LoRA config by condition numbers; see `KappaTuneSelector`.

    Args:
        model: the base model.
        top_p: share of the layers to adapt.
        max_dim_size_to_analyze: weights with a greater side are passed over.
        moe_param_suffixes: endings of names of parameters with the matrices of experts.
        show_progress: show a progress bar.

    Returns:
        `target_modules` and `target_parameters`, each a list of names, or None if there are none.

    Example:

        >>> import torch
        >>> from peft.helpers import find_kappa_target_modules
        >>> find_kappa_target_modules(torch.nn.Sequential(torch.nn.Linear(2, 2)), show_progress=False)
        {'target_modules': ['0'], 'target_parameters': None}
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p) or None,
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
