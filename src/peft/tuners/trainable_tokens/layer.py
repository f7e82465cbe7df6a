# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.tuners.trainable_tokens.layer`, and where it is."""

from ...utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.layers.base_layer": ["BaseTunerLayer"],
        "peft.layers.trainable_tokens": ["TrainableTokensLayer"],
        "peft.tuners._buffer_dict": ["BufferDict"],
        "peft.tuners.trainable_tokens.config": ["TrainableTokensConfig"],
        "peft.utils.integrations": ["check_deepspeed_zero3_enabled", "gather_params_ctx"],
        "peft.layers.merging.checks": ["check_adapters_to_merge"],
    },
)
