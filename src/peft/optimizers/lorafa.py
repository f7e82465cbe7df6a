# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA-FA: factor A stays as it is, and factor B moves as far as the weight would.

Zhang, Zhang, Shi, Chu, Li, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
2023, arXiv:2308.03303.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..utils.error import PeftRuntimeError, PeftValueError
from ..utils.old_names import old_names
from ..utils.tensor_parallel import is_divided
from ..utils.warning import warn
from .factor_pairs import FactorPair, check_places, inverted, layer_and_adapter, pair_by_name
from .parameters import check_setting, trainable_parameters


# what is added to A A' before it is inverted
_REGULARISATION = 1e-8


class LoraFAOptimizer(Optimizer):
    """
    Adam with decoupled weight decay, for B factors on their gradient times (A A')^-1 / scaling^2.

    A group may have three lists, with an entry for each of its parameters: `names`, as the model has them, by which
    factors find each other; `scaling_factors`, those of the layers (1 if left out); and `experts`, how many matrices
    a factor holds (1 if left out). Factors A have to be in the group of their B and are never moved. Everything else
    in a group, and all of one without names, has steps of Adam.

    Args:
        params: parameters, or groups of them; `create_lorafa_optimizer` makes the group of a model.
        lr: learning rate.
        betas: decay of the means of gradients and of their squares.
        eps: added to the root of the latter.
        weight_decay: share of a parameter, times `lr`, by which it shrinks in a step.
        correct_bias: whether the means are corrected for having started at zero.

    Raises:
        PeftValueError: if a setting is out of range, in a group too.

    Example:

        >>> import torch
        >>> from peft.optimizers.lorafa import LoraFAOptimizer
        >>> a, b = torch.nn.Parameter(torch.eye(2) * 2), torch.nn.Parameter(torch.zeros(3, 2))
        >>> names = ["layer.lora_A.default.weight", "layer.lora_B.default.weight"]
        >>> optimizer = LoraFAOptimizer([{"params": [a, b], "names": names, "scaling_factors": [1.0, 1.0]}], lr=0.1)
        >>> (b @ a).sum().backward()
        >>> optimizer.step()
        >>> b.round(decimals=2)[0].tolist(), a[0].tolist()
        ([-0.10000000149011612, -0.10000000149011612], [2.0, 0.0])
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        self._inverses: dict[int, tuple[Any, torch.Tensor]] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        _check_settings(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of another one, as copies and `load_state_dict` do."""
        super().__setstate__(state)
        self._inverses = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Add a group.

        Args:
            param_group: its parameters and settings, see the class.

        Raises:
            PeftValueError: if a setting is out of range, or a list has not as many entries as there are parameters.
        """
        param_group["params"] = (
            [param_group["params"]] if isinstance(param_group["params"], torch.Tensor) else list(param_group["params"])
        )
        _check_settings(param_group)
        for key in ("names", "scaling_factors", "experts"):
            if key in param_group and len(param_group[key]) != len(param_group["params"]):
                raise PeftValueError(
                    f"{key} has {len(param_group[key])} entries for {len(param_group['params'])} parameters; give one "
                    "for each"
                )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """
        Make a step.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            What the closure did.

        Raises:
            PeftRuntimeError: if a gradient is sparse, or factors are not there whole.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = dict(self._gradients(group))
            if moved:
                self._adam(group, list(moved), list(moved.values()))
        return loss

    def _gradients(self, group: dict[str, Any]) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yield what is to be moved, each with the gradient that Adam is to see."""
        names = tuple(group.get("names", ()))
        if names:
            check_places(names, group["params"])
        partners, fixed = pair_by_name(names)
        for place, parameter in enumerate(group["params"]):
            gradient = parameter.grad
            if gradient is None or place in fixed:
                continue
            if gradient.is_sparse:
                raise PeftRuntimeError(
                    "LoraFAOptimizer cannot use a sparse gradient; make the embedding without sparse=True"
                )
            if place in partners:
                experts = group["experts"][place] if "experts" in group else 1
                scaling = group["scaling_factors"][place] if "scaling_factors" in group else 1.0
                pair = FactorPair(group["params"][partners[place]], parameter, experts)
                gradient = pair.times_inverse(gradient, self._inverse(pair, scaling))
            yield parameter, gradient.to(parameter.dtype)

    def _inverse(self, pair: FactorPair, scaling: float) -> torch.Tensor:
        """Give (A A')^+ / scaling^2, which is computed again only if A has been replaced or written to."""
        a = pair.a
        # a divided tensor does not count what is written to its parts
        state = None if is_divided(a) else (id(a), a.data_ptr(), a._version, scaling)
        known, inverse = self._inverses.get(id(pair.b), (None, None))
        if inverse is None or state is None or known != state:
            (inverse,) = inverted([pair.gram_of_a(_REGULARISATION)])
            inverse = inverse / scaling**2
            self._inverses[id(pair.b)] = (state, inverse)
        return inverse

    def _adam(self, group: dict[str, Any], params: list[nn.Parameter], gradients: list[torch.Tensor]) -> None:
        (beta_1, beta_2), lr = group["betas"], group["lr"]
        states = [self.state[parameter] for parameter in params]
        for parameter, state in zip(params, states, strict=True):
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
            state["step"] += 1
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        torch._foreach_mul_(means, beta_1)
        torch._foreach_add_(means, gradients, alpha=1 - beta_1)
        torch._foreach_mul_(squares, beta_2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta_2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        counts = [state["step"] for state in states]
        steps = [-lr * _correction(n, beta_1, beta_2) if group["correct_bias"] else -lr for n in counts]
        torch._foreach_addcdiv_(params, means, roots, steps)
        if group["weight_decay"] > 0:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])


def _correction(step: int, beta_1: float, beta_2: float) -> float:
    """Compute by what a step is multiplied because the means have started at zero."""
    return math.sqrt(1 - beta_2**step) / (1 - beta_1**step)


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if name in settings:
            check_setting(name, settings[name])
    for place, beta in enumerate(settings.get("betas", ())):
        check_setting(f"betas[{place}]", beta, below=1.0)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """
    Freeze the A factors of a model, of all adapters, and make a LoRA-FA optimiser for the rest of what is trained.

    With A frozen, its inputs need not be kept for the backward pass, and there is no state of Adam for it. Adapters
    that are not active now are trained too, once they are. Ranks and scalings are those of the model's layers at the
    time of the call.

    Args:
        model: a model with LoRA.
        r: not used: the layers know it. Kept for callers of the released package.
        lora_alpha: likewise.
        lr: learning rate.
        weight_decay: see `LoraFAOptimizer`.
        use_rslora: likewise not used; deprecated.

    Raises:
        PeftValueError: if the model has no LoRA or trains nothing, an adapter's scaling is 0, a number is out of
            range, or `use_rslora` is not what active adapters have.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.optimizers import create_lorafa_optimizer
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-3)
        >>> [name.split(".")[-3] for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['lora_B']
    """
    check_setting("lr", lr)
    check_setting("weight_decay", weight_decay)
    parameters = dict(model.named_parameters())
    names = tuple(parameters)
    pairs = {
        names[b]: (names[a], *found)
        for b, a in pair_by_name(names).partners.items()
        if (found := layer_and_adapter(model, names[b])) is not None
    }
    if not pairs:
        raise PeftValueError(f"this {type(model).__name__} has no factors of LoRA, which LoRA-FA is for")
    if use_rslora is not None:
        _check_rslora(use_rslora, [(layer, adapter) for _, layer, adapter in pairs.values()])
    factors = {name for b, (a, *_) in pairs.items() for name in (a, b)}
    trainable = trainable_parameters(model)
    trained = [name for name in parameters if name in factors or name in trainable]
    scalings, experts = {}, {}
    for b, (_, layer, adapter) in pairs.items():
        scalings[b], experts[b] = float(layer.scaling[adapter]), layer.rank_axis("lora_B").experts
        if not scalings[b]:
            raise PeftValueError(
                f"adapter {adapter!r} has the scaling 0 in {b!r}, so it cannot learn; give it another"
            )
    for a, *_ in pairs.values():
        parameters[a].requires_grad_(False)
    group = {
        "params": [parameters[name] for name in trained],
        "names": trained,
        "scaling_factors": [scalings.get(name) for name in trained],
        "experts": [experts.get(name, 1) for name in trained],
    }
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay)


def _check_rslora(use_rslora: bool, adapters: list[tuple[nn.Module, str]]) -> None:
    """Refuse a setting that says something else than active adapters do, and say that it is of no use."""
    for layer, adapter in adapters:
        if adapter in layer.active_adapters and bool(layer.use_rslora[adapter]) != bool(use_rslora):
            raise PeftValueError(
                f"use_rslora={use_rslora} is not what adapter {adapter!r} has, which is "
                f"{layer.use_rslora[adapter]}; leave it out: the model's layers know their scaling"
            )
    warn("use_rslora of create_lorafa_optimizer is deprecated and has no effect; leave it out", FutureWarning)


__getattr__ = old_names(__name__)
