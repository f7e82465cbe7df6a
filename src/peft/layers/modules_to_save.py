# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Modules of the base model that adapters train in full."""

from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..utils.error import PeftTypeError, PeftValueError
from ..utils.integrations import gather_params_ctx
from ..utils.same_tensor import identity_of
from .borrowing import copy_borrowing, shared_places
from .training_wrapper import AuxiliaryTrainingWrapper


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """
    A module of the base model and, per adapter, a copy of it that is trained and saved in full.

    Args:
        module_to_save: the module of the base model; it stays frozen and unchanged.
        adapter_name: adapter to start with.
        tied_module: see `update`.
        only: see `update`.
    """

    adapter_layer_names = ("modules_to_save",)

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        tied_module: "ModulesToSaveWrapper | None" = None,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        super().__init__(module_to_save, adapter_name, tied_module=tied_module, only=only)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Make the container for the copies."""
        self.modules_to_save = nn.ModuleDict()

    def update(
        self,
        adapter_name: str,
        tied_module: "ModulesToSaveWrapper | None" = None,
        *,
        only: Collection[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Make a copy for an adapter.

        Parameters that the module shares with `tied_module` are not copied: the copy gets the very parameters that
        the adapter trains there, so that nothing is held twice, not even while this runs.

        Args:
            adapter_name: name.
            tied_module: wrapper of the module to follow; it has this adapter already.
            only: names of the module's parameters to train; the copy shares the others with the base model. All
                parameters if left out.
            kwargs: none.
        """
        lent = {}
        if tied_module is not None:
            theirs = tied_module.modules_to_save[adapter_name]
            shared = shared_places(self.original_module, tied_module.original_module)
            lent = {name: (theirs, there) for name, (_, there) in shared.items()}
        if only is not None:
            own = dict(self.original_module.named_parameters(remove_duplicate=False))
            lent.update((name, (self.original_module, name)) for name in own if name not in only)
        with gather_params_ctx(self.original_module.parameters()):
            self.modules_to_save[adapter_name], borrowed = copy_borrowing(self.original_module, lent)
        self.borrow(adapter_name, borrowed, tied_module)
        self.set_requires_grad(adapter_name)

    def parameters_in_place_of(self, adapter_name: str) -> dict[Hashable, nn.Parameter]:
        """Map the identity of each parameter of the base module to what an adapter has in its place."""
        copied = dict(self.modules_to_save[adapter_name].named_parameters(remove_duplicate=False))
        own = self.original_module.named_parameters(remove_duplicate=False)
        return {identity_of(p): copied[name] for name, p in own}

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that an adapter trains here; those that its copy shares with the base are none."""
        if adapter_name in self.modules_to_save:
            base = {id(parameter) for parameter in self.original_module.parameters()}
            yield from (p for p in self.modules_to_save[adapter_name].parameters() if id(p) not in base)

    def fill_missing(self, adapter_name: str, config: PeftConfig) -> None:
        """Start parameters of a copy that a checkpoint has left without storage, from the base module."""
        if adapter_name not in self.modules_to_save:
            return
        base = dict(self.original_module.named_parameters(remove_duplicate=False))
        copied = self.modules_to_save[adapter_name]
        for name, parameter in list(copied.named_parameters(remove_duplicate=False)):
            if parameter.is_meta:
                values = base[name].detach().clone()
                _replace_parameter(copied, name, nn.Parameter(values, parameter.requires_grad))
        self.take_borrowed()

    def _current_module(self) -> nn.Module:
        if not self._disable_adapters:
            for name in self._active_adapter:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self.original_module

    def _mixed_batch_forward(
        self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        result = self.original_module(x, *args, **kwargs)
        if not isinstance(result, torch.Tensor):
            raise PeftTypeError(
                "adapter_names mixes what modules trained in full give for each sample, a row of a tensor, as "
                "nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d and nn.Conv3d do; "
                f"{type(self.original_module).__name__} gives a {type(result).__name__}. Give each adapter a batch of "
                "its own"
            )
        for name in dict.fromkeys(adapter_names):
            if name in self.modules_to_save:
                rows = torch.tensor([i for i, wanted in enumerate(adapter_names) if wanted == name], device=x.device)
                part = self.modules_to_save[name](x[rows], *args, **kwargs)
                result = result.index_copy(0, rows, part.to(result.dtype))
        return result

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield for each tensor of a copy its key in a checkpoint and its key in this module's state dict."""
        if adapter_name in self.modules_to_save:
            copied = self.modules_to_save[adapter_name].state_dict(keep_vars=True)
            base = {id(parameter) for parameter in self.original_module.parameters()}
            for key, tensor in copied.items():
                if id(tensor) not in base:
                    yield key, f"modules_to_save.{adapter_name}.{key}"

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """
        Give the copy (to merge) or the module of the base model.

        Raises:
            PeftValueError: with `safe_merge`, if the copy has entries that are not finite.
        """
        chosen = self.check_set_adapter(self._active_adapter if adapter_names is None else adapter_names)
        if not merge or chosen is None:
            return self.original_module
        module = self.modules_to_save[chosen]
        if safe_merge and not all(torch.isfinite(p).all() for p in module.parameters()):
            raise PeftValueError(f"the copy that adapter {chosen!r} has trained has entries that are not finite")
        return module


def _replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, key = name.rpartition(".")
    module.get_submodule(path)._parameters[key] = parameter
