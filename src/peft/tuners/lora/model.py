# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA on a whole model."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...config import PeftConfig
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...utils.error import PeftNotImplementedError
from ...utils.tying import describe_no_effect, find_reached_ties, find_tied_groups, followers_of_saved
from ...utils.warning import warn
from .._matching import pattern_lookup
from ..tuners_utils import BaseTuner, BaseTunerLayer
from .config import LoraConfig
from .layer import Embedding, Linear, LoraLayer, warn_about_layout


# fields that ask for something that this version does not have
_NOT_IMPLEMENTED = (
    "use_dora",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "megatron_config",
    "monteclora_config",
    "velora_config",
    "arrow_config",
    "kasa_config",
    "use_bdlora",
)


class LoraModel(BaseTuner):
    """
    A model with LoRA layers in it (Hu et al. 2021, arXiv:2106.09685).

    Args:
        model: the base model; it is changed in place.
        peft_config: a `LoraConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the factors on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, LoraModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> LoraModel(net, LoraConfig(r=2, target_modules=["0"]), "default").targeted_module_names
        ['0']
    """

    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    layer_classes = {nn.Embedding: Embedding, Conv1D: Linear, nn.Linear: Linear}
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, adapter_name: str, config: PeftConfig) -> None:
        super()._check_new_adapter_config(adapter_name, config)
        asked = [name for name in _NOT_IMPLEMENTED if getattr(config, name)]
        if asked:
            raise PeftNotImplementedError(f"LoRA of this version does not have: {', '.join(asked)}; leave them out")

    def _check_tied_modules(self, model: nn.Module, peft_config: LoraConfig) -> None:
        """
        With `ensure_weight_tying`, record which modules have to follow which; without it, warn about lost ties.

        Raises:
            PeftValueError: if a tie cannot be kept; nothing has been changed then.
        """
        peft_config.modules_to_tie = {}
        if not peft_config.ensure_weight_tying:
            super()._check_tied_modules(model, peft_config)
            return
        groups = find_tied_groups(model)
        reached = find_reached_ties(model, peft_config, groups)
        if not reached:
            warn(describe_no_effect(model, groups))
        targeted = [member for tie in reached for member in tie.targeted]
        if targeted:
            raise PeftNotImplementedError(
                f"ensure_weight_tying=True does not work for tied modules that are targets ({', '.join(targeted)}) in "
                "this version; list them in modules_to_save, or take them out of target_modules"
            )
        peft_config.modules_to_tie = followers_of_saved(reached)

    def _layer_arguments_for(self, config: LoraConfig) -> Callable[[str], dict[str, Any]]:
        rank, alpha = pattern_lookup(config.rank_pattern), pattern_lookup(config.alpha_pattern)
        return lambda name: {"r": rank(name, config.r), "lora_alpha": alpha(name, config.lora_alpha)}

    def _create_layer(
        self, target: nn.Module, name: str, adapter_name: str, config: LoraConfig, arguments: dict[str, Any]
    ) -> BaseTunerLayer:
        layer = super()._create_layer(target, name, adapter_name, config, arguments)
        warn_about_layout(config, layer.get_base_layer())
        return layer
