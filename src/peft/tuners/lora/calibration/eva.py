# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
EVA: running a model on data for the components of its layers' inputs, and giving them to an adapter.

Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024, arXiv:2410.07170.
"""

import copy
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ....anatomy.walking import names_of_modules
from ....utils.error import PeftTypeError, PeftValueError
from ....utils.warning import warn
from ..config import EvaConfig, LoraConfig
from ..layer import Linear
from .cache_file import CacheFile
from .eva_components import Search, fingerprint
from .eva_rows import (
    LayerInputs,
    forward_fn_dict,
    functions_by_layer,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from .eva_writing import own_layers, write_components
from .observing import devices_of, in_mode, move_to_device, observing_inputs
from .targets import find_calibration_targets


# more times the rank than any layer has features
_LARGEST_RHO = 1000


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    cache_file: str | os.PathLike | None = None,
) -> dict[str, torch.Tensor]:
    """
    Find the components of layers' inputs on some data, and how many of them each layer should have.

    The model is run without gradients, in evaluation mode and with its adapters switched off, batch by batch, until
    the components do not turn any more. Inputs are not kept: a layer has its components, and layers with equal
    inputs share them.

    Args:
        model: a `PeftModel` with a LoRA adapter, or a base model.
        dataloader: batches, with a length; it is gone through again and again.
        peft_config: the adapter's config; for a `PeftModel` it is there.
        forward_fn: runs the model with a batch.
        prepare_model_inputs_fn: says which positions of a batch count, from the batch and the config; None for all.
        prepare_layer_inputs_fn: gives the rows (rows, in) of a layer that count, from its arguments, what the function
            above gave (a copy of the batch if that is None), and its name; by layer, if a dictionary; None for all.
        adapter_name: adapter of the `PeftModel`.
        gather_distributed_inputs: join the rows of all processes of `torch.distributed`.
        show_progress_bar: show how many layers are done.
        cache_file: file that keeps what is found while that is going on. If the search is interrupted it goes on from
            there the next time.

    Returns:
        Name of a layer in this model -> (its rank, in), in float64.

    Raises:
        PeftValueError: for configs, data and models that cannot work.
        PeftTypeError: for a loader without length, and batches without names.

    Example:

        >>> import torch
        >>> from peft import EvaConfig, LoraConfig, get_eva_state_dict
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
        >>> found = get_eva_state_dict(
        ...     net, [torch.randn(8, 4)], config, forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
        ...     prepare_layer_inputs_fn=None, show_progress_bar=False,
        ... )
        >>> found["0"].shape
        torch.Size([2, 4])
    """
    config = _config_of(model, peft_config, adapter_name)
    if not hasattr(dataloader, "__len__"):
        raise PeftTypeError(
            f"EVA goes through its data again and again, so the dataloader needs a length; found a "
            f"{type(dataloader).__name__}, give a DataLoader or a list of batches"
        )
    if not len(dataloader):
        raise PeftValueError("the dataloader is empty; EVA needs data like that which the adapter is trained on")
    layers, ranks = _layers_to_look_at(model, config, adapter_name)
    return _Run(
        model,
        dataloader,
        config,
        layers,
        forward_fn or forward_fn_dict,
        prepare_model_inputs_fn,
        functions_by_layer(prepare_layer_inputs_fn, list(layers)),
        gather_distributed_inputs,
    ).find(ranks, CacheFile(cache_file), show_progress_bar)


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    cache_file: str | os.PathLike | None = None,
) -> None:
    """
    Start a LoRA adapter by EVA: factor A from the components of inputs, ranks where they explain most.

    The adapter goes on to change nothing at first. Layers that are worth no rank lose it. If anything is refused, the
    model stays as it was.

    Args:
        model: a `PeftModel` whose active adapter has `init_lora_weights="eva"`.
        dataloader: see `get_eva_state_dict`; not needed with `eva_state_dict`.
        eva_state_dict: what that function has given; it is not changed.
        forward_fn: see there.
        prepare_model_inputs_fn: see there.
        prepare_layer_inputs_fn: see there.
        adapter_name: name of the adapter.
        gather_distributed_inputs: see there.
        show_progress_bar: see there.
        cache_file: see there.

    Raises:
        PeftValueError: for models, configs and data that cannot work.
        PeftTypeError: for a loader without length, and batches without names.

    Example:

        >>> import torch
        >>> from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(net, config, low_cpu_mem_usage=True)
        >>> initialize_lora_eva_weights(
        ...     model, [torch.randn(8, 4)], forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
        ...     prepare_layer_inputs_fn=None, show_progress_bar=False,
        ... )
        >>> rows = model.get_base_model()[0].lora_A["default"].weight.detach()
        >>> torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-5)
        True
    """
    if not _has_adapters(model):
        raise PeftValueError(
            f"EVA starts an adapter that is in a model, found a {type(model).__name__} without one; call "
            "get_peft_model first"
        )
    if len(model.active_adapters) > 1:
        raise PeftValueError(
            f"EVA starts one adapter, and {', '.join(model.active_adapters)} are active; activate {adapter_name!r} "
            "alone"
        )
    config = _config_of(model, None, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise PeftValueError("EVA needs a dataloader, or the eva_state_dict that get_eva_state_dict has given")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            config,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
            cache_file=cache_file,
        )
    write_components(model, adapter_name, config, dict(eva_state_dict))


# -------------------------------------------------------------------------------------------- what is asked for
def _has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model") and hasattr(model, "base_model")


def _config_of(model: nn.Module, given: LoraConfig | None, adapter_name: str) -> LoraConfig:
    config = given
    if config is None:
        configs = model.peft_config if _has_adapters(model) else {}
        if adapter_name not in configs:
            raise PeftValueError(
                f"there is no adapter {adapter_name!r} in a {type(model).__name__}; give peft_config, the config of "
                "the adapter that is going to be made"
            )
        config = configs[adapter_name]
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        found = getattr(config, "init_lora_weights", type(config).__name__)
        raise PeftValueError(f"EVA starts LoRA with init_lora_weights='eva', found {found!r}")
    if config.eva_config is None:
        warn("init_lora_weights='eva' without eva_config: its defaults are used; give eva_config=EvaConfig(...)")
        config = copy.copy(config)
        config.eva_config = EvaConfig()
    return config


def _layers_to_look_at(
    model: nn.Module, config: LoraConfig, adapter_name: str
) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Find the layers and their ranks; those that follow a tied one have no factors to be started."""
    if not _has_adapters(model):
        if config.target_modules is None:
            config = copy.copy(config)
            kinds = (nn.Linear, Conv1D)
            config.target_modules = [name for name, m in names_of_modules(model).items() if isinstance(m, kinds)]
        targets = find_calibration_targets(model, config)
        return {name: t.layer for name, t in targets.items()}, {name: t.rank for name, t in targets.items()}
    layers = {n: layer for n, layer in own_layers(model, adapter_name).items() if isinstance(layer, Linear)}
    if not layers:
        raise PeftValueError(f"adapter {adapter_name!r} has no linear layer, and EVA starts no others; use True")
    return layers, {name: layer.r[adapter_name] for name, layer in layers.items()}


def _rho(model: nn.Module, config: LoraConfig) -> float:
    """Give the config's rho; an absurd one means as many components as there are."""
    rho = config.eva_config.rho
    if rho <= _LARGEST_RHO:
        return rho
    largest = max((size for parameter in model.parameters() for size in parameter.shape), default=1)
    return max(largest // config.r, 1)


# ---------------------------------------------------------------------------------------------- running the model
class _Run:
    """
    A model, run on data again and again while inputs of its layers are looked at.

    Args:
        model: the model.
        dataloader: the data.
        config: config of the adapter, with its `eva_config`.
        layers: name -> layer to look at.
        forward_fn: see `get_eva_state_dict`.
        prepare_inputs: see there, `prepare_model_inputs_fn`.
        rows_of: name of a layer -> what picks its rows.
        gathers: whether to join the rows of all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        config: LoraConfig,
        layers: Mapping[str, nn.Module],
        forward_fn: Callable[[nn.Module, Any], Any],
        prepare_inputs: Callable[[Any, LoraConfig], Any] | None,
        rows_of: Mapping[str, LayerInputs],
        gathers: bool,
    ) -> None:
        self.model, self.dataloader, self.config, self.layers = model, dataloader, config, layers
        self.forward_fn, self.prepare_inputs, self.rows_of = forward_fn, prepare_inputs, rows_of
        devices = devices_of(model)
        self.device = devices[0] if len(devices) == 1 else None
        if len(devices) > 1:
            warn(
                f"the model is on several devices ({', '.join(map(str, devices))}), so batches are not moved; the "
                "dataloader has to give them where the model expects them"
            )
        self.gathers = gathers and torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.gathers:
            warn(
                "EVA joins the rows of all processes; if each of them gets the same data, use "
                "gather_distributed_inputs=False"
            )

    def find(self, ranks: Mapping[str, int], file: CacheFile, show_progress_bar: bool) -> dict[str, torch.Tensor]:
        """
        Look at inputs until all components have settled.

        Args:
            ranks: name of a layer -> rank.
            file: keeps what is found.
            show_progress_bar: whether to show how far it is.
        """
        eva = self.config.eva_config
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(in_mode(self.model, training=False))
            if _has_adapters(self.model):
                stack.enter_context(self.model.base_model.adapters_disabled())
            seen = self._look_at_first_batch()
            search = Search(
                ranks,
                _rho(self.model, self.config),
                eva.tau,
                {name: key for name, (key, _, _) in seen.items()},
                {name: features for name, (_, features, _) in seen.items()},
            )
            search.restore(file, {name: device for name, (_, _, device) in seen.items()})
            step = stack.enter_context(file.keeping(search.state))
            bar = stack.enter_context(
                tqdm(total=len(search.groups), desc="EVA", unit="input", disable=not show_progress_bar)
            )
            while not search.is_done:
                for batch in self._batches_from(search.batches % len(self.dataloader)):
                    if search.is_done:
                        break
                    self._run(search.listening, lambda name, rows: search.groups[name].update(rows, eva.tau), batch)
                    search.share_ranks()
                    search.batches += 1
                    step()
                    bar.update(search.progress - bar.n)
                search.check_progress()
        return search.result(eva.whiten)

    def _batches_from(self, first: int) -> Iterator[Any]:
        for number, batch in enumerate(self.dataloader):
            if number >= first:
                yield batch

    def _run(self, names: Iterable[str], look: Callable[[str, torch.Tensor], None], batch: Any) -> None:
        """Run the model with a batch, and look at the rows of some layers that count."""
        if self.device is not None:
            batch = move_to_device(batch, self.device)
        prepare = self.prepare_inputs
        prepared = copy.copy(batch) if prepare is None else prepare(batch, self.config)

        def look_at(name: str, inputs: tuple[Any, ...]) -> None:
            rows = self.rows_of[name](inputs, prepared, name)
            if not isinstance(rows, torch.Tensor) or rows.dim() != 2:
                found = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
                raise PeftValueError(f"prepare_layer_inputs_fn must give rows (rows, in) for {name!r}, found {found}")
            rows = rows.detach().float()
            look(name, _rows_of_all_processes(rows) if self.gathers else rows)

        with observing_inputs({name: self.layers[name] for name in names}, look_at):
            self.forward_fn(self.model, batch)

    def _look_at_first_batch(self) -> dict[str, tuple[Hashable, int, torch.device]]:
        """Give for each layer that is called a key of its inputs, their number of features, and where they are."""
        seen: dict[str, tuple[Hashable, int, torch.device]] = {}

        def look(name: str, rows: torch.Tensor) -> None:
            seen[name] = fingerprint(rows), rows.shape[1], rows.device

        self._run(list(self.layers), look, next(iter(self.dataloader)))
        if not seen:
            raise PeftValueError(
                f"the model calls none of the layers that EVA looks at ({', '.join(self.layers)}); check forward_fn"
            )
        return seen


def _rows_of_all_processes(rows: torch.Tensor) -> torch.Tensor:
    """Join the rows of all processes, in their order; each may have another number of them."""
    count = torch.distributed.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(count)]
    torch.distributed.all_gather(lengths, torch.tensor([len(rows)], device=rows.device))
    most = int(max(lengths))
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), rows.shape[1])])
    gathered = [torch.empty_like(padded) for _ in range(count)]
    torch.distributed.all_gather(gathered, padded)
    return torch.cat([part[: int(length)] for part, length in zip(gathered, lengths, strict=True)])
