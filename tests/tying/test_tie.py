# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The second stage: owner and followers hold one trained parameter, whatever happens to a live model."""

import copy
import io
import pickle
import sys
import types
from collections.abc import Callable

import pytest
import torch
from support.tied_models import TIED_MODELS, TiedModel, Transposed, llama
from test_record import SIDES
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.anatomy.walking import walk
from peft.layers.modules_to_save import ModulesToSaveWrapper


def adapted(tied: TiedModel, side: str = "inputs", **options) -> PeftModel:
    """Put a tied adapter into a new model."""
    return get_peft_model(tied.build(), config_for(tied, side), **options)


def config_for(tied: TiedModel, side: str = "inputs") -> LoraConfig:
    """Make the config of a tied adapter."""
    return LoraConfig(
        r=2,
        target_modules=tied.targets,
        modules_to_save=SIDES[side](tied),
        ensure_weight_tying=True,
        fan_in_fan_out="c_attn" in tied.targets,
        task_type=tied.task_type,
    )


def trained(model: nn.Module, tied: TiedModel, adapter: str = "default") -> list[nn.Parameter]:
    """Give what stands in for the tied parameter at each member."""
    base = model.get_base_model()
    found = []
    for member in tied.members:
        module, _, key = member.rpartition(".")
        wrapper = base.get_submodule(module)
        assert isinstance(wrapper, ModulesToSaveWrapper)
        found.append(wrapper.modules_to_save[adapter].get_parameter(key))
    return found


def is_tied(model: nn.Module, tied: TiedModel, adapter: str = "default") -> bool:
    """Say whether all members hold one parameter object for an adapter."""
    return len({id(parameter) for parameter in trained(model, tied, adapter)}) == 1


def train(model: nn.Module, tied: TiedModel, steps: int = 2) -> torch.optim.Optimizer:
    """Take a few steps on a made-up loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        tied.forward(model).float().pow(2).mean().backward()
        optimizer.step()
    return optimizer


each_model = pytest.mark.parametrize("tied", TIED_MODELS.values(), ids=TIED_MODELS)


@pytest.mark.parametrize("side", SIDES)
@each_model
def test_members_hold_one_parameter(tied, side):
    model = adapted(tied, side)
    assert is_tied(model, tied)
    parameter = trained(model, tied)[0]
    assert parameter.requires_grad
    assert sum(p is parameter for p in model.parameters()) == 1
    base = {id(p) for name, p in model.named_parameters() if "original_module" in name}
    assert id(parameter) not in base


@each_model
def test_nothing_is_held_twice(tied):
    """The adapter brings one copy of the tied matrix, however many members there are."""
    bare = sum(p.numel() for p in tied.build().parameters())
    model = adapted(tied)
    factors = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    matrix = trained(model, tied)[0]
    extra = sum(p.numel() for p in model.parameters()) - bare - factors
    rest = sum(p.numel() for name, p in model.named_parameters() if name.endswith("modules_to_save.default.bias"))
    assert extra == matrix.numel() + rest
    storages = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}
    assert sum(storages.values()) == bare + factors + extra


@each_model
def test_fresh_adapter_changes_nothing(tied):
    with torch.no_grad():
        assert torch.equal(tied.forward(adapted(tied).eval()), tied.forward(tied.build()))


@pytest.mark.parametrize("side", SIDES)
@each_model
def test_gradient_is_the_sum_of_all_uses(tied, side):
    """The base model is tied by hand, so the gradient of its own parameter is the reference."""
    reference = tied.build()
    tied.forward(reference).pow(2).mean().backward()
    expected = dict(reference.named_parameters(remove_duplicate=False))[tied.members[0]].grad
    model = adapted(tied, side).eval()
    tied.forward(model).pow(2).mean().backward()
    torch.testing.assert_close(trained(model, tied)[0].grad, expected)


def test_gradient_equals_that_of_a_model_written_by_hand():
    tied = TIED_MODELS["plain"]
    model = adapted(tied).eval()
    tied.forward(model).pow(2).mean().backward()
    base: Transposed = tied.build()
    matrix = base.lookup.weight.detach().clone().requires_grad_(True)
    rows = matrix[tied.keywords()["input_ids"]]
    hidden = torch.tanh(rows @ base.hidden.weight.T + base.hidden.bias)
    (hidden @ matrix.T + base.project.bias).pow(2).mean().backward()
    torch.testing.assert_close(trained(model, tied)[0].grad, matrix.grad)


@pytest.mark.parametrize("side", SIDES)
@each_model
def test_training_keeps_the_tie(tied, side):
    model = adapted(tied, side)
    start = trained(model, tied)[0].detach().clone()
    optimizer = train(model, tied)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.shape == start.shape and p is trained(model, tied)[0] for p in held) == 1
    assert len({id(p) for p in held}) == len(held)
    assert is_tied(model, tied)
    assert not torch.equal(trained(model, tied)[0], start)


@each_model
def test_disabled_equals_the_base_model(tied):
    model = adapted(tied).eval()
    train(model, tied)
    with torch.no_grad():
        changed = tied.forward(model)
        with model.disable_adapter():
            assert torch.equal(tied.forward(model), tied.forward(tied.build()))
        assert torch.equal(tied.forward(model), changed)
    assert trained(model, tied)[0].requires_grad


@each_model
def test_a_second_adapter_is_tied_on_its_own(tied):
    model = adapted(tied)
    train(model, tied)
    model.add_adapter("other", config_for(tied, "outputs"))
    first, second = trained(model, tied)[0], trained(model, tied, "other")[0]
    assert is_tied(model, tied, "other")
    assert first is not second
    assert (first.requires_grad, second.requires_grad) == (True, False)
    model.set_adapter("other")
    assert (first.requires_grad, second.requires_grad) == (False, True)
    with torch.no_grad():
        output = tied.forward(model.eval())
        model.delete_adapter("default")
        assert torch.equal(tied.forward(model), output)
    assert is_tied(model, tied, "other")
    assert all(
        "default" not in module.modules_to_save
        for _, module in walk(model, into_bases=True)
        if isinstance(module, ModulesToSaveWrapper)
    )


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to float64": lambda model: model.to(torch.float64),
    "half": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": torch_saved,
    "requires_grad": lambda model: model.requires_grad_(False).requires_grad_(True),
    "share_memory": lambda model: model.share_memory(),
    "state dict": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
    "disable and enable": lambda model: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
        model,
    )[2],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "plain_two_linears"])
def test_the_tie_outlives(name, change):
    tied = TIED_MODELS[name]
    model = adapted(tied)
    train(model, tied)
    model = change(model)
    assert is_tied(model, tied)
    train(model.float(), tied)
    assert is_tied(model, tied)


def test_without_storage_there_is_one_parameter_too():
    tied = TIED_MODELS["llama"]
    model = adapted(tied, low_cpu_mem_usage=True)
    assert is_tied(model, tied)
    assert trained(model, tied)[0].is_meta
    assert not any(p.is_meta for name, p in model.named_parameters() if "original_module" in name)


@pytest.mark.parametrize(("side", "bias_is_trained"), [("inputs", False), ("outputs", True), ("both", True)])
@pytest.mark.parametrize("name", ["bert", "roberta", "plain"])
def test_what_only_follows_keeps_its_bias(name, side, bias_is_trained):
    """A head's bias is trained if the head was named; a head that only follows keeps the base model's."""
    tied = TIED_MODELS[name]
    model = adapted(tied, side)
    head = next(
        m for n, m in model.named_modules() if n.endswith(tied.outputs) and isinstance(m, ModulesToSaveWrapper)
    )
    assert (head.modules_to_save["default"].bias is not head.original_module.bias) == bias_is_trained
    assert head.modules_to_save["default"].bias.requires_grad == bias_is_trained
    assert torch.equal(head.modules_to_save["default"].bias, head.original_module.bias)


def test_partitioned_parameters_are_gathered_before_they_are_copied(monkeypatch):
    """DeepSpeed is stood in for by a recorder: what counts is that it is asked, with these parameters, in time."""
    gathered = []

    class Recorder:
        def __init__(self, params, modifier_rank, fwd_module):
            gathered.append(([id(p) for p in params], modifier_rank))

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return False

    deepspeed = types.ModuleType("deepspeed")
    deepspeed.zero = types.SimpleNamespace(GatheredParameters=Recorder)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setattr("peft.utils.integrations.check_deepspeed_zero3_enabled", lambda: True)
    model = llama()
    weight = id(model.lm_head.weight)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    get_peft_model(model, config)
    assert gathered == [([weight], 0), ([weight], 0)]
