# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.utils.transformers_weight_conversion`, and where it is."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.checkpoints.conversion": [
            "FlattenDims",
            "PeftConcatenate",
            "PermuteDims",
            "build_peft_weight_mapping",
            "convert_peft_adapter_state_dict_for_transformers",
            "convert_peft_config_for_transformers",
            "get_model_conversion_mapping",
        ],
        "peft.config": ["PeftConfig"],
        "peft.utils.constants": ["INCLUDE_LINEAR_LAYERS_SHORTHAND"],
        "peft.utils.peft_types": ["PeftType"],
    },
)
