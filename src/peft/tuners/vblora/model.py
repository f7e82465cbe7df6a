# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""VB-LoRA on a whole model."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...anatomy.offload import computing_device
from ...layers.new_tensors import check_size, new_parameter
from ...utils.constants import TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ...utils.quantization_utils import stored_weight
from ..base import BaseTuner
from .config import VBLoRAConfig
from .layer import Linear, VBLoRALayer


class VBLoRAModel(BaseTuner):
    """
    A model with VB-LoRA layers in it (Li et al. 2024, arXiv:2405.15179).

    Args:
        model: the base model; it is changed in place.
        peft_config: a `VBLoRAConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the logits on the meta device; the bank, which is small, is made anyway.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Raises:
        PeftValueError: if sizes do not fit each other or a target.

    Example:

        >>> import torch
        >>> from peft import VBLoRAConfig, VBLoRAModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> config = VBLoRAConfig(r=2, num_vectors=6, vector_length=2, target_modules=["0", "2"])
        >>> model = VBLoRAModel(net, config, "default")
        >>> net[0].vblora_vector_bank["default"] is net[2].vblora_vector_bank["default"]
        True
    """

    prefix = "vblora_"
    tuner_layer_cls = VBLoRALayer
    layer_classes = {nn.Linear: Linear, Conv1D: Linear}
    target_module_mapping = TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, adapter_name: str, config: VBLoRAConfig) -> None:
        super()._check_new_adapter_config(adapter_name, config)
        for field in ("r", "num_vectors", "vector_length", "topk"):
            value = getattr(config, field)
            if not isinstance(value, int) or value <= 0:
                raise PeftValueError(f"{field} must be a positive integer, found {value!r}")
        if config.init_vector_bank_bound < 0 or config.init_logits_std < 0:
            raise PeftValueError(
                f"init_vector_bank_bound={config.init_vector_bank_bound} and init_logits_std={config.init_logits_std} "
                "are magnitudes and cannot be negative"
            )
        if config.topk > config.num_vectors:
            raise PeftValueError(
                f"topk={config.topk} vectors cannot be chosen out of num_vectors={config.num_vectors}"
            )

    @torch.no_grad()
    def make_shared(self, adapter_name: str, config: VBLoRAConfig, targets: dict[str, nn.Module]) -> None:
        """
        Make and draw the vector bank of an adapter.

        Args:
            adapter_name: name.
            config: the adapter's config.
            targets: full name -> layer of the base model.
        """
        layers = [layer for layer in targets.values() if self._layer_class(layer) is not None]
        if not layers:  # none of the targets can be adapted, which is refused when their turn comes
            return
        weight = stored_weight(layers[0])
        like, bound = new_parameter(weight, 0), config.init_vector_bank_bound
        device = computing_device(layers[0], weight)
        check_size((config.num_vectors, config.vector_length), weight, like.dtype, device)
        bank = torch.empty(config.num_vectors, config.vector_length, dtype=like.dtype, device=device)
        self.vblora_vector_bank[adapter_name] = nn.Parameter(nn.init.uniform_(bank, -bound, bound))

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """
        Count what a checkpoint of an adapter holds, in units of 4 bytes.

        Args:
            adapter: name.

        Returns:
            Number of the method's own parameters (indices count as the bytes that they take), and number of other
            parameters that are trained, such as biases and modules of `modules_to_save`.
        """
        self._config_of(adapter)
        size = 0.0
        for layer in self._layers():
            for name, form in layer.saved_forms(adapter).items() if adapter in layer.vblora_logits_A else ():
                logits = layer._modules[name][adapter]
                pieces = logits.numel() // logits.shape[-1]
                per_piece = form.topk - 1 + form.topk * form.index_dtype.itemsize / 4
                size += pieces * per_piece if form.is_used else logits.numel()
        named = self.model.named_parameters()
        other = sum(p.numel() for name, p in named if p.requires_grad and self.prefix not in name)
        return int(size) + self.vblora_vector_bank[adapter].numel(), other

    def print_savable_parameters(self) -> None:
        """Print what a checkpoint of each active adapter holds; see `get_nb_savable_parameters`."""
        for adapter in self.active_adapters:
            own, other = self.get_nb_savable_parameters(adapter)
            print(f"VB-LoRA parameters to save (as float32): {own:,} || all parameters to save: {own + other:,}")


__getattr__ = old_names(__name__)
