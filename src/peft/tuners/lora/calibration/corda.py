# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
CorDA's preparation: the covariances of layers' inputs, and weights decomposed by them.

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", 2024, arXiv:2406.05223.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ....anatomy.kinds import stores_weight_transposed
from ....anatomy.walking import unwrapped
from ....utils.error import PeftValueError
from ....utils.seeding import seeded
from ....utils.warning import warn
from ..config import CordaConfig, LoraConfig
from ..maths import leading_eigenvectors, trailing_left_vectors
from ..starts.corda import CordaEigens
from .cache_file import CacheFile
from .covariance import Covariances
from .observing import in_mode, observing_inputs
from .targets import CalibrationTarget, find_calibration_targets


# how often the damping is doubled before a covariance is given up
_MOST_DOUBLINGS = 40
# vectors with which it is tried how well a covariance can be inverted
_PROBES = 16


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """
    Prepare a base model for an adapter with `init_lora_weights="corda"`, which `get_peft_model` makes afterwards.

    Each target gets an attribute `eigens`. If anything is refused or interrupted, no target does; what has been found
    until then is in the cache file, if the config names one, and need not be found again.

    Args:
        model: the base model.
        lora_config: the adapter's config, with its `corda_config`.
        run_model: runs the model on samples of the task to be learned ("ipm"), or of what should not be forgotten
            ("kpm"). It is called once, without gradients and in evaluation mode.
        hooked_model: another model with layers of the same names, which `run_model` runs instead.

    Raises:
        PeftValueError: for configs, models and inputs that cannot work.
        PeftTypeError: for types of weights that cannot.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.tuners.lora.config import CordaConfig
        >>> from peft.tuners.lora.corda import preprocess_corda
        >>> net, x = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.randn(20, 8)
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig())
        >>> before = net(x)
        >>> preprocess_corda(net, config, run_model=lambda: net(x))
        >>> torch.allclose(get_peft_model(net, config)(x), before, atol=1e-5)
        True
    """
    settings = _checked_settings(lora_config)
    config = copy.copy(lora_config)
    config.corda_config = settings
    targets = find_calibration_targets(model, config)
    cache, covariance_file = CacheFile(settings.cache_file), CacheFile(settings.covariance_file)
    eigens = _eigens_in(cache, targets)
    missing = {name: target for name, target in targets.items() if name not in eigens}
    left: dict[str, torch.Tensor] = {}
    if missing:
        observed = model if hooked_model is None else hooked_model
        covariances = _find_covariances(missing, settings, covariance_file, observed, run_model)
        if not settings.prune_temporary_fields:
            left = dict(covariances)
        steps = _decompose_all(missing, covariances, settings)
        with cache.keeping(lambda: _as_tensors(eigens)) as step:
            for name, found in tqdm(steps, "CorDA", len(missing), disable=None if settings.verbose else True):
                eigens[name] = found
                step()
    for name, target in targets.items():
        target.layer.eigens = eigens[name]
        if name in left:
            target.layer.covariance_matrix, target.layer.corda_method = left[name], settings.corda_method
            target.layer.rank = target.rank


def _checked_settings(config: LoraConfig) -> CordaConfig:
    if config.init_lora_weights != "corda":
        raise PeftValueError(
            f"preprocess_corda is for init_lora_weights='corda', found {config.init_lora_weights!r}; set it in the "
            "config"
        )
    settings = config.corda_config
    if settings is None:
        warn("init_lora_weights='corda' without corda_config: its defaults are used; give corda_config=CordaConfig()")
        settings = CordaConfig()
    if settings.corda_method not in ("ipm", "kpm"):
        raise PeftValueError(f"corda_method must be 'ipm' or 'kpm', found {settings.corda_method!r}")
    return settings


# ------------------------------------------------------------------------------------------------ covariances
def _find_covariances(
    targets: Mapping[str, CalibrationTarget],
    settings: CordaConfig,
    file: CacheFile,
    observed: nn.Module,
    run_model: Callable[[], Any] | None,
) -> dict[str, torch.Tensor]:
    """Read covariances from their file, or run the model and write them there."""
    known = file.read()
    if all(name in known for name in targets):
        for name, target in targets.items():
            width = _matrix(target.layer).shape[1]
            if tuple(known[name].shape) != (width, width):
                raise PeftValueError(
                    f"{file.path!r} holds a covariance of shape {tuple(known[name].shape)} for {name!r}, which has "
                    f"{width} inputs; it was written for another model"
                )
        return {name: known[name] for name in targets}
    if run_model is None:
        raise PeftValueError(
            "CorDA needs the inputs of the targets: give run_model, a function that runs the model on samples; or a "
            "cache_file or covariance_file in corda_config that has been written before"
        )
    layers = {}
    for name in targets:
        try:
            layers[name] = unwrapped(observed.get_submodule(name))
        except AttributeError as error:
            raise PeftValueError(
                f"hooked_model has no layer {name!r}; it needs all targets, by the names that they have in the model"
            ) from error
    covariances = Covariances(settings.use_float16_for_covariance)
    with in_mode(observed, training=False), torch.no_grad(), observing_inputs(layers, covariances.look):
        run_model()
    found = covariances.finish(targets)
    file.write(found)
    return found


# ------------------------------------------------------------------------------------------------ decompositions
def _decompose_all(
    targets: Mapping[str, CalibrationTarget], covariances: dict[str, torch.Tensor], settings: CordaConfig
) -> Iterator[tuple[str, CordaEigens]]:
    """Decompose the weights by their covariances, each of which is dropped after its last use."""
    damped: tuple[torch.Tensor, torch.Tensor] | None = None
    for name in sorted(targets, key=_by_first_use(covariances, list(targets))):
        covariance = covariances.pop(name)
        weight = _matrix(targets[name].layer)
        if damped is None or damped[0] is not covariance:
            damped = covariance, damp(covariance.to(weight.device, torch.float32), name)
        yield name, decompose(weight, damped[1], targets[name].rank, settings.corda_method == "kpm")


def _by_first_use(covariances: Mapping[str, torch.Tensor], names: list[str]) -> Callable[[str], int]:
    """Order names so that those with the same covariance stand together."""
    first: dict[int, int] = {}
    for position, name in enumerate(names):
        first.setdefault(id(covariances[name]), position)
    return lambda name: first[id(covariances[name])]


def _matrix(layer: nn.Module) -> torch.Tensor:
    """Give the weight of a linear layer as (out, in), in float32."""
    weight = layer.weight.detach().float()
    return weight.T if stores_weight_transposed(layer) else weight


def damp(covariance: torch.Tensor, name: str) -> torch.Tensor:
    """
    Add a multiple of the identity to a covariance, so much that it can be inverted in float32.

    Args:
        covariance: (in, in), float32.
        name: name of the layer.

    Returns:
        Another matrix.

    Raises:
        PeftValueError: if that does not come to an end.
    """
    diagonal = covariance.diagonal().mean()
    with seeded(0, covariance.device):
        probes = torch.randn(len(covariance), _PROBES, device=covariance.device)
    share = 0.01
    for _ in range(_MOST_DOUBLINGS):
        matrix = covariance.clone()
        matrix.diagonal().add_(share * diagonal)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            residual = torch.addmm(probes, matrix, torch.cholesky_solve(probes, factor), beta=-1)
            # the expected Frobenius norm of K K^-1 - I
            if residual.norm() / _PROBES**0.5 < 0.05:
                return matrix
        share *= 2
    raise PeftValueError(
        f"the covariance of the inputs of {name!r} cannot be inverted, however much it is damped; check that these "
        "inputs are not all zero"
    )


def decompose(weight: torch.Tensor, damped: torch.Tensor, rank: int, trailing: bool) -> CordaEigens:
    """
    Decompose W = U S (K^-1 V)' by way of W K = U S V', for a symmetric K.

    K^-1 V is W' U / S, so K is never inverted, and U is enough. Only the vectors that are wanted are computed where
    that is faster; in float64, in which a Gram matrix tells as much as its factor does in float32.

    Args:
        weight: W (out, in), float32.
        damped: K (in, in), float32.
        rank: how many columns to give.
        trailing: give those of the smallest singular values, not of the largest.

    Returns:
        The columns, in the order of descending singular values.
    """
    w, k = weight.double(), damped.double()
    u = _trailing_vectors(w @ k, rank) if trailing else _leading_vectors(w, k, rank)
    back = w.T @ u
    s = (k @ back).norm(dim=0)
    s = s.clamp(min=max(torch.finfo(torch.float32).eps * float(s.max()), torch.finfo(torch.float32).tiny))
    return CordaEigens(s.float(), u.float().contiguous(), (back / s).float().contiguous())


def _leading_vectors(w: torch.Tensor, k: torch.Tensor, rank: int) -> torch.Tensor:
    """Give the left singular vectors of W K for its largest singular values."""
    found = leading_eigenvectors(lambda x: w @ (k @ (k @ (w.T @ x))), len(w), rank, w.device)
    if found is not None:
        return found
    product = w @ k
    if product.shape[0] <= product.shape[1]:
        return torch.linalg.eigh(product @ product.T).eigenvectors.flip(1)[:, :rank]
    right = torch.linalg.eigh(product.T @ product).eigenvectors.flip(1)[:, :rank]
    return torch.linalg.qr(product @ right).Q


def _trailing_vectors(product: torch.Tensor, rank: int) -> torch.Tensor:
    """Give the left singular vectors of a matrix for its smallest singular values, the smallest one last."""
    rows, columns = product.shape
    if rows <= columns:
        factor, failed = torch.linalg.cholesky_ex(product @ product.T)
        if not failed:
            found = leading_eigenvectors(lambda x: torch.cholesky_solve(x, factor), rows, rank, product.device)
            if found is not None:
                return found.flip(1)
    return trailing_left_vectors(product, rank)


# ------------------------------------------------------------------------------------------------ the cache file
def _as_tensors(eigens: Mapping[str, CordaEigens]) -> dict[str, torch.Tensor]:
    """Give what stands in the file."""
    return {
        f"{name}.eigens.{key}": tensor.cpu()
        for name, found in eigens.items()
        for key, tensor in zip(("S_WC", "U_WC", "V_WC"), found.tensors(), strict=True)
    }


def _eigens_in(file: CacheFile, targets: Mapping[str, CalibrationTarget]) -> dict[str, CordaEigens]:
    """Read what was found before; refuse what belongs to another model or rank."""
    content, eigens = file.read(), {}
    for name, (layer, rank) in targets.items():
        tensors = [content.get(f"{name}.eigens.{key}") for key in ("S_WC", "U_WC", "V_WC")]
        if None in [None if tensor is None else True for tensor in tensors]:
            continue
        found, shape = CordaEigens(*(tensor.to(layer.weight.device) for tensor in tensors)), _matrix(layer).shape
        if not found.fits(*shape, rank):
            raise PeftValueError(
                f"{file.path!r} holds a decomposition of rank {len(found.S_WC)} for {name!r}, which is "
                f"{tuple(shape)} with rank {rank} here; delete the file, or name another cache_file"
            )
        eigens[name] = found
    if content and not eigens:
        raise PeftValueError(
            f"{file.path!r} holds none of the targets ({', '.join(list(targets)[:3])} ...); it was written for "
            "another model, or is no cache_file of CorDA"
        )
    return eigens
