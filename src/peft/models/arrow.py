# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""A model whose tokens are routed among trained LoRA adapters; the routing is in `tuners/lora/variants/arrow.py`."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..anatomy.kinds import is_linear
from ..anatomy.matching import shortest_endings
from ..anatomy.walking import adapter_modules, names_of_modules
from ..config import PeftConfig
from ..surgery.transaction import all_or_nothing
from ..tuners.lora.config import ArrowConfig, LoraConfig
from ..tuners.lora.layer import LoraLayer
from ..tuners.lora.variants.arrow import GKS_ADAPTER_PREFIX, ROUTER, TASK_ADAPTER_PREFIX
from ..utils.constants import CONFIG_NAME
from ..utils.error import PeftTypeError, PeftValueError
from .peft_model import PeftModel


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | os.PathLike],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """
    Put trained LoRA adapters into a model, with a router that is active in their place.

    The adapters are named `task_0`, `task_1`, ... and `gks_0`, ..., the router `arrow_router`. Arrow: Ostapenko et al.
    2024, arXiv:2405.11157; general knowledge that is subtracted: ACL 2025, 2025.acl-short.54.

    Args:
        base_model: the base model; it is changed in place.
        task_specific_adapter_paths: folders of the experts, or hub ids, `"user/repo"` or `"user/repo/sub/folder"`. All
            have one rank, and adapt the same linear layers.
        arrow_config: settings of the router; the names of the adapters are written into it.
        general_adapter_paths: the same for adapters with general knowledge; needed if `use_gks` is set, and else not
            used.
        adapter_kwargs: for `PeftModel.from_pretrained` and `load_adapter`.

    Returns:
        The model.

    Raises:
        PeftValueError: if there are no adapters, or they do not go together; the base model stays as it was.
        PeftTypeError: if a target is no linear layer, or an adapter is none of LoRA.

    Example:

        >>> import tempfile, torch
        >>> from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
        >>> paths = []
        >>> for _ in range(2):
        ...     net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        ...     expert = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        ...     paths.append(tempfile.mkdtemp())
        ...     expert.save_pretrained(paths[-1])
        >>> model = create_arrow_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), paths, ArrowConfig(top_k=1))
        >>> sorted(model.peft_config), model.active_adapter
        (['arrow_router', 'task_0', 'task_1'], 'arrow_router')
    """
    if isinstance(task_specific_adapter_paths, (str, os.PathLike)) or not task_specific_adapter_paths:
        raise PeftValueError(
            "task_specific_adapter_paths must be a list of one adapter at least, found "
            f"{task_specific_adapter_paths!r}"
        )
    if arrow_config.use_gks and not general_adapter_paths:
        raise PeftValueError("use_gks=True subtracts general knowledge; give general_adapter_paths")
    experts = _named(TASK_ADAPTER_PREFIX, task_specific_adapter_paths)
    general = _named(GKS_ADAPTER_PREFIX, general_adapter_paths or ()) if arrow_config.use_gks else {}
    sources = {name: _resolve_adapter_source(path) for name, path in {**experts, **general}.items()}
    rank = _common_rank(sources, adapter_kwargs)
    before = arrow_config.task_adapter_names, arrow_config.gks_adapter_names
    try:
        with all_or_nothing(base_model):
            model = _load(base_model, sources, adapter_kwargs)
            check_loaded_lora_compatibility_arrow(model, list(sources))
            ensure_adapters_target_linear_layers_only(model, list(sources))
            arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(experts), list(general)
            targets = [name for name, _ in _layers_of(model, next(iter(experts)))]
            names = [name for name in names_of_modules(model.get_base_model()) if name]
            config = LoraConfig(r=rank, target_modules=_as_endings(targets, names), arrow_config=arrow_config)
            model.add_adapter(ROUTER, config)
            model.set_adapter(ROUTER)
    except BaseException:
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = before
        raise
    return model


def _named(prefix: str, paths: Sequence[str | os.PathLike]) -> dict[str, str]:
    return {f"{prefix}{number}": os.fspath(path) for number, path in enumerate(paths)}


def _resolve_adapter_source(path: str) -> tuple[str, str | None]:
    """Take a path apart: a folder, or a repository of the hub and a folder in it."""
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, CONFIG_NAME)):
            raise PeftValueError(
                f"the folder {path!r} has no {CONFIG_NAME}; give the folder that an adapter was saved to"
            )
        return path, None
    user, *rest = path.strip("/").split("/")
    if not rest or os.path.isabs(path):
        raise PeftValueError(
            f"{path!r} is no folder, and no id of the hub such as 'user/repo' or 'user/repo/sub/folder'; correct it"
        )
    return f"{user}/{rest[0]}", "/".join(rest[1:]) or None


def _common_rank(sources: dict[str, tuple[str, str | None]], options: dict[str, Any]) -> int:
    """Find the rank that all adapters say, before any is loaded."""
    hub = {name: options[name] for name in ("revision", "token", "cache_dir") if name in options}
    configs = {name: PeftConfig.from_pretrained(id, subfolder=folder, **hub) for name, (id, folder) in sources.items()}
    other = next((name for name, config in configs.items() if not isinstance(config, LoraConfig)), None)
    if other is not None:
        raise PeftTypeError(
            f"Arrow routes among adapters of LoRA, and {sources[other][0]!r} is one of {configs[other].peft_type}; "
            "convert it with save_as_lora"
        )
    ranks = {name: config.r for name, config in configs.items()}
    if len(set(ranks.values())) > 1:
        raise PeftValueError(
            f"Arrow needs adapters of one rank, found {_listed(ranks)}; convert them with save_as_lora"
        )
    return next(iter(ranks.values()))


def _load(base_model: nn.Module, sources: dict[str, tuple[str, str | None]], options: dict[str, Any]) -> PeftModel:
    model = None
    for name, (path, folder) in sources.items():
        where = {**options, "subfolder": folder} if folder else options
        if model is None:
            model = PeftModel.from_pretrained(base_model, path, adapter_name=name, **where)
        else:
            model.load_adapter(path, adapter_name=name, **where)
    return model


def _layers_of(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, layer in adapter_modules(base):
        if isinstance(layer, LoraLayer) and layer.has_adapter(adapter):
            yield name, layer


def _as_endings(targets: list[str], names: list[str]) -> list[str]:
    """Name the targets by the last parts of their names, or by longer endings where these would reach others too."""
    last = {target.rpartition(".")[2] for target in targets}
    reached = {name for name in names if name.rpartition(".")[2] in last}
    return sorted(last if reached == set(targets) else shortest_endings(targets, names))


def check_loaded_lora_compatibility_arrow(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """
    Refuse adapters that Arrow cannot mix: of several ranks, of other shapes, or of other layers.

    Args:
        model: the model that holds them.
        adapter_names: names.

    Raises:
        PeftValueError: if they differ.
    """
    layers = {adapter: dict(_layers_of(model, adapter)) for adapter in adapter_names}
    first = next(iter(layers))
    for adapter, own in layers.items():
        apart = sorted(own.keys() ^ layers[first].keys())
        if apart:
            raise PeftValueError(
                f"Arrow needs adapters of the same layers, and only one of {first!r} and {adapter!r} adapts "
                f"{apart[0]!r}; leave one of them out"
            )
        for name, layer in own.items():
            shapes = {a: [tuple(f.shape) for f in layer.factor_weights(a)] for a in (first, adapter)}
            if shapes[first] != shapes[adapter]:
                raise PeftValueError(
                    f"Arrow needs factors of the same shapes, found {_listed(shapes)} in {name!r}; convert the "
                    "adapters with save_as_lora, to one rank"
                )


def ensure_adapters_target_linear_layers_only(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """
    Refuse adapters of other layers than linear ones.

    Args:
        model: the model that holds them.
        adapter_names: names.

    Raises:
        PeftTypeError: if there is one.
    """
    for adapter in adapter_names:
        for name, layer in _layers_of(model, adapter):
            base = layer.get_base_layer()
            if layer.parameter_name is not None or not is_linear(base):
                raise PeftTypeError(
                    f"Arrow routes tokens among linear layers, and {adapter!r} adapts {name!r}, a "
                    f"{type(base).__name__}; leave the adapter out"
                )


def _listed(found: dict[str, Any]) -> str:
    return ", ".join(f"{value} ({name})" for name, value in found.items())
