# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The state of a model's ties as a table."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..anatomy.matching import containing, contains_one_of
from ..anatomy.walking import adapter_modules, bare_modules
from ..layers.base_layer import BaseTunerLayer
from ..layers.merging.sharing import merging_layers
from ..layers.merging.state import original_weights
from ..utils.same_tensor import identity_of
from .groups import TiedGroup, declared_but_untied, find_tied_groups, module_of


@dataclass(frozen=True)
class TyingRow:
    """
    One line of a report: what stands at the members of a tied group, for the base model or for one adapter.

    Attributes:
        members: full names of the parameter; the owner comes first.
        owner: the member that the others follow.
        adapter: name of the adapter, None for the base model.
        route: how the adapter reaches the group: "modules_to_save", "target_modules", "trainable_token_indices"; "base
            model" for the base model.
        shared: whether all members hold one parameter.
        bytes: memory of what stands at the members, each tensor counted once.
    """

    members: tuple[str, ...]
    owner: str
    adapter: str | None
    route: str
    shared: bool
    bytes: int


@dataclass(frozen=True)
class TyingReport:
    """
    The state of a model's ties; printed, it is a table.

    Attributes:
        rows: the base model's groups, each followed by what adapters have in their place.
    """

    rows: tuple[TyingRow, ...]

    @property
    def holds(self) -> bool:
        """Whether every tie holds, in the base model and for each adapter."""
        return all(row.shared for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Give the report as a dictionary of plain values."""
        return {"holds": self.holds, "rows": [{**asdict(row), "members": list(row.members)} for row in self.rows]}

    def __str__(self) -> str:
        if not self.rows:
            return "no two modules of the model share a parameter"
        head = ("tied members (owner first)", "adapter", "route", "shared", "bytes")
        lines = [
            (", ".join(r.members), r.adapter or "-", r.route, "yes" if r.shared else "NO", f"{r.bytes:,d}")
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        rule = tuple("-" * width for width in widths)
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, rule, *lines)
        )


def weight_tying_report(model: nn.Module) -> TyingReport:
    """
    Say which weights of a model are tied, what adapters have in their place, and whether that is tied too.

    Args:
        model: any model: bare, with injected adapters, a `PeftModel`, or a merged one. Ties that a transformers model
            declares and does not have are reported as not shared, and so are those whose members are not merged alike
            at this moment.

    Example:

        >>> import torch
        >>> from peft import weight_tying_report
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> net[1].weight = net[0].weight
        >>> print(weight_tying_report(net))
        tied members (owner first)  adapter  route       shared  bytes
        --------------------------  -------  ----------  ------  -----
        0.weight, 1.weight          -        base model  yes     64
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with original_weights(merging_layers(base)):  # while something is merged, a tie may have come apart
        groups, declared = find_tied_groups(base), declared_but_untied(base)
    rows = []
    for group in groups:
        rows.append(_row(group.members, None, "base model", _at_members(base, group)))
        for adapter in getattr(model, "peft_config", None) or ():
            present = _in_place_of(base, group, adapter)
            if any(identity_of(parameter) != identity_of(group.parameter) for parameter in present):
                rows.append(_row(group.members, adapter, "modules_to_save", present))
            rows += _target_row(base, group, adapter)
    rows += [
        _row((owner, follower), None, "declared by the model", [one, other])
        for owner, follower, one, other in declared
    ]
    return TyingReport(tuple(rows))


def _row(members: tuple[str, ...], adapter: str | None, route: str, present: list[torch.Tensor]) -> TyingRow:
    tensors = {identity_of(tensor): tensor for tensor in present}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return TyingRow(members, members[0], adapter, route, len(tensors) == 1, size)


def _at_members(base: nn.Module, group: TiedGroup) -> list[torch.Tensor]:
    """Find what the base model has at each member of a group at this moment."""
    modules = dict(bare_modules(base))
    return [modules[module_of(member)]._parameters[member.rpartition(".")[2]] for member in group.members]


def _in_place_of(base: nn.Module, group: TiedGroup, adapter: str) -> list[nn.Parameter]:
    """Find what an adapter has in the place of a tied parameter, at each member that takes part in computations."""
    wrappers = {name: module for name, module in adapter_modules(base) if "modules_to_save" in module._modules}
    present = []
    for member in group.members:
        module = module_of(member)
        if contains_one_of(module, wrappers):  # stands there for the sake of its name; see _wrappable_modules
            continue
        wrapper = wrappers.get(containing(wrappers, module))
        if wrapper is None or adapter not in wrapper.modules_to_save:
            present.append(group.parameter)
        else:
            present.append(wrapper.parameters_in_place_of(adapter)[identity_of(group.parameter)])
    return present


def _target_row(base: nn.Module, group: TiedGroup, adapter: str) -> list[TyingRow]:
    """Say whether the members of a group are adapted by one adapter; nothing if none of them is adapted by a layer."""
    modules = dict(adapter_modules(base))
    layers = {name: getattr(module, "token_adapter", module) for name, module in modules.items()}
    sources = []
    for member in group.members:
        layer = layers.get(module_of(member)) if member.endswith("weight") else None
        can_have = isinstance(layer, BaseTunerLayer) and layer.has_adapter(adapter)
        sources.append(layer.source(adapter) if can_have else None)
    adapted = {id(layer): layer for layer in sources if layer is not None}
    if not adapted:
        return []
    wrapped = any("token_adapter" in modules[module_of(m)]._modules for m in group.members if module_of(m) in modules)
    route = "trainable_token_indices" if wrapped else "target_modules"
    shared = len(adapted) == 1 and None not in sources
    parameters = {id(p): p for layer in adapted.values() for p in layer.adapter_parameters(adapter)}
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    return [TyingRow(group.members, group.owner, adapter, route, shared, size)]
