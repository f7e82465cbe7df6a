# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""BOFT: rotation by butterfly factors and scale are the paper's, and can be merged and taken out again."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import first_layer, llama, seeded, token_ids
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import BOFTConfig, PeftModel, get_peft_model
from peft.tuners.boft.layer import Butterfly, FastBlockDiag, MultiplicativeDropoutLayer, get_fbd_cuda
from peft.utils.error import PeftNotImplementedError, PeftValueError


KINDS = {
    "linear": (lambda: nn.Linear(16, 5), (3, 16)),
    "linear without bias": (lambda: nn.Linear(16, 5, bias=False), (3, 16)),
    "conv1d": (lambda: Conv1D(5, 16), (3, 16)),
    "conv2d": (lambda: nn.Conv2d(2, 5, (2, 4), stride=2, padding=1, dilation=(1, 2)), (2, 2, 9, 9)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_number_of_factors = pytest.mark.parametrize("factors", [1, 2, 3])


def make(kind: str = "linear", factors: int = 1, **options: object) -> tuple[PeftModel, torch.Tensor]:
    """A model of one layer with an adapter of so many factors, in eval mode, and an input."""
    options = {"boft_block_size": 4, "init_weights": False, "target_modules": ["0"], **options}
    make_layer, shape = KINDS[kind]
    with seeded():
        model = get_peft_model(nn.Sequential(make_layer()), BOFTConfig(**options))
        with_factors(model, factors)
        return model.eval(), torch.randn(shape)


def with_factors(model: PeftModel, factors: int) -> None:
    """Give the adapter more factors than a machine without a CUDA device makes."""
    layer = first_layer(model)
    size, count = layer.boft_block_size["default"], layer.boft_block_num["default"]
    loaded = {"boft_R": torch.empty(factors, count, size, size)}
    layer.prepare_to_load("default", loaded)
    assert len(layer.boft_R["default"]) == factors
    if factors > 1:
        nn.init.normal_(layer.boft_R["default"], std=0.1)


def expected_rotation(generators: torch.Tensor) -> torch.Tensor:
    """What rows of inputs are multiplied by, as a product of full matrices."""
    size = generators.shape[-1]
    features = size * generators.shape[1]
    product = torch.eye(features)
    for i, blocks in enumerate(generators.detach()):
        rotations = []
        for block in blocks:
            q, identity = (block - block.T) / 2, torch.eye(size)
            rotations.append((identity - q) @ torch.linalg.inv(identity + q))
        # Of each group of 2^i blocks, block by block: chunks of half a block, one from each half of the group.
        order = []
        for start in range(0, features, size * 2**i):
            chunks = torch.arange(start, start + size * 2**i).view(-1, size // 2)
            first, second = chunks.chunk(2)
            order += [torch.cat(pair) for pair in zip(first, second, strict=True)]
        taken = torch.eye(features)[torch.cat(order)]
        product = taken.T @ torch.block_diag(*rotations) @ taken @ product
    return product


@each_kind
@each_number_of_factors
def test_output_is_that_of_the_rotated_and_scaled_weight(kind: str, factors: int) -> None:
    model, x = make(kind, factors)
    layer = first_layer(model)
    rotation, scale = expected_rotation(layer.boft_R["default"]), layer.boft_s["default"].detach().view(-1, 1)
    base = copy.deepcopy(layer.get_base_layer())
    rows = scale * ((base.weight.T if kind == "conv1d" else base.weight.flatten(1)) @ rotation.T)
    base.weight.data = (rows.T if kind == "conv1d" else rows.view_as(base.weight)).detach().contiguous()
    torch.testing.assert_close(model(x), base(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.get_delta_weight("default")[0], rotation, atol=1e-5, rtol=1e-5)


def test_more_factors_mix_more_features() -> None:
    reach = []
    for factors in (1, 2, 3):
        model, _ = make("linear", factors)
        reach.append((first_layer(model).get_delta_weight("default")[0][0].abs() > 1e-7).sum().item())
    assert reach == [4, 8, 16]


@each_kind
@each_number_of_factors
def test_merging_is_exact_and_comes_undone(kind: str, factors: int) -> None:
    model, x = make(kind, factors)
    layer = first_layer(model)
    model.add_adapter("other", BOFTConfig(boft_block_size=8, init_weights=False, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    before, adapted = layer.weight.clone(), model(x)
    layer.merge()
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, atol=1e-5, rtol=0)


def test_scale_of_zero_comes_undone_too() -> None:
    model, _ = make()
    layer = first_layer(model)
    layer.boft_s["default"].data[2] = 0
    before = layer.weight.clone()
    layer.merge()
    assert layer.weight[2].eq(0).all()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@each_kind
def test_fresh_adapter_is_the_identity(kind: str) -> None:
    model, x = make(kind, init_weights=True)
    torch.testing.assert_close(model(x), first_layer(model).get_base_layer()(x))


@each_kind
def test_gradients_reach_rotation_and_scale_only(kind: str) -> None:
    model, x = make(kind, factors=2)
    model(x).pow(2).mean().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"base_model.model.0.boft_R.default", "base_model.model.0.boft_s.default"}


def test_half_precision_agrees_with_full() -> None:
    model, x = make(factors=2)
    expected = model(x)
    result = model.to(torch.bfloat16)(x.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=3e-2, rtol=3e-2)


@each_number_of_factors
def test_saved_adapter_computes_the_same(factors: int, tmp_path: Path) -> None:
    model, x = make("linear", factors)
    model.save_pretrained(tmp_path)
    with seeded():
        again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(16, 5)), tmp_path)
    assert torch.equal(again(x), model(x))


def test_file_with_impossible_factors_is_refused(tmp_path: Path) -> None:
    model, _ = make()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: t.repeat(6, 1, 1, 1) if key.endswith("boft_R") else t for key, t in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(PeftValueError, match="boft_n_butterfly_factor=6"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(16, 5)), tmp_path)


def test_tied_head_and_embedding_stay_one() -> None:
    config = BOFTConfig(boft_block_size=4, init_weights=False, target_modules=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(llama(tied=True), config).eval()
    adapted = model(token_ids()).logits
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(merged(token_ids()).logits, adapted, atol=1e-5, rtol=1e-4)


@each_number_of_factors
def test_transposed_butterfly_is_its_inverse(factors: int) -> None:
    blocks = torch.linalg.qr(torch.randn(factors, 8, 2, 2, dtype=torch.float64))[0]
    rows, butterfly = torch.randn(3, 16, dtype=torch.float64), Butterfly(blocks)
    torch.testing.assert_close(butterfly.inverse()(butterfly(rows)), rows)
    assert not torch.allclose(butterfly(rows), rows)


def test_block_diagonal_matrices_and_their_gradients() -> None:
    blocks = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([torch.block_diag(*some) for some in blocks])
    assert torch.equal(FastBlockDiag.apply(blocks), expected)
    assert torch.autograd.gradcheck(FastBlockDiag.apply, blocks)
    assert get_fbd_cuda() is None


def test_helpers_of_the_release() -> None:
    layer = first_layer(make()[0])
    order = layer.block_butterfly_perm(16, 2, 2, 1)
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert layer.block_butterfly_perm(4, 1, 1, 0).tolist() == [0, 1, 2, 3]
    with pytest.raises(PeftValueError, match="do not fit"):
        layer.block_butterfly_perm(16, 3, 2, 1)
    values = torch.arange(16.0)
    assert torch.equal(layer.perm2mat(order) @ values, values[order])
    rotations = layer.cayley_batch(torch.randn(5, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3, dtype=torch.float64).expand(5, 3, 3))


def test_dropout_drops_that_share_of_one_factor() -> None:
    blocks = torch.full((3, 10, 2, 2), 3.0)
    dropout = MultiplicativeDropoutLayer(0.5)
    is_identity = (dropout(blocks) == torch.eye(2)).all(dim=-1).all(dim=-1)
    assert sorted(is_identity.sum(dim=1).tolist()) == [0, 0, 5]
    assert dropout.eval()(blocks) is blocks


@each_kind
def test_dropout_is_for_training(kind: str) -> None:
    model, x = make(kind, boft_dropout=1.0)
    layer, expected = first_layer(model), model(x)
    model.train()
    dropped = model(x)
    assert not torch.allclose(dropped, expected)
    model.eval()
    nn.init.zeros_(layer.boft_R["default"])  # what is left is the scale
    torch.testing.assert_close(dropped, model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"boft_block_size": 0}, {"boft_block_num": 2}, {"boft_block_size": -4}])
def test_one_of_size_and_number_is_needed(options: dict) -> None:
    with pytest.raises(ValueError, match="boft_block_num"):
        BOFTConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_size": 5}, "does not divide the 16 features"),
        ({"boft_block_size": 0, "boft_block_num": 3}, "does not divide the 16 features"),
        ({"boft_block_size": 0, "boft_block_num": 32}, "does not divide the 16 features"),
        ({"init_weights": "bad"}, "init_weights"),
    ],
)
def test_what_cannot_work_is_refused(options: dict, message: str) -> None:
    with pytest.raises(PeftValueError, match=message):
        make(**options)


def test_kinds_that_cannot_be_adapted_are_refused() -> None:
    with pytest.raises(PeftNotImplementedError, match="groups=2"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), BOFTConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="Embedding"):
        get_peft_model(nn.Sequential(nn.Embedding(4, 4)), BOFTConfig(target_modules=["0"]))


def test_number_of_factors_depends_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BOFTConfig(boft_n_butterfly_factor=2, target_modules=["0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="boft_n_butterfly_factor=2 is used as 1"):
        model = get_peft_model(nn.Sequential(nn.Linear(16, 5)), config)
    assert first_layer(model).boft_R["default"].shape == (1, 4, 4, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 5)), config)
    assert first_layer(model).boft_R["default"].shape == (2, 4, 4, 4)
    for impossible in (0, 4):
        config.boft_n_butterfly_factor = impossible
        with pytest.raises(PeftValueError, match="boft_n_butterfly_factor"):
            get_peft_model(nn.Sequential(nn.Linear(16, 5)), config)


def test_scaling_warns_and_does_nothing() -> None:
    model, x = make()
    layer, expected = first_layer(model), model(x)
    for rescale in (lambda: layer.scale_layer(2.0), lambda: layer.set_scale("default", 2.0), layer.unscale_layer):
        with pytest.warns(UserWarning, match="has no scale"):
            rescale()
    assert torch.equal(model(x), expected)
