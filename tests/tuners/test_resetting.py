# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Starting an adapter of one layer anew, by the names that release 0.21.2 has for it."""

from collections.abc import Callable

import pytest
import torch
from support.helpers import assert_close, assert_equal, randomise
from torch import nn

from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)


def layer_of(config: object) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Give a layer with a random adapter, its base layer and an input."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).eval()
    randomise(model, "ia3_|vera_lambda_|lokr_|hada_|logits|tokens_delta")
    layer = model.base_model.model[0]
    return layer, layer.get_base_layer(), torch.randn(3, 8)


@pytest.mark.parametrize(
    ("config", "reset"),
    [
        (IA3Config(target_modules=["0"], feedforward_modules=[]), lambda layer: layer.reset_ia3_parameters("default")),
        (VeraConfig(target_modules=["0"], r=2), lambda layer: layer.reset_vera_parameters("default")),
        (
            LoKrConfig(target_modules=["0"], r=2),
            lambda layer: layer.reset_adapter_parameters_lycoris_way("default"),
        ),
    ],
)
def test_the_layer_computes_as_without_an_adapter(config: object, reset: Callable[[nn.Module], None]) -> None:
    layer, base, x = layer_of(config)
    assert not torch.allclose(layer(x), base(x), atol=1e-3)
    reset(layer)
    assert_close(layer(x), base(x))


def test_the_start_of_d_in_vera() -> None:
    layer, _, _ = layer_of(VeraConfig(target_modules=["0"], r=2))
    layer.reset_vera_parameters("default", d_initial=0.5)
    assert (layer.vera_lambda_d["default"] == 0.5).all() and not layer.vera_lambda_b["default"].any()


@pytest.mark.parametrize("config", [LoHaConfig(target_modules=["0"], r=2), LoKrConfig(target_modules=["0"], r=2)])
def test_lycoris_layers_change_at_once(config: object) -> None:
    layer, base, x = layer_of(config)
    layer.reset_adapter_parameters("default")
    assert_close(layer(x), base(x))
    layer.reset_adapter_parameters_random("default")
    assert not torch.allclose(layer(x), base(x), atol=1e-3)


def test_logits_of_vblora() -> None:
    layer, base, x = layer_of(VBLoRAConfig(target_modules=["0"], r=2, num_vectors=9, vector_length=4))
    layer.reset_vblora_logits("default", 0.0)
    assert not layer.vblora_logits_A["default"].any() and not layer.vblora_logits_B["default"].any()
    layer.reset_vblora_logits("default", 5.0)
    assert layer.vblora_logits_A["default"].std() > 2


def test_rows_of_given_adapters() -> None:
    config = TrainableTokensConfig(target_modules=["0"], token_indices=[1, 2])
    model = get_peft_model(nn.Sequential(nn.Embedding(6, 4)), config)
    model.add_adapter("other", config)
    randomise(model, "ia3_|vera_lambda_|lokr_|hada_|logits|tokens_delta")
    layer, x = model.base_model.model[0], torch.arange(6)[None]
    model.set_adapter("other")
    expected = layer(x)
    model.set_adapter("default")
    assert not torch.equal(layer(x), expected)
    assert_equal(layer.forward_adapters(x, ["other"]), expected)
    with model.disable_adapter():
        assert_equal(layer.forward_adapters(x, ["other"]), layer.get_base_layer()(x))
