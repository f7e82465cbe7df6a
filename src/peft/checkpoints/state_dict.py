# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Adapter tensors out of a model and into it: one pipeline for every method.

Every adapter module says which of its tensors belong to an adapter, and under which key each stands in a checkpoint
(see `keys.py`). Collecting reads that table from right to left, loading from left to right.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ..anatomy.embeddings import input_embedding
from ..anatomy.walking import adapter_modules
from ..layers.adapter_module import AdapterModule
from ..layers.merging.changes import taken_out
from ..layers.merging.sharing import merging_layers
from ..surgery.slots import without_collecting
from ..surgery.transaction import all_or_nothing
from ..utils import save_and_load
from ..utils.error import PeftKeyError
from ..utils.integrations import changes_weights_while_loading
from ..utils.near_names import explain_unknown_adapters
from ..utils.warning import warn
from ..utils.wrapped_names import plain_name, renamed
from .aliases import split_aliases
from .assignment import assign, live_tensors, one_value_per_tensor
from .checks import mistyped, not_finite, shape_of
from .keys import (
    Place,
    adapter_key_map,
    bias_key_map,
    embedding_key_map,
    embedding_tensors,
    ignored_keys,
    optional_keys,
    read_forms,
    write_forms,
)
from .load_report import LoadReport, LoadResult
from .vocabulary import changed_embeddings


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, torch.Tensor]:
    """
    Collect the tensors of an adapter under the keys that checkpoints have.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: the model's state dict, if it had to be gathered from several processes. What it lacks is left out.
        adapter_name: name.
        unwrap_compiled: take the model out of `torch.compile`'s wrapper first.
        save_embedding_layers: also write the base weights of the embeddings; "auto" does so if they differ
            from those of the published base model, as after resizing the vocabulary.

    Raises:
        PeftKeyError: if there is no adapter of that name.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(model).items()}
        {'base_model.model.0.lora_A.weight': (2, 4), 'base_model.model.0.lora_B.weight': (4, 2)}
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    tensors = collect_tensors(model, state_dict, adapter_name, save_embedding_layers)
    # a tensor that tied modules share is given under each key with memory of its own, so that any writer can take it
    kept, aliases = split_aliases(tensors)
    return {
        # some writers take tensors only as they lie in memory
        key: kept[key].contiguous()
        if key in kept
        else aliases[key].read(kept[aliases[key].key]).clone(memory_format=torch.contiguous_format)
        for key in tensors
    }


def collect_tensors(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None,
    adapter_name: str,
    save_embedding_layers: str | bool,
) -> dict[str, torch.Tensor]:
    """Do what `get_peft_model_state_dict` does; tensors that tied modules share are views of one memory."""
    config = _config_of(model, adapter_name)
    state_dict = renamed(model.state_dict() if state_dict is None else state_dict, plain_name)
    # what modules put there with `get_extra_state` may be anything
    state_dict = {key: tensor for key, tensor in state_dict.items() if isinstance(tensor, torch.Tensor)}
    keys = adapter_key_map(model, adapter_name)
    keys.update(bias_key_map(model, adapter_name, getattr(config, "bias", "none")))
    keys.update(_chosen_embedding_keys(model, adapter_name, state_dict, save_embedding_layers))
    # where a model is divided among processes, all but the first are given nothing, or a part
    tensors = {saved: place.read(state_dict[place.key]) for saved, place in keys.items() if place.key in state_dict}
    if state_dict and len(tensors) < len(keys):
        missing = [saved for saved in keys if saved not in tensors]
        warn(
            f"the state dict lacks {len(missing)} of {len(keys)} tensors of adapter {adapter_name!r}, the first is "
            f"{missing[0]!r}; they are left out of what is saved"
        )
    for name, module in adapter_modules(model):
        tensors.update(module.computed_tensors(adapter_name, state_dict, f"{name}." if name else ""))
    return write_forms(model, adapter_name, tensors)


def _config_of(model: nn.Module, adapter_name: str) -> Any:
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        raise PeftKeyError(explain_unknown_adapters([adapter_name], configs))
    return configs[adapter_name]


def _chosen_embedding_keys(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor], choice: str | bool
) -> dict[str, Place]:
    """Choose the base weights of embeddings that are saved with an adapter."""
    if not choice:
        return {}
    keys = embedding_key_map(model)
    if choice == "auto":
        changed = changed_embeddings(model, _config_of(model, adapter_name), state_dict)
        report = getattr(model, "load_reports", {}).get(adapter_name)
        # base weights that a checkpoint brought along, which it would lack when it is saved again
        brought = set(report.loaded) - set(report.expected) if report is not None else set()
        wanted = [*(keys if changed else ()), *changed, *sorted(brought.intersection(embedding_tensors(model)))]
        keys = {name: Place(name) for name in wanted}
        if changed:
            warn(
                f"{', '.join(changed[:4])}{' ...' if len(changed) > 4 else ''} differ from the published base "
                "model's, as they do after the vocabulary was resized, so the base weights of the embeddings are "
                "saved with the adapter; save_embedding_layers=False leaves them out"
            )
    elif not keys and input_embedding(model) is None:
        warn("save_embedding_layers was given, but the model does not say which layers its embeddings are")
    return keys


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """
    Put the tensors of a checkpoint into an adapter. If anything is refused, no tensor is changed.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        peft_model_state_dict: key in a checkpoint -> tensor.
        adapter_name: name of the adapter to fill.
        ignore_mismatched_sizes: leave out tensors of another shape, with a warning, instead of raising.
        low_cpu_mem_usage: the adapter was made on the meta device; its tensors are replaced, not written to. Tensors
            on the meta device are recognised without it, too.

    Returns:
        `missing_keys`: tensors of the model that were not set (also those of the base model and of other adapters);
        `unexpected_keys`: keys of the checkpoint that belong to nothing in the model; `report`: the `LoadReport`.

    Raises:
        PeftKeyError: if there is no adapter of that name.
        PeftLoadError: if shapes differ, no key belongs to the adapter, or a tensor has entries that are not finite.
    """
    return load_tensors(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes, quiet=True)


@without_collecting
def load_tensors(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    adapter_name: str,
    ignore_mismatched_sizes: bool = False,
    strict: bool = False,
    quiet: bool = False,
    settings: Mapping[str, tuple[Any, Any]] | None = None,
) -> LoadResult:
    """
    Do what `set_peft_model_state_dict` does.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        tensors: key in a checkpoint -> tensor.
        adapter_name: name of the adapter to fill.
        ignore_mismatched_sizes: leave out tensors of another shape.
        strict: raise on anything that does not fit.
        quiet: do not warn about tensors that are missing or unexpected.
        settings: fields in which the checkpoint's config differs from the adapter's; see `LoadReport`.
    """
    with all_or_nothing(model):
        return _load_tensors(model, tensors, adapter_name, ignore_mismatched_sizes, strict, quiet, settings or {})


def _load_tensors(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    adapter_name: str,
    ignore_mismatched_sizes: bool,
    strict: bool,
    quiet: bool,
    settings: Mapping[str, tuple[Any, Any]],
) -> LoadResult:
    """Do what `load_tensors` does; what it changes before it raises is put back."""
    config = _config_of(model, adapter_name)
    tensors = renamed(tensors, plain_name)
    before = _make_room(model, adapter_name, tensors)
    keys = adapter_key_map(model, adapter_name)
    keys.update(bias_key_map(model, adapter_name, getattr(config, "bias", "none")))
    expected = tuple(keys)
    for name in embedding_tensors(model):
        keys.setdefault(name, Place(name))
    tensors = under_new_names(model, tensors, adapter_name, keys)
    live = live_tensors(model, {place.key for place in keys.values()})
    content = read_forms(model, adapter_name, tensors)
    found = {saved: content[saved] for saved in keys if saved in content}
    shapes = {saved: (tuple(value.shape), shape_of(keys[saved], live)) for saved, value in found.items()}
    mismatched = {saved: pair for saved, pair in shapes.items() if pair[0] != pair[1]}
    fitting = {saved: value for saved, value in found.items() if saved not in mismatched}
    values, tied, overruled = one_value_per_tensor(fitting, keys, live)
    # a tensor that several modules share is loaded under all its names, whichever of them stand in the checkpoint
    filled = {id(live[key]) for key in values}
    lacking = [key for key in expected if key not in found and id(live[keys[key].key]) not in filled]
    optional = optional_keys(model, adapter_name) if lacking else ()
    unexpected = [key for key in content if key not in keys]
    ignored = ignored_keys(model, adapter_name) if unexpected else ()
    report = LoadReport(
        adapter_name,
        expected=expected,
        loaded=tuple(fitting),
        missing=tuple(key for key in lacking if key not in optional),
        unexpected=tuple(key for key in unexpected if key not in ignored),
        mismatched=mismatched,
        mistyped=mistyped(fitting, keys, live),
        not_finite=not_finite(found),
        tied=tied,
        overruled=overruled,
        resized={
            saved: (tuple(before[keys[saved].key]), tuple(live[keys[saved].key].shape))
            for saved in expected
            if keys[saved].key in before and before[keys[saved].key] != live[keys[saved].key].shape
        },
        settings=settings,
        about=_about(model, config),
    )
    report.refuse(strict, ignore_mismatched_sizes)
    report.warn(quiet)
    present = model.state_dict(keep_vars=True)
    missing = [plain_name(key) for key, tensor in present.items() if id(tensor) not in filled]
    save_and_load._maybe_shard_state_dict_for_tp(model, values, adapter_name)  # clients replace it at that path
    with taken_out(merging_layers(model), adapter_name):
        assign(model, live, values)
    if hasattr(model, "load_reports"):
        model.load_reports[adapter_name] = report
    result = LoadResult(missing_keys=missing, unexpected_keys=list(report.unexpected))
    result.report = report
    return result


def _make_room(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Let adapter modules prepare for tensors of another form; give the shapes from before, by key in the model."""
    before = {}
    for name, module in adapter_modules(model):
        if type(module).prepare_to_load is not AdapterModule.prepare_to_load:
            own = module.named_parameters(name, remove_duplicate=False)
            before.update((plain_name(key), parameter.shape) for key, parameter in own)
            module.prepare_to_load(adapter_name, tensors)
    return before


def _about(model: nn.Module, config: Any) -> str:
    """Say what an adapter is for, and what it is being loaded into; base models are named where they differ."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    method, task = (getattr(value, "value", value) for value in (config.peft_type, config.task_type))
    names = config.base_model_name_or_path, getattr(base, "name_or_path", None)
    differ = all(names) and names[0] != names[1]
    return (
        f"The adapter is {method}{f' for {task}' if task else ''}{f', trained on {names[0]!r}' if differ else ''}; "
        f"the model is a {type(base).__name__}{f', {names[1]!r}' if differ else ''}"
    )


def under_new_names(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], adapter_name: str, known: Collection[str]
) -> Mapping[str, torch.Tensor]:
    """
    Turn tensors of layers that transformers has renamed or fused since they were saved into those of the model.

    Args:
        model: a model with the adapter in it.
        tensors: key in a checkpoint -> tensor.
        adapter_name: name of the adapter.
        known: keys that the adapter has.
    """
    if all(key in known for key in tensors) or not changes_weights_while_loading():
        return tensors
    # releases of transformers before 5 lack what it builds on
    from .conversion.tensors import convert_peft_adapter_state_dict_for_transformers

    config = _config_of(model, adapter_name)
    return convert_peft_adapter_state_dict_for_transformers(model, config, tensors, adapter_name)
