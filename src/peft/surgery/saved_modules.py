# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a config trains beside the adapter layers: which modules are wrapped, and how they are tied."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from ..anatomy.embeddings import output_embedding
from ..anatomy.matching import (
    check_target_module_exists,
    ends_like,
    lies_in,
    near_names,
    outermost,
)
from ..anatomy.walking import bare_modules, is_adapter_module, names_of_modules
from ..config import PeftConfig
from ..layers.modules_to_save import ModulesToSaveWrapper
from ..layers.token_wrapper import TrainableTokensWrapper
from ..layers.trainable_tokens import check_token_indices
from ..layers.training_wrapper import AuxiliaryTrainingWrapper, check_wrappable
from ..tying.record import find_token_modules
from ..utils.constants import (
    QUESTION_ANSWERING_HEAD_NAMES,
    SEQ_CLS_HEAD_NAMES,
)
from ..utils.error import PeftTypeError, PeftValueError
from ..utils.near_names import FEW, did_you_mean
from ..utils.same_tensor import identity_of
from ..utils.warning import warn
from .slots import Slots


class AdditionalModules(NamedTuple):
    """
    What a config trains beside the adapter layers, without what follows it.

    Attributes:
        saved: full names of the modules that are trained in full.
        tokens: full name of a module of which single tokens are trained -> the tokens.
    """

    saved: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]


def find_additional_modules(model: nn.Module, peft_config: PeftConfig) -> AdditionalModules:
    """
    Find what a config trains beside the adapter layers.

    Args:
        model: the model, not changed yet.
        peft_config: a config.
    """
    saved = getattr(peft_config, "modules_to_save", None) or ()
    tokens = find_token_modules(model, getattr(peft_config, "trainable_token_indices", None))
    return AdditionalModules(
        tuple(outermost(_modules_named(model, saved))) if saved else (),
        MappingProxyType({name: tuple(ids) for name, ids in tokens.items() if not lies_in(saved, name)}),
    )


def _modules_named(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """
    Find the modules one of whose full names ends with one of `names`; see `ends_like`.

    Returns:
        First full name -> module, in the order of the model.
    """
    wanted = tuple(names)
    first: dict[int, str] = {}
    found = {}
    for name, module in names_of_modules(model).items():
        first.setdefault(id(module), name)
        if ends_like(wanted, name):
            found[first[id(module)]] = module
    return found


def newly_started_heads(model: nn.Module) -> list[str]:
    """
    Find the modules that a model of transformers has on top of its body, and that no checkpoint has filled.

    They hold random values, which an adapter has to train and save, whatever they are called.

    Args:
        model: a base model, with or without adapters.

    Returns:
        Full names; none for models that do not say which module their body is.
    """
    body = model._modules.get(getattr(model, "base_model_prefix", None) or "")
    if body is None:
        return []
    output = output_embedding(model)
    of_body = {id(parameter) for parameter in body.parameters()}
    found = []
    waiting = [(name, child) for name, child in reversed(model._modules.items()) if child not in (None, body, output)]
    while waiting:
        name, module = waiting.pop()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            waiting.extend((f"{name}.{key}", child) for key, child in reversed(module._modules.items()))
            continue
        parameters = list(module.parameters())
        tied = any(id(parameter) in of_body for parameter in parameters)
        # transformers notes on each parameter that it has read
        if any(not getattr(p, "_is_hf_initialized", False) for p in parameters) and not tied:
            found.append(name)
    return found


def _set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Sequence[str],
    inference_mode: bool = False,
    strict_module_check: bool = False,
    wrapper_cls: type[AuxiliaryTrainingWrapper] = ModulesToSaveWrapper,
    activate_adapter: bool = True,
    tied_module: ModulesToSaveWrapper | None = None,
    full_names: bool = False,
    **wrapper_kwargs: Any,
) -> list[str]:
    """
    Wrap modules so that an adapter trains them in full.

    Args:
        model: the model.
        adapter_name: name of the adapter.
        module_names: names of modules, or their endings.
        inference_mode: freeze what is made.
        strict_module_check: raise if no module matches.
        wrapper_cls: which wrapper.
        activate_adapter: use what is made at once.
        tied_module: wrapper of a module that these modules follow; see `ModulesToSaveWrapper.update`.
        full_names: take `module_names` as full names only.
        wrapper_kwargs: for the wrapper.

    Returns:
        Full names of the wrapped modules.

    Raises:
        PeftValueError: with `strict_module_check`, if no module matches.
    """
    if full_names:
        everything = names_of_modules(model)
        modules = {name: everything[name] for name in module_names}
    else:
        modules = _modules_named(model, module_names)
    if tied_module is not None:
        wrapper_kwargs["tied_module"] = tied_module
    names = outermost(modules)
    if strict_module_check and not names:
        raise PeftValueError(f"no module of the model is named {', '.join(module_names)}")
    slots = Slots(model)
    for name in names:
        module = modules[name]
        if isinstance(module, wrapper_cls):
            module.update(adapter_name, **wrapper_kwargs)
        else:
            wrapper = wrapper_cls(module, adapter_name, **wrapper_kwargs)
            wrapper.training = module.training
            if not activate_adapter:
                wrapper.choose([])
            slots.replace(module, wrapper)
            module = wrapper
        if activate_adapter:
            module.set_adapter(adapter_name, inference_mode=inference_mode)
        else:
            module.set_requires_grad(adapter_name, False)
    return names


def check_additional_trainable_modules(model: nn.Module, peft_config: PeftConfig) -> AdditionalModules:
    """
    Refuse what `set_additional_trainable_modules` could not do, and warn about names that match nothing.

    Args:
        model: the model, not changed yet.
        peft_config: a config.

    Returns:
        What is trained beside the adapter layers.

    Raises:
        PeftTypeError: for a module that cannot be wrapped.
    """
    names = getattr(peft_config, "modules_to_save", None) or ()
    if isinstance(names, str):
        raise PeftTypeError(f"modules_to_save must be a list of names, found the string {names!r}")
    for name, module in _modules_named(model, names).items():
        check_wrappable(module, name)
        inside = any(is_adapter_module(m) for m in module.modules() if m is not module)
        if not isinstance(module, ModulesToSaveWrapper) and (is_adapter_module(module) or inside):
            raise PeftTypeError(
                f"modules_to_save reaches {name!r}, which another adapter has adapted already; a module is either "
                "adapted or trained in full. Leave it out of modules_to_save, or delete the other adapter"
            )
    _check_followers(model, peft_config)
    _check_token_modules(model, peft_config, names)
    # the names of classification heads are tried for every model of their task
    optional = {*SEQ_CLS_HEAD_NAMES, *QUESTION_ANSWERING_HEAD_NAMES}
    full_names = list(names_of_modules(model)) if names else []
    unmatched = [entry for entry in names if not any(ends_like([entry], name) for name in full_names)]
    for entry in unmatched[:FEW]:
        if entry not in optional:
            near = near_names(entry, [name for name, _ in bare_modules(model)])
            warn(f"modules_to_save entry {entry!r} matches no module{did_you_mean(near)}")
    if unmatched and len(unmatched) == len(names) and optional.issuperset(names):
        warn(
            f"the task is {getattr(peft_config.task_type, 'value', peft_config.task_type)}, but "
            f"{type(model).__name__} has no module named {' or '.join(unmatched)}, so no head is trained and saved; "
            "name the head in modules_to_save, or use a model that has one for the task"
        )
    return find_additional_modules(model, peft_config)


def _check_followers(model: nn.Module, peft_config: PeftConfig) -> None:
    """
    Refuse modules that a tie brings in, and that cannot be wrapped because another adapter has adapted them.

    Raises:
        PeftTypeError: if there is one.
    """
    recorded = (
        ("modules_to_save", peft_config.modules_to_tie, ModulesToSaveWrapper),
        ("trainable_token_indices", peft_config.token_modules_to_tie, TrainableTokensWrapper),
    )
    for route, ties, wrapper_cls in recorded:
        for name in dict.fromkeys(name for pair in (ties or {}).items() for name in pair):
            module = model.get_submodule(name)
            if is_adapter_module(module) and not isinstance(module, wrapper_cls):
                others = ", ".join(
                    repr(other) for pair in ties.items() if name in pair for other in pair if other != name
                )
                raise PeftTypeError(
                    f"{route} reaches {name!r}, since it shares its weight with {others}, and another adapter has "
                    "adapted it already; a module is adapted in one way. Leave the tied modules out, or delete the "
                    "other adapter"
                )


def _check_token_modules(model: nn.Module, peft_config: PeftConfig, saved: Collection[str]) -> None:
    """
    Refuse tokens that cannot be trained, or are trained anyway.

    Raises:
        PeftTypeError: for a module that is adapted or cannot have tokens.
        PeftIndexError: for an id outside of the vocabulary.
        PeftValueError: for ids that stand there twice, for unknown modules, and for modules that are trained in full.
    """
    for name, indices in find_token_modules(model, getattr(peft_config, "trainable_token_indices", None)).items():
        module = model.get_submodule(name)
        if lies_in(saved, name):
            raise PeftValueError(
                f"trainable_token_indices reaches {name!r}, which modules_to_save trains in full, so that its tokens "
                "are trained already; leave it out of one of the two"
            )
        targeted = peft_config.target_modules is not None and check_target_module_exists(peft_config, name)
        if targeted or (is_adapter_module(module) and not isinstance(module, TrainableTokensWrapper)):
            raise PeftTypeError(
                f"trainable_token_indices reaches {name!r}, which is adapted as a target too; a module is adapted in "
                "one way. Leave it out of target_modules or of trainable_token_indices"
            )
        base = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        check_token_indices(base, name, indices)


def set_additional_trainable_modules(
    model: nn.Module,
    peft_config: PeftConfig,
    model_config: Mapping[str, Any],
    adapter_name: str,
    activate_adapter: bool = True,
    additional: AdditionalModules | None = None,
) -> None:
    """
    Wrap what a config trains beside the adapter layers.

    Args:
        model: the model.
        peft_config: config of the adapter.
        model_config: the base model's config.
        adapter_name: name of the adapter.
        activate_adapter: use what is made at once.
        additional: what that is, for those who have found it already.
    """
    if additional is None:
        additional = find_additional_modules(model, peft_config)
    options = {
        "inference_mode": peft_config.inference_mode,
        "activate_adapter": activate_adapter,
        "full_names": True,
    }
    if additional.saved:
        _train_in_full(model, peft_config, adapter_name, additional.saved, options)
    if additional.tokens:
        _train_tokens(model, peft_config, adapter_name, additional.tokens, options)


def _train_in_full(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str, named: Sequence[str], options: dict[str, Any]
) -> None:
    """Wrap the modules of `modules_to_save`, and those that follow them."""
    ties = peft_config.modules_to_tie or {}
    _set_trainable(model, adapter_name, [name for name in named if name not in ties], **options)
    # Second stage. Everything that has to follow was recorded before the first module was replaced, so the order in
    # which modules were named does not matter: owners come first.
    for owner in dict.fromkeys(ties.values()):
        followers = [follower for follower, followed in ties.items() if followed == owner]
        if owner not in named:
            shared = _shared_parameter_names(model, owner, followers)
            _set_trainable(model, adapter_name, [owner], only=shared, **options)
        tied_module = model.get_submodule(owner)
        for follower in followers:
            only = None if follower in named else _shared_parameter_names(model, follower, [owner])
            _set_trainable(model, adapter_name, [follower], tied_module=tied_module, only=only, **options)


def _train_tokens(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str,
    tokens: Mapping[str, Sequence[int]],
    options: dict[str, Any],
) -> None:
    """Wrap the modules of which tokens are trained, and those that follow them."""
    ties = peft_config.token_modules_to_tie or {}
    options = {**options, "wrapper_cls": TrainableTokensWrapper}
    for name in dict.fromkeys([*tokens, *ties.values()]):
        if name not in ties:
            # members beside the named one follow too, so only some of the followers have tokens
            named = (tokens[follower] for follower, owner in ties.items() if owner == name and follower in tokens)
            indices = tokens.get(name) or next(named)
            _set_trainable(model, adapter_name, [name], token_indices=indices, **options)
    order = {name: place for place, (name, _) in enumerate(bare_modules(model))}
    for follower, owner in ties.items():
        layer = model.get_submodule(owner).token_adapter
        is_named = _have_one_entry(peft_config.trainable_token_indices, follower, owner)
        options.update(token_indices=layer.token_indices[adapter_name], is_named=is_named)
        _set_trainable(model, adapter_name, [follower], tied_adapter=layer, **options)
        if order[follower] < order[owner]:  # Marian's `shared` comes before the embedding that it says it has
            model.get_submodule(follower).token_adapter.hold_nothing(adapter_name)


def _have_one_entry(tokens: Collection[int] | Mapping[str, Collection[int]], name: str, other: str) -> bool:
    """Say whether the config reaches two modules by one name, as `embed_tokens` in an encoder and in a decoder."""
    entries = tokens if isinstance(tokens, Mapping) else ()
    reached = [next((entry for entry in entries if ends_like([entry], module)), None) for module in (name, other)]
    return reached[0] is not None and reached[0] == reached[1]


def _shared_parameter_names(model: nn.Module, name: str, others: Iterable[str]) -> set[str]:
    """Name the parameters that a module of the base model shares with one of others."""
    elsewhere = {identity_of(p) for other in others for p in _base_module(model, other).parameters()}
    own = _base_module(model, name).named_parameters(remove_duplicate=False)
    return {key for key, parameter in own if identity_of(parameter) in elsewhere}


def _base_module(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
