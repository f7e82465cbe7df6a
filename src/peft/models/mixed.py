# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`PeftMixedModel`: adapters of several methods in one model, several of them active at once."""

import os
from typing import Any

from torch import nn

from ..checkpoints.load_report import LoadResult
from ..config import PeftConfig
from ..layers.new_tensors import making_tensors
from ..tuners.mixed.model import MixedModel
from ..utils.error import PeftNotImplementedError
from .loading import load_adapter, load_model
from .wrapper import ModelWrapper


class PeftMixedModel(ModelWrapper):
    """
    A base model whose adapters may be of several methods, several of them active at once.

    The methods are LoRA, LoHa, LoKr, AdaLoRA, OFT and SHiRA, as far as this version has them. It is meant for
    inference with adapters that were trained one by one; each is saved by the `PeftModel` that trained it.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how; it is not changed.
        adapter_name: name of the adapter.

    Attributes:
        load_reports: adapter name -> `LoadReport`, for adapters that were loaded from a checkpoint.

    Raises:
        PeftValueError: for methods whose adapters cannot be active beside others.

    Example:

        >>> import torch
        >>> from peft import LoHaConfig, LoraConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"]), adapter_name="a", mixed=True)
        >>> model.add_adapter("b", LoHaConfig(target_modules=["0"]))
        >>> model.set_adapter(["a", "b"])
        >>> model.active_adapters
        ['a', 'b']
        >>> type(model.merge_and_unload()[0]).__name__
        'Linear'
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> None:
        super().__init__()
        self.base_model = MixedModel(model, {adapter_name: peft_config}, adapter_name)

    @classmethod
    def _make(
        cls,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
    ) -> "PeftMixedModel":
        """Do what the constructor does, with its arguments and those of other models' constructors."""
        made = cls.__new__(cls)
        ModelWrapper.__init__(made)
        with making_tensors(full_precision=autocast_adapter_dtype):
            made.base_model = MixedModel(
                model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
            )
        return made

    @property
    def active_adapter(self) -> list[str]:
        """Names of the active adapters."""
        return self.base_model.active_adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Call the base model.

        Args:
            args: passed on.
            kwargs: likewise.
        """
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """
        Generate with the base model.

        Args:
            args: for the base model's `generate`.
            kwargs: likewise.
        """
        return self.base_model.generate(*args, **kwargs)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """
        Put another adapter beside those that the model has. It is not active at first, unless it is the only one.

        Args:
            adapter_name: its name.
            peft_config: what to adapt and how; it is not changed.
            low_cpu_mem_usage: make its tensors on the meta device.
            autocast_adapter_dtype: keep them in float32 where the base is in half precision.

        Raises:
            PeftValueError: if the name is taken, or the method cannot be active beside others; the model stays as it
                was.
        """
        self._check_name_is_free(adapter_name)
        self.base_model.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """
        Let an adapter train further modules in full. What is tied follows, as it does in `add_adapter`.

        Args:
            peft_config: config whose `modules_to_save` names them, and whose `ensure_weight_tying` says what is to
                become of ties; without any modules, nothing is done.
            adapter_name: name of an adapter of the model.

        Raises:
            PeftError: if a module cannot be trained in full, or a tie not be kept; the model stays as it was.
        """
        self._check_names([adapter_name])
        if getattr(peft_config, "modules_to_save", None) or getattr(peft_config, "trainable_token_indices", None):
            self.base_model.train_in_full(peft_config, adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the adapters that are used; others are frozen.

        Args:
            adapter_name: one name or several, of any methods.
            inference_mode: freeze the chosen ones too.

        Raises:
            PeftValueError: for a name that the model does not have.
        """
        self._check_names([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """
        Remove adapters.

        Args:
            adapter_name: one name or several.

        Raises:
            PeftValueError: for a name that the model does not have, or an adapter that is merged; then none is
                removed.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._check_names(names)
        self.base_model.delete_adapter(adapter_name)
        for name in names:
            self.load_reports.pop(name, None)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """
        Merge adapters and give the base model back; see `BaseTuner.merge_and_unload`.

        Args:
            args: see there.
            kwargs: likewise.
        """
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """
        Give the base model back as it was; see `BaseTuner.unload`.

        Args:
            args: none.
            kwargs: none.
        """
        return self.base_model.unload(*args, **kwargs)

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        *args: Any,
        strict: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> LoadResult:
        """
        Put an adapter from a folder or from the hub beside those that the model has. It is not active at first.

        Args:
            model_id: folder, or hub id.
            adapter_name: name to give the adapter; if there is one of that name, its tensors are replaced.
            args: see `PeftModel.load_adapter`.
            strict: refuse a checkpoint that does not fit in every respect.
            ignore_mismatched_sizes: leave out tensors of another shape.
            kwargs: see `PeftModel.load_adapter`.
        """
        fit = {"strict": strict, "ignore_mismatched_sizes": ignore_mismatched_sizes}
        return load_adapter(self, model_id, adapter_name, *args, **fit, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        strict: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> "PeftMixedModel":
        """
        Put an adapter from a folder or from the hub into a base model.

        Args:
            model: the base model; it is changed in place.
            model_id: folder, or hub id.
            adapter_name: name to give the adapter.
            is_trainable: let it be trained; otherwise it is frozen and the model is in eval mode.
            config: config to use instead of the one in the folder.
            strict: refuse a checkpoint that does not fit in every respect.
            ignore_mismatched_sizes: leave out tensors of another shape.
            kwargs: see `PeftModel.from_pretrained`.
        """
        fit = {"strict": strict, "ignore_mismatched_sizes": ignore_mismatched_sizes}
        return load_model(cls._make, model, model_id, adapter_name, is_trainable, config, **fit, **kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """
        Refuse to write a model card.

        Raises:
            PeftNotImplementedError: always; the adapters have cards of their own.
        """
        raise PeftNotImplementedError(
            "a PeftMixedModel has no model card; each adapter has one, written by the PeftModel that trained it"
        )

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = False,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Refuse to save.

        Raises:
            PeftNotImplementedError: always; adapters are saved by the `PeftModel` that trained them.
        """
        raise PeftNotImplementedError(
            "a PeftMixedModel cannot be saved; save each adapter with the PeftModel that trained it, or save the "
            "merged model: merge_and_unload().save_pretrained(...)"
        )
