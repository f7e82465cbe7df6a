# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adapters of several methods in one model: each method's own tuner works on the model that they share."""

import copy
from typing import Any

import torch
from torch import nn

from ...config import PeftConfig
from ...registry import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from ...surgery.saved_modules import check_additional_trainable_modules, set_additional_trainable_modules
from ...surgery.switching import remove_empty_layers
from ...surgery.transaction import all_or_nothing
from ...tying.record import find_followers, keep_ties
from ...tying.settle import one_object_each
from ...utils.error import PeftNotImplementedError, PeftValueError
from ...utils.old_names import old_names
from ..base import BaseTuner, BaseTunerLayer


# methods whose adapters can be active beside those of others, and what the names of their tensors start with
COMPATIBLE_TUNER_TYPES = tuple(PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
PREFIXES = [PEFT_TYPE_TO_PREFIX_MAPPING[method] for method in COMPATIBLE_TUNER_TYPES]


class MixedModel(BaseTuner):
    """
    A model with adapters of several methods in it.

    Where several methods adapt a module, the layer of each stands around those of the methods that came before, so
    that an adapter works on what those inside it leave: the order in which methods were added counts, not the order
    in which adapters are activated.

    Args:
        model: the base model; it is changed in place.
        config: config, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        kwargs: see `BaseTuner`.

    Raises:
        PeftValueError: for methods whose adapters cannot be active beside others.

    Example:

        >>> import torch
        >>> from peft import LoHaConfig, LoraConfig
        >>> from peft.tuners import MixedModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = MixedModel(net, LoraConfig(target_modules=["0"]), "a")
        >>> model.add_adapter("b", LoHaConfig(target_modules=["0"]))
        >>> model.set_adapter(["a", "b"])
        >>> [type(layer).__module__ for layer in (net[0], net[0].base_layer)]
        ['peft.tuners.loha.layer', 'peft.tuners.lora.layer']
    """

    prefix = ""
    tuner_layer_cls = BaseTunerLayer

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> None:
        # method -> its tuner; they are no submodules, since they hold the same model
        self.__dict__["_tuners"] = {}
        super().__init__(model, config, adapter_name, **kwargs)

    def _tuner_of(self, config: PeftConfig) -> BaseTuner:
        """Give the tuner of an adapter's method, up to date with this one."""
        method = config.peft_type
        if method not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
            known = sorted(getattr(other, "value", other) for other in PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
            raise PeftValueError(
                f"adapters of method {getattr(method, 'value', method)} cannot be active beside others; methods that "
                f"can: {', '.join(known)}"
            )
        if method not in self._tuners:
            self._tuners[method] = PEFT_TYPE_TO_MIXED_MODEL_MAPPING[method](self.model, {}, "")
            self._tuners[method].__dict__["in_mixed_model"] = True
        tuner = self._tuners[method]
        tuner.peft_config, tuner.active_adapter = self.peft_config, self.active_adapter
        return tuner

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Let the adapter's method put it into the model; see `BaseTuner.inject_adapter`."""
        with all_or_nothing(self, *self._tuners.values()):
            remove_empty_layers(model)  # a method that is added again comes after those that are there
            tuner = self._tuner_of(self.peft_config[adapter_name])
            tuner.inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            self.targeted_module_names = tuner.targeted_module_names
            self.targeted_parameter_names = tuner.targeted_parameter_names
            model.peft_config = self.peft_config

    def train_in_full(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """
        Let an adapter train further modules in full, or tokens of them; if it is refused, the model stays as it was.

        Args:
            peft_config: config whose `modules_to_save` or `trainable_token_indices` names them. Its targets have no
                effect; its `ensure_weight_tying` has.
            adapter_name: name of an adapter of the model.

        Raises:
            PeftError: if a module cannot be trained, or a tie not be kept.
        """
        asked = copy.copy(peft_config)
        asked.target_modules = asked.target_parameters = None
        model, present = self.model, self._config_of(adapter_name)
        kept = keep_ties(model, asked, lambda tie: tie.trains_the_same_tokens)
        asked.modules_to_tie = find_followers(tie for tie in kept if tie.saved)
        asked.token_modules_to_tie = find_followers(tie for tie in kept if tie.tokens)
        check_additional_trainable_modules(model, asked)
        active = adapter_name in self.active_adapters
        with all_or_nothing(self), one_object_each(model):
            set_additional_trainable_modules(model, asked, self.get_model_config(model), adapter_name, active)
            present.modules_to_tie = {**(present.modules_to_tie or {}), **asked.modules_to_tie}
            present.token_modules_to_tie = {**(present.token_modules_to_tie or {}), **asked.token_modules_to_tie}

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the adapters that are used, of any methods; others are frozen.

        Args:
            adapter_name: one name or several.
            inference_mode: freeze the chosen ones too.
        """
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """
        Remove adapters. If all that were active are gone, another one becomes active, with a warning.

        A method of which no adapter is left gives up its place among the others around a module: if it is added
        again, it comes after those that are there, as in a model that it was never in.

        Args:
            adapter_name: one name or several.

        Raises:
            PeftValueError: if there is no adapter of a name, or one is merged; then none is removed.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for config in [self._config_of(name) for name in names]:
            self._tuner_of(config)
        self._refuse_merged(names)
        for name in names:
            tuner = self._tuner_of(self.peft_config[name])
            tuner.delete_adapter(name)
            self.active_adapter = tuner.active_adapter

    def _unload(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        # a method that does more than to take its layers off, such as LoRA, says so in its tuner
        for method, tuner in self._tuners.items():
            if type(tuner)._unload is not BaseTuner._unload:
                config = next((config for config in self.peft_config.values() if config.peft_type == method), None)
                if config is not None:
                    return self._tuner_of(config)._unload(merge, safe_merge, adapter_names)
        return super()._unload(merge, safe_merge, adapter_names)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """
        Refuse to combine adapters into one.

        Raises:
            PeftNotImplementedError: always, since adapters of different methods have no common form.
        """
        raise PeftNotImplementedError(
            "adapters of several methods cannot be combined into one; activate them together with set_adapter instead"
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """
        Generate with the base model.

        Args:
            args: for the base model's `generate`.
            kwargs: likewise.
        """
        return self.model.generate(*args, **kwargs)


__getattr__ = old_names(__name__)
