# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The methods and the tasks that the package knows by name."""

from enum import Enum


class PeftType(str, Enum):
    """Method of an adapter, as written to `adapter_config.json` under `peft_type`."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class TaskType(str, Enum):
    """Task of the base model; picks the `PeftModel` subclass that wraps it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def register_peft_method(
    *, name: str, config_cls, model_cls, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """
    Enter a method into the package's registry.

    Args:
        name: name of the method; in upper case it is the value of `peft_type`.
        config_cls: config class, or `"package.module:Class"` to import it when it is first needed.
        model_cls: tuner class (a `BaseTuner`), or such a string.
        prefix: what the names of the method's parameters start with; `name` in lower case and `_` if left out.
        is_mixed_compatible: whether adapters of this method may be active beside those of other methods.

    Raises:
        PeftValueError: if the name is taken.

    Example:

        >>> from peft.utils.peft_types import register_peft_method
        >>> register_peft_method(name="lora", config_cls="somewhere:Config", model_cls="somewhere:Model")
        Traceback (most recent call last):
        ...
        peft.utils.error.PeftValueError: a method named 'LORA' is registered already; choose another name
    """
    from ..mapping import add_method, find_methods

    find_methods()  # so that a name that the library itself uses is refused
    add_method(name, config_cls, model_cls, prefix=prefix, is_mixed_compatible=is_mixed_compatible)
