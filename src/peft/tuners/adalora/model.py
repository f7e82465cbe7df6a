# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""AdaLoRA on a whole model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
from ...utils.error import PeftTypeError, PeftValueError
from ...utils.old_names import old_names
from ...utils.warning import warn
from ..base import BaseTuner
from ..families.ranks import RanksLeft
from ..lora.model import LoraModel
from .config import AdaLoraConfig
from .layer import AdaLoraLayer, RankAllocator, SVDConv2d, SVDLinear
from .maths import RANK_AXIS, distances_from_orthonormal
from .quantized import LAYER_OF_BACKEND


# fields of LoRA that mean nothing here
_WITHOUT_EFFECT = (
    "use_rslora",
    "lora_bias",
    "alpha_pattern",
    "target_parameters",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
)


class AdaLoraModel(LoraModel):
    """
    A model with AdaLoRA's layers in it (Zhang et al. 2023, arXiv:2303.10512).

    One adapter is trained at a time, since ranks are handed out over all of its layers: others have to be added with
    `inference_mode=True`.

    Args:
        model: the base model; it is changed in place.
        config: an `AdaLoraConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        kwargs: see `BaseTuner`.

    Attributes:
        trainable_adapter_name: the adapter whose ranks are handed out, None without one.
        rankallocator: what hands them out.

    Raises:
        PeftValueError: if the model would have two adapters that are trained.

    Example:

        >>> import torch
        >>> from peft import AdaLoraConfig, AdaLoraModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> config = AdaLoraConfig(init_r=3, target_r=1, total_step=4, target_modules=["0", "2"])
        >>> model = AdaLoraModel(net, config, "default")
        >>> optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        >>> for step in range(5):
        ...     model(torch.ones(1, 8)).pow(2).mean().backward()
        ...     optimizer.step()
        ...     model.update_and_allocate(step)
        ...     optimizer.zero_grad()
        >>> sum(map(sum, model.peft_config["default"].rank_pattern.values()))
        2
    """

    tuner_layer_cls = AdaLoraLayer
    layer_classes = {nn.Linear: SVDLinear, Conv1D: SVDLinear, nn.Conv2d: SVDConv2d}
    quantized_layer_classes = LAYER_OF_BACKEND
    pattern_fields: dict[str, str] = {}  # its `rank_pattern` says which ranks are left
    layer_parts = {}
    adapts_parallel_layers = False
    # clients replace the hook of LoRA's model and of this one, each with one that calls what it has replaced
    _create_and_replace = BaseTuner._create_and_replace
    parameter_layer_cls = None
    target_module_mapping = TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> None:
        self.__dict__.update(trainable_adapter_name=None, rankallocator=None)
        super().__init__(model, config, adapter_name, **kwargs)

    def _finish(self, adapter_name: str, config: AdaLoraConfig) -> None:
        super()._finish(adapter_name, config)
        if not config.inference_mode:
            self.trainable_adapter_name = adapter_name
            self.rankallocator = RankAllocator(self.model, config, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see `BaseTuner.delete_adapter`."""
        super().delete_adapter(adapter_name)
        if adapter_name == self.trainable_adapter_name:
            self.trainable_adapter_name = self.rankallocator = None

    def _needs_targets(self, config: AdaLoraConfig) -> bool:
        return True

    def _check_new_adapter_config(self, config: AdaLoraConfig) -> None:
        ignored = [name for name in _WITHOUT_EFFECT if getattr(config, name)]
        if ignored:
            warn(f"{', '.join(ignored)} of LoRA: AdaLoRA has no such thing, so it has no effect")
        super()._check_new_adapter_config(config)
        trained = [
            name
            for name, other in self.peft_config.items()
            if isinstance(other, AdaLoraConfig) and not other.inference_mode
        ]
        if len(trained) > 1 and not self.in_mixed_model:  # there, ranks stay as they are
            raise PeftValueError(
                f"{' and '.join(map(repr, trained))} would both be trained, and AdaLoRA hands out the ranks of one "
                "adapter; set inference_mode=True for the others"
            )

    def _check_start(self, *args: Any) -> None:
        """The factors do not depend on the base weights."""

    def _layer_arguments_for(self, config: AdaLoraConfig) -> Callable[[list[str]], dict[str, Any]]:
        """Give each target its ranks: all that it starts with, or those that are left."""
        pattern = config.rank_pattern or {}

        def arguments_for(names: list[str]) -> dict[str, Any]:
            left = next((pattern[f"{name}.lora_E"] for name in names if f"{name}.lora_E" in pattern), None)
            return {"r": config.init_r, "lora_alpha": config.lora_alpha, "ranks_left": left}

        return arguments_for

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Call the base model; the penalty on orthogonality is added to its loss.

        Args:
            args: passed on.
            kwargs: passed on.
        """
        outputs = super().forward(*args, **kwargs)
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, torch.Tensor) and self.trainable_adapter_name in self.active_adapters:
            penalty = self._orthogonality()
            if penalty is not None:
                outputs.loss = loss + penalty.to(loss.device, loss.dtype)
        return outputs

    def _orthogonality(self) -> torch.Tensor | None:
        """Compute how far, on average, factors are from orthonormal ones, with its weight."""
        config, name = self.peft_config[self.trainable_adapter_name], self.trainable_adapter_name
        distances = []
        for _, layer in self.rankallocator.layers(self.model):
            if not layer.disable_adapters:
                distances += distances_from_orthonormal(layer.lora_A[name], layer.lora_B[name])
        if not distances:
            return None
        average = torch.stack([distance.to(distances[0].device) for distance in distances]).mean()
        return config.orth_reg_weight * average

    def update_and_allocate(self, global_step: int) -> None:
        """
        Hand out ranks; to be called at every step of training, after the optimizer's and before gradients are zeroed.

        When step `total_step - tfinal` is reached, it is settled which ranks are left, and the config's
        `rank_pattern` says so. Only these are saved from then on.

        Args:
            global_step: steps of training so far.

        Raises:
            PeftValueError: if no adapter is trained.
        """
        if self.rankallocator is None:
            raise PeftValueError("there is no adapter whose ranks can be handed out; each is in inference_mode")
        config = self.peft_config[self.trainable_adapter_name]
        last = config.total_step - config.tfinal
        if global_step < last:
            self.rankallocator.update_and_allocate(self.model, global_step)
        elif global_step == last:
            _, pattern = self.rankallocator.update_and_allocate(self.model, global_step, force_mask=True)
            # names with that of the adapter at the end are those of the released package, and of its clients
            masks = {_module_of(key, self.trainable_adapter_name): mask for key, mask in pattern.items()}
            config.rank_pattern = {
                f"{name}.lora_E": layer.settle_ranks(self.trainable_adapter_name, masks[name])
                for name, layer in self.rankallocator.layers(self.model)
            }
            self.rankallocator.reset_ipt()
        elif config.rank_pattern:
            self.rankallocator.mask_using_rank_pattern(self.model, config.rank_pattern)

    def resize_modules_by_rank_pattern(self, rank_pattern: Mapping[str, Sequence[bool]], adapter_name: str) -> None:
        """
        Take the ranks away that are not left.

        Args:
            rank_pattern: as in the config.
            adapter_name: name.

        Raises:
            PeftValueError: if a pattern does not fit the ranks of its layer.
        """
        for name, mask in rank_pattern.items():
            self.model.get_submodule(_module_of(name, adapter_name)).resize(adapter_name, list(map(bool, mask)))

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: Mapping[str, Sequence[bool]], state_dict: Mapping[str, torch.Tensor], adapter_name: str
    ) -> dict[str, torch.Tensor]:
        """
        Take the ranks away that are not left, from tensors that are still whole.

        Args:
            rank_pattern: as in the config.
            state_dict: an adapter's tensors, by their keys in a checkpoint or in the model.
            adapter_name: name.

        Returns:
            All tensors.
        """
        resized = dict(state_dict)
        for name, mask in rank_pattern.items():
            for factor, axis in RANK_AXIS.items():
                saved = f"base_model.model.{_module_of(name, adapter_name)}.{factor}"
                for key in (saved, f"{saved}.{adapter_name}"):
                    if key in resized and resized[key].shape[axis] == len(mask):
                        (resized[key],) = RanksLeft(mask, axis).write(resized[key])
        return resized

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """
        Refuse: adapters whose factors are orthogonal and scaled have no combination of that kind.

        Raises:
            PeftTypeError: always.
        """
        raise PeftTypeError("AdaLoRA's adapters cannot be combined by add_weighted_adapter; use LoRA for that")


def _module_of(name: str, adapter_name: str) -> str:
    """Give the name of the layer that a key of a rank pattern belongs to."""
    return name.removeprefix("base_model.model.").removesuffix(f".{adapter_name}").removesuffix(".lora_E")


__getattr__ = old_names(__name__)
