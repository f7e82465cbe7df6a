# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which modules a config targets: pure functions from names and patterns to names. No model is touched here."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..utils.error import PeftValueError
from ..utils.near_names import nearest
from ..utils.patterns import BoundedPattern, compiled


# each is matched against the names of all modules
MOST_EXPRESSIONS = 10_000

Names = str | Collection[str] | None


def dotted_endings(name: str) -> Iterator[str]:
    """
    Yield a dotted name and everything that follows one of its dots, longest first.

    Example:

        >>> list(dotted_endings("model.layers.0"))
        ['model.layers.0', 'layers.0', '0']
    """
    yield name
    start = name.find(".")
    while start >= 0:
        yield name[start + 1 :]
        start = name.find(".", start + 1)


def matching_entry(names: Names, key: str) -> str | None:
    """
    Find the entry that a module's full name matches.

    Args:
        names: a regular expression that must match the whole name, or a collection of names of which one must be the
            full name or its ending from a dot on. A set is looked up in a time that does not depend on its size.
        key: full name of a module.

    Returns:
        The entry (for a regular expression: the expression), or None.
    """
    if names is None:
        return None
    if isinstance(names, str):
        return names if compiled(names).fullmatch(key) else None
    lookup = names if isinstance(names, (set, frozenset, dict)) else set(names)
    return next((ending for ending in dotted_endings(key) if ending in lookup), None)


def shortest_endings(wanted: Iterable[str], others: Iterable[str]) -> set[str]:
    """
    Find the fewest endings, each from a dot on, that all wanted names have and none of the others.

    Two endings are of nested sets of names or of disjoint ones, so the shortest that is possible for each name is the
    widest one that holds it, and nothing smaller covers them all.

    Args:
        wanted: full names of modules.
        others: full names of other modules; one that stands in both is wanted.

    Example:

        >>> shortest_endings(["0.q", "0.k", "1.q"], ["1.k", "0", "1"]) == {"q", "0.k"}
        True
    """
    wanted = dict.fromkeys(wanted)
    taken = {ending for name in others if name not in wanted for ending in dotted_endings(name)}
    return {
        next((ending for ending in reversed(list(dotted_endings(name))) if ending not in taken), name)
        for name in wanted
    }


def ends_like(names: Iterable[str], key: str) -> bool:
    """
    Say whether a module's full name ends with one of some names, from a dot on or not.

    Modules that are trained beside the adapter layers, in full or token by token, are named like that: `classifier`
    stands for a `pre_classifier` too, and `norm` for every norm.

    Example:

        >>> ends_like(["norm"], "model.layers.0.input_norm"), matching_entry(["norm"], "model.layers.0.input_norm")
        (True, None)
    """
    return key.endswith(tuple(name for name in names if name))


def lies_in(names: Collection[str], key: str) -> bool:
    """Say whether a module is, or lies inside, a module whose name ends with an entry (see `ends_like`)."""
    entries = tuple(name for name in names if name)
    ends = [i for i, character in enumerate(key) if character == "."] + [len(key)]
    return any(key.endswith(entries, 0, end) for end in ends)


def outermost(names: Iterable[str]) -> list[str]:
    """Leave out names of modules that lie inside other named ones."""
    names = list(dict.fromkeys(names))
    given = set(names)
    return [
        name for name in names if not any(name[:i] in given for i, character in enumerate(name) if character == ".")
    ]


def containing(modules: Iterable[str], name: str) -> str | None:
    """Find the module that is, or contains, the module of that name."""
    return next((module for module in modules if name == module or name.startswith(f"{module}.")), None)


def contains_one_of(module: str, others: Iterable[str]) -> bool:
    """Say whether a module contains another one of some modules."""
    prefix = f"{module}." if module else ""
    return any(other != module and other.startswith(prefix) for other in others)


def layer_index(key: str, layers_pattern: str | Collection[str] | None) -> int | None:
    """
    Read the index of the layer that a module lies in.

    Args:
        key: full name of a module.
        layers_pattern: name of the list of layers, or several such names, of which the first that the module lies in
            counts; any list if it is left out. Where several lists are nested, the outermost counts. Without a
            pattern that is one inside a module, if there is such a list: what stands in a list of the model itself,
            such as `down_blocks`, has layers of its own.

    Returns:
        The index, or None if the module lies in no such list.
    """
    if not layers_pattern:
        expressions = [r".+?\.[^.]+\.(\d+)\.", r"[^.]+\.(\d+)\."]
    else:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        expressions = [rf"(?:.*?\.)??(?:{pattern})\.(\d+)\." for pattern in patterns]
    for expression in expressions:
        found = compiled(expression).match(key)
        if found:
            return int(found.group(1))
    return None


def _layer_is_chosen(config: Any, key: str) -> bool:
    chosen = getattr(config, "layers_to_transform", None)
    if chosen is None or chosen == [] or isinstance(config.target_modules, str):  # an expression names layers itself
        return True
    if key in config.target_modules:  # the full name of one module needs no layer
        return True
    index = layer_index(key, getattr(config, "layers_pattern", None))
    return index is not None and (index == chosen if isinstance(chosen, int) else index in chosen)


class _ExcludedModule:
    """The answer for a module that `exclude_modules` leaves out: false, and known from that for no target at all."""

    def __bool__(self) -> bool:
        return False


def _is_valid_match(key: str, target_key: str) -> bool:
    """Say whether a name is another one, or ends with it after a dot."""
    return key == target_key or key.endswith(f".{target_key}")


def check_target_module_exists(config: Any, key: str) -> bool | _ExcludedModule:
    """
    Say whether a config targets the module of that name.

    Args:
        config: a config with `target_modules` and, where the method has them, `exclude_modules`,
            `layers_to_transform` and `layers_pattern`.
        key: full name of a module.
    """
    if matching_entry(getattr(config, "exclude_modules", None), key) is not None:
        return _ExcludedModule()
    return matching_entry(config.target_modules, key) is not None and _layer_is_chosen(config, key)


@dataclass
class Targets:
    """
    What a config reaches among a model's modules.

    Attributes:
        names: full names of the targeted modules, in the order of the model.
        excluded: names that `exclude_modules` took out.
        unmatched: entries of the `target_modules` list that match no module at all.
        absent_layers: entries of `layers_to_transform` beyond the last layer, and the index of that.
    """

    names: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    absent_layers: tuple[list[int], int] | None = None


def find_targets(config: Any, names: Collection[str]) -> Targets:
    """
    Find the modules that a config targets.

    Args:
        config: see `check_target_module_exists`.
        names: full names of the model's modules, in order.
    """
    targets = Targets()
    wanted = config.target_modules
    seen = set()
    for name in names:
        entry = matching_entry(wanted, name)
        if entry is None:
            continue
        seen.add(entry)
        if matching_entry(getattr(config, "exclude_modules", None), name) is not None:
            targets.excluded.append(name)
        elif _layer_is_chosen(config, name):
            targets.names.append(name)
    if not isinstance(wanted, str):
        targets.unmatched = sorted(set(wanted or ()) - seen)
        if targets.unmatched:
            # an entry may be the ending of a name that a longer entry has claimed already
            endings = {ending for name in names for ending in dotted_endings(name)}
            targets.unmatched = [entry for entry in targets.unmatched if entry not in endings]
    targets.absent_layers = _absent_layers(config, names)
    return targets


def _absent_layers(config: Any, names: Iterable[str]) -> tuple[list[int], int] | None:
    """Find indices of layers that no module lies in, and the last index that there is."""
    chosen = getattr(config, "layers_to_transform", None)
    if chosen is None or isinstance(config.target_modules, str):
        return None
    indices = {layer_index(name, getattr(config, "layers_pattern", None)) for name in names} - {None}
    absent = [i for i in ([chosen] if isinstance(chosen, int) else chosen) if indices and not 0 <= i <= max(indices)]
    return (absent, max(indices)) if absent else None


def names_in_text(text: str) -> list[str]:
    """
    Read the names from a text in which somebody has written a list; other texts have none.

    Example:

        >>> names_in_text('["q_proj", "v_proj"]')
        ['q_proj', 'v_proj']
        >>> names_in_text("q_proj")
        []
    """
    looks_like_a_list = re.fullmatch(r"[\w.\s,'\"\[\]-]+", text) and re.search(r"[,\s\[]", text)
    return re.findall(r"[\w.-]+", text) if looks_like_a_list else []


def near_names(wanted: str, names: Iterable[str], most: int = 3) -> list[str]:
    """
    Find names of modules that somebody who wrote `wanted` may have meant.

    Args:
        wanted: what was asked for; may be the ending of a name, or a regular expression.
        names: full names of the model's modules.
        most: how many to return at most.
    """
    literal = re.sub(r"[^\w.]", "", wanted).strip(".")
    candidates = dict.fromkeys(ending for name in names for ending in dotted_endings(name) if not ending.isdigit())
    dots = literal.count(".")
    return nearest(literal, [name for name in candidates if name.count(".") == dots], most)


def pattern_lookup(patterns: Mapping[str, Any] | None) -> Callable[[str | Collection[str], Any], Any]:
    """
    Make a function that finds a module's value in a mapping such as `rank_pattern`.

    A pattern matches if it is the module's full name, or the name's ending from a dot on; it may be a regular
    expression, and one that starts with `^` has to match from the beginning. The first pattern that matches wins.
    Plain names are looked up in a time that does not depend on how many there are.

    Args:
        patterns: name or regular expression -> value.

    Returns:
        A function of the module's full name (or all of them, if it has several) and the value to use where no pattern
        matches.
    """
    order = {pattern: position for position, pattern in enumerate(patterns or {})}
    plain, expressions = _plain_and_expressions(order)

    def lookup(key: str | Collection[str], default: Any) -> Any:
        keys = [key] if isinstance(key, str) else key
        found = [ending for key in keys for ending in dotted_endings(key) if ending in plain]
        found += [pattern for key in keys for pattern, expression in expressions if expression.match(key)]
        return patterns[min(found, key=order.__getitem__)] if found else default

    return lookup


def _plain_and_expressions(patterns: Iterable[str]) -> tuple[set[str], list[tuple[str, BoundedPattern]]]:
    plain = {pattern for pattern in patterns if re.fullmatch(r"[\w.\-]+", pattern)}
    if len(expressions := [pattern for pattern in patterns if pattern not in plain]) > MOST_EXPRESSIONS:
        raise PeftValueError(
            f"a mapping such as rank_pattern has {len(expressions):,d} regular expressions, at most "
            f"{MOST_EXPRESSIONS:,d} are matched; give plain names, of which there may be any number"
        )
    return plain, [(pattern, _pattern_expression(pattern)) for pattern in expressions]


def patterns_without_use(patterns: Mapping[str, Any] | None, keys: Collection[str]) -> list[str]:
    """
    Find the patterns that match none of some modules; see `pattern_lookup` for what matches.

    Args:
        patterns: name or regular expression -> value.
        keys: full names of modules.
    """
    plain, expressions = _plain_and_expressions(patterns or {})
    endings = {ending for key in keys for ending in dotted_endings(key)} if plain else set()
    used = {pattern for pattern, expression in expressions if any(expression.match(key) for key in keys)} | endings
    return [pattern for pattern in patterns or {} if pattern not in used]


def _pattern_expression(pattern: str) -> BoundedPattern:
    if pattern.startswith("^"):
        return compiled(rf"(?:{pattern})$")
    return compiled(rf"(?:.*\.)?(?:{pattern})$")


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """
    Find the first pattern that matches a module's full name; see `pattern_lookup` for what matches.

    Args:
        pattern_keys: names or regular expressions.
        key_to_match: full name of a module.

    Returns:
        The pattern, or the name itself if none matches.
    """
    return pattern_lookup({key: key for key in pattern_keys})(key_to_match, key_to_match)


def match_target_against_key(target_pattern: str, key: str) -> re.Match | None:
    """Match a regular expression against a whole name."""
    return compiled(target_pattern).fullmatch(key)
