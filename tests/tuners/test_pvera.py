# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""PVeRA: means, noise with the variance that is learned, and who draws it."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, differs, kinds, linears, randomise, refused, trainable
from torch import nn

from peft import PeftModel, PveraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.error import PeftValueError


pytestmark = [
    pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:save_projection=False:peft.utils.warning.PeftWarning"),
]


def adapted(base: nn.Module, *targets: str, **fields: object) -> PeftModel:
    """PVeRA with vectors that have an effect."""
    model = get_peft_model(base, PveraConfig(**{"r": 3, "target_modules": list(targets), **fields}))
    randomise(model, "pvera_lambda_")
    return model.eval()


def test_means() -> None:
    """Without sampling it is VeRA with the first halves of A and d, whichever way round layers keep their weights."""
    base = kinds()
    model = adapted(base, "conv", "lin", "head")
    a, b = model.base_model.pvera_A["default"], model.base_model.pvera_B["default"]
    assert (a.shape, b.shape) == ((6, 10), (10, 3))
    for layer, weight in ((base.conv, base.conv.weight.T), (base.lin, base.lin.weight), (base.head, base.head.weight)):
        weight = weight.clone()
        out, into = weight.shape
        vectors = layer.pvera_lambda_b["default"], layer.pvera_lambda_d["default"]
        delta = torch.diag(vectors[0]) @ b[:out] @ torch.diag(vectors[1][:3]) @ a[:3, :into]
        x = torch.randn(2, 5, into)
        bias = 0 if layer.bias is None else layer.bias
        assert_close(layer(x), x @ (weight + delta).T + bias)
        layer.merge()
        layer.train()
        assert_close(layer(x), x @ (weight + delta).T + bias)
        layer.unmerge()


@pytest.mark.parametrize(("training", "sample_at_inference"), [(True, False), (False, True), (False, False)])
def test_samples(training: bool, sample_at_inference: bool) -> None:
    """Samples have the mean and the variance that the layer says."""
    net = linears(4, 5)
    adapted(net, "0", sample_at_inference=sample_at_inference).train(training)
    layer = net[0]
    x = torch.randn(4)
    h = layer.pvera_lambda_d["default"] * (layer.pvera_A["default"] @ x)
    b = torch.diag(layer.pvera_lambda_b["default"]) @ layer.pvera_B["default"]
    torch.manual_seed(0)
    outputs = layer(x.expand(20000, 4))
    mean = layer.base_layer(x) + b @ h[:3]
    covariance = b @ torch.diag(h[3:].exp()) @ b.T if training or sample_at_inference else torch.zeros(5, 5)
    assert_close(outputs.mean(0), mean, atol=0.05)
    assert_close(torch.cov(outputs.T), covariance, atol=0.05 * float(covariance.abs().max()) + 1e-5)


def test_gradients_reach_the_variance() -> None:
    """Also the second half of d is trained, and by samples only."""
    net = linears(4, 5)
    model = adapted(net, "0")
    d = net[0].pvera_lambda_d["default"]
    model(torch.randn(2, 4)).sum().backward()
    assert d.grad[:3].all() and not d.grad[3:].any()
    model.train()
    model(torch.randn(2, 4)).sum().backward()
    assert d.grad[3:].all()


def test_own_generators() -> None:
    """With a seed each layer draws by itself; copies and pickles go on where the layer was."""
    net = linears(4, 4, 4)
    model = adapted(net, "0", "1", generator_seed=5).train()
    first, second = (layer.pvera_generator["default"] for layer in net)
    assert first is not second
    state = torch.get_rng_state()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    model(x)
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(5)
    torch.randn(2, 3, generator=generator)
    assert torch.equal(generator.get_state(), first.get_state())
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = model(x)
    assert all(torch.equal(again(x), expected) for again in copies)
    assert differs(model(x), expected)
    model.add_adapter("two", PveraConfig(r=3, target_modules=["0"]))
    assert net[0].pvera_generator["two"] is None


def test_start() -> None:
    """It changes nothing; a vector is drawn for d even where the config says what it is."""
    x = torch.randn(3, 4)
    for init_weights in (True, False):
        base = linears(4, 6, 2)
        expected = base(x)
        torch.manual_seed(1)
        model = get_peft_model(
            base, PveraConfig(r=3, target_modules=["0", "1"], d_initial=0.5, init_weights=init_weights)
        )
        after = torch.randn(1)
        torch.manual_seed(1)
        drawn = [torch.randn(6), torch.randn(6)]
        assert_equal(after, torch.randn(1))
        assert torch.equal(model(x), expected) is init_weights
        for layer, d in zip(base, drawn, strict=True):
            assert_equal(layer.pvera_lambda_d["default"], torch.full((6,), 0.5) if init_weights else d)
            assert_equal(layer.pvera_lambda_b["default"], torch.full((layer.out_features,), float(not init_weights)))
    assert trainable(model) == {f"base_model.model.{i}.pvera_lambda_{v}.default" for i in range(2) for v in "bd"}
    assert {key for key in get_peft_model_state_dict(model) if "lambda" not in key} == {
        "base_model.pvera_A",
        "base_model.pvera_B",
    }


@pytest.mark.parametrize("save_projection", [True, False])
def test_second_adapter_is_what_it_is_alone(tmp_path: Path, save_projection: bool) -> None:
    """Its projections fit its own layers, and not those of the first."""
    torch.manual_seed(0)
    base = linears(4, 6, 2)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, "0", save_projection=save_projection)
    config = PveraConfig(r=2, target_modules=["1"], save_projection=save_projection, init_weights=False)
    model.add_adapter("second", config)
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    fresh = linears(4, 6, 2)
    fresh.load_state_dict(state)
    again = PeftModel.from_pretrained(fresh, tmp_path / "second")
    assert again.base_model.pvera_A["default"].shape == (4, 6)
    x = torch.randn(3, 4)
    assert_equal(again(x), model.eval()(x))


@pytest.mark.parametrize("field", ["projection_prng_key", "save_projection"])
def test_adapters_agree(field: str) -> None:
    model = adapted(linears(4, 6), "0")
    with refused(model, PeftValueError, field):
        model.add_adapter("two", PveraConfig(r=2, target_modules=["0"], **{field: 0 if "save" in field else 7}))


def test_no_rank() -> None:
    base = linears(4, 6)
    with refused(base, PeftValueError, "r must be"):
        get_peft_model(base, PveraConfig(r=0, target_modules=["0"]))


def test_layers_pattern_alone() -> None:
    with pytest.raises(ValueError, match="layers_pattern"):
        PveraConfig(layers_pattern="layers")


def test_resetting() -> None:
    model = adapted(linears(4, 6), "0", init_weights=False)
    layer = model.base_model.model[0]
    layer.merge()
    layer.reset_pvera_parameters("default", d_initial=0.3)
    layer.reset_pvera_parameters("unknown")
    assert layer.merged
    assert_equal(layer.pvera_lambda_b["default"], torch.zeros(6))
    assert_equal(layer.pvera_lambda_d["default"], torch.full((6,), 0.3))
    layer.unmerge()
    assert_equal(model(torch.eye(4)), layer.base_layer(torch.eye(4)))
    layer.reset_pvera_parameters("default")
    assert_equal(layer.pvera_lambda_d["default"], torch.full((6,), 0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_starts_have_the_digits_of_the_base(dtype: torch.dtype, autocast: bool) -> None:
    for fields in ({"d_initial": 0.3}, {"init_weights": False}):
        base = linears(20, 30).to(dtype)
        torch.manual_seed(0)
        get_peft_model(base, PveraConfig(r=9, target_modules=["0"], **fields), autocast_adapter_dtype=autocast)
        torch.manual_seed(0)
        drawn = torch.randn(18) if fields.get("init_weights") is False else torch.full((18,), 0.3)
        found = base[0].pvera_lambda_d["default"]
        assert found.dtype == (torch.float32 if autocast else dtype)
        assert_equal(found.float(), drawn.to(dtype).float())
