# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What became of each tensor when an adapter was loaded; every error and warning about it is written here."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.nn.modules.module import _IncompatibleKeys

from ..registry import PEFT_TYPE_TO_PREFIX_MAPPING
from ..utils.error import PeftRuntimeError, PeftValueError
from ..utils.near_names import nearest
from ..utils.warning import warn


Shape = tuple[int, ...]

_SHOWN = 4
_REMEDY_FOR_SETTINGS = "to have the checkpoint's config, call delete_adapter first, or load under another name"
# comparing a name with all names of a large model would take longer than loading it
_COMPARED = 200


class PeftLoadError(PeftRuntimeError, PeftValueError):
    """
    A checkpoint that does not fit an adapter.

    Attributes:
        report: the `LoadReport` that says why.
    """

    report: "LoadReport | None" = None


class LoadResult(_IncompatibleKeys):
    """
    What loading returns: `missing_keys` and `unexpected_keys`, as release 0.21.2 has them.

    Attributes:
        report: the `LoadReport`, which has more to say.
    """

    report: "LoadReport"


@dataclass(frozen=True)
class LoadReport:
    """
    What became of each tensor of a checkpoint, and of each that an adapter has. Printed, it is a table.

    Args:
        adapter_name: name of the adapter.
        expected: keys that a complete checkpoint of the adapter has.
        loaded: keys of the checkpoint whose tensors fit, and are in the model now unless loading was refused.
        missing: keys of tensors that the checkpoint lacks; they keep their start values.
        unexpected: keys of the checkpoint that belong to nothing in the model.
        mismatched: key -> shape in the checkpoint and shape in the model, where these differ; left out.
        mistyped: key -> type in the checkpoint and type in the model, where only one of the two is for real numbers.
        not_finite: keys of tensors with entries that are infinite or no numbers.
        tied: key -> key of the tensor that it shares in the model; the latter's value was taken.
        overruled: those keys of `tied` for which the checkpoint has another value.
        resized: key -> shape before and after, of tensors of the model that were made to fit the checkpoint.
        settings: field of the config -> value in the checkpoint's config and value in the model's, where these differ;
            an adapter that is there keeps its own.
        about: which method, task and base model the adapter has, and which model it was loaded into.

    Example:

        >>> import tempfile, torch
        >>> from peft import LoraConfig, PeftModel, get_peft_model
        >>> def make_net():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> folder = tempfile.mkdtemp()
        >>> get_peft_model(make_net(), LoraConfig(r=2, target_modules=["0"])).save_pretrained(folder)
        >>> model = PeftModel.from_pretrained(make_net(), folder)
        >>> model.load_reports["default"].complete
        True
        >>> print(model.load_reports["default"])
        adapter 'default': 2 tensors loaded, everything fits
    """

    adapter_name: str
    expected: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    mistyped: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    overruled: tuple[str, ...] = ()
    resized: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    about: str = ""

    @property
    def complete(self) -> bool:
        """Whether each tensor of the checkpoint is in the model, each of the adapter was in it, and settings agree."""
        tensors = (self.missing, self.unexpected, self.mismatched, self.mistyped, self.not_finite, self.overruled)
        return not any(tensors) and not self.settings

    def near(self, key: str) -> list[str]:
        """
        Find keys that the checkpoint lacks and that one of its unexpected keys may stand for.

        Args:
            key: an unexpected key.
        """
        indices = _indices(key)
        same_layer = [name for name in self.missing if _indices(name) == indices]
        return nearest(key, (same_layer or self.missing)[:_COMPARED], most=1)

    def __str__(self) -> str:
        head = f"adapter {self.adapter_name!r}: {len(self.loaded)} tensors loaded"
        rows = [("missing", key, "keeps its start value") for key in self.missing]
        rows += [("unexpected", key, _near_text(self.near(key))) for key in self.unexpected]
        rows += [("mismatched", key, _pair_text(*shapes)) for key, shapes in self.mismatched.items()]
        rows += [("mistyped", key, _pair_text(*types)) for key, types in self.mistyped.items()]
        rows += [("not finite", key, "") for key in self.not_finite]
        rows += [("overruled", key, f"has the value of {self.tied[key]}") for key in self.overruled]
        rows += [("tied", key, f"to {owner}") for key, owner in self.tied.items() if key not in self.overruled]
        rows += [("setting", name, _pair_text(*map(repr, values))) for name, values in self.settings.items()]
        rows += [("resized", key, f"{old} -> {new}") for key, (old, new) in self.resized.items()]
        text = head + (", everything fits" if self.complete else f"; {self.about}" if self.about else "")
        return "\n".join([text, *(f"  {kind:<10}  {key}  {note}".rstrip() for kind, key, note in rows)])

    # ------------------------------------------------------------------------------------------- errors and warnings
    def refuse(self, strict: bool = False, ignore_mismatched_sizes: bool = False) -> None:
        """
        Raise if the checkpoint cannot be loaded.

        Args:
            strict: raise on anything that does not fit.
            ignore_mismatched_sizes: tensors of another shape are left out; it has no effect with `strict`.

        Raises:
            PeftLoadError: with the report.
        """
        found = (*self.unexpected, *self.loaded)
        if found and not self.mismatched and not set(self.loaded) & set(self.expected):
            self._fail(self._explain_no_key(found))
        problems = []
        if self.not_finite:
            problems.append((self._text_not_finite(), "use an earlier checkpoint: training has diverged"))
        if self.mismatched and (strict or not ignore_mismatched_sizes):
            problems.append((self._text_mismatched(), self._remedy_for_shapes()))
        if self.mistyped:
            problems.append((self._text_mistyped(), "save the adapter before its tensors are quantised"))
        if strict and self.missing:
            problems.append((self._text_missing(), ""))
        if strict and self.unexpected:
            problems.append((self._text_unexpected(), ""))
        if strict and self.overruled:
            problems.append((self._text_overruled(), ""))
        if self.settings and (strict or problems):  # they may be why something does not fit
            problems.append((self._text_settings(), _REMEDY_FOR_SETTINGS))
        if problems:
            remedies = [remedy for _, remedy in problems if remedy]
            remedies += ["strict=False loads what fits"] if len(remedies) < len(problems) else []
            texts = "; ".join(text for text, _ in problems)
            about = f"{self._about()}. " if self._about() else ""
            self._fail(f"{texts}; nothing was loaded. {about}What to do: {'; '.join(remedies)}")

    def warn(self, quiet: bool = False) -> None:
        """
        Warn once if anything was left out, with counts and names that come near.

        Args:
            quiet: say nothing about tensors that are missing or unexpected.
        """
        texts = []
        if self.missing and not quiet:
            texts.append(f"{self._text_missing()}; they keep their start values")
        if self.unexpected and not quiet:
            texts.append(f"{self._text_unexpected()}; they were left out")
        if self.mismatched:
            texts.append(f"{self._text_mismatched()}; they were left out, because ignore_mismatched_sizes=True")
        if self.overruled:
            texts.append(f"{self._text_overruled()}; the owner's values are used")
        if self.settings:
            texts.append(f"{self._text_settings()}; the tensors were loaded, and the model's settings kept")
        if texts:
            remedies = [_REMEDY_FOR_SETTINGS] if self.settings else []
            if not quiet and (self.missing or self.unexpected or self.settings):
                remedies.append("strict=True refuses such a checkpoint")
                remedies += ["key_mapping translates its keys"] if self.missing and self.unexpected else []
            warn(". ".join(part for part in ("; ".join(texts), self._about(), ", ".join(remedies)) if part))

    def _fail(self, message: str) -> None:
        error = PeftLoadError(message)
        error.report = self
        raise error

    def _about(self) -> str:
        return self.about if self.missing or self.unexpected or self.mismatched else ""

    def _explain_no_key(self, found: tuple[str, ...]) -> str:
        near = self.near(found[0]) or list(self.expected[:1]) or ["no tensor"]
        return (
            f"none of the checkpoint's {len(found)} keys belongs to adapter {self.adapter_name!r}. It holds "
            f"{found[0]!r}{' and others' if len(found) > 1 else ''}, the model expects {near[0]!r}"
            f"{' and others' if len(self.expected) > 1 else ''}. {self.about}. The checkpoint was made for another "
            f"architecture, config or method{_methods_text(found)}; names that only differ by a prefix can be "
            "translated with key_mapping"
        )

    def _text_missing(self) -> str:
        return (
            f"the checkpoint lacks {len(self.missing)} of {len(self.expected)} tensors of adapter "
            f"{self.adapter_name!r}: {_listed(self.missing)}"
        )

    def _text_unexpected(self) -> str:
        hints = {key: near for key in self.unexpected[:_SHOWN] if (near := _near_text(self.near(key)))}
        shown = [f"{key} ({hints[key]})" if key in hints else key for key in self.unexpected]
        return f"{len(self.unexpected)} tensors of the checkpoint belong to nothing in the model: {_listed(shown)}"

    def _text_mismatched(self) -> str:
        details = [f"{key}: {_pair_text(*shapes)}" for key, shapes in self.mismatched.items()]
        return (
            f"{len(details)} tensors of the checkpoint have another shape than in the model ({_listed(details, '; ')})"
        )

    def _text_mistyped(self) -> str:
        details = [f"{key}: {_pair_text(*types)}" for key, types in self.mistyped.items()]
        return (
            f"{len(details)} tensors of the checkpoint have a type that cannot be the model's "
            f"({_listed(details, '; ')})"
        )

    def _text_not_finite(self) -> str:
        return (
            f"{len(self.not_finite)} tensors of the checkpoint have entries that are not finite: "
            f"{_listed(self.not_finite)}"
        )

    def _text_overruled(self) -> str:
        values = [f"{key} (now that of {self.tied[key]})" for key in self.overruled]
        return (
            f"the checkpoint has other values for {_listed(values)}, although these modules are tied in the model, "
            "probably because it was saved by a version that let ties come apart"
        )

    def _text_settings(self) -> str:
        details = [f"{name}: {_pair_text(*map(repr, values))}" for name, values in self.settings.items()]
        return (
            f"the checkpoint's config differs from that of adapter {self.adapter_name!r}, which is there already "
            f"({_listed(details, '; ')})"
        )

    def _remedy_for_shapes(self) -> str:
        rows = {found[0] for found, _ in self.mismatched.values() if found}
        if len(rows) == 1 and all(found[1:] == wanted[1:] for found, wanted in self.mismatched.values()):
            return (
                f"if the vocabulary was resized for training, call resize_token_embeddings({rows.pop()}) on the base "
                "first; else check the rank"
            )
        return "check the rank and the base model"


def _indices(key: str) -> list[str]:
    return re.findall(r"(?<=\.)\d+(?=\.)", key)


def _methods_text(keys: Collection[str]) -> str:
    """Name the methods whose tensors have names like these."""
    methods = [
        method.value
        for method, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()
        if any(part.startswith(prefix) for key in keys for part in key.split("."))
    ]
    return f" (its tensors are named like those of {' or '.join(methods)})" if methods else ""


def _near_text(near: Collection[str]) -> str:
    return f"near: {', '.join(near)}" if near else ""


def _pair_text(found: Shape | str, wanted: Shape | str) -> str:
    return f"checkpoint {found}, model {wanted}"


def _listed(texts: Collection[str], separator: str = ", ") -> str:
    return separator.join(list(texts)[:_SHOWN]) + (" ..." if len(texts) > _SHOWN else "")
