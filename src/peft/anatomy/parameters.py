# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Parameters as targets: which ones `target_parameters` reaches, and what else may stand on their modules."""

from collections.abc import Collection, Iterable, Mapping

from torch import nn
from torch.nn.utils import parametrize

from ..utils.error import NoMatchingPeftModuleError, PeftValueError
from ..utils.near_names import FEW
from ..utils.warning import PeftRuntimeWarning, warn
from .matching import matching_entry, near_names
from .walking import is_adapter_module, stack_of, unwrapped


def find_parameters(modules: Mapping[str, nn.Module], wanted: Collection[str], others: bool) -> dict[str, nn.Module]:
    """
    Find the parameters of a base model that are targets.

    Args:
        modules: full name -> module, or the outermost layer around it; "" is the model.
        wanted: names of parameters, or their endings from a dot on.
        others: whether there may be other targets.

    Returns:
        Full name -> module of `modules` that holds it, in the order of the model, each parameter of a module once.

    Raises:
        NoMatchingPeftModuleError: if there is none and there are no other targets.
        PeftValueError: for a parameter of the model itself, which nothing can be put around.
    """
    lookup, seen, unmatched, found, names = set(wanted), set(), set(wanted), {}, []
    for name, module in modules.items():
        first_visit = id(module) not in seen
        seen.add(id(module))
        base = unwrapped(module)
        if is_adapter_module(base):  # trained in full
            continue
        computed = list(base.parametrizations) if parametrize.is_parametrized(base) else []
        for key in [key for key, parameter in base._parameters.items() if parameter is not None] + computed:
            full = f"{name}.{key}" if name else key
            entry = matching_entry(lookup, full)
            names.append(full)
            if entry is None:
                continue
            unmatched.discard(entry)
            if not name:
                raise PeftValueError(
                    f"target_parameters names {full!r}, which the model itself holds; only parameters of modules "
                    "inside the model can be adapted"
                )
            if first_visit:
                found[full] = module
    near = {entry: near_names(entry, names) for entry in sorted(unmatched)[:FEW]}
    hints = "; ".join(f"{entry!r}" + (f" (near: {', '.join(n)})" if n else "") for entry, n in near.items())
    if wanted and not found and not others:
        raise NoMatchingPeftModuleError(f"no parameter to adapt: target_parameters matches nothing: {hints}")
    if hints:
        warn(f"target_parameters entries match no parameter: {hints}", PeftRuntimeWarning)
    return found


def check_stacks(parameters: Mapping[str, nn.Module], targets: Iterable[nn.Module]) -> None:
    """
    Refuse modules that would be adapted as a whole and by a parameter, or by other parameters than they are already.

    Keys of a checkpoint tell wrappers of one module apart by their order only, so all adapters must have the same.

    Args:
        parameters: full name of each targeted parameter -> module, or the outermost layer around it.
        targets: modules that are targets as a whole, likewise.

    Raises:
        PeftValueError: if there is one.
    """
    asked: dict[int, list[str]] = {}
    for name, module in parameters.items():
        asked.setdefault(id(module), []).append(name)
    whole = {id(module) for module in targets}
    for name, module in parameters.items():
        present = [layer.parameter_name for layer in stack_of(module)]
        keys = [full.rpartition(".")[2] for full in asked[id(module)]]
        if id(module) in whole or None in present:
            raise PeftValueError(
                f"target_parameters reaches {name!r}, and its module is adapted as a whole already; take it out of "
                "target_modules or of target_parameters"
            )
        if present and sorted(present) != sorted(keys):
            raise PeftValueError(
                f"all adapters must target the same parameters of a module; another one has {', '.join(present)}, and "
                f"this one {', '.join(keys)}, in {name.rpartition('.')[0]!r}"
            )
    for module in targets:
        present = [layer.parameter_name for layer in stack_of(module) if layer.parameter_name is not None]
        if present:
            raise PeftValueError(
                f"target_modules reaches a {type(unwrapped(module)).__name__} of which another adapter targets "
                f"parameters ({', '.join(present)}); name the parameters in target_parameters here too"
            )
