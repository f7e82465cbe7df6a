# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""CorDA: weights decomposed by the covariance of their inputs, and what is kept in files."""

from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, gpt2, linears, llama, logits, refused, seeded, token_ids
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.calibration.corda import decompose
from peft.tuners.lora.calibration.covariance import Covariances
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import CordaEigens, preprocess_corda
from peft.tuners.lora.maths import leading_eigenvectors


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]


def config(targets: list[str] | None = None, **corda) -> LoraConfig:
    return LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=targets or TARGETS,
        init_lora_weights="corda",
        corda_config=CordaConfig(**corda),
    )


def samples(count: int = 4, width: int = 8) -> list[torch.Tensor]:
    with seeded(3):
        return [torch.randn(9, width) for _ in range(count)]


def by_hand(weight: torch.Tensor, inputs: list[torch.Tensor], rank: int, trailing: bool) -> tuple[torch.Tensor, ...]:
    """Compute the part of the weight that the factors take, as the paper has it, in float64."""
    scaled = [(x / x.max()).double() for x in inputs]
    covariance = sum(x.T @ x for x in scaled) / len(scaled)
    damped = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    u, s, vh = torch.linalg.svd(weight.double() @ damped, full_matrices=False)
    v = torch.linalg.inv(damped) @ vh.T
    chosen = slice(-rank, None) if trailing else slice(rank)
    return u[:, chosen] * s[chosen] @ v[:, chosen].T, s[chosen]


# ------------------------------------------------------------------------------------------ the math
@pytest.mark.parametrize("widths", [(8, 6), (8, 12)])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_the_chosen_part_moves_from_the_weight_to_the_factors(method: str, widths: tuple[int, int]) -> None:
    net = linears(*widths)
    before, expected = net[0].weight.detach().clone(), net(samples()[0])
    preprocess_corda(net, config(["0"], corda_method=method), run_model=lambda: [net(x) for x in samples()])
    part, singular = by_hand(before, samples(), 3, method == "kpm")
    assert_close(net[0].eigens.S_WC.double(), singular, atol=1e-4)
    model = get_peft_model(net, config(["0"], corda_method=method))
    layer = net[0]
    assert not hasattr(layer.base_layer, "eigens")
    assert_close(layer.get_delta_weight("default").double(), part, atol=1e-4)
    assert_close(layer.weight, before - part.float(), atol=1e-4)
    b = layer.lora_B["default"].weight
    assert_close((b.T @ b).detach().double(), torch.diag(singular / 2), atol=1e-4)
    assert_close(model(samples()[0]), expected)


def test_transposed_linear_layers() -> None:
    net = gpt2()
    ids = token_ids()
    expected = logits(net, ids)
    before = net.transformer.h[0].mlp.c_proj.weight.detach().clone()
    lora_config = config(["c_attn", "c_proj"])
    lora_config.fan_in_fan_out = True
    seen = []
    hook = net.transformer.h[0].mlp.c_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0][0].detach()))
    preprocess_corda(net, lora_config, run_model=lambda: net(ids[:1]))
    hook.remove()
    model = get_peft_model(net, lora_config)
    part, _ = by_hand(before.T, seen, 3, trailing=False)
    assert_close(before.T - net.transformer.h[0].mlp.c_proj.weight.T, part.float(), atol=1e-3)
    assert_close(logits(model, ids), expected, atol=1e-4)


def test_a_batch_counts_like_its_samples() -> None:
    one, other = linears(8, 6), linears(8, 6)
    preprocess_corda(one, config(["0"]), run_model=lambda: [one(x) for x in samples()])
    preprocess_corda(other, config(["0"]), run_model=lambda: other(torch.stack(samples())))
    for tensor, same in zip(one[0].eigens.tensors(), other[0].eigens.tensors(), strict=True):
        assert_close(tensor.abs(), same.abs(), atol=1e-4)


def test_inputs_without_a_positive_entry() -> None:
    net = linears(8, 6)
    preprocess_corda(net, config(["0"]), run_model=lambda: [net(-x.abs()) for x in samples()])
    assert all(tensor.isfinite().all() for tensor in net[0].eigens.tensors())


def test_layers_with_the_same_inputs_share_a_covariance_until_they_differ() -> None:
    first, second, third = samples(3)
    covariances = Covariances()
    for x in (first, second):
        covariances.look("a", (x,))
        covariances.look("b", (x,))
    assert covariances._sum_of["a"] is covariances._sum_of["b"]
    covariances.look("a", (third,))  # b is passed over, and gets another input then
    covariances.look("b", (first,))
    covariances.look("b", (second,))
    covariances.look("a", (first,))
    covariances.look("a", (second,))
    found = covariances.finish(["a", "b"])
    for name, inputs in (("a", [first, second, third, first, second]), ("b", [first, second, first, second])):
        expected = sum((x / x.max()).T @ (x / x.max()) for x in inputs) / len(inputs)
        assert_close(found[name], expected, atol=1e-4)


def test_a_layer_that_gets_less_than_the_others() -> None:
    first, second = samples(2)
    covariances = Covariances()
    covariances.look("a", (first,))
    covariances.look("b", (first,))
    covariances.look("a", (second,))
    found = covariances.finish(["a", "b"])
    x = first / first.max()
    assert_close(found["b"], x.T @ x, atol=1e-4)
    assert found["a"] is not found["b"]


def test_a_tensor_that_was_changed_is_another_input() -> None:
    x = samples(1)[0]
    covariances = Covariances()
    covariances.look("a", (x,))
    x.mul_(-2)
    covariances.look("b", (x,))
    found = covariances.finish(["a", "b"])
    assert not torch.equal(found["a"], found["b"])


# ------------------------------------------------------------------------------------------ the model, ties
def test_the_model_is_left_as_it_was_but_for_what_was_found() -> None:
    net = llama()
    net.train()
    net.model.layers[0].eval()
    modes = [module.training for module in net.modules()]
    preprocess_corda(net, config(), run_model=lambda: net(token_ids()))
    assert modes == [module.training for module in net.modules()]
    assert not any(module._forward_pre_hooks for module in net.modules())
    prepared = {name for name, module in net.named_modules() if hasattr(module, "eigens")}
    assert {name.rpartition(".")[2] for name in prepared} == set(TARGETS)


def test_a_tied_weight_is_changed_once() -> None:
    net = linears(8, 8, 8)
    net[1].weight = net[0].weight
    lora_config = config(["0", "1"])
    lora_config.ensure_weight_tying = True
    with torch.no_grad():
        expected = net(samples()[0])
    preprocess_corda(net, lora_config, run_model=lambda: [net(x) for x in samples()])
    assert hasattr(net[0], "eigens") and not hasattr(net[1], "eigens")
    model = get_peft_model(net, lora_config)
    assert_close(model(samples()[0]), expected, atol=1e-4)


def test_another_model_can_be_observed() -> None:
    net, observed = linears(8, 6), linears(8, 6).train()
    run = lambda: [observed(x) for x in samples()]  # noqa: E731
    preprocess_corda(net, config(["0"]), run_model=run, hooked_model=observed)
    assert not hasattr(observed[0], "eigens") and observed.training
    same = linears(8, 6)
    preprocess_corda(same, config(["0"]), run_model=lambda: [same(x) for x in samples()])
    assert_equal(net[0].eigens.U_WC, same[0].eigens.U_WC)
    with refused(None, ValueError, "'0'", "hooked_model"):
        preprocess_corda(net, config(["0"]), run_model=run, hooked_model=nn.ModuleDict())


# ------------------------------------------------------------------------------------------ files
def test_a_saved_adapter_is_loaded_with_its_cache_file(tmp_path: Path) -> None:
    file = str(tmp_path / "folder" / "corda.pt")
    net = llama()
    preprocess_corda(net, config(cache_file=file), run_model=lambda: net(token_ids()))
    keys = {f"model.layers.0.self_attn.q_proj.eigens.{key}" for key in ("S_WC", "U_WC", "V_WC")}
    assert keys <= set(torch.load(file))
    model = get_peft_model(net, config(cache_file=file))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    with refused(None, ValueError, "preprocess_corda", "cache_file", "path_initial_model_for_weight_conversion"):
        PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    again = llama()
    preprocess_corda(again, config(cache_file=file))  # without running the model
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert_close(logits(loaded, token_ids()), logits(model, token_ids()), atol=1e-4)


def test_an_adapter_becomes_plain_lora_when_it_is_saved(tmp_path: Path) -> None:
    net = llama()
    preprocess_corda(net, config(), run_model=lambda: net(token_ids()))
    model = get_peft_model(net, config())
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = PeftModel.from_pretrained(llama(), tmp_path / "plain").eval()
    assert_close(logits(plain, token_ids()), logits(model, token_ids()), atol=1e-3)


def test_covariances_serve_another_rank(tmp_path: Path) -> None:
    file = str(tmp_path / "covariances.pt")
    net, other = linears(8, 6), linears(8, 6)
    preprocess_corda(net, config(["0"], covariance_file=file), run_model=lambda: [net(x) for x in samples()])
    assert set(torch.load(file)) == {"0"}
    greater = config(["0"], covariance_file=file)
    greater.r = 5
    preprocess_corda(other, greater)
    assert_equal(other[0].eigens.S_WC[:3], net[0].eigens.S_WC)
    with refused(None, ValueError, "'0'", "another model"):
        preprocess_corda(linears(7, 6), config(["0"], covariance_file=file))


def test_an_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.calibration import corda

    settings = {"cache_file": str(tmp_path / "cache.pt"), "covariance_file": str(tmp_path / "covariances.pt")}
    net, done, decompose = llama(), [], corda.decompose

    def interrupted(*args) -> CordaEigens:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args)
        return decompose(*args)

    monkeypatch.setattr(corda, "decompose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess_corda(net, config(**settings), run_model=lambda: net(token_ids()))
    assert not any(hasattr(module, "eigens") for module in net.modules())
    assert len(torch.load(settings["cache_file"])) == 3 * 3
    monkeypatch.setattr(corda, "decompose", lambda *args: done.append(args) or decompose(*args))
    preprocess_corda(net, config(**settings))
    assert len(done) == 2 * len(TARGETS)
    assert get_peft_model(net, config()) is not None


# ------------------------------------------------------------------------------------------ refusals
def test_refusals(tmp_path: Path) -> None:
    net = linears(8, 6)
    run = lambda: [net(x) for x in samples()]  # noqa: E731
    with refused(net, ValueError, "'nonsense'", "ipm"):
        preprocess_corda(net, config(["0"], corda_method="nonsense"), run_model=run)
    with refused(net, ValueError, "run_model", "cache_file"):
        preprocess_corda(net, config(["0"]))
    with refused(net, ValueError, "'corda'"):
        preprocess_corda(net, LoraConfig(target_modules=["0"]), run_model=run)
    large = config(["0"])
    large.r = 7
    with refused(net, ValueError, "'0'", "rank 7"):
        preprocess_corda(net, large, run_model=run)
    with refused(net, ValueError, "'0'", "run_model"):
        preprocess_corda(net, config(["0"]), run_model=lambda: None)
    with refused(net, ValueError, "'0'", "nan"):
        preprocess_corda(net, config(["0"]), run_model=lambda: net(samples()[0] * float("nan")))
    with refused(net, ValueError, "'0'", "zero"):
        preprocess_corda(net, config(["0"]), run_model=lambda: net(samples()[0] * 0))
    (tmp_path / "nonsense.pt").write_bytes(b"nonsense")
    with refused(net, ValueError, "nonsense.pt", "delete"):
        preprocess_corda(net, config(["0"], cache_file=str(tmp_path / "nonsense.pt")), run_model=run)
    with refused(net, ValueError, "preprocess_corda"):
        get_peft_model(net, config(["0"]))
    preprocess_corda(net, config(["0"]), run_model=run)
    other = config(["0"])
    other.r = 2
    with refused(net, ValueError, "rank 2", "again"):
        get_peft_model(net, other)
    net[0].eigens.S_WC.fill_(float("nan"))
    with refused(net, ValueError, "nan"):
        get_peft_model(net, config(["0"]))


def test_a_refused_adapter_can_be_made_afterwards() -> None:
    net = llama()
    preprocess_corda(net, config(), run_model=lambda: net(token_ids()))
    wrong = config([*TARGETS, "lm_head"])
    with refused(net, ValueError, "preprocess_corda"):
        get_peft_model(net, wrong)
    expected = logits(net, token_ids())
    assert_close(logits(get_peft_model(net, config()), token_ids()), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------ large layers
@pytest.mark.parametrize("shape", [(256, 320), (320, 256)])
@pytest.mark.parametrize("trailing", [False, True])
def test_a_few_vectors_of_a_large_layer_are_those_of_a_whole_decomposition(
    trailing: bool, shape: tuple[int, int]
) -> None:
    with seeded():
        weight = torch.randn(shape)
        rows = torch.randn(2 * shape[1], shape[1]) * torch.logspace(0, -1, shape[1])
    damped = rows.T @ rows / len(rows)
    damped += 0.01 * damped.diagonal().mean() * torch.eye(shape[1])
    found = decompose(weight, damped, 4, trailing)
    u, s, vh = torch.linalg.svd(weight.double() @ damped.double(), full_matrices=False)
    chosen = slice(-4, None) if trailing else slice(4)
    v = torch.linalg.inv(damped.double()) @ vh.T[:, chosen]
    assert_close(found.S_WC.double() / s[chosen], torch.ones(4).double(), atol=1e-5)
    assert_close((found.U_WC * u[:, chosen]).sum(0).abs(), torch.ones(4).double(), atol=1e-4)
    product = u[:, chosen] * s[chosen] @ v.T
    assert_close(
        found.U_WC.double() * found.S_WC @ found.V_WC.T.double(), product, atol=1e-4 * float(product.abs().max())
    )


@pytest.mark.parametrize("is_flat", [False, True])
def test_eigenvectors_by_multiplication_alone(is_flat: bool) -> None:
    with seeded():
        basis = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64)).Q
    values = torch.ones(300).double() if is_flat else torch.logspace(0, -6, 300, dtype=torch.float64)
    matrix = basis * values @ basis.T
    found = leading_eigenvectors(lambda x: matrix @ x, 300, 4, matrix.device)
    if is_flat:
        assert found is None or (matrix @ found - found).norm() < 1e-9
    else:
        assert_close((found * basis[:, :4]).sum(0).abs(), torch.ones(4).double(), atol=1e-9)
    assert leading_eigenvectors(lambda x: matrix @ x, 100, 4, matrix.device) is None
