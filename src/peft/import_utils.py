# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.import_utils`, and where it is."""

from .utils.lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.utils.optional_packages": [
            "is_aqlm_available",
            "is_bnb_4bit_available",
            "is_bnb_available",
            "is_diffusers_available",
            "is_eetq_available",
            "is_gptqmodel_available",
            "is_hqq_available",
            "is_inc_available",
            "is_optimum_available",
            "is_te_available",
            "is_te_pytorch_available",
            "is_torch_tpu_available",
            "is_torchao_available",
            "is_torchao_ge_v0_18_0",
            "is_transformers_dtensor_tp",
            "is_transformers_ge_v5",
            "is_transformers_ge_v5_13_0",
            "is_transformers_ge_v5_17_0",
            "is_transformers_ge_v5_1_0",
            "is_transformers_ge_v5_4_0",
            "is_transformers_ge_v5_6_0",
            "is_transformers_le_4_53",
            "is_xpu_available",
        ],
    },
)
