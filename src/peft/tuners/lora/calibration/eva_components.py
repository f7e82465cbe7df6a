# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
EVA's search for the components of layers' inputs, and the ranks that follow from them.

Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024, arXiv:2410.07170.
"""

import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from ....utils.error import PeftValueError
from ....utils.incremental_pca import IncrementalPCA
from .cache_file import CacheFile


class Group:
    """
    Layers that get the same inputs, which are decomposed once.

    Args:
        names: of the layers; the first one owns the decomposition.
        components: how many components are looked for.

    Attributes:
        rank: how many of them its layers want at most; all of them until ranks are shared out.
        settled: which of them did not turn any more with the last batch.
    """

    def __init__(self, names: Sequence[str], components: int) -> None:
        self.names, self.components, self.rank = list(names), components, components
        self.pca = IncrementalPCA(components, copy=True, lowrank=True, lowrank_seed=42)
        self.settled = torch.zeros(components, dtype=torch.bool)
        self.most_rows = 0

    @property
    def is_found(self) -> bool:
        """Whether there has been a batch with enough rows."""
        return self.pca.n_samples_seen_ > 0

    @property
    def is_done(self) -> bool:
        """Whether all components that are wanted have settled."""
        return self.is_found and bool(self.settled[: self.rank].all())

    def update(self, rows: torch.Tensor, tau: float) -> None:
        """
        Take the rows of a batch in, if they are enough for the components.

        Args:
            rows: (rows, in)
            tau: cosine of the angle between a component before and after, from which on it counts as settled.
        """
        self.most_rows = max(self.most_rows, len(rows))
        if len(rows) < self.components:
            return
        before = self.pca.components_ if self.is_found else None
        self.pca.partial_fit(rows)
        if before is not None:
            now = self.pca.components_
            self.settled = (torch.cosine_similarity(before.to(now), now, dim=1) >= tau).cpu()

    def state(self) -> dict[str, Any]:
        """Give what has been found, to be put into a file."""
        found = {
            key: value.cpu() if isinstance(value, torch.Tensor) else value
            for key, value in vars(self.pca).items()
            if key.endswith("_")
        }
        return {"found": found, "rank": self.rank, "settled": self.settled}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """
        Take up what was put into a file.

        Args:
            state: see `state`.
            device: where the inputs are.
        """
        found = state["found"]
        vars(self.pca).update({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in found.items()})
        self.rank, self.settled = state["rank"], state["settled"]


class Search:
    """
    The components of all layers' inputs, as far as they are found.

    Args:
        ranks: name of a layer -> rank that the config gives it, in the model's order.
        rho: how many times that rank a layer may get at most.
        tau: see `Group.update`.
        equal_inputs: name of a layer -> key that layers with equal inputs have in common.
        features: name of a layer -> its number of inputs.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        rho: float,
        tau: float,
        equal_inputs: Mapping[str, Hashable],
        features: Mapping[str, int],
    ) -> None:
        self.tau, self.budget = tau, sum(ranks[name] for name in equal_inputs)
        members: dict[Hashable, list[str]] = {}
        for name in ranks:
            if name in equal_inputs:
                members.setdefault(equal_inputs[name], []).append(name)
        self.groups = {
            names[0]: Group(names, min(max(round(ranks[name] * rho) for name in names), features[names[0]]))
            for names in members.values()
        }
        self.ranks: dict[str, int] = {}
        self.batches = 0

    @property
    def listening(self) -> list[str]:
        """Names of the layers whose inputs have still to be looked at."""
        return [name for name, group in self.groups.items() if not group.is_done]

    @property
    def is_done(self) -> bool:
        """Whether nothing has to be looked at any more."""
        return not self.listening

    @property
    def progress(self) -> int:
        """How many groups are done."""
        return len(self.groups) - len(self.listening)

    def share_ranks(self) -> None:
        """Give each layer as many ranks as it has components among those that explain the largest shares of all."""
        if not all(group.is_found for group in self.groups.values()):
            return
        order = [(name, group) for name, group in self.groups.items()]
        order += [(name, group) for group in self.groups.values() for name in group.names[1:]]
        ratios = torch.cat([group.pca.explained_variance_ratio_.cpu() for _, group in order])
        owners = torch.tensor([i for i, (_, group) in enumerate(order) for _ in range(group.components)])
        largest = ratios.argsort(descending=True, stable=True)[: self.budget]
        counts = owners[largest].bincount(minlength=len(order)).tolist()
        self.ranks = {name: count for (name, _), count in zip(order, counts, strict=True)}
        for owner, group in self.groups.items():
            for name in group.names[1:]:  # the one that is looked at has to be looked at for as long as any
                if self.ranks[name] > self.ranks[owner]:
                    self.ranks[owner], self.ranks[name] = self.ranks[name], self.ranks[owner]
            group.rank = self.ranks[owner]

    def check_progress(self) -> None:
        """
        Refuse data that will never do, once all of it has been seen.

        Raises:
            PeftValueError: if no batch has enough rows for some layer.
        """
        for name, group in self.groups.items():
            if not group.is_found:
                raise PeftValueError(
                    f"no batch has enough rows for {name!r}: {group.components} components (r times rho) are looked "
                    f"for, and the largest batch has {group.most_rows} rows that count; use larger batches, or a "
                    "smaller r or rho"
                )

    def result(self, whiten: bool) -> dict[str, torch.Tensor]:
        """
        Give the components of each layer.

        Args:
            whiten: divide each by the root of its singular value.

        Returns:
            Name of a layer -> (its rank, in), in float64; layers that are looked at come first.
        """
        group_of = {name: group for group in self.groups.values() for name in group.names}
        found = {}
        for name, rank in self.ranks.items():
            pca = group_of[name].pca
            rows = pca.components_[:rank].double()
            found[name] = rows / pca.singular_values_[:rank].double().sqrt().unsqueeze(1) if whiten else rows.clone()
        return found

    # ------------------------------------------------------------------------------------------------------ resuming
    def settings(self) -> dict[str, Any]:
        """Say what the search is for, so that a file of another one can be told from its own."""
        groups = [[group.names, group.components] for group in self.groups.values()]
        return {"groups": groups, "tau": self.tau, "budget": self.budget}

    def state(self) -> dict[str, Any]:
        """Give what has been found, to be put into a file; nothing before the first batch."""
        if not self.batches:
            return {}
        groups = {name: group.state() for name, group in self.groups.items() if group.is_found}
        return {"settings": self.settings(), "batches": self.batches, "ranks": self.ranks, "groups": groups}

    def restore(self, file: CacheFile, devices: Mapping[str, torch.device]) -> None:
        """
        Take up what a file holds.

        Args:
            file: the file; if it is empty, nothing is done.
            devices: name of a layer -> where its inputs are.

        Raises:
            PeftValueError: if the file belongs to another search.
        """
        state = file.read()
        if not state:
            return
        if state.get("settings") != self.settings():
            raise PeftValueError(
                f"{file.path!r} was written for other layers, ranks or settings of EVA than those of this adapter; "
                "delete it, or name another cache_file"
            )
        self.batches, self.ranks = state["batches"], state["ranks"]
        for name, group in state["groups"].items():
            self.groups[name].restore(group, devices[name])


def fingerprint(rows: torch.Tensor) -> Hashable:
    """
    Give a key that two inputs have in common if and only if they are equal, for all that can be expected of data.

    Args:
        rows: (rows, in)
    """
    values = rows.detach().float().contiguous().cpu()
    sample = values.flatten()[:: max(1, values.numel() // 1024)]
    return tuple(values.shape), zlib.crc32(values.numpy().data.cast("B")), sample.contiguous().numpy().tobytes()
