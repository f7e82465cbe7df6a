# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Configs: dataclasses that are written to and read from `adapter_config.json`. No torch in here.

Field values are checked when a config is built and raise plain `ValueError` and `TypeError`, as any dataclass would;
reading a file raises the classes of `peft.utils.error`.
"""

import dataclasses
import inspect
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .configs.checks import refuse_unknown_fields
from .configs.commits import installed_commit as _get_commit_hash
from .configs.fields import option, shared_field
from .configs.files import (
    HUB_KWARGS,
    check_fields_of_file,
    find_config_file,
    refuse_constant,
    to_json,
    without_doubles,
    write_text,
)
from .registry import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, TaskType, config_of_method
from .utils.constants import CONFIG_NAME
from .utils.error import PeftConfigError, PeftError, PeftKeyError, PeftMissingKeyError, PeftPathError, PeftTypeError
from .utils.files import read_json, write_atomically
from .utils.near_names import FEW, did_you_mean, nearest
from .utils.warning import warn


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}

# fields that name modules, which may share a weight with others
_NAME_MODULES = {"target_modules", "modules_to_save"}

# of the field that keeps them tied: by keyword only, so that released fields keep their places, and left out of files
# where it is not set, for readers that do not know it
_TYING = {"kw_only": True, "metadata": {"written_if_set": True}}


# The release whose interface and file format this version has. Files name it, so that readers which know the released
# package take them for what they are.
__version__ = "0.21.2"


def interface_version() -> str:
    """Give the release whose interface and file format this version has, which is what files name."""
    if "dev" not in __version__:
        return __version__
    try:
        commit = _get_commit_hash("peft")
    except Exception as error:  # whatever is wrong with the installation: configs can be made all the same
        warn(f"the commit of this development version was not found out ({error!r}); files say UNKNOWN", UserWarning)
        commit = None
    return f"{__version__}@{commit or 'UNKNOWN'}"


class _VisibleSignature:
    """
    Shows what a config takes, as its generated `__init__` does.

    Without it, `inspect.signature` of a class prefers `__new__`, which sees nothing but names.
    """

    def __get__(self, config: Any, cls: type) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


@dataclass
class PeftConfigMixin:
    """
    Reading and writing of configs.

    Args:
        task_type: task of the base model, a value of `TaskType`.
        peft_type: method, a value of `PeftType`.
        auto_mapping: class and library of a base model that has no task type, filled in when saving.
        peft_version: version that made the config; this one if it is left out.

    Raises:
        ValueError: for an unknown task type.
    """

    task_type: str | TaskType | None = option(None, "Task of the base model.")
    peft_type: str | PeftType | None = option(None, "Method of the adapter.")
    auto_mapping: dict | None = option(None, "Class and library of the base model, where no task type says it.")
    peft_version: str | None = option(None, "Version of the package that made the config.")

    # fields that a config object has but that are never written: they describe a run, not an adapter
    _runtime_fields = ("runtime_config",)

    __signature__ = _VisibleSignature()

    def __new__(cls, *args: Any, **kwargs: Any) -> "PeftConfigMixin":
        """Refuse misspelt fields before `__init__` does, which could not name the one that was meant."""
        if not cls.__dataclass_fields__.keys() >= kwargs.keys():
            refuse_unknown_fields(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.peft_version is None:
            self.peft_version = interface_version()
        known = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in known:
            raise ValueError(f"unknown task_type {self.task_type!r}; choose one of {', '.join(known)} or None")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name.endswith("dropout") and isinstance(value, (int, float)) and not 0 <= value <= 1:
                raise ValueError(f"{f.name} is a probability and must lie between 0 and 1, found {value}")
            if f.name == "ensure_weight_tying" and not isinstance(value, bool):
                raise TypeError(f"ensure_weight_tying must be True or False, found {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """
        Give the fields as a dictionary, without those that only matter at run time.

        Returns:
            Field name -> value; nested configs as dictionaries.
        """
        values = dataclasses.asdict(self)
        for f in dataclasses.fields(self):
            unset = f.metadata.get("written_if_set") and not values[f.name]
            if f.name in self._runtime_fields or unset:
                del values[f.name]
        return values

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Write `adapter_config.json` into a folder, which is made if it is missing.

        Args:
            save_directory: folder to write to.
            kwargs: `auto_mapping_dict` is written under `auto_mapping`; others are ignored.

        Raises:
            PeftPathError: if the path is a file.
        """
        if os.path.isfile(save_directory):
            raise PeftPathError(f"{os.fspath(save_directory)!r} is a file; a config is saved into a folder")
        os.makedirs(save_directory, exist_ok=True)
        content = {**self.to_dict(), "peft_version": self.peft_version or interface_version()}
        if kwargs.get("auto_mapping_dict") is not None:
            content["auto_mapping"] = kwargs["auto_mapping_dict"]
        text = json.dumps(content, indent=2, sort_keys=True, default=to_json)
        write_atomically(os.path.join(save_directory, CONFIG_NAME), lambda path: write_text(path, text))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> "CommitInfo":
        """
        Upload `adapter_config.json` to the hub.

        Args:
            repo_id: id of the repository; it is made if it is missing.
            kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision` and `create_pr`; others are
                for `save_pretrained`.

        Returns:
            The commit; as a string it is its address.
        """
        from .utils.hub import push_folder

        return push_folder(self, repo_id, **kwargs)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "PeftConfigMixin":
        """
        Build the config of the class that belongs to `peft_type`.

        Args:
            kwargs: field values; `peft_type` picks the class, or this one if it derives from that. Unknown fields are
                left out with one warning.

        Raises:
            PeftKeyError: if no method has that `peft_type`.
        """
        peft_type = kwargs.get("peft_type")
        config_cls = cls if peft_type is None else cls._class_for(peft_type)
        names = {f.name for f in dataclasses.fields(config_cls)} - set(config_cls._runtime_fields)
        unknown = sorted(set(kwargs) - names)
        if unknown:
            near = {name: None for field in unknown[:FEW] for name in nearest(field, names, most=1)}
            written_by = kwargs.get("peft_version")
            warn(
                f"fields that {config_cls.__name__} of this version does not know are ignored: {', '.join(unknown)}. "
                f"They may come from a newer version (this is {interface_version()}, the file is from "
                f"{written_by or 'an unknown one'}){did_you_mean(near)}"
            )
        values = {name: value for name, value in kwargs.items() if name in names}
        values.pop("peft_type", None)
        config = config_cls(**values)
        if peft_type is not None and config.peft_type is None:
            config.peft_type = peft_type
        return config

    @classmethod
    def _class_for(cls, peft_type: str) -> type["PeftConfigMixin"]:
        """Give the class that a method's config is read into: the method's, or a client's own that derives from it."""
        config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
        return cls if config_of_method(cls) is config_cls else config_cls

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "PeftConfigMixin":
        """
        Read a config from a local folder or from the hub.

        Args:
            pretrained_model_name_or_path: folder with `adapter_config.json`, or hub id.
            subfolder: folder below it.
            kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, ... for the hub; names of fields replace what
                the file says; others are ignored.

        Returns:
            A config of the class that belongs to the file's `peft_type`.

        Raises:
            PeftPathError: if there is no such file.
            PeftKeyError: if `peft_type` is missing or unknown.
            PeftValueError: if the file is not a config.

        Example:

            >>> import tempfile
            >>> from peft import LoraConfig, PeftConfig
            >>> folder = tempfile.mkdtemp()
            >>> LoraConfig(r=4).save_pretrained(folder)
            >>> PeftConfig.from_pretrained(folder).r
            4
        """
        hub_kwargs = {name: value for name, value in kwargs.items() if name in HUB_KWARGS}
        overrides = {name: value for name, value in kwargs.items() if name not in HUB_KWARGS}
        name_or_path = os.fspath(pretrained_model_name_or_path)
        path = find_config_file(name_or_path, subfolder, hub_kwargs)
        try:
            return cls.from_file(path, **overrides)
        except FileNotFoundError:  # a save that was under way has ended meanwhile, and has moved it to its place
            return cls.from_file(find_config_file(name_or_path, subfolder, hub_kwargs), **overrides)

    @classmethod
    def from_file(cls, path: str, **overrides: Any) -> "PeftConfigMixin":
        """
        Build a config from a file, which may come from anywhere.

        Args:
            path: the file.
            overrides: values to take instead of those in the file.

        Raises:
            PeftKeyError: if `peft_type` is missing or unknown.
            PeftValueError: if the file is not a config.
        """
        from_file = cls.from_json_file(path)
        values = {**from_file, **overrides}
        missing = MIN_EXPECTED_CONFIG_KEYS - set(values)
        if missing:
            raise PeftMissingKeyError(
                f"{path!r} lacks {', '.join(sorted(missing))}; found {', '.join(sorted(values)) or 'nothing'}. "
                "It is not the config of an adapter, or it was damaged"
            )
        if values["peft_type"] is None:
            raise PeftKeyError(f"{path!r} has peft_type null; write the method's name there, for example 'LORA'")
        if not isinstance(values["peft_type"], str):
            found = values["peft_type"]
            raise PeftKeyError(f"{path!r} has peft_type {found!r}, expected the name of a method such as 'LORA'")
        config_cls = cls._class_for(values["peft_type"])
        # callers pass on what other loaders take (`proxies`, `trust_remote_code`): that says nothing about the file
        known = {*from_file, *config_cls.__dataclass_fields__}
        values = {name: value for name, value in values.items() if name in known}
        try:
            check_fields_of_file(config_cls, {name: from_file[name] for name in from_file if name not in overrides})
            if "ensure_weight_tying" in config_cls.__dataclass_fields__:  # a file that says nothing says no
                values.setdefault("ensure_weight_tying", False)
            config = cls.from_peft_type(**values)
        except PeftError:
            raise
        except (TypeError, ValueError) as error:
            raise PeftConfigError(f"{path!r} does not hold a valid config: {error}") from error
        config.loaded_from = os.path.dirname(path)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """
        Read a JSON file that holds one object.

        Raises:
            PeftValueError: if it is not JSON, or not an object; if a field stands there twice, or holds no number.
        """
        return read_json(path_json_file, object_pairs_hook=without_doubles, parse_constant=refuse_constant)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """
        Check field values before a config is built from them; returns them unchanged.

        Raises:
            PeftTypeError: for names that are not fields of the config.
        """
        unknown = sorted(set(kwargs) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise PeftTypeError(f"{cls.__name__} has no field named {', '.join(unknown)}")
        return kwargs

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method puts virtual tokens in front of the inputs."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is adaption prompt."""
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """
    What every method's config has.

    Args:
        base_model_name_or_path: where the base model comes from.
        revision: revision of the base model on the hub.
        inference_mode: whether the adapter is frozen.

    Attributes:
        ensure_weight_tying: keep tied modules tied: what one of them learns, all of them use. A field of every config
            that can name modules (`TyingConfig`), which others never do.
        modules_to_tie: recorded while an adapter is injected, never saved: full name of each module that has to follow
            another one, because they share a parameter -> full name of the module that it follows.
        target_modules_to_tie: the same for modules that follow a target.
        token_modules_to_tie: the same for modules that follow one of which single tokens are trained.
        target_parameters_to_tie: the same for parameters, by their full names.
        loaded_from: folder of the file that the config was read from, never saved.
    """

    ensure_weight_tying = False

    # how the config applies to one model: found out while injecting, never written to a file
    modules_to_tie = None
    target_modules_to_tie = None
    token_modules_to_tie = None
    target_parameters_to_tie = None
    loaded_from = None

    base_model_name_or_path: str | None = option(None, "Where the base model is from.")
    revision: str | None = option(None, "Revision of the base model on the hub.")
    inference_mode: bool = option(False, "Whether the adapter is frozen.")

    def advise(self, low_cpu_mem_usage: bool) -> None:
        """
        Warn of what a caller of `get_peft_model` should know, such as what is left to do. To be extended by methods.

        Args:
            low_cpu_mem_usage: whether the adapter's tensors are made without storage.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give configs that were written for the released package the field too, if they can name modules."""
        super().__init_subclass__(**kwargs)
        # this runs before the decorator that makes the class a dataclass, so there are annotations only
        own = cls.__annotations__
        if _NAME_MODULES & own.keys() and "ensure_weight_tying" not in {*own, *cls.__dataclass_fields__}:
            own["ensure_weight_tying"] = bool
            cls.ensure_weight_tying = shared_field("ensure_weight_tying", **_TYING)


@dataclass
class TyingConfig(PeftConfig):
    """
    What the configs of methods have in common that adapt modules, or train them in full.

    Args:
        ensure_weight_tying: keep tied modules tied: what one of them learns, all of them use. It is written to the
            file if it is True. The environment variable PEFT_ENSURE_WEIGHT_TYING=1 makes True what it starts with.
    """

    ensure_weight_tying: bool = shared_field("ensure_weight_tying", **_TYING)


@dataclass
class PromptLearningConfig(TyingConfig):
    """
    What the configs of prompt-learning methods have in common.

    Args:
        num_virtual_tokens: number of virtual tokens.
        token_dim: width of the base model's embedding.
        num_transformer_submodules: 2 for encoder-decoder models, else 1.
        num_attention_heads: attention heads of the base model.
        num_layers: layers of the base model.
        modules_to_save: names of modules that are trained and saved in full.
    """

    num_virtual_tokens: int | None = option(None, "Number of virtual tokens.")
    token_dim: int | None = option(None, "Width of the base model's embedding.")
    num_transformer_submodules: int | None = option(None, "2 for encoder-decoder models, else 1.")
    num_attention_heads: int | None = option(None, "Attention heads of the base model.")
    num_layers: int | None = option(None, "Layers of the base model.")
    modules_to_save: list[str] | None = shared_field("modules_to_save")

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method puts virtual tokens in front of the inputs."""
        return True
