# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Private methods of the released package that are not here, and what does their work: clients call or bring some."""

from .error import PeftAttributeError
from .warning import warn


_HOOK = "_create_and_replace makes the layer of each target and puts it into the model; replace or call that"
# steps of the released package's injection, which subclasses and clients put code of their own in the place of
STEPS = {
    "_create_new_module": _HOOK,
    "_replace_module": _HOOK,
    "_create_and_replace_parameter": "_create_and_replace is given parameter_name for parameters; replace that",
    "_mark_only_adapters_as_trainable": (
        "an injection freezes the base model by itself; call set_requires_grad(adapter_names) afterwards"
    ),
    "_prepare_adapter_config": (
        "default targets stand in the class attribute target_module_mapping; fill in a config before it is used"
    ),
    "_pre_injection_hook": "extend inject_adapter, and do it before calling the original",
    "_post_injection_hook": "extend inject_adapter, and do it after calling the original",
}
# those that a hook may call
OF_THE_HOOK = ("_create_new_module", "_replace_module", "_create_and_replace_parameter")
_OTHERS = {
    "_enable_adapter_layers": "call enable_adapter_layers() or disable_adapter_layers()",
    "_check_merge_allowed": "merge_adapter refuses what cannot be merged, before anything is changed",
    "_get_tied_target_modules": "call peft.weight_tying_report(model)",
    "_check_add_weighted_adapter": "add_weighted_adapter refuses what cannot be combined",
    "_get_available_adapters": "read available_adapters",
    "_all_available_adapter_names": "read available_adapters",
    "_check_forward_args": "a layer's forward checks its arguments itself",
    "_cast_input_dtype": "delta_forward casts its input; elsewhere use x.to(dtype)",
    "_get_base_layer_device_and_dtype": "read stored_weight().device and .dtype",
    "_freeze_non_trainable_peft_weights": "call set_requires_grad(adapter_names, False)",
}


def explain_former_method(owner: type, name: str) -> PeftAttributeError | None:
    """
    Say what does the work of a private method of the released package.

    Args:
        owner: class of the object that was asked for it.
        name: its name.

    Returns:
        The exception to raise; None if the released package has no such method either, or nothing is known of it.
    """
    instead = STEPS.get(name) or _OTHERS.get(name)
    if instead is None:
        return None
    return PeftAttributeError(f"{owner.__name__}.{name} of release 0.21.2 is not in this version: {instead}")


def warn_of_former_steps(owner: type, except_for: tuple[str, ...] = ()) -> None:
    """
    Say which methods of a class, or what was put there, the released package would call and this one does not.

    Args:
        owner: class of a tuner. Nothing in this package has methods of these names, so they are a client's.
        except_for: names that the client may call by itself.
    """
    useless = [name for name in STEPS if name not in except_for and hasattr(owner, name)]
    if useless:
        reasons = "; ".join(dict.fromkeys(STEPS[name] for name in useless))
        warn(
            f"{owner.__module__}.{owner.__qualname__} has {', '.join(useless)}, which is never called here: {reasons}"
        )
