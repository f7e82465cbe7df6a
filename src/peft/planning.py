# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What an injection would do to a model, without a change to the model."""

from torch import nn

from .anatomy.skeletons import without_storage
from .config import PeftConfig
from .mapping_func import get_peft_model
from .tying.report import TyingReport, weight_tying_report


def plan_weight_tying(model: nn.Module, config: PeftConfig, adapter_name: str = "default") -> TyingReport:
    """
    Say what an adapter would do to the ties of a model, without a change to the model.

    The adapter is put into a copy of the model that has no storage, by the code that puts it into the model itself. So
    the answer holds for every method, costs no memory for weights, and is there for models on the meta device too.
    What `get_peft_model` would warn about or refuse is warned about and refused here.

    Args:
        model: a base model; or a `PeftModel`, beside whose adapters the new one would stand.
        config: config of the adapter; it is not changed.
        adapter_name: its name.

    Returns:
        What `weight_tying_report` would give for the adapted model.

    Raises:
        PeftError: if the adapter would be refused.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, plan_weight_tying
        >>> net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> net[1].weight = net[0].weight
        >>> print(plan_weight_tying(net, LoraConfig(r=2, target_modules=["1"], ensure_weight_tying=True)))
        tied members (owner first)  adapter  route           shared  bytes
        --------------------------  -------  --------------  ------  -----
        0.weight, 1.weight          -        base model      yes     144
        0.weight, 1.weight          default  target_modules  yes     104
    """
    skeleton = without_storage(model)
    if hasattr(skeleton, "get_base_model"):
        skeleton.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
    else:
        skeleton = get_peft_model(skeleton, config, adapter_name, low_cpu_mem_usage=True)
    return weight_tying_report(skeleton)
