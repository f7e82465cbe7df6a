# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Riemannian preconditioning of LoRA: steps that do not depend on how the delta is divided between the factors.

Zhang, Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", 2024, arXiv:2402.02347.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..utils.error import PeftTypeError, PeftValueError
from ..utils.old_names import old_names
from .factor_pairs import FactorPair, check_places, inverted, layer_and_adapter, pair_by_name
from .parameters import check_setting, trainable_parameters


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> torch.optim.Optimizer:
    """
    Make an optimiser for all that is trained, which sees preconditioned gradients of LoRA's factors.

    These are (B' B + reg I)^+ grad(A) and grad(B) (A A' + reg I)^+, in float32 at least, with the factors as they are
    before the step. Factors of embeddings and of convolutions, magnitudes, biases and everything else have their
    usual gradients. After the step, `.grad` is what the backward pass has left there.

    Args:
        model: a model with LoRA.
        optimizer_cls: class of the optimiser, one whose steps need no closure.
        lr: learning rate.
        reg: what is added to the diagonals, for stability.
        kwargs: for `optimizer_cls`.

    Returns:
        An instance of `optimizer_cls`. Copies of it, by `copy` or `pickle`, do not precondition.

    Raises:
        PeftTypeError: if `optimizer_cls` is no class of optimisers.
        PeftValueError: if its steps need a closure, no pair of factors is trained, or a number is out of range.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.optimizers import create_riemannian_optimizer
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3, reg=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """
    _check_class(optimizer_cls)
    check_setting("lr", lr)
    check_setting("reg", reg)
    parameters = trainable_parameters(model)
    names = tuple(parameters)
    pairs = {
        (a, b): found[0].rank_axis("lora_B").experts
        for b, a in pair_by_name(names).partners.items()
        if (found := layer_and_adapter(model, names[b])) is not None
        and not found[0].is_embedding
        and len(getattr(parameters[names[b]], "ds_shape", parameters[names[b]].shape)) == 2
    }
    if not pairs:
        raise PeftValueError(
            f"no pair of LoRA's factors A and B is trained in this {type(model).__name__}, so there is nothing to "
            "precondition; use the optimiser itself"
        )
    optimizer = optimizer_cls(list(parameters.values()), lr=lr, **kwargs)
    preconditioning = _Preconditioning(names, pairs, reg)
    optimizer.register_step_pre_hook(preconditioning.begin)
    optimizer.register_step_post_hook(preconditioning.end)
    return optimizer


def _check_class(optimizer_cls: Any) -> None:
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise PeftTypeError(f"optimizer_cls must be a class of optimisers, found {optimizer_cls!r}")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PeftValueError(
            f"the steps of {optimizer_cls.__name__} need a closure, which computes gradients that cannot be "
            "preconditioned; choose another class, such as torch.optim.AdamW"
        )


class _Preconditioning:
    """
    What happens before and after a step of the optimiser.

    Args:
        names: names of the parameters in the optimiser's first group. The parameters are taken from there at each
            step, since accelerate puts others in their place.
        pairs: places of factors A and B there, and how many experts they hold.
        reg: what is added to diagonals.
    """

    def __init__(self, names: tuple[str, ...], pairs: dict[tuple[int, int], int], reg: float) -> None:
        self.names, self.pairs, self.reg = names, pairs, reg
        # parameter, its usual gradient, the preconditioned one
        self.changed: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def begin(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        """
        Put preconditioned gradients in the place of the usual ones.

        Raises:
            PeftValueError: if the step was given a closure.
            PeftRuntimeError: if the optimiser does not hold the factors any more.
        """
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:]):
            raise PeftValueError(
                "the step was given a closure, which computes gradients that cannot be preconditioned; compute them "
                "before the step"
            )
        if self.changed and all(parameter.grad is gradient for parameter, _, gradient in self.changed):
            return  # within a step of a subclass that makes one of its parent's, or after one that failed
        params = optimizer.param_groups[0]["params"]
        check_places(self.names, params)
        pairs = [FactorPair(params[a], params[b], experts) for (a, b), experts in self.pairs.items()]
        self.changed = [(parameter, parameter.grad, gradient) for parameter, gradient in self._preconditioned(pairs)]
        for parameter, _, gradient in self.changed:
            parameter.grad = gradient

    def end(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        """Bring the usual gradients back."""
        for parameter, gradient, _ in self.changed:
            parameter.grad = gradient
        self.changed = []

    def _preconditioned(self, pairs: list[FactorPair]) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        of_a = [pair for pair in pairs if pair.a.grad is not None]
        of_b = [pair for pair in pairs if pair.b.grad is not None]
        grams = [pair.gram_of_b(self.reg) for pair in of_a] + [pair.gram_of_a(self.reg) for pair in of_b]
        inverses = iter(inverted(grams))
        for pair in of_a:
            yield pair.a, pair.inverse_times(next(inverses), pair.a.grad)
        for pair in of_b:
            yield pair.b, pair.times_inverse(pair.b.grad, next(inverses))


__getattr__ = old_names(__name__)
