# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""In which order adapters can be merged, and which have to wait for others."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from ...utils.warning import warn
from .state import Contribution


def in_order(contributions: Iterable[Contribution]) -> list[Contribution]:
    """
    Sort contributions as a forward pass meets them: from inside, and in a layer in the order of activation.

    Adapters that are not active stay where they are.
    """
    by_layer: dict[int, list[Contribution]] = {}
    for contribution in dict.fromkeys(contributions):
        by_layer.setdefault(id(contribution[0]), []).append(contribution)
    result: list[Contribution] = []
    for stack in sorted(by_layer.values(), key=lambda held: sum(1 for _ in held[0][0].layers_inside())):
        layer, names = stack[0][0], [name for _, name in stack]
        in_turn = iter([(layer, name) for name in layer.active_adapters if name in names])
        result += [next(in_turn) if name in layer.active_adapters else (layer, name) for name in names]
    return result


def mergeable_now(
    contributions: Iterable[Contribution],
) -> tuple[list[Contribution], dict[Contribution, Contribution]]:
    """
    Choose what can be in the weight while active adapters that are not merged go on computing.

    Returns:
        What is to be merged, in order; and what has to stay beside the weight, with the adapter that it waits for.
    """
    merged: list[Contribution] = []
    waiting: dict[Contribution, Contribution] = {}
    for contribution in in_order(contributions):
        other = _waits_for(contribution, merged)
        if other is None:
            merged.append(contribution)
        else:
            waiting[contribution] = other
    return merged, waiting


def _waits_for(contribution: Contribution, merged: Collection[Contribution]) -> Contribution | None:
    """Find an adapter that has to be merged before another one can be, since the order of the two matters."""
    layer, name = contribution
    for other in _before(contribution):
        if other not in merged and not layer.commutes_with(name, *other):
            return other
    return None


def _before(contribution: Contribution) -> Iterator[Contribution]:
    """
    Yield the adapters whose part of the forward pass comes before that of an adapter.

    Those that are switched off count too: what was merged meanwhile would be too early when they are back.
    """
    layer, name = contribution
    for inner in layer.layers_inside():
        yield from ((inner, other) for other in inner.active_adapters if inner.has_adapter(other))
    if name in layer.active_adapters:
        earlier = layer.active_adapters[: layer.active_adapters.index(name)]
        yield from ((layer, other) for other in earlier if layer.has_adapter(other))


def warn_of_waiting(waiting: Mapping[Contribution, Contribution]) -> None:
    """Warn, once for all layers, about adapters that stay beside the weight."""
    pairs = dict.fromkeys((name, other) for (_, name), (_, other) in waiting.items())
    if pairs:
        found = "; ".join(f"{name!r} works on what {other!r} leaves" for name, other in pairs)
        warn(
            f"not merged in {len(waiting)} layers, so that outputs stay what they are: {found}, which is active and "
            "not merged. Merge that one too, and both will be, or deactivate it first"
        )
