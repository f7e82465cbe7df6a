# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""VeLoRA: gradients from projections of the inputs, the vector that they are projected on, and what is kept of it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import assert_close, assert_equal, differs, features, logits, randomise, stack
from torch import nn

from peft import LoraConfig, PeftModel, VeloraConfig, get_peft_model


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


def one_layer(inputs: int = 10, groups: int = 4, kind: str = "batch_average", **changes: Any) -> nn.Sequential:
    """A linear layer with an adapter that has an effect, in training mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inputs, 5))
    settings = VeloraConfig(num_groups=groups, init_type=kind, **changes)
    get_peft_model(net, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], velora_config=settings))
    randomise(net)
    return net.train()


def cut(x: torch.Tensor, groups: int) -> list[torch.Tensor]:
    """The groups of each row, one after the other."""
    width = -(-x.shape[-1] // groups)
    padded = torch.cat([x, torch.zeros(len(x), groups * width - x.shape[-1])], 1)
    return [padded[:, i * width : (i + 1) * width] for i in range(groups)]


@pytest.mark.parametrize(("inputs", "groups"), [(10, 1), (10, 4), (10, 5), (10, 10), (10, 13)])
def test_gradients(inputs: int, groups: int) -> None:
    scale = 0.7
    net, x = one_layer(inputs, groups, scale=scale), features(6, inputs).requires_grad_()
    plain = copy.deepcopy(net)
    plain[0].variants.clear()
    layer, by = net[0], torch.randn(6, 5)
    (net(x) * by).sum().backward()
    exact = x.grad.clone()
    x.grad = None
    (plain(x) * by).sum().backward()
    assert_close(net(x), plain(x))
    assert_close(exact, x.grad)
    assert_close(layer.lora_B["default"].weight.grad, plain[0].lora_B["default"].weight.grad)

    parts = cut(x.detach(), groups)
    mean = torch.cat(parts).mean(0)
    vector = mean / mean.norm()
    assert_close(layer.lora_velora_embed["default"], vector)
    rebuilt = torch.cat([scale * (part @ vector).unsqueeze(1) * vector for part in parts], 1)[:, :inputs]
    at_a = 3 * by @ layer.lora_B["default"].weight.detach()
    assert_close(layer.lora_A["default"].weight.grad, at_a.T @ rebuilt)


def test_less_is_kept_for_the_backward_pass() -> None:
    def kept(net: nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            net(features(256, 64))
        return sum(sizes)

    with_velora = one_layer(64, 2)
    plain = copy.deepcopy(with_velora)
    plain[0].variants.clear()
    for net in (with_velora, plain):
        net[0].base_layer.requires_grad_(False)
    assert kept(with_velora) < 0.2 * kept(plain)


@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once", "random"])
def test_the_vector(kind: str) -> None:
    layer = one_layer(kind=kind)[0]
    vector = layer.lora_velora_embed["default"]
    at_first = vector.clone()
    assert vector.shape == (3,)
    assert_close(vector.norm(), torch.tensor(1.0 if kind == "random" else 0.0))
    layer.eval()(features(3, 10))
    layer.train()
    with torch.no_grad():
        layer(features(3, 10))
    assert_equal(vector, at_first)
    layer(features(3, 10))
    after_one = vector.clone()
    assert_close(after_one.norm(), torch.tensor(1.0))
    assert differs(after_one, at_first) == (kind != "random")
    layer(features(3, 10) ** 2)
    assert differs(vector, after_one) == (kind == "batch_average")


def test_a_mean_of_zero() -> None:
    layer = one_layer()[0]
    layer(torch.zeros(3, 10))
    assert_close(layer.lora_velora_embed["default"], torch.full((3,), 3**-0.5))


def test_what_a_checkpoint_has_set_stays(tmp_path: Path) -> None:
    settings = VeloraConfig(num_groups=4, init_type="batch_average_once")
    model = get_peft_model(stack(), LoraConfig(r=2, target_modules=["up"], velora_config=settings)).train()
    model(features())
    vector = model.base_model.model.layers[0].up.lora_velora_embed["default"].clone()
    assert vector.any()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(stack(), tmp_path, is_trainable=True).train()
    again(features() ** 2)
    assert_equal(again.base_model.model.layers[0].up.lora_velora_embed["default"], vector)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_without_the_vector(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    settings = VeloraConfig(num_groups=4)
    model = get_peft_model(stack(), LoraConfig(r=2, target_modules=["up"], velora_config=settings)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: tensor for key, tensor in tensors.items() if "velora" not in key}, path)
    with pytest.warns(UserWarning, match="lacks"):
        again = PeftModel.from_pretrained(stack(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_equal(logits(again, features()), logits(model, features()))
    assert_equal(again.base_model.model.layers[0].up.lora_velora_embed["default"], torch.zeros(2))


def test_autocast() -> None:
    net, x = one_layer(), features(6, 10)
    with torch.autocast("cpu", torch.bfloat16):
        net(x).float().square().sum().backward()
    low = net[0].lora_A["default"].weight.grad.clone()
    net.zero_grad()
    net(x).square().sum().backward()
    torch.testing.assert_close(low, net[0].lora_A["default"].weight.grad, rtol=0.1, atol=0.1 * low.abs().max().item())


@pytest.mark.parametrize("changes", [{"num_groups": 0}, {"scale": 0.0}, {"init_type": "zeros"}])
def test_configs_that_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        VeloraConfig(**changes)
