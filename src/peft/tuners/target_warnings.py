# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What is said about targets of a config that reach something else than was meant."""

from collections.abc import Collection

from torch import nn

from ..anatomy.matching import ends_like, find_targets, lies_in, matching_entry
from ..config import PeftConfig
from ..utils.constants import DUMMY_TARGET_MODULES
from ..utils.near_names import FEW
from ..utils.warning import PeftRuntimeWarning, warn


def as_names(names: str | Collection[str] | None) -> Collection[str]:
    """Give a list of names for a field of a config that holds one, a list, or nothing."""
    return [names] if isinstance(names, str) else names or ()


def explain_absent_layers(absent: list[int], last: int) -> str:
    """Say which layers there are, to somebody who asked for others."""
    return f"there is no layer {', '.join(map(str, absent))}; the indices of the model's layers go from 0 to {last}"


def warn_of_targets_in_full(saved: Collection[str], targets: list[str]) -> None:
    """Warn of targets that `modules_to_save` takes by a part of their names only, which is easily overlooked."""
    lookup = set(saved)
    names = [name for name in targets if ends_like(saved, name) and matching_entry(lookup, name) is None]
    if names:
        entry = next(entry for entry in saved if ends_like([entry], names[0]))
        warn(
            f"target_modules reaches {', '.join(map(repr, names[:FEW]))}, whose names end with the modules_to_save "
            f"entry {entry!r}; what that reaches is trained in full and gets no adapter. Leave them out of "
            "target_modules"
        )


def compare_with_targets(config: PeftConfig, modules: dict[str, nn.Module], names: list[str]) -> None:
    """Warn where a state dict, which decides about what is adapted, has other modules than the config."""
    if config.target_modules is None or config.target_modules == DUMMY_TARGET_MODULES:
        return
    saved = as_names(getattr(config, "modules_to_save", None))
    targeted = [name for name in find_targets(config, list(modules)).names if not (saved and lies_in(saved, name))]
    adapted, wanted = ({id(modules[name]) for name in found} for found in (names, targeted))  # names may be several
    beyond = [name for name in names if id(modules[name]) not in wanted]
    without = [name for name in targeted if id(modules[name]) not in adapted]
    if beyond:
        warn(
            f"the state dict has tensors for {len(beyond)} modules that the config does not target, and these are "
            f"adapted: {', '.join(beyond)}",
            PeftRuntimeWarning,
        )
    if without:
        warn(
            f"the config targets {len(without)} modules that the state dict has no tensors for, and these are not "
            f"adapted: {', '.join(without)}",
            PeftRuntimeWarning,
        )
