# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA on the linear layers of Megatron, whose weights are divided among processes (Shoeybi et al. 2019,
arXiv:1909.08053).

A column parallel layer holds some of the output features in each process, a row parallel one some of the input
features. The factor on that side is a layer of Megatron's of the same kind, so that the library communicates for it;
the other factor is whole in each process, and the same.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ...anatomy.walking import unwrapped
from ...config import PeftConfig
from ...layers.base_layer import BaseTunerLayer
from ...utils.error import PeftImportError, PeftNotImplementedError, PeftValueError
from ...utils.old_names import old_names
from .config import LoraConfig
from .factors import Factor
from .layer import LoraLayer, WithAdapter
from .starts import find_start
from .variants.registry import names_asked_for


def get_default_module_allowlist() -> list[str]:
    """
    List the libraries from which a config's `megatron_core` may be imported.

    Example:

        >>> from peft.tuners.lora.tp_layer import get_default_module_allowlist
        >>> get_default_module_allowlist()
        ['megatron']
    """
    return ["megatron"]


def import_megatron(config: LoraConfig) -> ModuleType:
    """
    Import what a config says holds Megatron's parallel layers, if it lies in a library that may be imported.

    Args:
        config: config with `megatron_core`.

    Raises:
        PeftValueError: if the module lies elsewhere; files of adapters must not choose what is run.
        PeftImportError: if it is not there.
    """
    name = config.megatron_core
    if not isinstance(name, str) or not name.startswith(tuple(f"{root}." for root in get_default_module_allowlist())):
        raise PeftValueError(
            f"megatron_core={name!r} is a module that may not be imported; it must lie in "
            f"{' or '.join(get_default_module_allowlist())}, such as 'megatron.core'"
        )
    try:
        core = importlib.import_module(name)
        importlib.import_module(f"{name}.tensor_parallel")
        importlib.import_module(f"{name}.transformer.transformer_config")
    except ImportError as error:
        raise PeftImportError(
            f"megatron_config needs {name!r}, which cannot be imported ({error}); run pip install megatron-core, or "
            "leave megatron_config out if the model has none of Megatron's layers"
        ) from error
    return core


def parallel_settings(config: LoraConfig) -> Any:
    """
    Make Megatron's own config of a config's `megatron_config`.

    Args:
        config: config with both fields.

    Raises:
        PeftValueError: if Megatron does not take the arguments.
    """
    make = import_megatron(config).transformer.transformer_config.TransformerConfig
    # files of adapters hold the names of types
    dtypes = {
        name: getattr(torch, value.removeprefix("torch."), value)
        for name, value in config.megatron_config.items()
        if isinstance(value, str) and value.startswith("torch.")
    }
    try:
        return make(**{**config.megatron_config, **dtypes})
    except (TypeError, ValueError, AssertionError) as error:
        raise PeftValueError(
            f"megatron_config={config.megatron_config!r} does not make a TransformerConfig of "
            f"{config.megatron_core!r}: {error}. Give it the arguments that the model's own was made with"
        ) from error


def parallel_layers(config: LoraConfig) -> dict[type[nn.Module], type[LoraLayer]]:
    """
    List the kinds of layers that a config's `megatron_config` lets LoRA adapt; none without it.

    Args:
        config: an adapter's config.
    """
    if not config.megatron_config:
        return {}
    backend = import_megatron(config).tensor_parallel
    return dict.fromkeys((backend.ColumnParallelLinear, backend.RowParallelLinear), LoraParallelLinear)


def backend_of(configs: Iterable[PeftConfig]) -> ModuleType:
    """
    Give Megatron's module `tensor_parallel` that the latest of some configs with `megatron_config` names.

    Args:
        configs: configs of a model's adapters, at least one of which has it.
    """
    *_, latest = (config for config in configs if getattr(config, "megatron_config", None))
    return import_megatron(latest).tensor_parallel


class LoraParallelLinear(WithAdapter, LoraLayer, nn.Module):
    """
    LoRA on Megatron's `ColumnParallelLinear` and `RowParallelLinear`. Like these it gives an output and a bias.

    Each process has, saves and merges its part of the delta: rows of factor B for a column parallel layer, columns of
    factor A for a row parallel one.

    Args:
        base_layer: the layer to adapt.
        adapter_name: adapter to start with.
        config: its config.
        backend: Megatron's module `tensor_parallel`, which has both classes.
        r: its rank.
        lora_alpha: numerator of its scaling.
        is_target_conv_1d_layer: kept for callers of the released package; has no effect.
        kwargs: for `update_layer`.

    Raises:
        PeftValueError: if the layer has no weight of its own, or the config asks for what parts cannot have.
    """

    supports_mixed_batch = False
    # the first dimension of Megatron's tensors is the sequence; this one says so where a layer is called by itself
    _mixed_batch_forward = BaseTunerLayer._mixed_batch_forward

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        backend: ModuleType,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        # classes, because a module can be neither copied nor pickled
        self.__dict__["_kinds"] = (backend.ColumnParallelLinear, backend.RowParallelLinear)
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, **kwargs)

    @classmethod
    def prepare_adapter(cls, base: nn.Module, config: LoraConfig, **arguments: Any) -> Mapping[str, Any]:
        """Refuse what parts of a weight cannot have; see `BaseTunerLayer.prepare_adapter`."""
        check_parallel(base, config)
        return super().prepare_adapter(base, config, **arguments)

    def _wrap(self, base_layer: nn.Module) -> None:
        super()._wrap(base_layer)
        base = self.get_base_layer()
        self.__dict__.update(in_features=base.input_size, out_features=base.output_size)

    @property
    def is_parallel_a(self) -> bool:
        """Whether factor A is the one that is divided."""
        return isinstance(self.get_base_layer(), self._kinds[1])

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: LoraConfig,
        init_method: Callable[[torch.Tensor], Any] = nn.init.xavier_normal_,
        input_is_parallel: bool = True,
        gather_output: bool = False,
        inference_mode: bool = False,
        **parallel_linear_kwargs: Any,
    ) -> None:
        """
        Add an adapter; see `LoraLayer.update_layer`.

        Args:
            adapter_name: name.
            r: rank, positive.
            lora_alpha: numerator of the scaling.
            config: the adapter's config.
            init_method: fills Megatron's part of a factor. What stands there afterwards follows from the config, but
                for a factor A of which processes have different parts, since they would draw the same numbers.
            input_is_parallel: kept for callers of the released package; the base layer says whether its input is
                divided.
            gather_output: likewise for its output.
            inference_mode: kept for callers of the released package.
            parallel_linear_kwargs: further arguments of Megatron's layer; `megatron_config` if it is not to be made
                of the config's.
        """
        super().update_layer(adapter_name, r, lora_alpha, config, init_method=init_method, **parallel_linear_kwargs)

    def make_adapter(
        self,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
        init_method: Callable[[torch.Tensor], Any] = nn.init.xavier_normal_,
        megatron_config: Any = None,
        **parallel_linear_kwargs: Any,
    ) -> None:
        """
        Make the tensors of an adapter, and note its settings; see `update_layer`.

        Args:
            adapter_name: name.
            config: the adapter's config.
            r: rank, positive.
            lora_alpha: numerator of the scaling.
            init_method: fills the part of a factor.
            megatron_config: Megatron's own config for it.
            parallel_linear_kwargs: further arguments of its layer.
        """
        check_parallel(self.get_base_layer(), config)
        super().make_adapter(adapter_name, config, r, lora_alpha)
        if megatron_config is None:
            megatron_config = parallel_settings(config) if config.megatron_config else self.get_base_layer().config
        arguments = {"config": megatron_config, "init_method": init_method, "bias": False, **parallel_linear_kwargs}
        part, whole = (self.lora_A, self.lora_B) if self.is_parallel_a else (self.lora_B, self.lora_A)
        like = whole[adapter_name].weight
        # a process that sees a part of each sequence has a part of the gradient; Megatron adds those that say so
        like.sequence_parallel = bool(getattr(megatron_config, "sequence_parallel", False))
        part[adapter_name] = self._make_part(r, arguments).to(device=like.device, dtype=like.dtype)

    def _make_factors(self, adapter: str, r: int, config: LoraConfig) -> None:
        """Make the factor that is whole in each process."""
        if self.is_parallel_a:
            self.lora_B[adapter] = Factor(self.new_parameter(self.out_features, r))
        else:
            self.lora_A[adapter] = Factor(self.new_parameter(r, self.in_features))

    def _make_part(self, r: int, arguments: dict[str, Any]) -> nn.Module:
        """Make the layer of Megatron that holds this process's part of the other factor."""
        base, (column, row) = self.get_base_layer(), self._kinds
        if getattr(base, "is_expert", False):
            arguments["is_expert"] = True
        if self.is_parallel_a:
            arguments = {"input_is_parallel": base.input_is_parallel, "skip_bias_add": True, **arguments}
            return row(self.in_features, r, **arguments)
        return column(r, self.out_features, **{"gather_output": base.gather_output, **arguments})

    def reset_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Start an adapter's factors; see `LoraLayer.reset_adapter`, and `update_layer` for parts of factor A."""
        a = self.lora_A[adapter_name].weight
        own = a.clone() if a.shape[1] < self.in_features else None
        super().reset_adapter(adapter_name, config)
        if own is not None:
            a.copy_(own)

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield keys of an adapter's tensors, without what Megatron's layers put into a state dict beside them."""
        for saved, live in super().adapter_keys(adapter_name):
            if not live.endswith("._extra_state"):
                yield saved, live

    def adapter_forward(
        self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the adapters' terms to the base layer's output; its bias, which may be added later, is passed on."""
        output, bias = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            output = (output + self.delta_forward(adapter, x)).to(output.dtype)
        return output, bias

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute scaling * B A x; between the factors Megatron communicates r features instead of all."""
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        if self.cast_input_dtype_enabled and x.dtype != a.weight.dtype:
            x = x.to(a.weight.dtype)
        hidden = _output(a(self.lora_dropout[adapter](x)))
        return _output(b(hidden * self.scaling[adapter]))


def _output(given: torch.Tensor | tuple[torch.Tensor, Any]) -> torch.Tensor:
    """Give the output of a factor, be it a layer of torch or of Megatron."""
    return given[0] if isinstance(given, tuple) else given


def check_parallel(base: nn.Module, config: LoraConfig) -> None:
    """
    Refuse what LoRA cannot do on a part of a weight.

    Args:
        base: a parallel layer of Megatron.
        config: the adapter's config.

    Raises:
        PeftValueError: if the layer computes with a weight that it is given, which may be tied; if the start takes
            factors out of the whole weight, or would be the same in each process.
        PeftNotImplementedError: for variants and for a bias of factor B.
    """
    kind = type(base).__name__
    if getattr(base, "weight", None) is None:
        raise PeftValueError(
            f"the {kind} has no weight of its own but is given one, so that nothing could be merged into it; leave it "
            "out of target_modules"
        )
    start = config.init_lora_weights
    is_part = getattr(base, "input_size_per_partition", base.input_size) < base.input_size
    if find_start(start).needs_matrix or (is_part and start is not True):
        raise PeftValueError(
            f"init_lora_weights={start!r} does not work on a {kind}, whose weight is divided among processes; use True"
        )
    useless = [*names_asked_for(config), *(["lora_bias"] if config.lora_bias else [])]
    if useless:
        raise PeftNotImplementedError(f"{', '.join(useless)} does not work on the {kind} of Megatron; leave it out")


def dispatch_megatron(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """
    Make the LoRA layer for a parallel layer of Megatron.

    Args:
        target: layer to adapt.
        adapter_name: name of the adapter.
        config: its config; without `megatron_config` nothing is looked up.
        kwargs: arguments of the layer, such as `r` and `lora_alpha`.

    Returns:
        The layer; None if the target is another kind of layer.
    """
    if not isinstance(unwrapped(target), tuple(parallel_layers(config))):
        return None
    return LoraParallelLinear(target, adapter_name, config=config, backend=backend_of([config]), **kwargs)


__getattr__ = old_names(__name__)
