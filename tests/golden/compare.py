# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Comparisons that say in one line what differs; each yields nothing where all is as expected."""

import importlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peft


RTOL = 1e-4
# Where an adapter was made, not what it is.
PROVENANCE = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision")


def is_close(got: Tensor, want: Tensor, atol: float, rtol: float = RTOL) -> bool:
    """Whether two tensors agree, infinities and NaN excluded."""
    return got.shape == want.shape and bool(torch.isfinite(got).all()) and torch.allclose(got, want, rtol, atol)


def compare_tensors(what: str, got: Tensor, want: Tensor, atol: float, rtol: float = RTOL) -> Iterator[str]:
    """Compare two tensors."""
    got = got.detach()
    if got.shape != want.shape:
        yield f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    elif not is_close(got, want, atol, rtol):
        yield f"{what}: differs by up to {(got - want).abs().max():.2e} (tolerance {atol:g})"


def compare(what: str, got: Any, want: Any) -> Iterator[str]:
    """Compare two values."""
    if got != want:
        yield f"{what}: {str(got)[:200]}, expected {str(want)[:200]}"


def compare_keys(what: str, got: Collection[str], want: Collection[str]) -> Iterator[str]:
    """Compare two collections of names, order aside."""
    for problem, names in (("lacks", set(want) - set(got)), ("has beyond", set(got) - set(want))):
        if names:
            yield f"{what}: {problem} {len(names)}: {', '.join(sorted(names)[:4])}"


def compare_dicts(what: str, got: dict, want: dict) -> Iterator[str]:
    """Compare two dicts entry by entry."""
    yield from compare_keys(what, got, want)
    for key in sorted(got.keys() & want.keys()):
        yield from compare(f"{what}[{key}]", got[key], want[key])


def compare_state_dicts(what: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> Iterator[str]:
    """Compare names, shapes, types and values of saved tensors."""
    yield from compare_keys(f"{what} keys", got, want)
    for key in sorted(got.keys() & want.keys()):
        if got[key].dtype != want[key].dtype:
            yield f"{what}[{key}]: {got[key].dtype}, expected {want[key].dtype}"
        else:
            yield from compare_tensors(f"{what}[{key}]", got[key], want[key], atol=1e-6, rtol=1e-5)


def expect_raise(what: str, call: Callable[[], Any], name: str) -> Iterator[str]:
    """Expect an exception of the class of that name, or of one derived from it."""
    try:
        call()
    except Exception as error:
        if name not in [cls.__name__ for cls in type(error).__mro__]:
            yield f"{what}: raised {type(error).__name__} ({str(error)[:120]}), expected {name}"
    else:
        yield f"{what}: raised nothing, expected {name}"


def read_config(folder: Path) -> dict:
    """Return a saved config in the form in which configs are compared."""
    return comparable_config(json.loads((folder / "adapter_config.json").read_text()))


def comparable_config(config: dict) -> dict:
    """Return the config with lists of names sorted, and without what depends on where it was saved."""

    def normal(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: normal(entry) for key, entry in value.items()}
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return sorted(set(value))
        return value

    return {key: normal(value) for key, value in config.items() if key not in PROVENANCE}


def decode_argument(value: Any, folder: Path) -> Any:
    """Restore an argument from its JSON form: config objects, tuples, and paths under the case's folder."""
    if isinstance(value, dict) and "__class__" in value:
        name = value["__class__"]
        cls = getattr(peft, name, None) or getattr(importlib.import_module("peft.tuners.lora.config"), name)
        return cls(**decode_argument(value.get("kwargs", {}), folder))
    if isinstance(value, dict) and "__tuple__" in value:
        return tuple(decode_argument(value["__tuple__"], folder))
    if isinstance(value, dict):
        return {key: decode_argument(entry, folder) for key, entry in value.items()}
    if isinstance(value, list):
        return [decode_argument(entry, folder) for entry in value]
    if isinstance(value, str) and value.startswith("$DIR/"):
        return str(folder / value.removeprefix("$DIR/"))
    return value


def make_config(facts: dict, folder: Path) -> peft.PeftConfig:
    """Return the config that `config_class` and `config_kwargs` describe."""
    return getattr(peft, facts["config_class"])(**decode_argument(facts["config_kwargs"], folder))


def trainable_shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    """Return the shape of each trainable parameter by name."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
