# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a start of LoRA's factors says about itself, and how one is found by the value of `init_lora_weights`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping

from torch import nn

from ....utils.error import PeftValueError
from ..config import LoraConfig
from ..low_rank import LowRankLayer


_STARTS: dict[bool | str, type["Start"]] = {}


class Start(ABC):
    """
    How the factors of an adapter start: a strategy that `register_start` enters under a value of `init_lora_weights`.

    Args:
        name: the value, as the config has it.

    Attributes:
        changes_base: whether the product of the factors is taken out of base weights, but for those of embeddings.
            See `FromBaseWeight`, which does it, and puts it off until all layers of an injection are made.
        is_taken_out: whether the base weight and the product of the first factors add up to the weight as it was, so
            that plain LoRA can be made of the adapter.
        keeps_output_factor: whether the factor that gives the output is never trained.
        needs_matrix: whether it works for weights that are matrices only, and not for experts, whose factors hold
            one after the other.
        family: what to tell of the values beside the registered one, if there are such.
        config: config of the adapter, for starts with settings; None where only the value is known.
    """

    changes_base: bool = False
    is_taken_out: bool = True
    keeps_output_factor: bool = False
    needs_matrix: bool = True
    family: str | None = None
    config: LoraConfig | None = None

    def __init__(self, name: bool | str) -> None:
        self.name = name

    @classmethod
    def from_name(cls, name: str) -> "Start | None":
        """
        Make the strategy for another value than the registered one; None if the value does not belong to it.

        Args:
            name: the value in lower case.
        """
        return None

    def refusal(
        self, base: nn.Module, rank: int, layer: nn.Module | None = None, adapter: str | None = None
    ) -> Exception | None:
        """
        Say what stands against starting an adapter like that: the kind of the layer, how its weight is kept, the rank.

        It is asked for all layers before a model is changed.

        Args:
            base: the base layer.
            rank: rank of the factors.
            layer: the adapter layer around it; anything else if there is none yet.
            adapter: name of the adapter to start.

        Returns:
            The exception to raise, or None.
        """
        return None

    def warn_of_targets(self, targets: Mapping[str, nn.Module]) -> None:  # noqa: B027
        """
        Warn of what should be known about the targets of an adapter before they are started.

        Args:
            targets: name -> base layer, none of which the start refuses.
        """

    @abstractmethod
    def start(self, layer: LowRankLayer, adapter: str) -> None:
        """
        Write to the factors in place. It is called without gradients.

        Args:
            layer: the layer that has the factors; see `LowRankLayer.factor_weights`.
            adapter: name.
        """


def register_start(name: bool | str) -> Callable[[type[Start]], type[Start]]:
    """
    Make a decorator that enters a strategy, so that `init_lora_weights=name` finds it.

    Args:
        name: the value; strings are compared without regard to case.

    Raises:
        PeftValueError: if the name is taken.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.methods import Start, register_start
        >>> @register_start("ones")
        ... class Ones(Start):
        ...     def start(self, layer, adapter):
        ...         into, out = layer.factor_weights(adapter)
        ...         into.fill_(1)
        ...         out.zero_()
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> model = get_peft_model(net, LoraConfig(r=1, target_modules=["0"], init_lora_weights="ones"))
        >>> model.get_base_model()[0].lora_A["default"].weight.tolist()
        [[1.0, 1.0]]
    """

    def enter(start_cls: type[Start]) -> type[Start]:
        key = _key(name)
        if key in _STARTS:
            raise PeftValueError(f"a start named {name!r} is registered already; choose another name")
        _STARTS[key] = start_cls
        return start_cls

    return enter


def registered_starts() -> list[bool | str]:
    """List the values of `init_lora_weights` that strategies are registered under, in lower case."""
    return list(_STARTS)


def find_start(name: bool | str | None, config: LoraConfig | None = None) -> Start:
    """
    Find the strategy for a value of `init_lora_weights`.

    Args:
        name: the value; None is True.
        config: config of the adapter, if there is one.

    Raises:
        PeftValueError: if no start has that name.
    """
    found = _look_up(name)
    if found is not None:
        found.config = config
        return found
    families = [start_cls.family for start_cls in _STARTS.values() if start_cls.family]
    raise PeftValueError(
        f"init_lora_weights={name!r} is not known; choose one of "
        f"{' or '.join([', '.join(map(repr, _STARTS)), *families])}"
    )


def changes_base(name: bool | str | None) -> bool:
    """Say whether a value of `init_lora_weights` takes the product of the factors out of base weights."""
    found = _look_up(name)
    return found is not None and found.changes_base


def check_start(
    start: Start,
    targets: Mapping[str, tuple[nn.Module, nn.Module, int]],
    shared: Collection[Collection[str]],
) -> None:
    """
    Refuse a start where it cannot work, before anything is changed.

    Args:
        start: the strategy.
        targets: name of a module that gets factors of its own -> base layer, module as it stands there, rank.
        shared: for each weight that several modules hold, the names of those that do not follow one of them.

    Raises:
        PeftValueError: for kinds, ranks, ties and neighbours that cannot work.
        PeftTypeError: for types of weights that cannot.
    """
    for target, (base, layer, rank) in targets.items():
        refusal = start.refusal(base, rank, layer)
        if refusal is not None:
            raise type(refusal)(f"{target!r}: {refusal}")
        if not start.changes_base or isinstance(base, nn.Embedding):
            continue
        apart = next((holders for holders in shared if target in holders and len(holders) > 1), None)
        if apart:
            raise PeftValueError(
                f"init_lora_weights={start.name!r} changes the weight of {target!r} itself, which "
                f"{', '.join(repr(other) for other in apart if other != target)} would get too without the adapter; "
                "set ensure_weight_tying=True where all of them can follow, or use another initialisation"
            )
    start.warn_of_targets({target: base for target, (base, _, _) in targets.items()})


def _key(name: bool | str | None) -> bool | str:
    return name.lower() if isinstance(name, str) else True if name is None else bool(name)


def _look_up(name: bool | str | None) -> Start | None:
    key = _key(name)
    if key in _STARTS:
        return _STARTS[key](key)
    if not isinstance(key, str):
        return None
    return next((made for start_cls in _STARTS.values() if (made := start_cls.from_name(key)) is not None), None)
