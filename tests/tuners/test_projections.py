# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Projections of checkpoints that fit larger layers than the model's: layers use the beginning of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import assert_close, assert_equal, linears, randomise, refused

from peft import PeftConfig, PeftModel, PveraConfig, RandLoraConfig, VeraConfig, get_peft_model


CONFIGS = {"vera": VeraConfig, "pvera": PveraConfig, "randlora": RandLoraConfig}
each_method = pytest.mark.parametrize(("name", "config"), CONFIGS.items(), ids=list(CONFIGS))


def saved_with_larger_ones(name: str, config: type[PeftConfig], folder: Path) -> tuple[dict, torch.Tensor]:
    """Save an adapter of a small layer with more projections than it uses, as beside an adapter of larger layers."""
    base = linears(4, 6, 9, 5)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, config(r=2, target_modules=["0"])).eval()
    randomise(model, f"{name}_")
    x = torch.randn(3, 4)
    model.save_pretrained(folder)
    file, enlarged = folder / "adapter_model.safetensors", {}
    for key, tensor in load_file(file).items():
        if key.endswith(f"{name}_A"):
            tensor = torch.cat([tensor, torch.randn(*tensor.shape[:-1], 5)], -1)
        elif key.endswith("randlora_B"):
            tensor = torch.cat([tensor, torch.randn(tensor.shape[0], 3, tensor.shape[2])], 1)
            tensor = torch.cat([tensor, torch.randn(2, *tensor.shape[1:])], 0)
        elif key.endswith(f"{name}_B"):
            tensor = torch.cat([tensor, torch.randn(3, tensor.shape[1])])
        enlarged[key] = tensor
    for key, tensor in enlarged.items():  # those under layers are the same as those above
        above = f"base_model.{key.rpartition('.')[2]}"
        enlarged[key] = enlarged[above].clone() if above in enlarged else tensor
    save_file(enlarged, file)
    return state, (x, model(x))


@each_method
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_layers_use_the_beginning(
    name: str, config: type[PeftConfig], low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    state, (x, expected) = saved_with_larger_ones(name, config, tmp_path)
    fresh = linears(4, 6, 9, 5)
    fresh.load_state_dict(state)
    model = PeftModel.from_pretrained(fresh, tmp_path, strict=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_close(model(x), expected)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    for key, tensor in saved.items():
        assert_equal(again[key], tensor)
    model.merge_adapter()
    assert_close(model(x), expected, atol=1e-5)


@each_method
def test_others_keep_theirs(name: str, config: type[PeftConfig], tmp_path: Path) -> None:
    state, (x, expected) = saved_with_larger_ones(name, config, tmp_path)
    fresh = linears(4, 6, 9, 5)
    fresh.load_state_dict(state)
    model = get_peft_model(fresh, config(r=2, target_modules=["0"]), "own").eval()
    randomise(model, f"{name}_")
    before, own = model(x), model.base_model.get_buffer(f"{name}_A.own")
    model.load_adapter(tmp_path, "larger")
    assert model.base_model.get_buffer(f"{name}_A.own") is own
    assert_equal(model(x), before)
    model.set_adapter("larger")
    assert_close(model(x), expected)


@each_method
def test_other_ranks_are_refused(name: str, config: type[PeftConfig], tmp_path: Path) -> None:
    saved_with_larger_ones(name, config, tmp_path)
    model = get_peft_model(linears(4, 6, 9, 5), config(r=3, target_modules=["0"]))
    with refused(model, RuntimeError, "another shape"):
        model.load_adapter(tmp_path, "default")
