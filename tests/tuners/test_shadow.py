# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Shadow: a state that goes from block to block, computed by hand, and the small model that it comes from."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from transformers import DynamicCache, LlamaConfig, LlamaForSequenceClassification, LlamaModel

from peft import PeftModel, ShadowConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.shadow import ShadowCache, ShadowLayer


pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

IDS = token_ids()
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
BASES = {"llama": llama, "gpt2": gpt2, "opt": opt}
each_base = pytest.mark.parametrize("base", BASES.values(), ids=list(BASES))


def config(**fields: Any) -> ShadowConfig:
    return ShadowConfig(**{"r": 3, "shadow_alpha": 0.7, "task_type": "CAUSAL_LM", **fields})


def classifier() -> LlamaForSequenceClassification:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with seeded():
        return LlamaForSequenceClassification(LlamaConfig(vocab_size=48, num_labels=3, pad_token_id=0, **sizes)).eval()


def adapted(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """Shadow with an effect."""
    model = get_peft_model(llama() if base is None else base, config(**fields))
    randomise(model, "shadow_")
    return model.eval()


def layers(model: nn.Module) -> list[ShadowLayer]:
    return [module for module in model.modules() if isinstance(module, ShadowLayer)]


# ------------------------------------------------------------------------------------------ math
def network(x: torch.Tensor, sequential: nn.Sequential) -> torch.Tensor:
    first, _, second = sequential
    inner = F.linear(x, first.weight, first.bias)
    return F.linear(inner * 0.5 * (1 + torch.erf(inner / 2**0.5)), second.weight, second.bias)


def test_math() -> None:
    model = adapted()
    inner = model.base_model.model.model
    backbone = model.base_model.shadow_backbone["default"]
    state = backbone(inputs_embeds=inner.embed_tokens(IDS)).last_hidden_state
    hidden = inner.embed_tokens(IDS)
    rotary = inner.rotary_emb(hidden, torch.arange(5)[None])
    mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    for layer in layers(model):
        down, up = layer.shadow_down["default"].weight, layer.shadow_up["default"].weight
        hidden = hidden + 0.7 * (hidden - state) @ down.T @ up.T
        hidden = layer.base_layer(hidden, attention_mask=mask, position_embeddings=rotary)
        share = torch.sigmoid(network(hidden, layer.shadow_update_gate["default"]))
        state = (1 - share) * state + share * network(hidden, layer.shadow_update_transform["default"])
    expected = model.base_model.model.lm_head(inner.norm(hidden))
    assert_close(logits(model, input_ids=IDS), expected)


@each_base
def test_a_fresh_adapter_is_the_identity(base) -> None:
    model = get_peft_model(base(), config()).eval()
    assert_close(logits(model, input_ids=IDS), logits(base(), input_ids=IDS))
    assert trainable(model) == {name for name, _ in model.named_parameters() if "shadow_" in name}


def test_random_draws() -> None:
    base = llama()
    with seeded():
        model = get_peft_model(base, config(shadow_hidden_size=8, init_weights=False))
    with seeded():
        small = copy.deepcopy(base.config)
        small.num_hidden_layers, small.hidden_size = 1, 8
        backbone, projection = LlamaModel(small), nn.Linear(8, 16, bias=False)
        down, up = nn.Linear(16, 3, bias=False), nn.Linear(3, 16, bias=False)
        transform = nn.Linear(16, 3)
    found, first = model.base_model, layers(model)[0]
    for mine, expected in (
        (found.shadow_backbone["default"].layers[0].self_attn.q_proj, backbone.layers[0].self_attn.q_proj),
        (found.shadow_projection["default"], projection),
        (first.shadow_down["default"], down),
        (first.shadow_up["default"], up),
        (first.shadow_update_transform["default"][0], transform),
    ):
        assert_equal(mine.weight, expected.weight)


def test_dropout_in_training_only() -> None:
    model = adapted(shadow_dropout=0.5)
    assert_equal(logits(model, input_ids=IDS), logits(model, input_ids=IDS))
    model.train()
    assert differs(logits(model, input_ids=IDS), logits(model, input_ids=IDS))


@pytest.mark.parametrize("by_position", [False, True])
def test_the_small_model_sees_the_mask(by_position: bool) -> None:
    model = adapted()
    args, kwargs = ((IDS, MASK), {}) if by_position else ((), {"input_ids": IDS, "attention_mask": MASK})
    changed = IDS.clone()
    changed[1, 3:] = 1
    found = model.base_model(*args, **kwargs).logits
    other = model.base_model(changed, MASK).logits
    assert_close(found[1, :3], other[1, :3])
    assert_close(found, logits(model, input_ids=IDS, attention_mask=MASK))


def test_own_embeddings() -> None:
    model = adapted(share_embeddings=False)
    table = model.base_model.shadow_backbone["default"].embed_tokens
    before = logits(model, input_ids=IDS)
    with torch.no_grad():
        table.weight[IDS[0, 0]] += 1
    assert differs(logits(model, input_ids=IDS), before)
    embeds = model.get_input_embeddings()(IDS)
    shared = adapted()
    assert_close(logits(shared, inputs_embeds=embeds), logits(shared, input_ids=IDS))


# ------------------------------------------------------------------------------------------ loss
def test_loss_of_a_language_model() -> None:
    model = adapted(auxiliary_loss_weight=0.3)
    outputs = model(input_ids=IDS, labels=IDS)
    base = model.base_model.model
    state = model.base_model.shadow_backbone["default"](inputs_embeds=base.model.embed_tokens(IDS)).last_hidden_state
    own = F.cross_entropy(base.lm_head(state)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    plain = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert_close(outputs.shadow_loss, own)
    assert_close(outputs.loss, plain + 0.3 * own)
    assert outputs[0] is outputs.loss and not outputs.shadow_loss.requires_grad
    assert_equal(model.base_model.last_shadow_loss, outputs.shadow_loss)
    assert_close(model.base_model.shadow_auxiliary_loss(IDS), own)
    outputs.loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {name for name in trainable(model) if "layers.1.shadow_update" in name}
    assert not hasattr(adapted(auxiliary_loss_weight=0)(input_ids=IDS, labels=IDS), "shadow_loss")


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (torch.tensor([1, 2]), F.cross_entropy),
        (torch.tensor([[1.0, 0, 1], [0, 0, 1]]), F.binary_cross_entropy_with_logits),
    ],
)
def test_loss_of_a_classifier(labels: torch.Tensor, loss) -> None:
    model = adapted(classifier(), task_type="SEQ_CLS")
    model(input_ids=IDS, attention_mask=MASK)
    inner, tuner = model.base_model.model.model, model.base_model
    states = tuner.shadow_backbone["default"](inputs_embeds=inner.embed_tokens(IDS), attention_mask=MASK)[0]
    last = torch.stack([states[0, 4], states[1, 2]])
    expected = loss(tuner.shadow_head["default"](last), labels)
    assert_close(tuner.shadow_auxiliary_loss(labels, MASK), expected)
    with refused(model, ValueError, "brings a head"):
        model.add_adapter("other", config(task_type="SEQ_CLS"))


def test_no_loss_without_a_state() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="no shadow state"):
        model.base_model.shadow_auxiliary_loss(IDS)


# ------------------------------------------------------------------------------------------ caches and generation
@each_base
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generate_with_and_without_a_cache(base, options: dict) -> None:
    model = adapted(base())
    found = []
    for use_cache in (True, False):
        with seeded():
            made = model.generate(
                input_ids=IDS, **{"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache, **options}
            )
        found.append(made)
    assert_equal(*found)
    assert "forward" not in vars(model.get_base_model())


def test_a_step_with_a_cache() -> None:
    model = adapted()
    whole = logits(model, input_ids=IDS)
    start = model(input_ids=IDS[:, :3], use_cache=True)
    cache = start.past_key_values
    assert isinstance(cache, ShadowCache) and cache.get_seq_length() == cache.shadow.get_seq_length() == 3
    step = model(input_ids=IDS[:, 3:], past_key_values=cache, attention_mask=torch.ones(2, 5, dtype=torch.long))
    assert_close(step.logits, whole[:, 3:])
    plain = model.base_model.model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has not seen"):
        model(input_ids=IDS, past_key_values=plain)


def test_cache() -> None:
    cache = ShadowCache(DynamicCache(), DynamicCache())
    for each, width in ((cache, 4), (cache.shadow, 2)):
        for layer in range(2):
            each.update(torch.randn(2, 1, 3, width), torch.randn(2, 1, 3, width), layer)
    assert len(cache) == 2 and cache.get_seq_length() == 3 and not cache.is_compileable
    cache.batch_repeat_interleave(2)
    assert cache.base.layers[0].keys.shape[0] == cache.shadow.layers[0].keys.shape[0] == 4
    cache.batch_select_indices(torch.tensor([0, 2]))
    before = cache.shadow.layers[1].values.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert_equal(cache.shadow.layers[1].values, before.flip(0))
    cache.crop(-1)
    assert cache.get_seq_length() == cache.shadow.get_seq_length() == 2
    assert copy.deepcopy(cache).get_seq_length() == 2
    for refuse in (cache.to_legacy_cache, ShadowCache.from_legacy_cache):
        with pytest.raises(NotImplementedError, match="two caches"):
            refuse()


# ------------------------------------------------------------------------------------------ the small model
def test_targets() -> None:
    for fields, expected in (
        ({}, [0, 1]),
        ({"layers_to_transform": [1]}, [1]),
        ({"target_modules": ["layers.0"]}, [0]),
        ({"target_modules": r".*\.layers\.\d+"}, [0, 1]),
    ):
        blocks = get_peft_model(llama(), config(**fields)).base_model.model.model.layers
        assert [i for i, block in enumerate(blocks) if isinstance(block, ShadowLayer)] == expected


def test_small_models_that_are_loaded(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = LlamaModel(LlamaConfig(vocab_size=48, **sizes))
    small.save_pretrained(tmp_path / "small")
    model = get_peft_model(llama(), config(shadow_model=str(tmp_path / "small")))
    tuner = model.base_model
    assert_equal(tuner.shadow_backbone["default"].embed_tokens.weight, small.embed_tokens.weight)
    assert tuner.shadow_projection["default"].weight.shape == (16, 8)
    assert not tuner.shadow_backbone["default"].embed_tokens.weight.requires_grad
    with model.disable_adapter():
        assert not trainable(model)
    assert not tuner.shadow_backbone["default"].embed_tokens.weight.requires_grad
    folder = tmp_path / "projected"
    folder.mkdir()
    tensors = {f"shadow_model.{key}": value for key, value in small.state_dict().items()}
    settings = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": small.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(settings))
    weight = torch.randn(16, 8)
    save_file({**tensors, "shadow_hidden_projection.weight": weight}, folder / "model.safetensors")
    tuner = get_peft_model(llama(), config(shadow_model=str(folder))).base_model
    assert_equal(tuner.shadow_projection["default"].weight, weight)
    save_file({**tensors, "shadow_hidden_projection.weight": weight.T.contiguous()}, folder / "model.safetensors")
    base = llama()
    with refused(base, ValueError, "(16, 8)", "(8, 16)"):
        get_peft_model(base, config(shadow_model=str(folder)))


@pytest.mark.parametrize("projected", [False, True])
def test_loading_an_adapter_reads_the_small_model_from_its_file(projected: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    small, folder = LlamaModel(LlamaConfig(vocab_size=48, **sizes)), tmp_path / "small"
    small.save_pretrained(folder)
    if projected:
        tensors = {f"shadow_model.{key}": value for key, value in small.state_dict().items()}
        settings = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": small.config.to_dict()}
        (folder / "config.json").write_text(json.dumps(settings))
        save_file({**tensors, "shadow_hidden_projection.weight": torch.randn(16, 8)}, folder / "model.safetensors")
    model = adapted(shadow_model=str(folder))
    model.save_pretrained(tmp_path / "adapter")
    (folder / "model.safetensors").unlink()
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter", strict=True)
    assert_equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))
    again.load_adapter(tmp_path / "adapter", "other", strict=True)
    again.set_adapter("other")
    assert_equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))
    with pytest.raises(OSError, match="model.safetensors"):
        get_peft_model(llama(), config(shadow_model=str(folder)))


@each_base
def test_embeddings_that_are_given_are_not_made_again(base, tmp_path: Path) -> None:
    """Files of the released package hold some for a small model whose class calls them otherwise than Llama does."""
    model = adapted(base())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = adapted(base(), share_embeddings=False).base_model.shadow_backbone["default"]
    extra = {f"base_model.shadow_backbone.default.{key}" for key in kept.state_dict()} - tensors.keys()
    assert len(extra) == 1
    save_file({**tensors, extra.pop(): torch.randn(48, 16)}, file)
    again = PeftModel.from_pretrained(base(), tmp_path, strict=True)
    assert_equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))


@pytest.mark.parametrize("copied", [False, True])
def test_by_itself(copied: bool) -> None:
    model = adapted()
    alone = model.base_model.unload_shadow(copy=copied)
    base = model.base_model.model
    state = model.base_model.shadow_backbone["default"](inputs_embeds=base.model.embed_tokens(IDS)).last_hidden_state
    outputs = alone(input_ids=IDS, labels=IDS)
    assert_close(outputs.logits, base.lm_head(state))
    assert_close(outputs.loss, model(input_ids=IDS, labels=IDS).shadow_loss)
    assert (alone.get_input_embeddings() is base.model.embed_tokens) is not copied
    assert ("input_embeddings.weight" in alone.state_dict()) is copied
    by_hand = IDS
    for _ in range(3):
        by_hand = torch.cat([by_hand, alone(input_ids=by_hand).logits[:, -1:].argmax(-1)], dim=1)
    assert_equal(alone.generate(input_ids=IDS, max_new_tokens=3, do_sample=False), by_hand)
    with refused(model, ValueError, "nobody"):
        model.base_model.unload_shadow("nobody")


def test_a_classifier_by_itself() -> None:
    model = adapted(classifier(), task_type="SEQ_CLS")
    alone = model.base_model.unload_shadow()
    labels = torch.tensor([0, 2])
    assert not alone.can_generate() and alone.get_output_embeddings() is None
    found = alone(input_ids=IDS, attention_mask=MASK, labels=labels)
    assert found.logits.shape == (2, 3)
    assert_close(found.loss, model(input_ids=IDS, attention_mask=MASK, labels=labels).shadow_loss)


# ------------------------------------------------------------------------------------------ the life of adapters
def test_files(tmp_path: Path) -> None:
    model = adapted(shadow_hidden_size=8, shadow_num_attention_heads=2)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.shadow_down.default.weight" in keys
    assert "base_model.shadow_projection.default.weight" in keys
    for name, low_cpu_mem_usage in (("default", False), ("other", True)):
        again = PeftModel.from_pretrained(llama(), tmp_path, name, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not trainable(again)
        assert_equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "other" / "adapter_model.safetensors").keys() == keys


def test_several_adapters() -> None:
    model = adapted()
    first = logits(model, input_ids=IDS)
    model.add_adapter("other", config(r=2, shadow_hidden_size=8, shadow_num_attention_heads=2))
    assert all(".default." in name for name in trainable(model))
    model.set_adapter("other")
    assert all(".other." in name for name in trainable(model)) and trainable(model)
    assert_close(logits(model, input_ids=IDS), logits(llama(), input_ids=IDS))
    with refused(model, ValueError, "one Shadow adapter"):
        model.base_model.set_adapter(["default", "other"])
    before = trainable(model)
    with model.disable_adapter():
        assert not trainable(model)
        assert_equal(logits(model, input_ids=IDS), logits(llama(), input_ids=IDS))
    assert trainable(model) == before
    with warned("'default' is active now"):
        model.delete_adapter("other")
    assert not any(".other." in name for name in model.state_dict())
    assert_equal(logits(model, input_ids=IDS), first)
    assert all(".default." in name for name in trainable(model))


def test_copies() -> None:
    model = adapted()
    expected = logits(model, input_ids=IDS)
    model(input_ids=IDS, labels=IDS)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(logits(again, input_ids=IDS), expected)


def test_half_precision_and_checkpointing() -> None:
    model = get_peft_model(llama().to(torch.bfloat16), config())
    assert layers(model)[0].shadow_down["default"].weight.dtype == torch.float32
    assert model.base_model.shadow_backbone["default"].norm.weight.dtype == torch.bfloat16
    gradients = []
    for checkpointed in (False, True):
        model = adapted(shadow_dropout=0.0)
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable()
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, atol=1e-6)


def test_ties_stay_and_unloading_gives_the_base() -> None:
    base = llama(tied=True)
    model = adapted(base)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert model.base_model.unload() is base and not layers(base)
    assert_equal(logits(base, input_ids=IDS), logits(llama(tied=True), input_ids=IDS))


# ------------------------------------------------------------------------------------------ refusals
def test_merging_is_refused() -> None:
    model = adapted()
    for act in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload, layers(model)[0].merge):
        with refused(model, NotImplementedError, "cannot be merged"):
            act()


def test_refusals_change_nothing() -> None:
    base = llama(num_hidden_layers=3)
    for fields, error, said in (
        ({"target_modules": ["layers.0", "layers.2"]}, ValueError, "neighbours"),
        ({"target_modules": ["q_proj"]}, ValueError, "one list of blocks"),
        ({"r": 0}, ValueError, "r must be"),
    ):
        with refused(base, error, said):
            get_peft_model(base, config(**fields))
    base = gpt2()
    with refused(base, AttributeError, "intermediate_size"):
        get_peft_model(base, config(shadow_intermediate_size=8))
    net = nn.Sequential(nn.Linear(3, 3))
    with refused(net, AttributeError, "list of blocks"):
        get_peft_model(net, config(task_type=None))
    with pytest.raises(ValueError, match="shadow_hidden_size"):
        config(shadow_model="somewhere", shadow_hidden_size=8)
    model = adapted()
    model.add_adapter("other", config())
    with refused(model, TypeError, "ShadowLayer"):
        model(input_ids=IDS, adapter_names=["default", "other"])


def test_it_needs_a_model_around_it() -> None:
    base = llama()
    with refused(base, ValueError, "SHADOW"):
        inject_adapter_in_model(config(), base)
