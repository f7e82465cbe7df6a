# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.utils.save_and_load`, and where it is."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.checkpoints.base_state_dict": ["get_base_model_state_dict", "set_base_model_state_dict"],
        "peft.checkpoints.read_file": ["load_peft_weights", "torch_load"],
        "peft.checkpoints.state_dict": ["get_peft_model_state_dict", "set_peft_model_state_dict"],
        "peft.checkpoints.write_file": ["write_peft_weights"],
        "peft.layers.training_wrapper": ["AuxiliaryTrainingWrapper"],
        "peft.utils.devices": ["infer_device"],
        "peft.utils.constants": [
            "EMBEDDING_LAYER_NAMES",
            "INCLUDE_LINEAR_LAYERS_SHORTHAND",
            "SAFETENSORS_WEIGHTS_NAME",
            "WEIGHTS_NAME",
        ],
        "peft.registry": ["PEFT_TYPE_TO_TUNER_MAPPING", "PeftType"],
        "peft.utils.warning": ["PeftWarning"],
        "peft.utils.hub": ["check_file_exists_on_hf_hub"],
        "peft.anatomy.matching": ["match_target_against_key"],
        "peft.utils.tensor_parallel": ["TpInfo", "dtensor_from_local_like"],
        "peft.anatomy.embeddings": ["get_embedding_layer_name", "has_valid_embedding_base_layer"],
        "peft.checkpoints.assignment": ["_maybe_shard_state_dict_for_tp"],
    },
)
