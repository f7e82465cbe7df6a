# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adaption prompt: what attention modules add, computed another way, and the life of several adapters."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    gpt2,
    llama,
    logits,
    opt,
    randomise,
    refused,
    seeded,
    token_ids,
    trainable,
    warned,
)
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from peft.tuners.adaption_prompt import AdaptedAttention
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG, prepare_config
from peft.tuners.adaption_prompt.utils import (
    gpt2_compute_query_states,
    is_adaption_prompt_trainable,
    llama_apply_rotary_pos_emb,
    llama_rotate_half,
)


IDS = token_ids()
N = 3


def mistral() -> MistralForCausalLM:
    """Heads that are wider together than the model, and share keys."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    with seeded():
        return MistralForCausalLM(MistralConfig(vocab_size=48, **sizes, **heads)).eval()


BASES = {"llama": llama, "gpt2": gpt2, "mistral": mistral}
each_base = pytest.mark.parametrize("base", BASES.values(), ids=list(BASES))


def config(**fields: Any) -> AdaptionPromptConfig:
    return AdaptionPromptConfig(**{"adapter_len": N, "adapter_layers": 1, "task_type": "CAUSAL_LM", **fields})


def adapted(base: nn.Module, effect: bool = True, **fields: Any) -> PeftModel:
    model = get_peft_model(base, config(**fields))
    if effect:
        randomise(model, "adaption_")
    return model.eval()


def wrappers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(type(module), "projections")]


# ------------------------------------------------------------------------------------------ math
def half_turned(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


def added_by_hand(wrapper: nn.Module, x: torch.Tensor, cos_sin: tuple | None) -> torch.Tensor:
    """Head by head, with the projections of the module."""
    attention, prompt = wrapper.model, wrapper.adaption_prompt[0]
    width = attention.head_dim
    if cos_sin is None:
        queries = attention.c_attn(x)[..., : x.shape[-1]]
        _, keys, values = attention.c_attn(prompt).split(x.shape[-1], dim=-1)
    else:
        queries, keys, values = attention.q_proj(x), attention.k_proj(prompt), attention.v_proj(prompt)
    heads = queries.shape[-1] // width
    times = heads * width // keys.shape[-1]
    joined = []
    for head in range(heads):
        at, shared = slice(head * width, (head + 1) * width), slice(head // times * width, (head // times + 1) * width)
        q = queries[..., at]
        if cos_sin is not None:
            q = q * cos_sin[0] + half_turned(q) * cos_sin[1]
        weights = wrapper.adaption_gate * F.softmax(q @ keys[:, shared].T / width**0.5, dim=-1)
        joined.append(weights @ values[:, shared])
    added = torch.cat(joined, dim=-1)
    return added if cos_sin is None else attention.o_proj(added)


@each_base
def test_math(base) -> None:
    model = adapted(base())
    (wrapper,) = wrappers(model)
    seen = {}

    def note(module: nn.Module, args: tuple, kwargs: dict, outputs: tuple) -> None:
        seen[module] = (args, kwargs, outputs[0])

    for module in (wrapper, wrapper.model):
        module.register_forward_hook(note, with_kwargs=True)
    logits(model, input_ids=IDS)
    args, kwargs, found = seen[wrapper]
    x = kwargs.get("hidden_states", args[0] if args else None)
    expected = seen[wrapper.model][2] + added_by_hand(wrapper, x, kwargs.get("position_embeddings"))
    assert_close(found, expected)


@each_base
def test_a_fresh_adapter_is_the_identity_and_draws_prompts_from_below(base) -> None:
    expected = logits(base(), input_ids=IDS)
    plain = base()
    with seeded(4):
        model = get_peft_model(plain, config(adapter_layers=2)).eval()
    assert_equal(logits(model, input_ids=IDS), expected)
    with seeded(4):
        for wrapper in wrappers(model):
            assert_equal(wrapper.adaption_prompt, torch.randn(1, N, plain.config.hidden_size))
            assert not wrapper.adaption_gate.any()
    assert all(name.endswith(("adaption_prompt", "adaption_gate")) for name in trainable(model))


def test_generate_with_and_without_a_cache() -> None:
    for base in BASES.values():
        model = adapted(base())
        found = [
            model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert_equal(*found)


def test_queries_of_cross_attention() -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "add_cross_attention": True}
    block = GPT2LMHeadModel(GPT2Config(**sizes)).transformer.h[0]
    x = torch.randn(2, 3, 16)
    found = gpt2_compute_query_states(block.crossattention, x, encoder_hidden_states=x)
    assert_close(found.transpose(1, 2).flatten(2), block.crossattention.q_attn(x))
    with pytest.raises(ValueError, match="q_attn"):
        gpt2_compute_query_states(block.attn, x, encoder_hidden_states=x)


def test_rotation() -> None:
    x = torch.arange(4.0)
    assert llama_rotate_half(x).tolist() == [-2, -3, 0, 1]
    q, angles = torch.randn(1, 2, 3, 4), torch.randn(5, 4)
    ids = torch.tensor([[4, 0, 2]])
    found = llama_apply_rotary_pos_emb(q, angles.cos()[None, None], angles.sin()[None, None], ids)
    assert_close(found[0, 1, 0], q[0, 1, 0] * angles[4].cos() + half_turned(q[0, 1, 0]) * angles[4].sin())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = adapted(llama().to(dtype))
    (wrapper,) = wrappers(model)
    assert wrapper.adaption_prompt.dtype == wrapper.adaption_gate.dtype == dtype
    assert logits(model, input_ids=IDS).dtype == dtype


# ------------------------------------------------------------------------------------------ several adapters
def two() -> PeftModel:
    model = adapted(llama(), adapter_layers=2)
    model.add_adapter("other", config(adapter_len=5, adapter_layers=1))
    randomise(model, "others.other.", seed=7)
    return model


def test_switching() -> None:
    model = two()
    first = logits(model, input_ids=IDS)
    assert model.active_adapter == "default"
    model.set_adapter("other")
    second = logits(model, input_ids=IDS)
    assert differs(first, second)
    alone = get_peft_model(llama(), config(adapter_len=5), adapter_name="other").eval()
    with torch.no_grad():
        for mine, its in zip(
            wrappers(alone)[0].adapter_parameters("other"), wrappers(model)[1].adapter_parameters("other"), strict=True
        ):
            mine.copy_(its)
    assert_equal(second, logits(alone, input_ids=IDS))
    assert {name.rsplit(".", 4)[-3] for name in trainable(model)} == {"1"}
    model.set_adapter("default")
    assert_equal(logits(model, input_ids=IDS), first)
    assert len(trainable(model)) == 4
    model.set_adapter("default", inference_mode=True)
    assert not trainable(model)
    with refused(model, ValueError, "one adaption prompt"):
        model.base_model.set_adapter(["default", "other"])


def test_disabling_keeps_what_is_trained_and_saved() -> None:
    model = two()
    before = trainable(model)
    with model.disable_adapter():
        assert_equal(logits(model, input_ids=IDS), logits(llama(), input_ids=IDS))
        keys = set(model.state_dict())
    assert trainable(model) == before and keys == set(model.state_dict())


def test_deleting() -> None:
    model = two()
    model.set_adapter("other")
    with warned("'default' is active now"):
        model.delete_adapter("other")
    assert model.active_adapter == "default" and len(trainable(model)) == 4
    model.delete_adapter("default")
    assert not wrappers(model)
    assert_equal(logits(model, input_ids=IDS), logits(llama(), input_ids=IDS))
    model.add_adapter("again", config())
    assert model.active_adapter == "again"


def test_an_adapter_that_is_not_active_is_saved_and_moved(tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert {key.rpartition(".")[0] for key in saved} == {"base_model.model.model.layers.1.self_attn"}
    again = PeftModel.from_pretrained(llama(), tmp_path / "other", adapter_name="x")
    model.set_adapter("other")
    assert_equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))
    again.load_adapter(tmp_path, "y", low_cpu_mem_usage=True)
    again.set_adapter("y")
    model.set_adapter("default")
    assert_equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))
    again.half()
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float16}


def test_loaded_adapters_are_frozen_unless_asked_for(tmp_path: Path) -> None:
    adapted(llama()).save_pretrained(tmp_path)
    assert not trainable(PeftModel.from_pretrained(llama(), tmp_path))
    assert len(trainable(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))) == 2


@each_base
def test_copies(base) -> None:
    model = adapted(base())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))


def test_status() -> None:
    model = two()
    assert [layer.available_adapters for layer in model.get_layer_status()] == [["default"], ["default", "other"]]
    assert model.get_model_status().active_adapters == ["default"]


def test_ties_stay(tmp_path: Path) -> None:
    model = adapted(llama(tied=True))
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight


# ------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"adapter_len": None}, TypeError, "adapter_len"),
        ({"adapter_layers": None}, TypeError, "adapter_layers"),
        ({"adapter_len": 0}, ValueError, "adapter_len"),
        ({"adapter_layers": 0}, ValueError, "adapter_layers"),
        ({"adapter_layers": 9}, ValueError, "adapter_layers=9"),
        ({"target_modules": "nothing"}, ValueError, "'nothing'"),
        ({"target_modules": ["self_attn"]}, ValueError, "one name"),
        ({"target_modules": "q_proj"}, ValueError, "q_proj"),
    ],
)
def test_refusals_change_nothing(fields: dict, error: type, said: str) -> None:
    base = llama()
    with refused(base, error, said):
        get_peft_model(base, config(**fields))
    model = adapted(llama())
    with refused(model, error, said):
        model.add_adapter("other", config(**fields))


def test_other_refusals() -> None:
    base = opt()
    with refused(base, ValueError, "llama, mistral, gpt2", "opt"):
        get_peft_model(base, config())
    model = two()
    with refused(model, ValueError, "already"):
        model.add_adapter("other", config())
    with refused(model, ValueError, "already"):
        model.base_model.add_adapter("other", config())
    for act in (model.base_model.set_adapter, model.base_model.delete_adapter):
        with refused(model, ValueError, "nobody"):
            act("nobody")
    with refused(model, TypeError, "AdaptedAttention"):
        model(input_ids=IDS, adapter_names=["default", "other"])
    for name in ("merge_and_unload", "unload", "merge_adapter"):
        assert not hasattr(model, name)


# ------------------------------------------------------------------------------------------ public names
def test_public_names() -> None:
    assert prepare_config(config(), gpt2()).target_modules == "attn"
    assert TRANSFORMERS_MODEL_CONFIG["mistral"].o_proj_layer == "o_proj"
    assert is_adaption_prompt_trainable("model.self_attn.adaption_gate")
    assert not is_adaption_prompt_trainable("model.adaption_prompt.weight")
    attention = llama().model.layers[0].self_attn
    alone = AdaptedAttention("llama", 3, attention)
    assert alone.adaption_prompt.shape == (1, 3, 16) and alone.layer_idx == 0
