# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Ties in which no embedding takes part: shared linear layers, shared modules, shared convolutions, shared biases."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

from peft import HRAConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, PeftWarning, get_peft_model


WIDTH = 8


class Three(nn.Module):
    """Three linear layers with one weight, and something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.between = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.third.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(self.between(torch.tanh(self.first(x))))))


class EncoderDecoder(nn.Module):
    """An encoder and a decoder that share their inner layers' weights, parameter by parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))
        self.decoder = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))
        for index in (0, 2):
            self.decoder[index].weight, self.decoder[index].bias = self.encoder[index].weight, self.encoder[index].bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


class Reused(nn.Module):
    """One module object that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)
        self.same = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.same(torch.tanh(self.one(x)))


class TwoConvolutions(nn.Module):
    """Two convolutions with one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x.unsqueeze(-1).expand(-1, -1, 5))))


class OneBias(nn.Module):
    """Two linear layers whose biases are one, and whose weights are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.bias = self.first.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def build(model_cls: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_cls().eval()


def adapt(model: nn.Module, config) -> PeftModel:
    """Adapt without a warning, and give what is trained values that matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model = get_peft_model(model, config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def config_of(method: str, targets: list[str], **config):
    return {
        "LORA": lambda: LoraConfig(r=2, target_modules=targets, **config),
        "LOHA": lambda: LoHaConfig(r=2, target_modules=targets, **config),
        "IA3": lambda: IA3Config(target_modules=targets, feedforward_modules=[], **config),
        "HRA": lambda: HRAConfig(r=2, target_modules=targets, **config),
    }[method]()


X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
each_method = pytest.mark.parametrize("method", ["LORA", "LOHA", "IA3", "HRA"])


@each_method
@pytest.mark.parametrize(
    ("model_cls", "targets", "members"),
    [
        (Three, ["second"], ("first", "second", "third")),
        (EncoderDecoder, ["decoder.2"], ("encoder.2", "decoder.2")),
        (Reused, ["same"], ("one", "same")),
    ],
)
def test_naming_one_member_adapts_all(method: str, model_cls: Callable, targets: list[str], members: tuple) -> None:
    ensure = model_cls is not Reused  # one module cannot come apart, so nothing has to be asked for
    model = adapt(build(model_cls), config_of(method, targets, ensure_weight_tying=ensure))
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = model(X)
    expected.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained)
    merged = model.merge_and_unload()
    assert len({id(merged.get_submodule(name).weight) for name in members}) == 1
    torch.testing.assert_close(merged(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["LORA", "LOHA", "IA3"])
def test_two_convolutions_with_one_kernel(method: str) -> None:
    if method == "IA3":
        pytest.skip("IA3 adapts convolutions of two and three dimensions only")
    model = adapt(build(TwoConvolutions), config_of(method, ["second"], ensure_weight_tying=True))
    expected = model(X)
    merged = model.merge_and_unload()
    assert merged.first.weight is merged.second.weight
    torch.testing.assert_close(merged(X), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_that_two_layers_share_is_scaled_for_the_adapted_one_only() -> None:
    base = build(OneBias)
    model = adapt(copy.deepcopy(base), config_of("IA3", ["first"]))
    expected = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    inner = model.get_base_model()
    assert torch.equal(inner.second.bias, base.second.bias)
    model.unmerge_adapter()
    assert inner.first.bias is inner.second.bias
    with pytest.warns(PeftWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X), expected, rtol=1e-5, atol=1e-5)


def test_a_shared_bias_is_trained_once() -> None:
    model = adapt(build(OneBias), LoraConfig(r=2, target_modules=["first", "second"], bias="all"))
    assert len([p for name, p in model.named_parameters() if p.requires_grad and "bias" in name]) == 1


@each_method
def test_a_layer_that_is_used_many_times(method: str, tmp_path) -> None:
    """ALBERT has one layer of each kind, which it passes through again and again; its head is tied as well."""
    config = AlbertConfig(
        vocab_size=30,
        embedding_size=8,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )

    def base() -> nn.Module:
        return build(lambda: AlbertForMaskedLM(config))

    ids = {"input_ids": torch.tensor([[3, 5, 7, 9]])}
    model = adapt(base(), config_of(method, ["query", "decoder"], ensure_weight_tying=True))
    queries = [m for name, m in model.named_modules() if name.endswith("query")]
    assert len(queries) == 1
    with torch.no_grad():
        expected = model(**ids).logits
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(**ids).logits, expected, rtol=0, atol=0)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert merged.predictions.decoder.weight is merged.albert.embeddings.word_embeddings.weight
