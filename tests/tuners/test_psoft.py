# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""PSOFT against its formula, its starts, and files that hold the subspace."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import PeftModel, PsoftConfig, get_peft_model
from peft.tuners.psoft.layer import PsoftLayer
from peft.tuners.psoft.maths import OrthLayer, principal_factors
from peft.utils.warning import PeftWarning


def adapted(net: nn.Sequential, **fields: object) -> PsoftLayer:
    get_peft_model(net, PsoftConfig(**{"target_modules": ["0"], "r": 3, "init_weights": False, **fields}))
    with torch.no_grad():
        for parameter in net[0].adapter_parameters("default"):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net[0]


def turned(layer: PsoftLayer) -> torch.Tensor:
    """Write down what the principal subspace is multiplied by."""
    module, c = layer.psoft_R["default"], layer.settings["default"]
    w, r = module.weight.detach(), c.r
    if c.psoft_orth:
        q, k = torch.zeros(r, r), 0
        for i in range(r):
            for j in range(i + 1, r):
                q[i, j], q[j, i], k = w[k], -w[k], k + 1
        eye = torch.eye(r)
        if c.use_cayley_neumann:
            if c.cayley_neumann_eps is not None:
                q = q * min(1.0, c.cayley_neumann_eps / q.norm().item())
            powers = [torch.matrix_power(q, n) for n in range(c.num_cayley_neumann_terms)]
            w = powers[0] + 2 * sum(powers[1:-1]) + powers[-1]
        else:
            w = (eye + q) @ torch.linalg.inv(eye - q)
    if module.vector_b is not None:
        w = torch.diag(module.vector_b.detach()) @ w
    return w if module.vector_a is None else w @ torch.diag(module.vector_a.detach())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"psoft_alpha": 5},
        {"psoft_orth": False},
        {"psoft_mag_a": False},
        {"psoft_mag_b": False, "ab_svd_init": "pissa_init"},
        {"use_cayley_neumann": True},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 6, "cayley_neumann_eps": 0.05},
    ],
)
def test_the_principal_subspace_is_turned_and_stretched(fields: dict) -> None:
    layer, x = adapted(nn.Sequential(nn.Linear(6, 5)), **fields), torch.randn(4, 6)
    base = layer.base_layer
    weight = base.weight.detach().clone()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    left, right = (u * s, vh) if "ab_svd_init" not in fields else (u * s.sqrt(), s.sqrt()[:, None] * vh)
    changed = weight + left[:, :3] @ (turned(layer) - torch.eye(3)) @ right[:3]
    torch.testing.assert_close(layer(x), x @ changed.T + base.bias)
    layer.merge()
    torch.testing.assert_close(base.weight, changed)
    layer.unmerge()
    torch.testing.assert_close(base.weight, weight)
    assert layer.supports_lora_conversion()


def test_randomised_decomposition_leaves_the_random_state_as_it_is() -> None:
    weight = torch.randn(8, 3) @ torch.randn(3, 9)
    state = torch.get_rng_state()
    b, a = principal_factors(weight, 3, 1.0, in_both=False, rounds=4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(b @ a, weight, atol=1e-4, rtol=1e-4)
    again = principal_factors(weight, 3, 1.0, in_both=False, rounds=4, seed=1)
    assert torch.equal(again[0], b) and torch.equal(again[1], a)


def test_files_determine_the_function(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    model = get_peft_model(net, PsoftConfig(target_modules=["0"], r=3, init_weights=False))
    layer = net[0]
    with torch.no_grad():  # a pair of singular directions may come with either sign
        for factor, index in ((layer._psoft_A_cache, (0,)), (layer._psoft_B_cache, (slice(None), 0))):
            factor["default"][index] *= -1
    expected = model(x)
    model.save_pretrained(tmp_path)
    base = nn.Sequential(layer.base_layer)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(x), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_files_without_the_subspace_are_read(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    model = get_peft_model(net, PsoftConfig(target_modules=["0"], r=3, init_weights=False))
    expected = model(x)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "cache" not in key}, file)
    base = nn.Sequential(net[0].base_layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert again.load_reports["default"].complete
    torch.testing.assert_close(again(x), expected)


def test_an_adapter_that_is_made_while_another_is_merged_has_the_subspace_of_the_weight() -> None:
    layer = adapted(nn.Sequential(nn.Linear(6, 5)))
    layer.merge()
    layer.update_layer("other", PsoftConfig(r=3))
    layer.unmerge()
    torch.testing.assert_close(
        layer._psoft_B_cache["other"] @ layer._psoft_A_cache["other"],
        layer._psoft_B_cache["default"] @ layer._psoft_A_cache["default"],
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("orth", [True, False])
def test_starts(orth: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 5))
    torch.manual_seed(0)
    get_peft_model(net, PsoftConfig(target_modules=["0"], r=3, init_weights=False, psoft_orth=orth))
    torch.manual_seed(0)
    drawn = torch.empty(3 if orth else (3, 3)).normal_(std=0.1)
    module = net[0].psoft_R["default"]
    assert torch.equal(module.weight, drawn if orth else drawn + torch.eye(3))
    assert (module.vector_a == 1).all() and (module.vector_b == 1).all()
    module.reset_parameters(True)
    assert torch.equal(module.get_matrix(), torch.eye(3))


def test_gradients() -> None:
    module = OrthLayer(3, use_cayley_neumann=True, num_cayley_neumann_terms=4, cayley_neumann_eps=0.1).double()
    module.reset_parameters(False)
    assert torch.autograd.gradcheck(lambda *_: module(torch.ones(1, 3).double()), tuple(module.parameters()))


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"ab_svd_init": "other"},
        {"psoft_svd": "other"},
        {"num_cayley_neumann_terms": 0, "use_cayley_neumann": True},
        {"cayley_neumann_eps": 1.0, "use_cayley_neumann": True},
    ],
)
def test_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        PsoftConfig(**fields)


@pytest.mark.parametrize(
    "fields", [{"psoft_svd_lowrank_niter": 3}, {"num_cayley_neumann_terms": 3}, {"cayley_neumann_eps": 0.5}]
)
def test_what_has_no_effect_is_said(fields: dict) -> None:
    with pytest.warns(PeftWarning, match=next(iter(fields))):
        PsoftConfig(**fields)


def test_more_directions_than_there_are_are_refused() -> None:
    base = nn.Linear(6, 5)
    net = nn.Sequential(base)
    with pytest.raises(ValueError, match="r=6"):
        get_peft_model(net, PsoftConfig(target_modules=["0"], r=6))
    assert net[0] is base
