# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""AdaMSS: clusters of rows by hand, and which of them are frozen."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft import AdamssConfig, AdamssModel, PeftModel, get_peft_model


cluster = pytest.importorskip("sklearn.cluster", reason="the method needs scikit-learn")

from peft.tuners.adamss import layer as layer_module  # noqa: E402
from peft.tuners.adamss import utils as helpers  # noqa: E402
from peft.tuners.adamss.asa_callback import AdamssAsaCallback  # noqa: E402
from peft.tuners.adamss.layer import AdamssLayer  # noqa: E402


def model_with(base: nn.Module, **fields: object) -> PeftModel:
    return get_peft_model(
        nn.Sequential(base), AdamssConfig(**{"target_modules": ["0"], "r": 4, "num_subspaces": 3, **fields})
    )


def adapted(base: nn.Module, **fields: object) -> AdamssLayer:
    return model_with(base, **{"init_weights": None, **fields}).base_model.model[0]


def clusters_of(layer: AdamssLayer) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    base = layer.base_layer
    x = base.weight if base.bias is None else torch.cat((base.weight, base.bias[:, None]), 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, _, v = torch.svd_lowrank(x.detach(), q=4, niter=2)
    means = cluster.KMeans(n_clusters=3, init="random", n_init=1, max_iter=10, random_state=123456789)
    labels = means.fit_predict(u.numpy()).tolist()
    return [[row for row, label in enumerate(labels) if label == i] for i in range(3)], u, v.T


@pytest.mark.parametrize("bias", [True, False])
def test_output(bias: bool) -> None:
    layer, x = adapted(nn.Linear(7, 9, bias=bias)), torch.randn(2, 3, 7)
    rows, _, c = clusters_of(layer)
    torch.testing.assert_close(layer.adamss_newB["default"], c)
    delta = torch.zeros(9, c.shape[1])
    for own, a, b in zip(rows, layer.adamss_A["default"], layer.adamss_B["default"], strict=True):
        delta[own] = (b @ a @ c).detach()
    term = x @ delta[:, :7].T + (delta[:, 7] if bias else 0)
    expected = layer.base_layer(x) + term
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.get_delta_bias("default"), delta[:, 7] if bias else torch.zeros(9))
    before = {name: tensor.clone() for name, tensor in layer.base_layer.state_dict().items()}
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    torch.testing.assert_close(dict(layer.base_layer.state_dict()), before)


def test_starts() -> None:
    base = nn.Linear(7, 9)
    torch.manual_seed(1)
    layer = adapted(base, subspace_rank=2)
    after = torch.rand(1)
    rows, u, _ = clusters_of(layer)
    torch.manual_seed(1)
    for own, a, b in zip(rows, layer.adamss_A["default"], layer.adamss_B["default"], strict=True):
        y, q = u[own], min(2, len(own))
        g = torch.svd_lowrank(y @ y.T, q=q, niter=2)[0][:, :q]
        torch.testing.assert_close(a.detach(), torch.linalg.qr(y.T @ g)[0].T)
        torch.testing.assert_close(b.detach(), torch.randn(len(own), q) * 0.01)
    assert torch.equal(torch.rand(1), after)
    layer = adapted(base, init_weights="orthogonal")
    assert not any(b.any() for b in layer.adamss_B["default"])
    assert layer.num_subspaces["default"] == 3


def test_ranks_fit() -> None:
    assert all(a.shape[0] <= 2 for a in adapted(nn.Linear(7, 9), r=2, subspace_rank=5).adamss_A["default"])
    ranks = [len(a) for a in adapted(nn.Linear(7, 9), use_dynamic_rank=True, svd_threshold=0.99).adamss_A["default"]]
    assert ranks == [1, 1, 1]
    layer = adapted(nn.Linear(7, 2))
    assert len(layer.adamss_A["default"]) == 2


def test_other_types_and_inputs() -> None:
    layer = adapted(nn.Linear(7, 9))
    assert layer(torch.randn(7)).shape == (9,)
    x = torch.randn(3, 7)
    expected = layer(x)
    torch.testing.assert_close(layer.double()(x.double()).float(), expected)
    torch.testing.assert_close(copy.deepcopy(layer)(x.double()).float(), expected)


def step(model: PeftModel, number: int) -> None:
    model.zero_grad()
    model(torch.randn(5, 7)).square().sum().backward()
    AdamssAsaCallback().on_optimizer_step(None, SimpleNamespace(global_step=number), None, model=model)


ASA = {"use_asa": True, "init_warmup": 2, "final_warmup": 6, "mask_interval": 2, "init_weights": None}


def trained(model: PeftModel) -> list[bool]:
    layer = model.base_model.model[0]
    pairs = zip(layer.adamss_A["default"], layer.adamss_B["default"], strict=True)
    return [a.requires_grad and b.requires_grad for a, b in pairs]


def test_the_most_important_clusters_go_on() -> None:
    model = model_with(nn.Linear(7, 9), **ASA, asa_target_subspaces=1, asa_schedule_exponent=1.0)
    layer = model.base_model.model[0]
    step(model, 1)
    assert not layer.settings["default"].states  # the schedule has not begun
    step(model, 2)
    assert sum(trained(model)) == 3
    step(model, 3)
    step(model, 4)
    assert sum(trained(model)) == 2  # half of the way from three to one
    frozen = trained(model).index(False)
    assert layer.adamss_A["default"][frozen].grad is None
    step(model, 6)
    assert sum(trained(model)) == 1
    model.set_adapter("default")
    assert sum(trained(model)) == 1
    step(model, 8)
    assert sum(trained(model)) == 1


def test_scores_by_hand() -> None:
    model = model_with(nn.Linear(7, 9), **{**ASA, "mask_interval": 100}, asa_target_subspaces=1)
    layer, seen = model.base_model.model[0], []
    for number in (2, 3):
        step(model, number)
        a, b = layer.adamss_A["default"][0], layer.adamss_B["default"][0]
        seen.append([(factor.detach() * factor.grad).abs() for factor in (a, b)])
    expected = 0.0
    for first, second in zip(*seen, strict=True):
        i, d = 0.15 * first, 0.15 * first
        d = 0.85 * d + 0.15 * (second - i).abs()
        i = 0.85 * i + 0.15 * second
        expected += (i * d).mean().item()
    assert layer.scores("default")[0] == pytest.approx(expected, rel=1e-5)
    layer.reset_importance("default")
    assert layer.scores("default") == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"init_weights": "random"},
        {"use_asa": True, "mask_interval": 0},
        {"use_asa": True, "init_warmup": 1000},
        {"use_asa": True, "asa_target_subspaces": 0},
        {"use_asa": True, "asa_schedule_exponent": 0.0},
    ],
)
def test_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=list(fields)[-1]):
        AdamssConfig(**fields)


def test_weights_that_are_not_finite() -> None:
    base = nn.Linear(7, 9)
    with torch.no_grad():
        base.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        adapted(base)


def test_what_layers_tell_of_clusters() -> None:
    model = model_with(nn.Linear(7, 9), **ASA)
    layer = model.base_model.model[0]
    rows, _, _ = clusters_of(layer)
    assert {number: own.tolist() for number, own in layer.seg_result["default"].items()} == dict(enumerate(rows))
    assert layer.scatter_index["default"].tolist() == sum(rows, [])
    assert layer.train_subspace_index == {"default": [0, 1, 2]}
    assert layer.exp_avg_ipt_A == layer.exp_avg_unc_B == {"default": [None, None, None]}
    layer.adamss_A["default"][1].grad = torch.ones_like(layer.adamss_A["default"][1])
    layer.update_importance("default", importance_beta=0.5, uncertainty_beta=0.25)
    size = layer.adamss_A["default"][1].detach().abs()
    torch.testing.assert_close(layer.exp_avg_ipt_A["default"][1], 0.5 * size)
    torch.testing.assert_close(layer.exp_avg_unc_A["default"][1], 0.75 * size)
    assert layer.exp_avg_ipt_A["default"][0] is None
    assert layer.exp_avg_ipt_B["default"][1] is None


def test_helpers() -> None:
    matrices = torch.randn(2, 1, 9, 7)
    torch.manual_seed(5)
    right, left = helpers.slice_pca(matrices, 3, "cpu", torch.float64, random_seed=1)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert (right.shape, left.shape, right.dtype) == ((2, 1, 3, 7), (2, 1, 9, 3), torch.float64)
    torch.manual_seed(1)
    u, _, v = [torch.svd_lowrank(matrix.double(), q=3, niter=2) for matrix in matrices[:, 0]][1]
    torch.testing.assert_close(left[1, 0], u)
    torch.testing.assert_close(right[1, 0], v.T)
    assert helpers.slice_pca(matrices, 8, "cpu")[0].shape == (2, 1, 7, 7)

    labels, count = helpers.clustering_Z(torch.tensor([[0.0], [5.0], [0.1], [5.1]]), 2, 10)
    assert count == 2
    assert labels[0] == labels[2] != labels[1] == labels[3]
    rows = helpers.seg_locations(torch.tensor([2, 0, 2]))
    assert {label: own.tolist() for label, own in rows.items()} == {0: [1], 1: [], 2: [0, 2]}
    assert helpers.get_trainable_subspaces(3) == [0, 1, 2]
    assert layer_module.clustering_Z is helpers.clustering_Z


def test_the_model_takes_its_config_by_name() -> None:
    config = AdamssConfig(r=4, num_subspaces=2, target_modules=["0"])
    model = AdamssModel(nn.Sequential(nn.Linear(8, 8)), config=config, adapter_name="one")
    assert model.targeted_module_names == ["0"] and model.active_adapters == ["one"]


def test_fields_that_choose_layers_go_with_any_targets() -> None:
    for fields in ({"layers_pattern": "h"}, {"layers_to_transform": [0]}):
        assert AdamssConfig(target_modules=".*x", **fields).target_modules == ".*x"
