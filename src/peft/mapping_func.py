# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`get_peft_model`: the way in."""

import copy

from torch import nn

from .config import PeftConfig
from .models.mixed import PeftMixedModel
from .models.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, peft_model_for_task
from .registry import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from .surgery.slots import without_collecting
from .surgery.transaction import all_or_nothing
from .tuners.base import BaseTuner, BaseTunerLayer
from .utils.error import PeftTypeError
from .utils.old_names import old_names
from .utils.warning import warn


__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "BaseTuner",
    "BaseTunerLayer",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "get_peft_model",
]


@without_collecting
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel | PeftMixedModel:
    """
    Put an adapter into a base model.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how; it is not changed.
        adapter_name: name of the adapter.
        mixed: make a model that can hold adapters of several methods.
        autocast_adapter_dtype: keep the adapter's tensors in float32 where the base is in half precision.
        revision: revision of the base model on the hub, to be noted in the saved config.
        low_cpu_mem_usage: make the tensors on the meta device, to be filled by loading a checkpoint.

    Returns:
        A `PeftModel` of the class that belongs to the config's task.

    Raises:
        NoMatchingPeftModuleError: if nothing in the model matches what the config targets.
        PeftTypeError: if `peft_config` is no config.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        >>> model.targeted_module_names
        ['0']
    """
    if not isinstance(peft_config, PeftConfig):
        swapped = "; model and config are the wrong way round" if isinstance(model, PeftConfig) else ""
        raise PeftTypeError(f"peft_config must be a PeftConfig, found a {type(peft_config).__name__}{swapped}")
    if isinstance(model, PeftModel):
        warn(
            "the model is a PeftModel already; add_adapter puts another adapter beside those that it has, and "
            "unload() gives the base model back"
        )
    config = copy.copy(peft_config)
    own_name = getattr(model, "name_or_path", None)
    if own_name:
        if config.base_model_name_or_path not in (None, own_name):
            warn(f"the model's name {own_name!r} replaces the config's base model {config.base_model_name_or_path!r}")
        config.base_model_name_or_path = own_name
    if revision is not None:
        if config.revision is not None and config.revision != revision:
            warn(f"revision={revision!r} replaces the config's revision {config.revision!r}")
        config.revision = revision
    config.advise(low_cpu_mem_usage)
    with all_or_nothing(model):
        if mixed:
            return PeftMixedModel(model, config, adapter_name=adapter_name)
        return peft_model_for_task(
            model,
            config,
            adapter_name=adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )


__getattr__ = old_names(__name__)
