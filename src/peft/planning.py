# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What an injection would do to a model, without a change to the model."""

import copy

from torch import nn

from .anatomy.skeletons import without_storage
from .anatomy.view import viewing
from .config import PeftConfig
from .mapping_func import get_peft_model
from .models.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from .registry import PEFT_TYPE_TO_TUNER_MAPPING
from .surgery.switching import remove_adapter
from .tuners.plan import AdapterPlan
from .tying.report import TyingReport, weight_tying_report
from .utils.error import PeftValueError


def plan_adapter(model: nn.Module, config: PeftConfig, adapter_name: str = "default") -> AdapterPlan:
    """
    Say what putting an adapter into a model would do, without a change to the model.

    Nothing is made and no weights are needed: it is the plan that `get_peft_model` and `add_adapter` would carry out,
    for a copy of the model that has no storage. What is refused while an adapter is planned is refused here.

    Args:
        model: a base model; or a `PeftModel`, beside whose adapters the new one would stand.
        config: config of the adapter; it is not changed.
        adapter_name: its name.

    Returns:
        The plan: which modules and parameters get a layer, of which class and with which settings, who follows whom,
        and what matches nothing; printed, it is a summary.

    Raises:
        PeftError: if the adapter would be refused, or has no layers.

    Example:

        >>> import torch
        >>> from peft import LoraConfig
        >>> from peft.planning import plan_adapter
        >>> net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> net[1].weight = net[0].weight
        >>> print(plan_adapter(net, LoraConfig(r=2, target_modules=["1"], ensure_weight_tying=True)))
        adapter 'default' (LORA): 2 targets
          0 (Embedding 4 x 9, r=2, lora_alpha=8)
          1 follows 0 (target_modules)
    """
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise PeftValueError(
            f"{config.peft_type} does not put adapters into modules of the model; there are no targets to plan"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    task_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    config = copy.copy(task_cls._with_heads(config, base))
    skeleton = without_storage(base)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](skeleton, {}, adapter_name)
    tuner.peft_config[adapter_name] = config
    tuner._prepare_model(config, skeleton)
    with viewing(skeleton) as view:
        remove_adapter(skeleton, adapter_name)
        return tuner.plan_adapter(view, adapter_name, config)


def plan_weight_tying(model: nn.Module, config: PeftConfig, adapter_name: str = "default") -> TyingReport:
    """
    Say what an adapter would do to the ties of a model, without a change to the model.

    `plan_adapter` tells who follows whom. Here the plan is carried out as well, in a copy of the model that has no
    storage, since only layers know how many bytes their tensors take. So the answer holds for every method, costs no
    memory for weights, and is there for models on the meta device too. What `get_peft_model` would warn about or
    refuse is warned about and refused here.

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
