# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Table of names: what is imported from `peft.utils.export`, and where it is."""

from .lazy import lazy_exports


__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "peft.export": ["export_gguf", "export_onnx", "export_safetensors", "interleave_halves"],
    },
)
