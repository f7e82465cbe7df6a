# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The functions that integrations use on models that are not wrapped in a `PeftModel`."""

from .checkpoints.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from .mapping import inject_adapter_in_model
from .tuners.base import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad


__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
