# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""VeRA on a whole model."""

import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...anatomy.kinds import features
from ...anatomy.offload import computing_device
from ...layers.new_tensors import check_size, new_parameter
from ...utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ...utils.quantization_utils import stored_weight
from ..base import BaseTuner
from .config import VeraConfig
from .layer import Linear, VeraLayer


class VeraModel(BaseTuner):
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

    prefix = "vera_lambda_"
    tuner_layer_cls = VeraLayer
    layer_classes = {nn.Linear: Linear, Conv1D: Linear}
    target_module_mapping = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, adapter_name: str, config: VeraConfig) -> None:
        super()._check_new_adapter_config(adapter_name, config)
        if not isinstance(config.r, int) or config.r <= 0:
            raise PeftValueError(f"the rank r must be a positive integer, found {config.r!r}")
        for field in ("projection_prng_key", "save_projection"):
            values = {
                name: getattr(other, field)
                for name, other in self.peft_config.items()
                if isinstance(other, VeraConfig)
            }
            if len(set(values.values())) > 1:
                raise PeftValueError(f"{field} must be the same for all VeRA adapters of a model, found {values}")

    def make_shared(self, adapter_name: str, config: VeraConfig, targets: dict[str, nn.Module]) -> None:
        """
        Draw the projections of an adapter. They depend on its seed, its rank and the sizes of its layers only.

        Args:
            adapter_name: name.
            config: the adapter's config.
            targets: full name -> layer of the base model.
        """
        layers = [layer for layer in targets.values() if self._layer_class(layer) is not None]
        if not layers:  # none of the targets can be adapted, which is refused when their turn comes
            return
        inputs, outputs = (max(sizes) for sizes in zip(*map(features, layers), strict=True))
        weight = stored_weight(layers[0])
        largest = max(map(stored_weight, layers), key=torch.Tensor.numel)
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for container, shape in ((self.vera_A, (config.r, inputs)), (self.vera_B, (outputs, config.r))):
            check_size(shape, largest, torch.float32, "cpu")
            container.persistent = config.save_projection
            drawn = draw_projection(shape, weight, generator)
            container[adapter_name] = drawn.to(computing_device(layers[0], weight))


def draw_projection(shape: tuple[int, int], weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Draw a frozen matrix whose product with a vector of unit variance has entries of variance 2, as before a ReLU.

    It is rounded to the type of the base weight, as the released package does.

    Args:
        shape: (outputs, inputs).
        weight: base weight, whose type the matrix is rounded to.
        generator: on the CPU, so that a seed stands for the same matrix on every device.
    """
    bound = math.sqrt(6 / shape[1])
    matrix = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    dtype = new_parameter(weight, 0).dtype
    return (matrix.to(weight.dtype) if weight.dtype.itemsize > 1 else matrix).to(dtype)


__getattr__ = old_names(__name__)
