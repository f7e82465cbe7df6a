# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.adaption_prompt.utils`, and where it is."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.tuners.adaption_prompt.maths": [
            "gpt2_compute_query_states",
            "is_adaption_prompt_trainable",
            "llama_apply_rotary_pos_emb",
            "llama_compute_query_states",
            "llama_rotate_half",
        ],
    },
)
