# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""AdaMSS: W + a low-rank change of each cluster of rows, over right singular vectors of W."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...anatomy.offload import tensor_of
from ...configs.checks import check_counts
from ...utils.constants import TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING
from ...utils.old_names import old_names
from ..declared.layers import DeclaredAdditive, DeclaredLayer
from ..declared.method import DeclaredModel, method
from ..declared.tensors import Frozen, Kept, Shape, Tensors, TrainedModule, shape_of
from .config import AdamssConfig
from .maths import check_decomposable, decompose, get_trainable_subspaces, number_to_keep, start_of, track


class ClusteredLayer(DeclaredAdditive):
    """A layer with clusters of rows, of which some can be frozen while others are trained."""

    @classmethod
    def prepare_adapter(
        cls, base: nn.Module, config: AdamssConfig, present: DeclaredLayer | None = None, **arguments: Any
    ) -> Mapping[str, Any]:
        """Refuse a weight that has no clusters; to find them takes long, and is left to when they are needed."""
        check_decomposable((shape_of(base) if present is None else present.shape).weight)
        return arguments

    def get_delta_bias(self, adapter: str) -> torch.Tensor:
        """
        Compute what an adapter adds to the bias, (out,); zeros without one.

        Args:
            adapter: name.
        """
        delta = self.bias_delta(adapter)
        return self.get_delta_weight(adapter).new_zeros(self.out_features) if delta is None else delta

    @property
    def seg_result(self) -> dict[str, dict[int, torch.Tensor]]:
        """Rows of each cluster, by adapter name and number."""
        return {name: dict(enumerate(map(torch.tensor, c.rows))) for name, c in self.settings.items()}

    @property
    def scatter_index(self) -> dict[str, torch.Tensor]:
        """Rows of all clusters, one cluster after the other, by adapter name."""
        return {name: torch.tensor(sum(c.rows, [])) for name, c in self.settings.items()}

    @property
    def train_subspace_index(self) -> dict[str, list[int]]:
        """Numbers of the clusters that there are to train, by adapter name."""
        return {name: get_trainable_subspaces(len(c.rows)) for name, c in self.settings.items()}

    @property
    def exp_avg_ipt_A(self) -> dict[str, list[torch.Tensor | None]]:
        """How important the numbers of each A are, by adapter name; None where no gradient was seen."""
        return self._tracked(0, 0)

    @property
    def exp_avg_ipt_B(self) -> dict[str, list[torch.Tensor | None]]:
        """How important the numbers of each B are, by adapter name; None where no gradient was seen."""
        return self._tracked(1, 0)

    @property
    def exp_avg_unc_A(self) -> dict[str, list[torch.Tensor | None]]:
        """How uncertain that is of each A, by adapter name; None where no gradient was seen."""
        return self._tracked(0, 1)

    @property
    def exp_avg_unc_B(self) -> dict[str, list[torch.Tensor | None]]:
        """How uncertain that is of each B, by adapter name; None where no gradient was seen."""
        return self._tracked(1, 1)

    def _tracked(self, factor: int, kind: int) -> dict[str, list[torch.Tensor | None]]:
        unseen = (None, None)
        return {
            name: [c.states.get((number, factor), unseen)[kind] for number in range(len(c.rows))]
            for name, c in self.settings.items()
        }

    def pairs(self, adapter: str) -> Iterator[tuple[int, tuple[nn.Parameter, nn.Parameter]]]:
        """Yield the factors of each cluster with its number."""
        return enumerate(zip(self.adamss_A[adapter], self.adamss_B[adapter], strict=True))

    def update_importance(
        self, adapter_name: str, importance_beta: float = 0.85, uncertainty_beta: float = 0.85
    ) -> None:
        """
        Follow how important the clusters of an adapter are, from the gradients that it has.

        Args:
            adapter_name: name.
            importance_beta: how slowly importance forgets.
            uncertainty_beta: how slowly uncertainty does.
        """
        states = self.settings[adapter_name].states
        for number, pair in self.pairs(adapter_name):
            for place, factor in enumerate(pair):
                if factor.grad is not None:
                    key = number, place
                    states[key] = track(states.get(key), factor, (importance_beta, uncertainty_beta))

    def reset_importance(self, adapter_name: str) -> None:
        """
        Forget how important clusters are.

        Args:
            adapter_name: name.
        """
        self.settings[adapter_name].states.clear()

    def scores(self, adapter: str) -> dict[int, float]:
        """Rate the clusters of which gradients were seen."""
        states, rated = self.settings[adapter].states, {}
        for number, _ in self.pairs(adapter):
            both = [states.get((number, place)) for place in (0, 1)]
            if None not in both:
                rated[number] = sum((importance * uncertainty).mean().item() for importance, uncertainty in both)
        return rated

    def freeze(self, adapter: str, numbers: Sequence[int]) -> None:
        """Let clusters keep their values from now on."""
        self.settings[adapter].frozen.update(numbers)
        self.set_requires_grad(adapter, True)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze adapters or let them be trained, but for clusters that are frozen for good."""
        super().set_requires_grad(adapter_names, requires_grad)
        for adapter in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for number, pair in self.pairs(adapter) if adapter in self.settings else ():
                for factor in pair if number in self.settings[adapter].frozen else ():
                    factor.requires_grad, factor.grad = False, None


class ClusteredModel(DeclaredModel):
    """A model with AdaMSS; the arguments are those of `BaseTuner`."""

    def update_and_allocate(self, global_step: int) -> None:
        """
        Freeze clusters as the schedule says; to be called after the backward pass, before gradients are cleared.

        Args:
            global_step: number of the step.
        """
        for adapter in self.active_adapters:
            c = self.peft_config[adapter]
            if not c.use_asa or not c.init_warmup <= global_step <= c.final_warmup:
                continue
            layers = [layer for layer in self._layers() if adapter in layer.settings]
            for layer in layers:
                layer.update_importance(adapter, c.asa_importance_beta, c.asa_uncertainty_beta)
            if global_step % c.mask_interval == 0:
                self._freeze(adapter, c, layers, (global_step - c.init_warmup) / (c.final_warmup - c.init_warmup))

    def _freeze(self, adapter: str, c: AdamssConfig, layers: list[ClusteredLayer], progress: float) -> None:
        """Freeze all clusters of an adapter but the most important ones."""
        total = sum(len(layer.adamss_A[adapter]) for layer in layers)
        kept = number_to_keep(total, c.asa_target_subspaces, progress, c.asa_schedule_exponent)
        rated = [(score, layer, number) for layer in layers for number, score in layer.scores(adapter).items()]
        rated.sort(key=lambda entry: entry[0], reverse=True)
        for _, layer, number in rated[kept:]:
            layer.freeze(adapter, [number])
        for layer in layers:
            layer.reset_importance(adapter)


@method(
    "ADAMSS",
    AdamssConfig,
    kinds={nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING,
    settings={"num_subspaces": "num_subspaces"},
    rule=ClusteredLayer,
    model=ClusteredModel,
)
class Adamss:
    """A layer with a low-rank change of each cluster of its rows."""

    modules, kept, frozen = ("A", "B"), ("newB",), ("order",)

    def check(c: AdamssConfig, others: Sequence[AdamssConfig]) -> None:
        """Refuse what is no number of vectors, clusters or ranks."""
        check_counts(c, "r", "num_subspaces", "subspace_rank")

    def values(c: AdamssConfig, names: Sequence[str], shape: Shape) -> dict[str, Any]:
        """Cut the weight, with the bias as its last column, into clusters, and draw their starts."""
        weight, bias = shape.weight, tensor_of(shape.layer, "bias")
        if bias is not None:
            weight = torch.cat((weight, bias.detach()[:, None].to(weight.device)), 1)
        space = decompose(weight.float(), c.r, c.num_subspaces, c.random_seed)
        threshold, pairs = c.svd_threshold if c.use_dynamic_rank else None, []
        for rows in space.rows:
            a = start_of(space.left[rows], c.subspace_rank, threshold)
            size = len(rows), len(a)
            pairs.append((a, torch.zeros(size) if c.init_weights else torch.randn(size) * 0.01))
        a, b = zip(*pairs, strict=True)
        return {
            "num_subspaces": len(pairs),
            "sizes": {"A": [tuple(start.shape) for start in a], "B": [tuple(start.shape) for start in b]},
            "rows": [rows.tolist() for rows in space.rows],
            "found": {"A": a, "B": b, "newB": space.right},
            "states": {},
            "frozen": set(),
        }

    def tensors(shape: Shape, c: AdamssConfig) -> dict[str, Any]:
        """Tell the factors of each cluster, (q, r) and (rows, q), the vectors that they go with, (r, columns)."""
        return {
            "A": parts("A", shape, c),
            "B": parts("B", shape, c),
            "newB": Kept(lambda: take("newB", shape, c), rounded=True),
            "order": Frozen(lambda: torch.tensor(sum(c.rows, [])).argsort()),
        }

    def low_rank(t: Tensors, shape: Shape, c: AdamssConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the changes of all clusters together, (out, r), and give the vectors that they go with, (r, in)."""
        return changes(t), t.newB[:, : shape[1]]

    def bias(t: Tensors, shape: Shape, c: AdamssConfig, b: torch.Tensor | None) -> torch.Tensor | None:
        """Give the change of the last column, (out,)."""
        return None if b is None or t.newB.shape[1] == shape[1] else changes(t) @ t.newB[:, -1]


def take(name: str, shape: Shape, c: AdamssConfig) -> Any:
    """Give what was found along with the sizes. It is given away once, so that no tensor is kept twice."""
    return c.found.pop(name) if name in c.found else Adamss.values(c, (), shape)["found"][name]


def parts(name: str, shape: Shape, c: AdamssConfig) -> TrainedModule:
    """Tell trained tensors in a list, which have no more digits than the weight."""
    dtype = shape.dtype if shape.dtype.is_floating_point else torch.float32

    def start(module: nn.ParameterList) -> None:
        for parameter, value in zip(module, take(name, shape, c), strict=True):
            parameter.copy_(value.to(dtype))

    return TrainedModule(lambda: nn.ParameterList(torch.empty(size, device="meta") for size in c.sizes[name]), start)


def changes(t: Tensors) -> torch.Tensor:
    """Multiply the factors of each cluster, and put the rows in their places, (out, r)."""
    return torch.block_diag(*t.B)[t.order] @ torch.cat(tuple(t.A))


AdamssLayer, Linear = Adamss.Layer, Adamss.Linear


__getattr__ = old_names(__name__)
