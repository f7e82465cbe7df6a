# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Principal components batch by batch, against scikit-learn's class and against those of all rows at once."""

import pytest
import torch
from support.helpers import assert_close, assert_equal, refused, seeded

from peft.utils.incremental_pca import IncrementalPCA


def rows(count: int = 60, features: int = 8) -> torch.Tensor:
    with seeded(1):
        return torch.randn(count, features, dtype=torch.float64) @ torch.randn(features, features).double() + 3.0


@pytest.mark.parametrize("components", [None, 3])
def test_like_scikit_learn(components: int | None) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    ours = IncrementalPCA(components, batch_size=17).fit(rows())
    theirs = decomposition.IncrementalPCA(components, batch_size=17).fit(rows().numpy())
    names = ["singular_values_", "mean_", "var_", "explained_variance_", "explained_variance_ratio_"]
    for name in [*names, "noise_variance_"]:
        assert_close(getattr(ours, name), torch.as_tensor(getattr(theirs, name)).double(), atol=1e-9)
    theirs_components = torch.as_tensor(theirs.components_)
    assert_close((ours.components_ * theirs_components).sum(1).abs(), torch.ones(len(theirs_components)).double())
    assert_close(ours.transform(rows()).abs(), torch.as_tensor(theirs.transform(rows().numpy())).abs(), atol=1e-9)
    assert (ours.n_components_, ours.n_samples_seen_) == (theirs.n_components_, theirs.n_samples_seen_)


def test_all_components_are_exact_whatever_the_batches() -> None:
    whole = rows()
    pca = IncrementalPCA(8)
    for part in whole.split([9, 20, 31]):
        pca.partial_fit(part)
    assert_close(pca.singular_values_, torch.linalg.svdvals(whole - whole.mean(0)), atol=1e-9)
    assert_close(pca.var_, whole.var(0, correction=0), atol=1e-9)
    assert_equal(
        pca.components_.gather(1, pca.components_.abs().argmax(1, keepdim=True)).sign(), torch.ones(8, 1).double()
    )


def test_low_rank_finds_the_leading_components() -> None:
    whole = rows() * torch.tensor([9.0, 5.0, 1, 1, 1, 1, 1, 1]).double()
    exact = IncrementalPCA(2).fit(whole)
    with seeded(5):
        found = IncrementalPCA(2, lowrank=True, lowrank_seed=3).fit(whole)
        after = torch.rand(2)
    assert_close(found.components_, exact.components_, atol=1e-3)
    with seeded(5):
        assert_equal(after, torch.rand(2))


def test_rows_of_the_caller_are_left_alone_if_asked_for() -> None:
    given = rows()
    IncrementalPCA(2, copy=True).fit(given)
    assert_equal(given, rows())


@pytest.mark.parametrize(
    ("n", "size", "least", "expected"),
    [(7, 3, 0, [(0, 3), (3, 6), (6, 7)]), (7, 3, 2, [(0, 3), (3, 7)]), (6, 3, 2, [(0, 3), (3, 6)]), (0, 3, 0, [])],
)
def test_batches(n: int, size: int, least: int, expected: list[tuple[int, int]]) -> None:
    assert [(part.start, part.stop) for part in IncrementalPCA.gen_batches(n, size, least)] == expected


def test_refusals() -> None:
    for settings in ({"n_components": 0}, {"lowrank": True}, {"n_components": 4, "lowrank": True, "lowrank_q": 2}):
        with pytest.raises(ValueError):
            IncrementalPCA(**settings)
    fitted = IncrementalPCA(2).fit(rows())
    with refused(None, ValueError, "features", "8"):
        fitted.partial_fit(rows(features=5))
    with refused(None, ValueError, "9 components", "rows"):
        IncrementalPCA(9).fit(rows(count=5))
    with refused(None, ValueError, "nan"):
        IncrementalPCA(2).fit(rows() * float("nan"))
    with refused(None, ValueError, "(60,)"):
        IncrementalPCA(2).fit(rows()[:, 0])
