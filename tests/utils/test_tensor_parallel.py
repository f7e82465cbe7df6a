# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tensors that are divided among processes: here one process, whose part is the whole."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import save_and_load
from peft.utils.integrations import TpInfo, dtensor_from_local_like


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_part_is_divided_like_another_tensor(mesh):
    like = distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)])
    part = torch.randn(4, 2)
    found = dtensor_from_local_like(part, like)
    assert isinstance(found, DTensor) and found.placements == like.placements and found.shape == like.shape
    assert found.to_local().data_ptr() == part.data_ptr()
    assert TpInfo({"layers.*.q": "colwise"}, mesh, 1).device_mesh is mesh


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_loaded_into_divided_parameters(mesh, monkeypatch):
    config = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    source = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    factor = model.base_model.model[0].lora_B["default"]
    factor.weight = nn.Parameter(distribute_tensor(factor.weight.detach(), mesh, [Shard(0)]))
    tensors = get_peft_model_state_dict(source)
    set_peft_model_state_dict(model, tensors)
    assert isinstance(factor.weight, DTensor)
    expected = source.base_model.model[0].lora_B["default"].weight
    assert torch.equal(factor.weight.to_local(), expected)

    asked = []  # clients replace the function at its old path
    monkeypatch.setattr(save_and_load, "_maybe_shard_state_dict_for_tp", lambda *args: asked.append(args[-1]))
    set_peft_model_state_dict(source, tensors)
    assert asked == ["default"]
