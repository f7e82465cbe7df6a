# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What stands beside the base model as a whole: the small model, its projection and its head."""

from collections.abc import Iterable, Iterator

from torch import nn

from ...layers.adapter_module import AdapterModule


class ShadowParts(AdapterModule, nn.ModuleDict):
    """
    Modules by adapter name, which stand on the tuner.

    Attributes:
        frozen: adapter name -> names of its parameters that are never trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self._active_adapter = []
        self.frozen: dict[str, frozenset[str]] = {}

    @property
    def available_adapters(self) -> set[str]:
        """Names of the adapters that have something here."""
        return set(self._modules)

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of one adapter."""
        if adapter_name in self._modules:
            yield from self[adapter_name].parameters()

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """
        Freeze adapters or let them be trained, but for what is never trained.

        Args:
            adapter_names: one name or several.
            requires_grad: False to freeze.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.forget_trained_before(name)
            if name in self._modules:
                frozen = self.frozen.get(name, ())
                for key, parameter in self[name].named_parameters():
                    parameter.requires_grad_(requires_grad and key not in frozen)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the adapters that are used; others are frozen.

        Args:
            adapter_names: one name or several.
            inference_mode: freeze the chosen ones too.
        """
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in self._modules:
            self.set_requires_grad(name, name in self._active_adapter and not inference_mode)

    def remove_adapter(self, adapter_name: str) -> None:
        """
        Remove what an adapter has here.

        Args:
            adapter_name: name.
        """
        self._modules.pop(adapter_name, None)
        self.frozen.pop(adapter_name, None)
        self.forget_trained_before(adapter_name)

    def ignored_keys(self, adapter_name: str) -> Iterator[str]:
        """Yield keys of embeddings that the released package saves for a small model which is given the base's."""
        parts = self[adapter_name].named_modules() if adapter_name in self._modules else ()
        for name, part in parts:
            prefix = f"default.{name}." if name else "default."
            yield from (f"{prefix}{key}.weight" for key, child in part._modules.items() if child is None)

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield keys of an adapter's tensors: in checkpoints every adapter is called default."""
        if adapter_name in self._modules:
            for key in self[adapter_name].state_dict():
                yield f"default.{key}", f"{adapter_name}.{key}"
