# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Names of the released package that are doors here: they give what the layers themselves compute."""

import pytest
import torch
from support.helpers import assert_close, linears
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from peft.peft_model import get_alora_offsets_for_forward, get_alora_offsets_for_generate
from peft.tuners.lora import dora
from peft.tuners.lora.layer import LoraEmbeddingATPHolder, _LoraParameterProxy
from peft.tuners.lora.model import add_lora_tp_hooks_dtensor, get_tp_plan_and_mesh
from peft.tuners.lora.starts import find_start
from peft.tuners.lora.variants import (
    ALoraLinearVariant,
    DoraLinearVariant,
    MiCAEmbeddingVariant,
    MiCALinearVariant,
    is_alora_relevant_in_batch,
)
from peft.tuners.mixed.model import PREFIXES


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.words, self.conv = nn.Linear(5, 4), nn.Embedding(7, 3), nn.Conv2d(2, 3, 3)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    options = {"use_dora": True, "r": 2, "lora_alpha": 4, "init_lora_weights": False}
    get_peft_model(net, LoraConfig(target_modules=["linear", "words", "conv"], **options))
    for layer in (net.linear, net.words, net.conv):
        layer.lora_magnitude_vector["default"].weight.data.mul_(1.3)
    return net


class TestDora:
    def test_linear(self, net: Net) -> None:
        layer, x = net.linear, torch.randn(6, 5)
        magnitude, factors = layer.lora_magnitude_vector["default"], (layer.lora_A["default"], layer.lora_B["default"])
        assert type(magnitude) is dora.DoraLinearLayer
        base = layer.base_layer(x)
        arguments = dict(zip(("lora_A", "lora_B"), factors, strict=True), scaling=2.0, base_layer=layer.base_layer)
        assert_close(base + magnitude(x, **arguments), layer(x))
        assert_close(base + magnitude(x, **arguments, base_result=base), layer(x))
        again = dora.DoraLinearLayer(fan_in_fan_out=False)
        again.update_layer(**arguments)
        assert_close(again.weight * 1.3, magnitude.weight)

    def test_embedding(self, net: Net) -> None:
        layer, ids = net.words, torch.tensor([1, 2, 6])
        magnitude = layer.lora_magnitude_vector["default"]
        assert type(magnitude) is dora.DoraEmbeddingLayer
        a, b = layer.lora_embedding_A["default"].T, layer.lora_embedding_B["default"].T
        scale, added = magnitude(ids, lora_A=a, lora_B=b, scaling=2.0, base_layer=layer.base_layer)
        assert_close(scale * layer.base_layer(ids) + added, layer(ids))

    def test_convolution(self, net: Net) -> None:
        layer, x = net.conv, torch.randn(1, 2, 5, 5)
        magnitude, factors = layer.lora_magnitude_vector["default"], (layer.lora_A["default"], layer.lora_B["default"])
        assert type(magnitude) is dora.DoraConv2dLayer
        added = magnitude(x, lora_A=factors[0], lora_B=factors[1], scaling=2.0, base_layer=layer.base_layer)
        assert_close(layer.base_layer(x) + added, layer(x))

    def test_what_is_kept(self) -> None:
        class Counting(nn.Module):
            calls = 0

            @dora.cache_decorator("count")
            def count(self, adapter_name: str) -> int:
                self.calls += 1
                return self.calls

        module = Counting().eval()
        assert [module.count(adapter_name="a") for _ in range(2)] == [1, 2]
        with DoraCaching():
            assert [module.count(adapter_name=name) for name in "aab"] == [3, 3, 4]
            assert module.train().count(adapter_name="a") == 5

    def test_variants(self, net: Net) -> None:
        layer = net.linear
        assert layer.resolve_lora_variant(config=LoraConfig(use_dora=True)) is DoraLinearVariant
        assert layer.resolve_lora_variant(config=LoraConfig()) is None
        assert isinstance(layer.variants["default"], DoraLinearVariant)
        found = layer.lora_variants
        assert found[("use_dora",)] is DoraLinearVariant
        assert found[("alora_invocation_tokens",)] is ALoraLinearVariant
        assert ("alora_invocation_tokens",) not in net.words.lora_variants


class TestActivatedLora:
    IDS = torch.tensor([[1, 3, 4, 5], [1, 2, 1, 2]])

    @pytest.fixture
    def model(self) -> nn.Module:
        base = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        base.prepare_inputs_for_generation = None
        config = LoraConfig(target_modules=["1"], task_type="CAUSAL_LM", init_lora_weights=False)
        invoked = LoraConfig(target_modules=["1"], task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4])
        model = get_peft_model(base, invoked, adapter_name="invoked")
        model.add_adapter("plain", config)
        return model

    def test_offsets(self, model: nn.Module) -> None:
        ids = self.IDS
        assert get_alora_offsets_for_forward(model, ids) == {"alora_offsets": [3, None]}
        names = ["plain", "invoked"]
        found = get_alora_offsets_for_forward(model, ids.flip(0), adapter_names=names)
        assert found == {"alora_offsets": [None, 3], "adapter_names": names}
        assert get_alora_offsets_for_forward(model, ids, alora_offsets=[1, 2]) == {"alora_offsets": [1, 2]}
        assert get_alora_offsets_for_generate(model, ids, num_beams=2) == {"alora_offsets": [3, None], "num_beams": 2}
        assert set(get_alora_offsets_for_generate(model, input_ids=ids)) == {"input_ids", "alora_offsets"}
        with pytest.warns(UserWarning, match="without token ids"):
            assert get_alora_offsets_for_forward(model, None, torch.zeros(1, 2, 4)) == {"alora_offsets": None}

    def test_other_adapters_need_none(self, model: nn.Module) -> None:
        model.set_adapter("plain")
        assert not is_alora_relevant_in_batch(model) and is_alora_relevant_in_batch(model, ["invoked"])
        assert get_alora_offsets_for_forward(model, self.IDS, x=1) == {"x": 1}


class TestTensorParallelism:
    @pytest.fixture
    def mesh(self, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()

    def test_plan_of_a_module(self) -> None:
        model = linears(8, 8)
        model.tp_plan = {"layers.*.q": "colwise"}
        assert get_tp_plan_and_mesh(model, "layers.3.q") == (None, None)
        model._device_mesh = "mesh"
        assert get_tp_plan_and_mesh(model, "layers.3.q") == ("colwise", "mesh")
        assert get_tp_plan_and_mesh(model, "layers.3.k") == (None, None)

    def test_factors_are_divided(self, mesh) -> None:
        base = nn.Linear(4, 6)
        for way, placements in {"colwise": [Shard(0), Shard(0)], "rowwise": [Shard(1), Replicate()]}.items():
            factor = nn.Linear(2, 6)
            weight = factor.weight.detach().clone()
            add_lora_tp_hooks_dtensor(factor, way, mesh, base_layer=base, module_name="layers.0.q")
            assert [parameter.placements[0] for parameter in factor.parameters()] == placements
            assert torch.equal(factor.weight.to_local(), weight) and factor.weight.requires_grad
        with pytest.raises(ValueError, match=r"'layers.0.q' \(Linear\) is divided among processes by 'other'"):
            add_lora_tp_hooks_dtensor(nn.Linear(2, 6), "other", mesh, base_layer=base, module_name="layers.0.q")

    def test_a_delta_is_added_to_a_divided_parameter(self, mesh) -> None:
        weight, delta = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
        divided = distribute_tensor(weight, mesh, [Shard(0)])
        found = _LoraParameterProxy(delta)(divided)
        assert isinstance(found, DTensor) and torch.equal(found.to_local(), weight + delta)
        found.to_local().sum().backward()
        assert torch.equal(delta.grad, torch.ones(4, 3))
        found = _LoraParameterProxy(divided)(delta)
        assert isinstance(found, DTensor) and torch.equal(found.to_local(), weight + delta)
        assert torch.equal(_LoraParameterProxy(delta)(weight), weight + delta)

    def test_a_factor_as_an_embedding(self) -> None:
        factor = nn.Parameter(torch.randn(2, 5))
        holder = LoraEmbeddingATPHolder(factor)
        assert torch.equal(holder(torch.tensor([3])), factor.T[[3]]) and holder.weight.requires_grad
        assert holder.weight.data_ptr() == factor.data_ptr()


def test_prefixes_of_methods_that_mix() -> None:
    assert {"lora_", "lokr_", "hada_", "oft_"} <= set(PREFIXES)


def test_mica_is_a_start() -> None:
    """Those who look for its class find it, although layers have no variant of that name."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(5, 4)), LoraConfig(r=2, target_modules=["0"], init_lora_weights="mica")
    )
    layer = model.base_model.model[0]
    assert isinstance(find_start("mica"), MiCALinearVariant) and MiCAEmbeddingVariant is MiCALinearVariant
    assert (
        not layer.lora_B["default"].weight.requires_grad
        and layer.resolve_lora_variant(config=model.peft_config["default"]) is None
    )
