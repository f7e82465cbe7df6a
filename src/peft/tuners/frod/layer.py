# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""FRoD: W + U (S + diag(l - l0)) V', with U and l0 such that W = U diag(l0) V', and V shared by layers of one role."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ...layers.buffer_dict import BufferDict
from ...utils.constants import TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ...utils.warning import warn
from ..declared.layers import DeclaredAdditive
from ..declared.method import DeclaredModel, method
from ..declared.tensors import Frozen, Kept, Shape, Tensors, Trained
from .config import FrodConfig
from .maths import (
    block_of,
    common_basis,
    core,
    factor,
    number_of_pairs,
    random_pairs,
    role_of,
    small_normal_,
    version_of,
)


class FactoredLayer(DeclaredAdditive):
    """
    A layer that factors its weight anew whenever the basis has become another one, such as that of a file.

    What layers of one role share stands on the tuner alone: `settings[adapter].bases`.
    """

    shares_on_tuner = True
    other_param_names = (*DeclaredAdditive.other_param_names, "factored")

    def __getstate__(self) -> dict[str, Any]:
        """Give l0 as numbers: the tensors of a model are its parameters and buffers."""
        factored = {name: (v, 0, scales.tolist()) for name, (v, _, scales) in self.factored.items()}
        return {**super().__getstate__(), "factored": factored}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy, where changes of tensors are counted anew."""
        super().__setstate__(state)
        self.factored = {
            name: (v, version_of(v), torch.tensor(scales)) for name, (v, _, scales) in self.factored.items()
        }

    def frozen(self, adapter: str, name: str, specified: Mapping[str, Any] | None = None) -> torch.Tensor | None:
        """
        Give what is not trained, beside U.

        Args:
            adapter: name of an adapter that this layer has itself.
            name: name of the tensor.
            specified: not used.
        """
        if name in Frod.of_roles:
            c = self.settings[adapter]
            return c.bases[f"frod_{name}"][c.role][adapter]
        self.factor(adapter)
        return self.factored[adapter][2].to(self.frod_U[adapter])

    @torch.no_grad()
    def factor(self, adapter: str) -> None:
        """Compute U and l0, unless they belong to the basis that there is; one that was only moved is the same."""
        v = self.frozen(adapter, "V")
        known, version, scales = self.factored.get(adapter, (None, 0, None))
        if known is v and version == version_of(v):
            return
        if known is None or known is v or not torch.equal(known.to(v), v):
            with torch.inference_mode(False):
                u, scales = factor(self.shape.weight, v)
                self.frod_U.put(adapter, u.to(v), False)
        self.factored[adapter] = (v, version_of(v), scales)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Compute what an adapter adds to the weight."""
        self.factor(adapter)
        return super().get_delta_weight(adapter)

    def delta_forward(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute what an adapter adds to the output."""
        self.source(adapter).factor(adapter)
        return super().delta_forward(adapter, x)

    def start(self, adapter: str, c: FrodConfig) -> None:
        """Start an adapter anew: l is counted from l0."""
        super().start(adapter, c)
        with torch.no_grad():
            self.frod_lambda_l[adapter].add_(self.frozen(adapter, "lambda_0"))

    def reset_frod_parameters(self, adapter_name: str) -> None:
        """Start an adapter anew."""
        self.restart(adapter_name)

    def shared_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield the keys of what layers share, in a checkpoint and in the tuner's state dict."""
        for name, roles in self.settings[adapter_name].bases.items() if adapter_name in self.settings else ():
            for role, tensors in roles.items():
                if adapter_name in tensors and tensors.is_persistent(adapter_name):
                    yield f"{name}.{role}", f"{name}.{role}.{adapter_name}"

    def remove_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, with what its layers share."""
        bases = self.settings[adapter_name].bases if adapter_name in self.settings else {}
        super().remove_adapter(adapter_name)
        for tensors in [tensors for roles in bases.values() for tensors in roles.values()]:
            if adapter_name in tensors:
                del tensors[adapter_name]


class RolesModel(DeclaredModel):
    """A model that has the bases, role by role and then by adapter."""

    uses_shared_state = True

    def _shared_containers(self) -> dict[str, nn.Module]:
        settings = [c for layer in self._layers() if isinstance(layer, FactoredLayer) for c in layer.settings.values()]
        for name in Frod.of_roles:
            present = settings[0].bases[f"frod_{name}"] if settings else None
            if present is not None or f"frod_{name}" not in self._modules:
                self._modules[f"frod_{name}"] = nn.ModuleDict() if present is None else present
        return {f"frod_{name}": self._modules[f"frod_{name}"] for name in Frod.of_roles}

    def _place_in_group(
        self, container: nn.ModuleDict, adapter_name: str, group: str, trained: bool
    ) -> tuple[nn.Module, str]:
        if group not in container:
            container[group] = BufferDict()
        return container[group], adapter_name

    def _arguments_from_all(self, config: FrodConfig, targets: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        bases = self._shared_containers()
        return {name: {**v, "bases": bases} for name, v in super()._arguments_from_all(config, targets).items()}

    def _modules_in_state_dict(self, state_dict: dict[str, torch.Tensor]) -> set[str]:
        return super()._modules_in_state_dict(state_dict) - {"base_model"}


@method(
    "FROD",
    FrodConfig,
    kinds={nn.Linear: "Linear", Conv1D: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING,
    dropout="frod_dropout",
    settings={"runtime_offload_base_weight": "runtime_offload_base_weight"},
    in_common=("projection_prng_key", "save_projection", "runtime_offload_base_weight"),
    rule=FactoredLayer,
    model=RolesModel,
)
class Frod:
    """A layer whose scales l in a basis are trained, and a sparse core beside them."""

    of_roles = ("V", "s_indices", "s_size")
    trained, kept, frozen = ("lambda_s_values", "lambda_l"), ("U",), (*of_roles, "lambda_0")
    groups = dict.fromkeys(of_roles, "role")

    def values_of_all(targets: Mapping[str, Shape], c: FrodConfig) -> dict[str, dict[str, str]]:
        """Tell the roles of the layers; those of one role need to have the same inputs."""
        widths: dict[str, int] = {}
        for name, shape in targets.items():
            if widths.setdefault(role_of(name), shape[1]) != shape[1]:
                raise PeftValueError(
                    f"layers of one role share a basis, but {name!r} has {shape[1]} inputs and others that end in "
                    f"{role_of(name)!r} have {widths[role_of(name)]}; narrow target_modules"
                )
        return {name: {"role": role_of(name)} for name in targets}

    def shared_tensors(targets: Mapping[str, Shape], c: FrodConfig) -> dict[str, dict[str, Frozen]]:
        """Tell the bases V (in, in), where the cores have entries (2, number), and their sizes (2,)."""
        roles: dict[str, dict[int, Shape]] = {}
        for i, (name, shape) in enumerate(targets.items()):
            roles.setdefault(role_of(name), {})[block_of(name, i)] = shape
        generator, spec = torch.Generator().manual_seed(c.projection_prng_key), Kept if c.save_projection else Frozen
        tensors: dict[str, dict[str, Frozen]] = {"V": {}, "s_indices": {}, "s_size": {}}
        bar = cache(lambda: tqdm(total=len(roles), desc="bases of roles", disable=not c.progressbar, leave=False))

        def basis(shapes: list[Shape]) -> torch.Tensor:
            bar().update()
            return common_basis([shape.weight for shape in shapes], c.regularization_alpha)

        for role, blocks in sorted(roles.items()):
            n = next(iter(blocks.values()))[1]
            tensors["V"][role] = spec(partial(basis, [blocks[block] for block in sorted(blocks)]), rounded=True)
            tensors["s_indices"][role] = spec(partial(random_pairs, n, c.sparse_rate, generator))
            tensors["s_size"][role] = spec(partial(torch.tensor, [n, n]))
        return tensors

    def tensors(shape: Shape, c: FrodConfig) -> dict[str, Trained]:
        """Tell the entries of the core (number,), and the scales (in,), here without l0."""
        start = 0.0 if c.init_weights else partial(small_normal_, shape.dtype)
        count = number_of_pairs(shape[1], c.sparse_rate)
        return {"lambda_s_values": Trained((count,), start), "lambda_l": Trained((shape[1],), start)}

    def delta(t: Tensors, shape: Shape, c: FrodConfig, w: torch.Tensor) -> torch.Tensor:
        """Compute U (S + diag(l - l0)) V', (out, in); U and l0 come from the weight."""
        return t.U @ Frod.core(t) @ t.V.T

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: FrodConfig) -> torch.Tensor:
        """Turn the input, apply the core, and turn the result."""
        return F.linear(F.linear(x @ t.V, Frod.core(t)), t.U)

    def core(t: Tensors) -> torch.Tensor:
        """Compute S + diag(l - l0), (in, in)."""
        return core(t.lambda_l - t.lambda_0, t.lambda_s_values, t.s_indices)

    def check(c: FrodConfig, others: Sequence[FrodConfig]) -> None:
        """Say what is not done."""
        if c.runtime_offload_base_weight:
            warn("runtime_offload_base_weight=True has no effect: base weights stay where they are")


FrodLayer, Linear = Frod.Layer, Frod.Linear


__getattr__ = old_names(__name__)
