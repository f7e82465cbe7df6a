# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.utils.transformers_weight_conversion`, and where it is."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.checkpoints.conversion.config": ["convert_peft_config_for_transformers"],
        "peft.checkpoints.conversion.operations": ["FlattenDims", "PeftConcatenate", "PermuteDims"],
        "peft.checkpoints.conversion.tensors": [
            "build_peft_weight_mapping",
            "convert_peft_adapter_state_dict_for_transformers",
        ],
        "peft.config": ["PeftConfig"],
        "peft.utils.constants": ["INCLUDE_LINEAR_LAYERS_SHORTHAND"],
        "peft.registry": ["PeftType"],
        "transformers.conversion_mapping": ["get_model_conversion_mapping"],
        "peft.anatomy.matching": ["check_target_module_exists"],
    },
)
