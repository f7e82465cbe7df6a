# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What layers and wrappers have in common, so that saving, loading and walking a model treats them alike."""

from collections.abc import Mapping

import torch


class AdapterModule:
    """
    A module that this package has put into a model.

    Attributes:
        adapter_layer_names: attributes that hold trainable tensors by adapter name.
        other_param_names: attributes that hold other settings by adapter name.
    """

    _is_adapter_module = True

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def computed_tensors(
        self, adapter_name: str, state_dict: Mapping[str, torch.Tensor], prefix: str
    ) -> dict[str, torch.Tensor]:
        """
        Give tensors of a checkpoint that follow from those of the model, instead of standing in it.

        Args:
            adapter_name: name.
            state_dict: the model's state dict.
            prefix: what keys of this module start with in it.

        Returns:
            Key in a checkpoint -> tensor; they replace what `adapter_keys` tells.
        """
        return {}

    def prepare_to_load(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Make room for the tensors of a checkpoint, where they have another form than those of the model.

        Args:
            adapter_name: name.
            tensors: key in a checkpoint -> tensor. They are not checked yet.
        """
