# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What an adapter of LoRA may do otherwise: strategies, by what in the config asks for them, a file for each."""

from ....utils.old_names import old_names
from ..starts.mica import Mica
from .alora import (
    ActivatedLora,
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
    is_alora_relevant_in_batch,
)
from .arrow import Arrow, ArrowLoraLinearLayer
from .base import LoraVariant
from .bdlora import BdLora, BlockDiagonalLinear
from .dora import Dora
from .kasa import Kasa
from .monteclora import Monteclora, MontecloraSampler
from .qalora import QaLora
from .registry import (
    attach_variants,
    check_beside,
    check_targets,
    detach_variants,
    find_variant,
    make_variant,
    names_asked_for,
    penalties,
    register_variant,
    variants_by_field,
)
from .velora import Velora, VeloraFunction


__all__ = [
    "ActivatedLora",
    "Arrow",
    "ArrowLoraLinearLayer",
    "BdLora",
    "BlockDiagonalLinear",
    "Dora",
    "Kasa",
    "LoraVariant",
    "Monteclora",
    "MontecloraSampler",
    "QaLora",
    "Velora",
    "VeloraFunction",
    "attach_variants",
    "calculate_alora_offsets",
    "check_beside",
    "check_targets",
    "detach_variants",
    "find_variant",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "is_alora_relevant_in_batch",
    "make_variant",
    "names_asked_for",
    "penalties",
    "register_variant",
    "variants_by_field",
]

# the released package has a class for each kind of layer, which is one here
ALoraLinearVariant, ArrowLinearVariant = ActivatedLora, Arrow
MontecloraLinearVariant, VeloraLinearVariant = Monteclora, Velora
BdLoraLinearVariant, KasaLinearVariant, QALoraLinearVariant = BdLora, Kasa, QaLora
DoraLinearVariant = DoraEmbeddingVariant = DoraConv1dVariant = DoraConv2dVariant = DoraConv3dVariant = Dora
MiCALinearVariant = MiCAEmbeddingVariant = Mica  # a start here, which leaves B as it is


__getattr__ = old_names(__name__)
