# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA-GA's preparation: gradients of the weights that are going to be adapted.

Wang, Yu, Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024, arXiv:2407.05000.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ....utils.error import PeftValueError
from ..config import LoraConfig
from ..starts.lora_ga import GRADIENT
from .cache_file import CacheFile
from .observing import in_mode
from .targets import CalibrationTarget, find_calibration_targets


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | os.PathLike | None = None,
) -> None:
    """
    Prepare a base model for an adapter with `init_lora_weights="lora_ga"`, which `get_peft_model` makes afterwards.

    Each target keeps the mean of its weight's gradient until then. Whatever happens, which parameters are trained, the
    gradients that they had and the mode of the model are as before.

    Args:
        model: the base model.
        lora_config: the adapter's config, with its `lora_ga_config`.
        train_step: does forward and backward passes on data of the task, as many as it likes, without an optimiser.
            It is called once, in training mode. Gradients are summed up in the weights of the targets alone.
        cache_file: file that keeps the gradients; if it is there, they are read from it, and `train_step` is not
            called.

    Raises:
        PeftValueError: for configs, models and gradients that cannot work.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga
        >>> net, x = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.randn(20, 8)
        >>> config = LoraConfig(
        ...     r=2, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
        ... )
        >>> before = net(x)
        >>> preprocess_loraga(net, config, train_step=lambda: net(x).pow(2).mean().backward())
        >>> torch.allclose(get_peft_model(net, config)(x), before, atol=1e-4)
        True
    """
    if lora_config.init_lora_weights != "lora_ga":
        raise PeftValueError(
            f"preprocess_loraga is for init_lora_weights='lora_ga', found {lora_config.init_lora_weights!r}; set it "
            "in the config"
        )
    targets = find_calibration_targets(model, lora_config)
    file = CacheFile(cache_file)
    gradients = _gradients_in(file, targets)
    if not gradients:
        gradients = _find_gradients(model, targets, train_step)
        file.write({f"{name}.{GRADIENT}": gradient.cpu() for name, gradient in gradients.items()} if file.path else {})
    for name, gradient in gradients.items():
        setattr(targets[name].layer, GRADIENT, gradient)


def _find_gradients(
    model: nn.Module, targets: Mapping[str, CalibrationTarget], train_step: Callable[[], Any]
) -> dict[str, torch.Tensor]:
    weights = {name: target.layer.weight for name, target in targets.items()}
    with in_mode(model, training=True), _training_only(model, weights.values()), torch.enable_grad():
        with _counting_backwards({name: target.layer for name, target in targets.items()}) as counts:
            train_step()
        found = {}
        for name, weight in weights.items():
            if weight.grad is not None:
                found[name] = weight.grad.div_(max(counts[name], 1))
                weight.grad = None
    if not found:
        raise PeftValueError(
            f"train_step sends no gradient to any target ({', '.join(list(targets)[:3])} ...); it has to call "
            "backward() on a loss of this model"
        )
    broken = [name for name, gradient in found.items() if not gradient.isfinite().all()]
    if broken:
        raise PeftValueError(
            f"the gradient of {broken[0]!r} holds nan or infinite entries; check the loss of train_step, and the type "
            "that the model computes in"
        )
    return found


@contextmanager
def _training_only(model: nn.Module, weights: Any) -> Iterator[None]:
    """Let only some weights have gradients inside, none at first; all is as before afterwards."""
    trained = {id(weight) for weight in weights}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in trained)
            parameter.grad = None
        yield
    finally:
        for parameter, wants_grad, gradient in before:
            parameter.requires_grad_(wants_grad)
            parameter.grad = gradient


@contextmanager
def _counting_backwards(layers: Mapping[str, nn.Module]) -> Iterator[Counter]:
    """Count how often a gradient goes through each layer."""
    counts: Counter = Counter()

    def note(name: str) -> Callable[[torch.Tensor], None]:
        def count(_: torch.Tensor) -> None:
            counts[name] += 1

        return count

    def watch(name: str) -> Callable[..., None]:
        def look(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(note(name))

        return look

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _gradients_in(file: CacheFile, targets: Mapping[str, CalibrationTarget]) -> dict[str, torch.Tensor]:
    """Read gradients that were found before; refuse those of another model."""
    content, found = file.read(), {}
    for name, target in targets.items():
        gradient, weight = content.get(f"{name}.{GRADIENT}"), target.layer.weight
        if gradient is None:
            continue
        if gradient.shape != weight.shape:
            raise PeftValueError(
                f"{file.path!r} holds a gradient of shape {tuple(gradient.shape)} for {name!r}, whose weight has the "
                f"shape {tuple(weight.shape)}; it was written for another model"
            )
        found[name] = gradient.to(weight.device, weight.dtype)
    if content and not found:
        raise PeftValueError(
            f"{file.path!r} holds no gradient of the targets ({', '.join(list(targets)[:3])} ...); it was written for "
            "another model, or is no cache_file of LoRA-GA"
        )
    return found
