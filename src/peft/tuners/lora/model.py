# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA on a whole model."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...config import PeftConfig
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...utils.error import PeftNotImplementedError, PeftValueError
from ...utils.tying import describe_no_effect, find_followers, find_reached_ties, find_tied_groups, refuse_two_routes
from ...utils.warning import warn
from .._kinds import stores_weight_transposed
from .._matching import pattern_lookup
from ..tuners_utils import BaseTuner, BaseTunerLayer
from .config import LoraConfig
from .layer import Embedding, Linear, LoraLayer


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
        peft_config.modules_to_tie, peft_config.target_modules_to_tie = {}, {}
        if not peft_config.ensure_weight_tying:
            super()._check_tied_modules(model, peft_config)
            return
        groups = find_tied_groups(model)
        reached = find_reached_ties(model, peft_config, groups)
        if not reached:
            warn(describe_no_effect(model, groups))
        refuse_two_routes(reached)
        targeted = [tie for tie in reached if tie.targeted]
        if targeted and peft_config.lora_bias:
            members = ", ".join(repr(member) for tie in targeted for member in tie.group.members)
            raise PeftValueError(
                f"lora_bias=True does not work for targets that are tied ({members}), since what is added to a bias "
                "is not tied; leave it out"
            )
        peft_config.modules_to_tie = find_followers(tie for tie in reached if tie.saved)
        peft_config.target_modules_to_tie = find_followers(targeted)

    def _layer_arguments_for(self, config: LoraConfig) -> Callable[[list[str]], dict[str, Any]]:
        rank, alpha = pattern_lookup(config.rank_pattern), pattern_lookup(config.alpha_pattern)
        return lambda names: {"r": rank(names, config.r), "lora_alpha": alpha(names, config.lora_alpha)}

    def _check_targets(self, model: nn.Module, config: LoraConfig, names: list[str]) -> None:
        """Believe the layers, not the config, in how weights are stored."""
        modules = [model.get_submodule(name) for name in names]
        layers = [module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in modules]
        transposed = {stores_weight_transposed(layer) for layer in layers if not isinstance(layer, nn.Embedding)}
        if transposed == {not config.fan_in_fan_out}:
            config.fan_in_fan_out = not config.fan_in_fan_out
            warn(
                f"fan_in_fan_out={not config.fan_in_fan_out} does not fit the targets, which store their weights as "
                f"{'(in, out)' if config.fan_in_fan_out else '(out, in)'}; {config.fan_in_fan_out} is used"
            )
