# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What putting an adapter into a model will do, as a value: worked out in `targets`, carried out in `placing`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from ..anatomy.kinds import features
from ..anatomy.matching import near_names
from ..anatomy.walking import unwrapped
from ..config import PeftConfig
from ..layers.base_layer import BaseTunerLayer
from ..surgery.saved_modules import AdditionalModules
from ..tying.groups import module_of


class Target(NamedTuple):
    """
    What gets a layer: a module, or one parameter of it.

    Attributes:
        name: full name of the module, or of the parameter.
        module: what stands there: a module of the base model, or the outermost layer of other adapters around it.
        parameter: name of the parameter in its module; None if the module is adapted as a whole.
        layer_class: class of the layer that it gets; None where the method has none, and a client's hook may know one.
        arguments: what the layer is made with beside the config, such as the rank, with patterns resolved.
        owner: full name of the target that it follows, which has the tensors; None if it has its own.
    """

    name: str
    module: nn.Module
    parameter: str | None
    layer_class: type[BaseTunerLayer] | None
    arguments: Mapping[str, Any]
    owner: str | None

    @property
    def kind(self) -> str:
        """Class of the layer of the base model."""
        return type(unwrapped(self.module)).__name__

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Shape of the parameter; of a module its output and input features, None where it does not say them."""
        base = unwrapped(self.module)
        return features(base)[::-1] if self.parameter is None else tuple(base._parameters[self.parameter].shape)


@dataclass(frozen=True)
class AdapterPlan:
    """
    What putting an adapter into a model will do; printed, it is a summary.

    Attributes:
        adapter_name: name of the adapter.
        config: a copy of its config as it applies to the model: targets are names, and what has to follow what is
            recorded in `modules_to_tie`, `target_modules_to_tie`, `token_modules_to_tie` and
            `target_parameters_to_tie`.
        targets: what gets a layer; owners before their followers, modules before parameters.
        matched: full names of the modules that the config reaches.
        names: those, and the ones that a tie brings in, without the parts that are adapted along with others.
        excluded: full names that `exclude_modules` leaves out.
        unmatched: entries of `target_modules` that match nothing.
        additional: what is trained beside the layers.
        all_names: full names of all modules of the model.
    """

    adapter_name: str
    config: PeftConfig
    targets: tuple[Target, ...]
    matched: tuple[str, ...]
    names: tuple[str, ...]
    excluded: tuple[str, ...]
    unmatched: tuple[str, ...]
    additional: AdditionalModules
    all_names: tuple[str, ...]

    @property
    def module_names(self) -> tuple[str, ...]:
        """Full names of the modules that are reached, with those that a tie brings in if the config asks for ties."""
        return self.names if self.config.ensure_weight_tying else self.matched

    @property
    def parameters(self) -> tuple[str, ...]:
        """Full names of the parameters that get layers."""
        return tuple(target.name for target in self.targets if target.parameter is not None)

    @property
    def own_layers(self) -> dict[str, nn.Module]:
        """Full name of each target that follows no other one -> its layer of the base model, in the model's order."""
        layers = {target.name: unwrapped(target.module) for target in self.targets if target.owner is None}
        return {name: layers[name] for name in in_order(layers, self.all_names)}

    @property
    def near_misses(self) -> Mapping[str, tuple[str, ...]]:
        """Entries of `target_modules` that match nothing -> names that come near."""
        return MappingProxyType({entry: tuple(near_names(entry, self.all_names)) for entry in self.unmatched})

    @property
    def ties(self) -> Mapping[str, Mapping[str, str]]:
        """What is tied, by the route that reaches it -> follower -> owner; names of modules, or of parameters."""
        config = self.config
        recorded = {
            "target_modules": config.target_modules_to_tie,
            "target_parameters": config.target_parameters_to_tie,
            "modules_to_save": config.modules_to_tie,
            "trainable_token_indices": config.token_modules_to_tie,
        }
        return MappingProxyType({route: MappingProxyType(dict(ties)) for route, ties in recorded.items() if ties})

    def __str__(self) -> str:
        method = getattr(self.config.peft_type, "value", self.config.peft_type)
        lines = [f"adapter {self.adapter_name!r} ({method}): {len(self.targets)} targets"]
        alike: dict[tuple[str, str], list[str]] = {}
        for target in self.targets:
            if target.owner is None:
                alike.setdefault(_sort_of(target), []).append(target.name)
        for (name, text), names in alike.items():
            lines.append(f"  {len(names)} x {name} {text}" if len(names) > 1 else f"  {names[0]} {text}")
        lines += [f"  trained in full: {name}" for name in self.additional.saved]
        lines += [f"  {len(indices)} tokens of {name}" for name, indices in self.additional.tokens.items()]
        for route, ties in self.ties.items():
            lines += [f"  {follower} follows {owner} ({route})" for follower, owner in ties.items()]
        for entry, near in self.near_misses.items():
            lines.append(f"  {entry!r} matches nothing" + (f"; near: {', '.join(near)}" if near else ""))
        return "\n".join(lines)


def in_order(targets: Iterable[str], all_names: Iterable[str]) -> list[str]:
    """Put full names of modules, or of parameters, into the order of all modules of the model."""
    places = {name: place for place, name in enumerate(all_names)}
    return sorted(targets, key=lambda name: places[name if name in places else module_of(name)])


def _sort_of(target: Target) -> tuple[str, str]:
    """Give name and description of a target, both the same for the same target of other layers."""
    name = ".".join("*" if part.isdigit() else part for part in target.name.split("."))
    plain = {key: value for key, value in target.arguments.items() if isinstance(value, (int, float, str))}
    arguments = "".join(f", {key}={value}" for key, value in plain.items())
    return name, f"({target.kind} {' x '.join(map(str, target.shape))}{arguments})"
