# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
How LoRA's factors start: strategies by the value of `init_lora_weights`.

They are called without gradients and write to the factors in place. Some make the factors from the base weight and
take their product out of it. That is put off until all layers of an injection are made (`deferring_base_changes`), so
that an injection or a load that is refused halfway has changed no weight.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from ...anatomy.kinds import stores_weight_transposed
from ...layers.base_changes import change_base
from ...layers.base_layer import BaseTunerLayer
from ...utils.computed_weights import find_computed_weight
from ...utils.error import PeftNotImplementedError, PeftRuntimeError, PeftTypeError, PeftValueError
from ...utils.quantization_utils import resolve_quantization_backend


if TYPE_CHECKING:
    from .layer import LoraLayer


Initialization = Callable[["LoraLayer", str], None]

# named in the config's type, and part of later versions of this package
_PLANNED = ("eva", "corda", "loftq", "mica", "lora_ga")

# singular vectors beyond those wanted that a randomised decomposition computes (Halko et al. 2011 advise 5 to 10)
_OVERSAMPLING = 8
# a subspace has long been found by then
_MOST_ITERATIONS = 1_000


# ------------------------------------------------------------------------------------------ at random
def _uniform_by_fan_in(weight: nn.Parameter) -> None:
    """Draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as `nn.Linear` does; weight is (out, in)."""
    bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] > 0 else 0.0
    weight.uniform_(-bound, bound)


def start_neutral(layer: "LoraLayer", adapter: str) -> None:
    """One factor at random, the other zero: the adapter changes nothing at first."""
    into, out = layer.factor_weights(adapter)
    if layer.is_embedding:
        into.zero_()
        out.normal_()
    else:
        _uniform_by_fan_in(into)
        out.zero_()


def start_gaussian(layer: "LoraLayer", adapter: str) -> None:
    """Like the neutral start, with factor A from N(0, 1/r^2)."""
    into, out = layer.factor_weights(adapter)
    if layer.is_embedding:
        into.zero_()
        out.normal_()
    else:
        into.normal_(std=1 / layer.r[adapter])
        out.zero_()


def start_random(layer: "LoraLayer", adapter: str) -> None:
    """Both factors at random, so that the adapter has an effect at once; for tests."""
    for weight in layer.factor_weights(adapter):
        if layer.is_embedding:
            weight.normal_()
        else:
            _uniform_by_fan_in(weight)


def start_orthogonal(layer: "LoraLayer", adapter: str) -> None:
    """
    Both factors at random, in orthogonal halves of the r dimensions between them.

    B A = 0, so the adapter changes nothing at first, and yet both factors get gradients from the first step on. An
    embedding starts neutrally.
    """
    if layer.is_embedding:
        start_neutral(layer, adapter)
        return
    into, out = layer.factor_weights(adapter)
    rank = layer.r[adapter]
    if out.shape[1] != rank:
        raise PeftValueError("init_lora_weights='orthogonal' does not work for convolutions with groups; use True")
    if rank % 2:
        raise PeftValueError(f"init_lora_weights='orthogonal' needs an even rank, found r={rank}")
    between = torch.linalg.qr(torch.randn(rank, rank, device=into.device, dtype=torch.float32)).Q
    half = rank // 2
    rows = torch.randn(half, into.shape[1], device=into.device, dtype=torch.float32)
    columns = torch.randn(out.shape[0], half, device=into.device, dtype=torch.float32)
    into.copy_(between[:, :half] @ rows * 0.1)
    out.copy_(columns @ between[:, half:].T * 0.1)


# ------------------------------------------------------------------------------------------ from the base weight
# (out, in) matrix, rank, scaling -> (out, r) and (r, in); scaling times their product is taken out of the matrix
Factorisation = Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]


def principal_factors(
    weight: torch.Tensor, rank: int, scaling: float, iterations: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factorise the principal part of a matrix: PiSSA (Meng et al. 2024, arXiv:2404.02948).

    Args:
        weight: (out, in), float32 or float64.
        rank: number of singular values.
        scaling: factor that the adapter multiplies the product with.
        iterations: if given, use a randomised decomposition with so many subspace iterations.

    Returns:
        B (out, rank) and A (rank, in); scaling * B A is the best approximation of that rank.
    """
    u, s, vh = (
        torch.linalg.svd(weight, full_matrices=False)
        if iterations is None
        else _leading_singular_vectors(weight, rank, iterations)
    )
    root = (s[:rank] / scaling).sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]


def _leading_singular_vectors(
    weight: torch.Tensor, count: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Decompose a matrix approximately, by subspace iteration (Halko et al. 2011, arXiv:0909.4061).

    It starts from the same numbers whenever it is called, on whatever device: an adapter that is loaded takes out of
    the base weight what it took out when it was trained.
    """
    wanted = min(count + _OVERSAMPLING, *weight.shape)
    numbers = torch.randn(weight.shape[1], wanted, generator=torch.Generator().manual_seed(0), device="cpu")
    basis = torch.linalg.qr(weight @ numbers.to(weight)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(weight.T @ basis).Q
        basis = torch.linalg.qr(weight @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, vh


def orthonormal_factors(weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factorise a matrix by QR: OLoRA (Büyükakyüz 2024, arXiv:2406.01775).

    Args:
        weight: (out, in), float32 or float64.
        rank: number of columns of Q and rows of R.
        scaling: not used: the product is taken out of the weight as often as the adapter adds it.

    Returns:
        B (out, rank) with orthonormal columns, and A (rank, in).
    """
    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]


def _find_factorisation(name: bool | str | None) -> Factorisation | None:
    """Find the factorisation of the base weight that a value of `init_lora_weights` stands for, if it does."""
    name = name.lower() if isinstance(name, str) else name
    if name == "olora":
        return orthonormal_factors
    if name == "pissa":
        return principal_factors
    if isinstance(name, str) and (found := re.fullmatch(r"pissa_niter_(\d+)", name)):
        iterations = int(found[1])
        if iterations > _MOST_ITERATIONS:
            raise PeftValueError(
                f"init_lora_weights={name!r} asks for {iterations:,d} iterations; a few are enough, and at most "
                f"{_MOST_ITERATIONS} are done"
            )
        return lambda weight, rank, scaling: principal_factors(weight, rank, scaling, iterations)
    return None


def changes_base(name: bool | str | None) -> bool:
    """Say whether a value of `init_lora_weights` takes the product of the factors out of the base weights."""
    return _find_factorisation(name) is not None


_PROGRESS: ContextVar[tqdm | None] = ContextVar("start_progress", default=None)


@contextmanager
def showing_progress(name: bool | str | None, layers: int) -> Iterator[None]:
    """
    Show a bar for initialisations that take longer than a moment, where somebody can see it.

    Args:
        name: value of `init_lora_weights`.
        layers: how many layers are going to be started.
    """
    if _find_factorisation(name) is None:
        yield
        return
    with tqdm(total=layers, desc=str(name), disable=None, delay=2, leave=False) as bar:
        token = _PROGRESS.set(bar)
        try:
            yield
        finally:
            _PROGRESS.reset(token)


@torch.no_grad()
def _take_out(layer: "LoraLayer", adapter: str, left: torch.Tensor, right: torch.Tensor) -> None:
    """Subtract a product of factors from a base weight, which stays the same parameter."""
    weight = layer.get_base_weight()
    if left.dtype == weight.dtype:
        weight.addmm_(left, right, alpha=-layer.scaling[adapter])
    else:
        weight.copy_(weight.to(left.dtype).addmm_(left, right, alpha=-layer.scaling[adapter]))
    layer.__dict__["base_changed_by"] = adapter


def _start_from_base(name: str, factorise: Factorisation) -> Initialization:
    """Make a strategy out of a factorisation of the base weight."""

    def start(layer: "LoraLayer", adapter: str) -> None:
        if layer.is_embedding:
            start_neutral(layer, adapter)
            return
        refusal = why_base_cannot_change(layer.get_base_layer(), layer.r[adapter], layer, adapter)
        if refusal:
            raise refusal(name)
        weight = layer.get_base_weight()
        matrix = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
        transposed = stores_weight_transposed(layer.get_base_layer())
        scaling = layer.scaling[adapter]
        b, a = factorise(matrix.T if transposed else matrix, layer.r[adapter], scaling)
        into, out = layer.factor_weights(adapter)
        into.copy_(a)
        out.copy_(b)
        left, right = (a.T, b.T) if transposed else (b, a)
        change_base((id(layer), adapter), lambda: _take_out(layer, adapter, left, right))
        bar = _PROGRESS.get()
        if bar is not None:
            bar.update()

    return start


def why_base_cannot_change(
    base: nn.Module, rank: int, layer: nn.Module | None = None, adapter: str | None = None
) -> Callable[[str], Exception] | None:
    """
    Find out what stands against factors made from a base weight.

    Args:
        base: the base layer.
        rank: rank of the factors.
        layer: the adapter layer around it; anything else if there is none yet.
        adapter: name of the adapter to start.

    Returns:
        A function that makes an exception from the name of the initialisation; None if nothing stands against it.
    """
    weight = getattr(base, "weight", None)
    kind = type(base).__name__
    backend = resolve_quantization_backend(base)
    if backend is not None:
        return lambda name: PeftTypeError(
            f"init_lora_weights={name!r} changes the base weight, which is quantised here ({backend.name}); start the "
            "adapter before the model is quantised, or use another initialisation"
        )
    computed = find_computed_weight(base, "weight")
    if computed is not None:
        return lambda name: PeftValueError(
            f"init_lora_weights={name!r} changes the base weight, which a {kind} layer computes anew in each forward "
            f"pass ({computed.kind}); use another initialisation, or take the parametrisation off first"
        )
    if weight is None or weight.dim() != 2:
        return lambda name: PeftValueError(
            f"init_lora_weights={name!r} works for matrices, not for the weight of a {kind}; use True or 'gaussian'"
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return lambda name: PeftTypeError(
            f"init_lora_weights={name!r} needs a base weight in float32, float64, bfloat16 or float16, found "
            f"{weight.dtype}; start the adapter before the model is quantised"
        )
    if weight.is_meta:
        return lambda name: PeftValueError(
            f"init_lora_weights={name!r} reads the base weights, which are on the meta device; load them first"
        )
    if rank > min(weight.shape):
        return lambda name: PeftValueError(
            f"init_lora_weights={name!r} cannot give factors of rank {rank} for a {kind} of shape "
            f"{tuple(weight.shape)}; use r <= {min(weight.shape)}, or rank_pattern for this layer"
        )
    if not isinstance(layer, BaseTunerLayer):
        return None
    if layer.__dict__.get("base_changed_by") is not None:
        return lambda name: PeftRuntimeError(
            f"the base weight of a {kind} has been changed by adapter {layer.base_changed_by!r} already, so "
            f"init_lora_weights={name!r} would start from what is left of it; load the base model again. To use two "
            "such adapters in one model, save each with path_initial_model_for_weight_conversion, which makes plain "
            "LoRA of it"
        )
    others = sorted(layer.available_adapters - {adapter})
    if others:
        return lambda name: PeftValueError(
            f"init_lora_weights={name!r} changes the base weights, and other adapters ({', '.join(others)}) stand on "
            "them; load this adapter first, or convert it to plain LoRA with path_initial_model_for_weight_conversion"
        )
    return None


def check_bases_can_change(
    name: bool | str | None,
    targets: Mapping[str, tuple[nn.Module, nn.Module, int]],
    shared: Collection[Collection[str]],
) -> None:
    """
    Refuse an initialisation that would change base weights where that is wrong, before anything is changed.

    Args:
        name: value of `init_lora_weights`.
        targets: name of a module that gets factors of its own -> base layer, module as it stands there, rank.
        shared: for each weight that several modules hold, the names of those that do not follow one of them.

    Raises:
        PeftValueError: for kinds, ranks, ties and neighbours that cannot work.
        PeftTypeError: for types of weights that cannot.
    """
    if _find_factorisation(name) is None:
        return
    for target, (base, layer, rank) in targets.items():
        if isinstance(base, nn.Embedding):
            continue
        refusal = why_base_cannot_change(base, rank, layer)
        if refusal:
            exception = refusal(str(name))
            raise type(exception)(f"{target!r}: {exception}")
        apart = next((holders for holders in shared if target in holders and len(holders) > 1), None)
        if apart:
            raise PeftValueError(
                f"init_lora_weights={name!r} changes the weight of {target!r} itself, which "
                f"{', '.join(repr(other) for other in apart if other != target)} would get too without the adapter; "
                "set ensure_weight_tying=True where all of them can follow, or use another initialisation"
            )


# ------------------------------------------------------------------------------------------ finding a strategy
INITIALIZATIONS: dict[bool | str, Initialization] = {
    True: start_neutral,
    "gaussian": start_gaussian,
    "orthogonal": start_orthogonal,
    "pissa": _start_from_base("pissa", principal_factors),
    "olora": _start_from_base("olora", orthonormal_factors),
    False: start_random,
}


def find_initialization(name: bool | str | None) -> Initialization:
    """
    Find the strategy for a value of `init_lora_weights`.

    Args:
        name: the value; strings are compared without regard to case. `pissa_niter_16` is PiSSA with 16 iterations of
            a randomised decomposition.

    Raises:
        PeftValueError: if no initialisation has that name.
        PeftNotImplementedError: if this version does not have it yet.
    """
    key = name.lower() if isinstance(name, str) else bool(name) if name is not None else True
    if key in INITIALIZATIONS:
        return INITIALIZATIONS[key]
    factorise = _find_factorisation(name)
    if factorise is not None:
        return _start_from_base(key, factorise)
    if str(key) in _PLANNED:
        raise PeftNotImplementedError(
            f"init_lora_weights={name!r} is not part of this version; use True or 'gaussian'"
        )
    raise PeftValueError(
        f"init_lora_weights={name!r} is not known; choose one of {', '.join(map(repr, INITIALIZATIONS))} or "
        "'pissa_niter_N' with a number N"
    )


class StartMethods:
    """The initialisations as methods of a layer, by the names that callers of the released package use."""

    @torch.no_grad()
    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Start an adapter by PiSSA; `init_lora_weights` is "pissa" or "pissa_niter_N"."""
        find_initialization(init_lora_weights)(self, adapter_name)

    @torch.no_grad()
    def olora_init(self, adapter_name: str) -> None:
        """Start an adapter by OLoRA."""
        find_initialization("olora")(self, adapter_name)

    @torch.no_grad()
    def orthogonal_init(self, adapter_name: str) -> None:
        """Start an adapter with orthogonal halves."""
        find_initialization("orthogonal")(self, adapter_name)
