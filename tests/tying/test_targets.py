# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA on tied modules: one adapter for the group with ensure_weight_tying, adapters apart without it."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from support.tied_models import TIED_MODELS, TiedModel, llama
from test_record import SIDES
from test_stages import bare_members, outputs
from test_tie import each_model
from torch import nn

from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tying.groups import find_tied_groups
from peft.tying.report import weight_tying_report


def adapted(tied: TiedModel, side: str = "inputs", ensure: bool = True, **config) -> PeftModel:
    """Put an adapter with random factors on members of the tied group and on the usual targets."""
    with warnings.catch_warnings():
        if not ensure:
            warnings.filterwarnings("ignore", message="the config reaches modules that share", category=PeftWarning)
        return get_peft_model(tied.build(), config_for(tied, side, ensure, **config))


def config_for(tied: TiedModel, side: str = "inputs", ensure: bool = True, **config) -> LoraConfig:
    """Make the config of an adapter on tied modules."""
    return LoraConfig(
        r=2,
        target_modules=[*tied.targets, *SIDES[side](tied)],
        ensure_weight_tying=ensure,
        init_lora_weights=False,
        fan_in_fan_out="c_attn" in tied.targets,
        task_type=tied.task_type,
        **config,
    )


def layers(model: PeftModel, tied: TiedModel) -> list[LoraLayer]:
    """Give the adapter layers at the members, owner first."""
    return [model.get_base_model().get_submodule(member.rpartition(".")[0]) for member in tied.members]


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def reference(model: PeftModel, tied: TiedModel, adapter: str = "default") -> nn.Module:
    """Build the base model with W + delta written into every adapted weight by hand, ties and all."""
    base = tied.build()
    done = set()
    with torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer) and name:
                weight = base.get_submodule(name).weight
                if id(weight) not in done:
                    weight += module.source(adapter).get_delta_weight(adapter)
                    done.add(id(weight))
    return base


@pytest.mark.parametrize("side", SIDES)
@each_model
def test_a_group_has_one_adapter(tied, side):
    model = adapted(tied, side)
    owner, *followers = layers(model, tied)
    assert len(list(owner.adapter_parameters("default"))) == 2
    assert all(not list(follower.adapter_parameters("default")) for follower in followers)
    once = sum(p.numel() for name, p in factors(model).items() if name.rpartition(".lora_")[0].endswith(tied.inputs))
    assert once in (0, sum(p.numel() for p in owner.adapter_parameters("default")))  # 0: the owner has another name
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in factors(model).values())


@pytest.mark.parametrize("side", SIDES)
@each_model
def test_every_member_computes_with_the_adapted_weight(tied, side):
    model = adapted(tied, side)
    torch.testing.assert_close(outputs(model, tied), outputs(reference(model, tied), tied), rtol=1e-4, atol=1e-4)


@each_model
def test_factors_of_a_follower_answer_with_the_owners_storage(tied):
    model = adapted(tied)
    owner, *followers = layers(model, tied)
    storages = {p.untyped_storage().data_ptr() for p in owner.adapter_parameters("default")}
    for follower in followers:
        assert {w.untyped_storage().data_ptr() for w in follower.factor_weights("default")} == storages
        assert (follower.r["default"], follower.scaling["default"]) == (owner.r["default"], owner.scaling["default"])
        torch.testing.assert_close(follower.get_delta_weight("default"), owner.get_delta_weight("default"))
    owner.set_scale("default", 3.0)
    assert all(follower.scaling["default"] == owner.scaling["default"] for follower in followers)


@each_model
def test_gradient_is_the_sum_of_all_uses(tied):
    """Reference: the same factors put into a tied base weight by autograd-friendly hands."""
    model = adapted(tied).eval()
    tied.forward(model).pow(2).mean().backward()
    owner = layers(model, tied)[0]
    base = reference(model, tied)
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    tied.forward(base).pow(2).mean().backward()
    weight_grad = dict(base.named_parameters(remove_duplicate=False))[tied.members[0]].grad
    left, right = (factor.detach().requires_grad_(True) for factor in owner.delta_factors("default"))
    ((left @ right) * owner.scaling["default"]).backward(weight_grad)
    got = {id(p): p.grad for p in owner.adapter_parameters("default")}
    into_and_out = owner.factor_weights("default")
    expected = (left.grad.T, right.grad.T) if owner.is_embedding or owner.fan_in_fan_out else (right.grad, left.grad)
    for factor, grad in zip(into_and_out, expected, strict=True):
        torch.testing.assert_close(got[id(factor)], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
@each_model
def test_merging_adds_the_delta_once(tied, side):
    model = adapted(tied, side)
    expected = outputs(model, tied)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, tied), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, tied), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, tied), outputs(tied.build(), tied), rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, tied), expected, rtol=1e-4, atol=1e-4)
    assert len(bare_members(merged, tied)) == 1


@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=str)
@each_model
def test_reloaded_adapter_is_equal(tied, options, deduplicate, tmp_path):
    model = adapted(tied)
    model.save_pretrained(tmp_path, deduplicate_tied=deduplicate)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        again = PeftModel.from_pretrained(tied.build(), tmp_path, **options)
    assert torch.equal(outputs(again, tied), outputs(model, tied))
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert ("tied_aliases" in file.metadata()) == deduplicate
    names = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys}
    members = {member.rpartition(".")[0] for member in tied.members}
    assert members & names == ({tied.members[0].rpartition(".")[0]} if deduplicate else members)


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float()]
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "plain_two_linears"])
def test_followers_follow_through_copies(name, change):
    tied = TIED_MODELS[name]
    model = change(adapted(tied))
    owner, *followers = layers(model, tied)
    assert all(follower.source("default") is owner for follower in followers)
    with torch.no_grad():
        next(iter(owner.adapter_parameters("default"))).mul_(2)
    torch.testing.assert_close(outputs(model, tied), outputs(reference(model, tied), tied), rtol=1e-4, atol=1e-4)


@each_model
def test_tied_and_untied_adapters_side_by_side(tied):
    model = adapted(tied)
    first = outputs(model, tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        model.add_adapter("apart", config_for(tied, "both", ensure=False))
    model.set_adapter("apart")
    second = outputs(model, tied)
    assert not torch.allclose(first, second)
    model.merge_adapter(["apart"])
    torch.testing.assert_close(outputs(model, tied), second, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert len({id(layer.get_base_weight()) for layer in layers(model, tied)}) == 1
    model.merge_adapter(["default"])
    torch.testing.assert_close(outputs(model, tied), first, rtol=1e-4, atol=1e-4)
    model.merge_adapter(["apart"])
    model.unmerge_adapter()
    model.delete_adapter("apart")
    torch.testing.assert_close(outputs(model, tied), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["inputs", "outputs", "both"])
@pytest.mark.parametrize("name", TIED_MODELS)
def test_adapted_apart_on_purpose(name, side, tmp_path):
    """A member that was not adapted is never changed: the others get a weight of their own when they are merged."""
    tied = TIED_MODELS[name]
    model = adapted(tied, side, ensure=False)
    expected = outputs(model, tied)
    original = {id(group.parameter) for group in find_tied_groups(model.get_base_model())}
    values = {id(g.parameter): g.parameter.detach().clone() for g in find_tied_groups(model.get_base_model())}
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, tied), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    groups = find_tied_groups(model.get_base_model())
    assert {id(group.parameter) for group in groups} == original
    assert all(torch.equal(group.parameter, values[id(group.parameter)]) for group in groups)
    with pytest.warns(PeftWarning, match="no longer tied in the merged model"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, tied), expected, rtol=1e-4, atol=1e-4)
    if isinstance(merged, transformers.PreTrainedModel):
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(outputs(again, tied), outputs(merged, tied))


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@each_model
def test_report_tells_one_adapter_from_adapters_apart(tied, side):
    for ensure in (True, False):
        model = adapted(tied, side, ensure=ensure)
        report = weight_tying_report(model)
        assert report.holds == ensure
        (row,) = [row for row in report.rows if row.route == "target_modules" and row.members == tied.members]
        assert (row.adapter, row.shared) == ("default", ensure)
        reached = {id(layer): layer for layer in layers(model, tied) if isinstance(layer, LoraLayer)}
        assert row.bytes == 4 * sum(p.numel() for m in reached.values() for p in m.adapter_parameters("default"))


def test_merging_one_layer_by_itself_leaves_the_others_be():
    tied = TIED_MODELS["llama"]
    model = adapted(tied, "outputs", ensure=False)
    expected = outputs(model, tied)
    layers(model, tied)[1].merge()
    torch.testing.assert_close(outputs(model, tied), expected, rtol=1e-4, atol=1e-4)
    layers(model, tied)[1].unmerge()
    assert len(find_tied_groups(model.get_base_model())) == 1


@pytest.mark.parametrize("rule", ["all-linear", r".*(embed_tokens|q_proj)", ["model.embed_tokens", "lm_head"]])
def test_however_targets_are_named(rule):
    config = LoraConfig(target_modules=rule, ensure_weight_tying=True, task_type="CAUSAL_LM")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(llama(), config)
    reached = "model.embed_tokens" in model.targeted_module_names
    assert reached == ("lm_head" in model.targeted_module_names) == (rule != "all-linear")
    texts = [str(w.message) for w in caught if issubclass(w.category, PeftWarning)]
    assert [("has no effect" in text) for text in texts] == ([] if reached else [True])


def test_patterns_of_the_owner_hold_for_the_group():
    config = LoraConfig(
        target_modules=["lm_head"], rank_pattern={"embed_tokens": 5}, alpha_pattern={"embed_tokens": 10},
        ensure_weight_tying=True, use_rslora=True,
    )  # fmt: skip
    model = get_peft_model(llama(), config)
    head = model.get_base_model().lm_head
    assert (head.r["default"], head.lora_A["default"].weight.shape[0]) == (5, 5)
    assert head.scaling["default"] == pytest.approx(10 / 5**0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, "can only be adapted in one way"),
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, "lora_bias=True does not work"),
    ],
)
def test_what_cannot_be_tied_is_refused_before_anything_is_changed(config, message):
    model = llama()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(**config, ensure_weight_tying=True))
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
