# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.cartridge.utils`, and where it is."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tuners.cartridge.composing": ["compose_cartridge_adapters"],
        "peft.tuners.cartridge.starting": [
            "initialize_kv_prefix_from_past_key_values",
            "initialize_kv_prefix_from_text",
            "prompt_embeddings_from_past_key_values",
        ],
        "peft.config": ["PeftConfig"],
        "peft.registry": ["PeftType"],
        "peft.utils.constants": ["SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"],
        "peft.checkpoints.read_file": ["load_peft_weights"],
    },
)
