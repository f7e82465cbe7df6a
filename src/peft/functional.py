# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: the functions that integrations use on models that are not wrapped in a `PeftModel`."""

from .utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.checkpoints.state_dict": ["get_peft_model_state_dict", "set_peft_model_state_dict"],
        "peft.mapping": ["inject_adapter_in_model"],
        "peft.surgery.switching": ["cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"],
    },
)
