# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Trainable tokens in a whole model."""

from typing import Any

from torch import nn

from ...config import PeftConfig
from ...layers.trainable_tokens import TrainableTokensLayer, check_token_indices
from ...tying.record import ReachedTie, default_token_module
from ...utils.error import NoMatchingPeftModuleError
from ...utils.old_names import old_names
from ..base import BaseTuner
from .config import TrainableTokensConfig


class TrainableTokensModel(BaseTuner):
    """
    A model of which single tokens are trained.

    Args:
        model: the base model; it is changed in place.
        peft_config: a `TrainableTokensConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the rows on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import TrainableTokensConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
        >>> net[1].weight = net[0].weight  # tied, so one set of rows is trained for both
        >>> model = get_peft_model(net, TrainableTokensConfig(token_indices=[3, 7], target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 8 || all params: 48 || trainable%: 16.6667
    """

    prefix = "trainable_tokens_"
    tuner_layer_cls = TrainableTokensLayer
    layer_classes = {nn.Embedding: TrainableTokensLayer, nn.Linear: TrainableTokensLayer}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Put an adapter into the model, with the signature that the released package has here; see `BaseTuner`.

        Args:
            model: the base model.
            adapter_name: name of the adapter.
            autocast_adapter_dtype: keep the rows in float32 where the base is in half precision.
            low_cpu_mem_usage: make the rows on the meta device.
            kwargs: `state_dict`.
        """
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, **kwargs)

    def _resolve_targets(self, model: nn.Module, config: PeftConfig) -> None:
        if config.target_modules is None:
            name = default_token_module(model)
            if name is None:
                raise NoMatchingPeftModuleError(
                    "target_modules was left out, and the model does not say which layer its input embedding is; name "
                    "it in target_modules"
                )
            config.target_modules = {name}
        super()._resolve_targets(model, config)

    def _check_targets(self, model: nn.Module, config: TrainableTokensConfig, names: list[str]) -> None:
        for name in names:
            check_token_indices(model.get_submodule(name), name, config.token_indices)

    def _ties_unasked(self, config: PeftConfig, tie: ReachedTie) -> bool:
        """A token has one embedding, so what is tied to a targeted embedding is adapted with it."""
        return tie.group.owner in tie.targeted and not tie.saved


__getattr__ = old_names(__name__)
