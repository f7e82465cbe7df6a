# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""VeRA on a whole model."""

from ...utils.old_names import old_names
from .layer import Vera


class VeraModel(Vera.Model):
    """
    A model with VeRA layers in it (Kopiczko et al. 2023, arXiv:2310.11454).

    Args:
        model: the base model; it is changed in place.
        peft_config: a `VeraConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the vectors on the meta device; the projections are drawn anyway.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Raises:
        PeftValueError: if adapters differ in `projection_prng_key` or `save_projection`.

    Example:

        >>> import torch
        >>> from peft import VeraConfig, VeraModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> model = VeraModel(net, VeraConfig(r=3, target_modules=["0", "2"]), "default")
        >>> tuple(model.vera_A["default"].shape), tuple(model.vera_B["default"].shape)
        ((3, 8), (6, 3))
    """


__getattr__ = old_names(__name__)
