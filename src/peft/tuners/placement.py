# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""An adapter on its way into a model: which layers are placed, and what hooks of clients have made of the plan."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..anatomy.walking import stack_of
from ..layers.base_layer import BaseTunerLayer
from ..surgery.slots import Slots
from ..utils.error import PeftTypeError, PeftValueError
from ..utils.near_names import FEW
from ..utils.warning import warn
from .plan import AdapterPlan, Target


class Placement:
    """
    What is planned, and what is placed of it so far.

    Args:
        plan: what to do.
        shared: containers of tensors that layers share, by name; empty for methods without.
        slots: the places of the model.

    Attributes:
        layers: full name of a target -> its layer.
        owners: full name of a target that follows another one -> that of the other.
        left_out: full names of targets for which a hook has made no layer.
    """

    def __init__(self, plan: AdapterPlan, shared: dict[str, nn.Module], slots: Slots) -> None:
        self.plan, self.slots = plan, slots
        self.shared: dict[str, Any] = {"shared": shared} if shared else {}
        self.layers: dict[str, BaseTunerLayer] = {}
        self.owners = {target.name: target.owner for target in plan.targets if target.owner is not None}
        self.left_out: list[str] = []
        self._targets = {target.name: target for target in plan.targets}
        # id of a module -> what stands in its place now, and the other way round
        self._outermost: dict[int, nn.Module] = {}
        self._first: dict[int, nn.Module] = {}

    def outermost(self, module: nn.Module) -> nn.Module:
        """Give what stands in the place of a module now: several parameters of one have layers around each other."""
        return self._outermost.get(id(module), module)

    def put(self, base: nn.Module, layer: nn.Module) -> None:
        """Put a layer wherever the model holds what it is around."""
        self.slots.replace(base, layer)
        self._stands_for(base, layer)

    def _stands_for(self, base: nn.Module, layer: nn.Module) -> None:
        first = self._first.pop(id(base), base)
        self._outermost[id(first)] = layer
        self._first[id(layer)] = first

    def target_for(
        self,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str | None,
        parameter_name: str | None,
    ) -> Target:
        """
        Find what is planned for a call of the hook, which may come from a client's code.

        Raises:
            PeftTypeError: if the target is no module.
            PeftValueError: if the arguments contradict each other, or the plan.
        """
        call = f"_create_and_replace(..., target_name={target_name!r}, current_key={current_key!r})"
        if adapter_name != self.plan.adapter_name:
            raise PeftValueError(
                f"{call} was called for adapter {adapter_name!r} while {self.plan.adapter_name!r} is injected; pass "
                "on the adapter_name that the hook is given"
            )
        if not isinstance(target, nn.Module):
            raise PeftTypeError(f"{call} needs a module as its target, found a {type(target).__name__}")
        if parent._modules.get(target_name) is not target:
            raise PeftValueError(
                f"{call}: {target_name!r} of the {type(parent).__name__} that was given as parent is not the "
                f"{type(target).__name__} that was given as target; pass the module that holds the target, and its "
                "name in there"
            )
        if current_key is None:
            current_key = next((name for name, one in self._targets.items() if one.module is target), None)
        if current_key is None:
            raise PeftValueError(
                f"{call} needs current_key, the full name of the target; pass on what the hook is given"
            )
        planned = self._targets.get(current_key)
        if planned is None:
            return Target(current_key, target, parameter_name, None, {}, None)
        return planned._replace(module=target) if self.outermost(planned.module) is target else planned

    def owner_of(self, target: Target, hook: Callable) -> BaseTunerLayer:
        """
        Give the layer that a target follows; owners come first, so it is there.

        Raises:
            PeftValueError: if a hook has left it out.
        """
        if target.owner not in self.layers:
            raise PeftValueError(
                f"{_describe(hook)} has left out {target.owner!r}, whose weight is tied to {target.name!r}, for which "
                "it has not; one of two tied modules cannot have the adapter alone. Leave both out, or neither"
            )
        return self.layers[target.owner]

    def note_what_was_done(
        self, target: Target, stood: nn.Module, parent: nn.Module, key: str, returned: Any, hook: Callable
    ) -> None:
        """
        See what a hook has done with a target that it has not handed on.

        Args:
            target: the target.
            stood: what stood in its place.
            parent: what holds it.
            key: name in there.
            returned: what the hook gave.
            hook: the hook.

        Raises:
            PeftTypeError: if it gave something that is no layer.
        """
        stands = parent._modules.get(key)
        if isinstance(returned, BaseTunerLayer) and stands is stood and returned is not stood:
            self.put(stood, returned)
            stands = returned
        elif returned is not None and not isinstance(returned, nn.Module):
            raise PeftTypeError(
                f"{_describe(hook)} has returned a {type(returned).__name__} for {target.name!r}; it has to call the "
                "original, to return a layer with the adapter, or to return None to leave the target out"
            )
        elif stands is not stood:
            self.slots.replaced(stood, stands)
            self._stands_for(stood, stands)
        name = self.plan.adapter_name
        layers = stack_of(stands) if isinstance(stands, BaseTunerLayer) else []
        layer = next((one for one in layers if isinstance(one, BaseTunerLayer) and one.has_adapter(name)), None)
        if layer is None:
            self.left_out.append(target.name)
        else:
            self.layers[target.name] = layer

    def without_left_out(self, names: Iterable[str]) -> list[str]:
        """Give names of targets, without those that a hook has left out."""
        left_out = set(self.left_out)
        return [name for name in names if name not in left_out]

    def report(self, hook: Callable) -> None:
        """
        Say what a hook has left out.

        Raises:
            PeftValueError: if that is everything, or one of several tied modules.
        """
        if not self.left_out:
            return
        if not self.layers:
            raise PeftValueError(
                f"{_describe(hook)} has made no layer for any of {len(self.left_out)} targets "
                f"({', '.join(self.left_out[:FEW])}); for those that are to be adapted it has to call the original, "
                "or put a layer into parent"
            )
        for name in self.left_out:
            if self.owners.get(name) in self.layers:
                raise PeftValueError(
                    f"{_describe(hook)} has left out {name!r}, whose weight is tied to {self.owners[name]!r}, for "
                    "which it has not; one of two tied modules cannot have the adapter alone. Leave both out, or "
                    "neither"
                )
        warn(
            f"{_describe(hook)} has left out {len(self.left_out)} of {len(self._targets)} targets, which get no "
            f"adapter: {', '.join(self.left_out[:FEW])}{' ...' if len(self.left_out) > FEW else ''}"
        )


def _describe(hook: Callable) -> str:
    """Name what stands in the place of the hook."""
    function = getattr(hook, "__func__", hook)
    where = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return f"{where}, which stands in the place of _create_and_replace,"
