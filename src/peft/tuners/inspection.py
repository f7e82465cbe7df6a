# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What a config reaches in a model, for those who want to know before or after."""

from ..anatomy.matching import check_target_module_exists
from ..utils.error import PeftValueError
from ..utils.near_names import explain_unknown_adapters
from .base import BaseTuner


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """
    Sort the modules of a model by whether an adapter's targets name them.

    Args:
        tuner: a model with the adapter in it, such as `model.base_model`.
        adapter_name: name of the adapter.

    Returns:
        `"matched"` and `"unmatched"` -> full names.

    Raises:
        PeftValueError: if there is no adapter of that name.

    Example:

        >>> from torch import nn
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.tuners.tuners_utils import inspect_matched_modules
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"]))
        >>> inspect_matched_modules(model.base_model)["matched"]
        ['0']
    """
    if adapter_name not in tuner.peft_config:
        raise PeftValueError(explain_unknown_adapters([adapter_name], tuner.peft_config))
    config = tuner.peft_config[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name, _ in tuner.model.named_modules():
        found["matched" if check_target_module_exists(config, name) else "unmatched"].append(name)
    return found
