# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LayerNorm tuning on a whole model."""

from torch import nn

from ...anatomy.walking import unwrapped
from ...tying.record import ReachedTie
from ...utils.old_names import old_names
from ..targets import UnsupportedLayerError
from .config import LNTuningConfig
from .layer import LNTuning


class LNTuningModel(LNTuning.Model):
    """
    A model with trained normalisation layers (Zhao et al. 2023, arXiv:2312.11420).

    Args:
        model: the base model; it is changed in place.
        peft_config: an `LNTuningConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the copies on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Raises:
        PeftValueError: if a target has no parameters to train.

    Example:

        >>> import torch
        >>> from peft import LNTuningConfig, LNTuningModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> model = LNTuningModel(net, LNTuningConfig(target_modules=["1"]), "default")
        >>> [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        ['1.ln_tuning_layers.default.weight', '1.ln_tuning_layers.default.bias']
    """

    def _check_targets(self, model: nn.Module, config: LNTuningConfig, names: list[str]) -> None:
        """Refuse modules without parameters."""
        modules = {name: unwrapped(model.get_submodule(name)) for name in names}
        empty = [name for name, module in modules.items() if next(module.parameters(), None) is None]
        if empty:
            raise UnsupportedLayerError(
                f"{', '.join(f'{name!r} ({type(modules[name]).__name__})' for name in empty)} has no parameters, so "
                "there is nothing to train; narrow target_modules"
            )

    def _check_ties_of_targets(self, model: nn.Module, config: LNTuningConfig, ties: list[ReachedTie]) -> None:
        """Refuse nothing: a copy can be tied to another one, whatever the modules are."""


__getattr__ = old_names(__name__)
