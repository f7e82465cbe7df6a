# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What comes of ties in release 0.21.2, one test for each way in which it goes wrong there."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from support.helpers import assert_close
from support.tied_models import ALL_MODELS, TiedModel, llama
from torch import nn

from peft import (
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PeftWarning,
    TrainableTokensConfig,
    get_peft_model,
)
from peft.layers.modules_to_save import ModulesToSaveWrapper


def adapt(tied: TiedModel, config: Any, **options: Any) -> PeftModel:
    """Adapt a model and give what is trained values that matter; any warning of this package is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model = get_peft_model(tied.build(), config, **options)
    return randomised(model)


def randomised(model: PeftModel) -> PeftModel:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def outputs(tied: TiedModel, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return tied.forward(model.eval())


def lora(tied: TiedModel, **config: Any) -> LoraConfig:
    values = {"r": 2, "target_modules": tied.targets, "ensure_weight_tying": True, **config}
    return LoraConfig(task_type=tied.task_type, fan_in_fan_out="c_attn" in tied.targets, **values)


def saved(tied: TiedModel, *names: str, **config: Any) -> LoraConfig:
    return lora(tied, modules_to_save=list(names), **config)


def test_1_a_tied_delta_is_merged_once() -> None:
    tied = ALL_MODELS["llama"]
    model = adapt(tied, lora(tied, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False))
    expected = outputs(tied, model)
    layer = model.get_base_model().get_input_embeddings()
    weight = layer.get_base_weight().detach() + layer.get_delta_weight("default").detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.lm_head.weight, weight)
    assert_close(outputs(tied, merged), expected)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False),
        LoHaConfig(r=2, target_modules=["lm_head"]),
        IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        OFTConfig(r=0, oft_block_size=4, target_modules=["lm_head"]),
        HRAConfig(r=2, target_modules=["lm_head"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_2_a_head_that_is_adapted_alone_leaves_the_embedding_alone(config: Any, tmp_path: Any) -> None:
    tied = ALL_MODELS["llama"]
    with pytest.warns(PeftWarning, match="ensure_weight_tying=True"):
        model = randomised(get_peft_model(tied.build(), config))
    expected = outputs(tied, model)
    model.merge_adapter()
    assert torch.equal(model.get_base_model().model.embed_tokens.weight, tied.build().model.embed_tokens.weight)
    model.unmerge_adapter()
    with pytest.warns(PeftWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, tied.build().model.embed_tokens.weight)
    assert merged.config.tie_word_embeddings is False
    assert_close(outputs(tied, merged), expected)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(outputs(tied, again), outputs(tied, merged))


@pytest.mark.parametrize("name", ["gpt2", "bloom", "mamba", "opt"])
def test_3_a_saved_head_does_not_land_in_the_base_whatever_its_embedding_is_called(name: str, tmp_path: Any) -> None:
    tied = ALL_MODELS[name]
    model = adapt(tied, saved(tied, tied.outputs))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tied.build(), tmp_path)
    torch.testing.assert_close(outputs(tied, again), outputs(tied, model), rtol=0, atol=1e-5)
    with again.disable_adapter():
        torch.testing.assert_close(outputs(tied, again), outputs(tied, tied.build()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("route", ["modules_to_save", "target_modules"])
def test_4_a_file_under_a_second_name_computes_the_same_and_is_tied(route: str, tmp_path: Any) -> None:
    tied = ALL_MODELS["llama"]
    model = adapt(tied, lora(tied, **{route: ["lm_head"] if route == "modules_to_save" else ["q_proj", "lm_head"]}))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    first = outputs(tied, model)
    model.set_adapter("second")
    assert torch.equal(outputs(tied, model), first)
    trained = [p for name, p in model.named_parameters() if ".second" in name]
    assert len({id(p) for p in trained}) == len({p.data_ptr() for p in trained})


@pytest.mark.parametrize("side", ["lm_head", "embed_tokens", "shared"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_5_every_name_of_a_shared_embedding_trains_what_is_used(name: str, side: str) -> None:
    tied = ALL_MODELS[name]
    model = adapt(tied, saved(tied, side))
    trained = [p for n, p in model.named_parameters() if "modules_to_save" in n and p.shape == (48, 16)]
    assert len(trained) == 1
    tied.forward(model).sum().backward()
    assert trained[0].grad.abs().sum() > 0
    assert_close(outputs(tied, copy.deepcopy(model).merge_and_unload()), outputs(tied, model))


@pytest.mark.parametrize("route", ["tokens", "saved", "targeted"])
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "plain"])
def test_6_the_bias_of_a_head_is_kept(name: str, route: str) -> None:
    tied = ALL_MODELS[name]
    config = {
        "tokens": lambda: lora(tied, trainable_token_indices={tied.inputs: [3, 5]}),
        "saved": lambda: saved(tied, tied.inputs),
        "targeted": lambda: lora(tied, target_modules=[tied.inputs]),
    }[route]()
    torch.testing.assert_close(outputs(tied, get_peft_model(tied.build(), config)), outputs(tied, tied.build()))


@pytest.mark.parametrize("route", ["modules_to_save", "target_modules", "trainable_token_indices"])
def test_7_one_parameter_one_gradient_one_count(route: str) -> None:
    """The gradient is that of the base model's one matrix, which is used on both sides."""
    tied = ALL_MODELS["llama"]
    value = {"trainable_token_indices": [3, 5]}.get(route, ["embed_tokens", "lm_head"])
    model = adapt(tied, lora(tied, **{route: value}))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len({p.data_ptr() for p in trained}) == len(trained)
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in trained)
    if route == "modules_to_save":
        loss = tied.forward(model).pow(2).mean()
        loss.backward()
        copied = model.get_base_model().get_input_embeddings().modules_to_save["default"].weight
        with torch.no_grad():
            copied.copy_(copied)
        merged = copy.deepcopy(model).merge_and_unload()
        for parameter in merged.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        tied.forward(merged).pow(2).mean().backward()
        assert_close(copied.grad, merged.lm_head.weight.grad)


def test_8_casting_and_copying_keep_ties() -> None:
    tied = ALL_MODELS["llama"]
    for config in (saved(tied, "lm_head"), lora(tied, target_modules=["q_proj", "lm_head"])):
        model = adapt(tied, config)
        count = sum(p.numel() for p in model.parameters())
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to(torch.float64)):
            assert sum(p.numel() for p in again.parameters()) == count
            assert again.merge_and_unload().lm_head.weight is not None
            assert again.get_base_model().lm_head.weight is again.get_base_model().model.embed_tokens.weight


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_9_a_merged_model_is_the_same_after_reloading(name: str, tmp_path: Any) -> None:
    tied = ALL_MODELS[name]
    with pytest.warns(PeftWarning, match="ensure_weight_tying=True"):
        model = randomised(get_peft_model(tied.build(), saved(tied, tied.outputs, ensure_weight_tying=False)))
    expected = outputs(tied, model)
    with pytest.warns(PeftWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, attn_implementation="eager")
    assert_close(outputs(tied, again), expected)


def test_10_layernorm_tuning_with_a_saved_head_leaves_no_wrapper() -> None:
    tied = ALL_MODELS["llama"]
    config = LNTuningConfig(target_modules=["norm"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    model = adapt(tied, config)
    expected = outputs(tied, model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, ModulesToSaveWrapper) for module in merged.modules())
    assert type(merged.lm_head) is nn.Linear
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(outputs(tied, merged), expected)


def test_11_a_second_adapter_with_tokens_works_on_a_tied_model() -> None:
    tied = ALL_MODELS["llama"]
    model = adapt(tied, TrainableTokensConfig(token_indices=[3, 5]))
    first = outputs(tied, model)
    model.add_adapter("second", TrainableTokensConfig(token_indices=[5, 7, 9]))
    model.set_adapter("second")
    randomised(model)
    second = outputs(tied, model)
    assert not torch.equal(first, second)
    assert_close(outputs(tied, copy.deepcopy(model).merge_and_unload()), second)
    model.set_adapter("default")
    assert torch.equal(outputs(tied, model), first)


@pytest.mark.parametrize("route", ["modules_to_save", "target_modules"])
def test_12_unload_gives_the_base_model(route: str) -> None:
    tied = ALL_MODELS["llama"]
    bare = adapt(tied, lora(tied, **{route: ["lm_head"]})).unload()
    assert torch.equal(outputs(tied, bare), outputs(tied, tied.build()))
    assert bare.lm_head.weight is bare.model.embed_tokens.weight


def test_13_a_mixed_model_heeds_the_flag() -> None:
    tied = ALL_MODELS["llama"]
    model = randomised(get_peft_model(tied.build(), saved(tied, "lm_head"), mixed=True))
    inner = model.base_model.model
    assert (
        inner.lm_head.modules_to_save["default"].weight is inner.model.embed_tokens.modules_to_save["default"].weight
    )


@pytest.mark.parametrize("ensure", [True, False])
@pytest.mark.parametrize("tokens", [[3, 5], {"embed_tokens": [3, 5], "lm_head": [3, 5]}], ids=str)
def test_14_no_warning_where_nothing_is_wrong(tokens: Any, ensure: bool) -> None:
    tied = ALL_MODELS["llama"]
    adapt(tied, lora(tied, trainable_token_indices=tokens, ensure_weight_tying=ensure))


def test_14_one_warning_for_one_cause() -> None:
    tied = ALL_MODELS["llama"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(llama(tie=False), lora(tied, trainable_token_indices=[3, 5]))
    texts = [str(w.message) for w in caught if issubclass(w.category, PeftWarning)]
    assert len(texts) == 1 and "has no effect" in texts[0]


def test_15_the_tied_matrix_is_held_and_written_once(tmp_path: Any) -> None:
    tied = ALL_MODELS["llama"]
    seen: list[int] = []
    copy_of = nn.Parameter.__deepcopy__

    def count(self: nn.Parameter, memo: dict) -> nn.Parameter:
        seen.extend([1] if self.shape == (48, 16) and id(self) not in memo else [])
        return copy_of(self, memo)

    model = tied.build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Parameter, "__deepcopy__", count)
        model = get_peft_model(model, saved(tied, "embed_tokens", "lm_head"))
    assert len(seen) == 1
    model.save_pretrained(tmp_path, deduplicate_tied=True)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    matrix = 48 * 16 * 4
    factors = sum(p.numel() * 4 for n, p in model.named_parameters() if "lora_" in n)
    assert size < 1.5 * matrix + factors + 4096 and size > matrix + factors
