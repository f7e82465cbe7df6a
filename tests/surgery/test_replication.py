# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
`layer_replication`: a deeper model out of a model's own layers, with adapters of its own in each.

The deeper model is built by hand: as many layers, the weights of the originals copied into them.
"""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from support.helpers import (
    VOCABULARY,
    WIDTH,
    assert_close,
    assert_equal,
    differs,
    gpt2,
    llama,
    logits,
    opt,
    randomise,
    refused,
    stack,
    token_ids,
    trainable,
)
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import clone_module, replicate_layers
from peft.tying.groups import find_tied_groups
from peft.tying.report import weight_tying_report


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

IDS = token_ids()
RANGES = [(0, 2), (0, 1), (1, 2)]
SOURCES = [0, 1, 0, 1]


def config(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "layer_replication": RANGES, **kwargs})


def adapted(base: nn.Module | None = None, **kwargs) -> PeftModel:
    model = get_peft_model(llama() if base is None else base, config(**kwargs)).eval()
    randomise(model)
    return model


def deeper(tied: bool = False) -> LlamaForCausalLM:
    """A model of that depth, with copies of the weights."""
    small, deep = llama(tied), llama(tied, num_hidden_layers=len(SOURCES))
    deep.load_state_dict(small.state_dict(), strict=False)
    for place, source in enumerate(SOURCES):
        deep.model.layers[place].load_state_dict(small.model.layers[source].state_dict())
    return deep


def by_hand(model: PeftModel) -> LlamaForCausalLM:
    """The deeper model, with each layer's own delta in its own weight."""
    deep = deeper()
    with torch.no_grad():
        for place, layer in enumerate(deep.model.layers):
            adapter = model.get_base_model().model.layers[place].self_attn.q_proj
            layer.self_attn.q_proj.weight += adapter.get_delta_weight("default")
    return deep


# ------------------------------------------------------------------------------------------ what it computes
def test_every_replica_has_an_adapter_of_its_own() -> None:
    model = adapted()
    assert model.targeted_module_names == [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    assert model.get_base_model().config.num_hidden_layers == 4
    assert_close(logits(model, IDS), logits(by_hand(model), IDS))
    with model.disable_adapter():
        assert_close(logits(model, IDS), logits(deeper(), IDS))
    model(IDS).logits.sum().backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert len(gradients) == 8
    assert all(g.abs().sum() > 0 for g in gradients)


def test_replicas_share_the_weights_of_their_original() -> None:
    small = llama()
    total = sum(p.numel() for p in small.parameters())
    model = adapted(small)
    layers = small.model.layers
    assert layers[2].mlp.up_proj.weight is layers[0].mlp.up_proj.weight
    assert layers[3].self_attn.q_proj.weight is layers[1].self_attn.q_proj.weight
    assert layers[2] is not layers[0]
    assert model.get_nb_trainable_parameters() == (8 * 2 * WIDTH, total + 8 * 2 * WIDTH)


@pytest.mark.parametrize("use_cache", [False, True])
def test_generating_with_a_cache(use_cache: bool) -> None:
    """Every replica has a place of its own in the cache."""
    model = adapted()
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache}
    assert_equal(model.generate(input_ids=IDS, **options), by_hand(model).generate(input_ids=IDS, **options))


def test_configs_with_an_entry_per_layer() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "head_dim": 8}
    sizes.update(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    types = ["full_attention", "sliding_attention"]
    base = Qwen3ForCausalLM(Qwen3Config(**sizes, layer_types=types, use_sliding_window=True, sliding_window=4)).eval()
    model = get_peft_model(base, config(layer_replication=[(1, 2), (0, 2)]))
    assert base.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    model.generate(input_ids=IDS, max_new_tokens=3)
    assert model.unload().config.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (gpt2, "transformer.h"),
        (opt, "model.decoder.layers"),
        (
            lambda: BertModel(
                BertConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=WIDTH,
                    intermediate_size=24,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                )
            ).eval(),
            "encoder.layer",
        ),
    ],
    ids=["gpt2", "opt", "bert"],
)
def test_other_architectures(build, path: str) -> None:
    base = build()
    model = get_peft_model(base, config(target_modules=None, fan_in_fan_out=path == "transformer.h"))
    assert len(base.get_submodule(path)) == base.config.num_hidden_layers == 4
    before = model(IDS)[0]
    randomise(model)
    assert differs(model(IDS)[0], before)


# ------------------------------------------------------------------------------------------ ties, merging
def test_replicas_are_no_ties() -> None:
    """Nothing is said about ties (warnings are errors here), and the report holds."""
    model = adapted(ensure_weight_tying=False)
    base = model.get_base_model()
    assert find_tied_groups(base) == []
    assert len(find_tied_groups(base, with_replicas=True)) == 2 * 9
    assert weight_tying_report(model).rows == ()
    with pytest.warns(match="no two modules"):
        get_peft_model(llama(), config(ensure_weight_tying=True))


def test_true_ties_are_still_seen() -> None:
    model = get_peft_model(
        llama(tied=True), config(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    ).eval()
    (group,) = find_tied_groups(model.get_base_model())
    assert group.members == ("model.embed_tokens.weight", "lm_head.weight")
    randomise(model)
    expected = logits(model, IDS)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert_close(logits(merged, IDS), expected)


def test_a_layer_that_is_tied_to_another_one_keeps_that_tie() -> None:
    """Two of the model's own layers share a matrix; that is a tie, replicas or not."""
    base = llama()
    base.model.layers[1].self_attn.q_proj.weight = base.model.layers[0].self_attn.q_proj.weight
    replicate_layers(base, RANGES)
    (group,) = find_tied_groups(base)
    assert group.members == tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4))


def test_merging_gives_each_replica_its_own_weight() -> None:
    model = adapted()
    expected = logits(model, IDS)
    model.merge_adapter()
    assert_close(logits(model, IDS), expected)
    model.unmerge_adapter()
    assert_equal(logits(model, IDS), expected)
    layers = model.get_base_model().model.layers
    assert layers[0].self_attn.q_proj.weight is layers[2].self_attn.q_proj.weight
    layers[2].self_attn.q_proj.merge()
    assert_close(logits(model, IDS), expected)


def test_the_merged_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model, IDS)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert_close(logits(merged, IDS), expected)
    assert find_tied_groups(merged, with_replicas=True) == []
    assert_equal(merged.model.layers[2].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight)
    merged.save_pretrained(tmp_path)
    assert_equal(logits(LlamaForCausalLM.from_pretrained(tmp_path), IDS), logits(merged, IDS))


def test_unloading_gives_the_model_back() -> None:
    base = llama()
    names, layers = [n for n, _ in base.named_modules()], list(base.model.layers)
    state = copy.deepcopy(base.state_dict())
    unloaded = adapted(base).unload()
    assert unloaded is base
    assert list(base.model.layers) == layers
    assert ([n for n, _ in base.named_modules()], base.config.num_hidden_layers) == (names, 2)
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1]
    for key, tensor in base.state_dict().items():
        assert_equal(tensor, state[key])
    assert_equal(logits(adapted(base), IDS), logits(adapted(), IDS))


def test_layers_that_were_left_out_are_gone() -> None:
    model = get_peft_model(llama(), config(layer_replication=[(1, 2), (1, 2)]))
    with pytest.warns(match="left layers out"):
        unloaded = model.unload()
    assert len(unloaded.model.layers) == unloaded.config.num_hidden_layers == 2


# ------------------------------------------------------------------------------------------ files, copies, adapters
def test_saving_and_loading(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_replicated_too(copied) -> None:
    model = adapted()
    twin = copied(model)
    assert_equal(logits(twin, IDS), logits(model, IDS))
    layers = twin.get_base_model().model.layers
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert find_tied_groups(twin.get_base_model()) == []
    assert len(twin.unload().model.layers) == 2


def test_further_adapters(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    expected = logits(model, IDS)
    model.add_adapter("same", config())
    model.add_adapter("without", config(layer_replication=None, target_modules=["v_proj"]))
    model.load_adapter(tmp_path, "loaded")
    assert len(model.get_base_model().model.layers) == 4
    model.set_adapter("loaded")
    assert_equal(logits(model, IDS), expected)
    model.set_adapter("without")
    assert len(trainable(model)) == 8
    with refused(model, ValueError, "layer_replication", "another way"):
        model.add_adapter("other", config(layer_replication=[(0, 2), (0, 2), (0, 1)]))


# ------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("ranges", "mentions"),
    [
        ([(0, 3)], ("(0, 3)", "<= 2")),
        ([(1, 1)], ("(1, 1)",)),
        ([(-1, 2)], ("(-1, 2)",)),
        ([(0, 2), (0, 1, 2)], ("(0, 1, 2)",)),
        ([("0", "1")], ("('0', '1')",)),
    ],
    ids=str,
)
def test_ranges_that_cannot_be(ranges: list, mentions: tuple[str, ...]) -> None:
    base = llama()
    with refused(base, ValueError, "layer_replication", *mentions):
        get_peft_model(base, config(layer_replication=ranges))


def test_a_refused_injection_leaves_the_depth(tmp_path: Path) -> None:
    base = llama()
    with refused(base, ValueError, "nothing_of_that_name"):
        get_peft_model(base, config(target_modules=["nothing_of_that_name"]))
    adapted(r=3).save_pretrained(tmp_path)
    narrow = LoraConfig.from_pretrained(tmp_path)
    narrow.r = 2
    with refused(base, RuntimeError, "another shape"):
        PeftModel.from_pretrained(base, tmp_path, config=narrow)
    assert base.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in base.model.layers] == [0, 1]


def test_models_without_one_list_of_layers() -> None:
    base = stack()
    with refused(base, ValueError, "config.num_hidden_layers", "Stack"):
        get_peft_model(base, config(target_modules=["up"]))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )
    with refused(t5, ValueError, "encoder.block, decoder.block"):
        get_peft_model(t5, config(target_modules=["q"]))


def test_weights_of_replicas_are_not_factorised() -> None:
    base = llama()
    with refused(base, ValueError, "pissa", "q_proj"):
        get_peft_model(base, config(init_lora_weights="pissa"))


# ------------------------------------------------------------------------------------------ the functions
def test_replicating_a_bare_model() -> None:
    base = llama()
    replicate_layers(base, RANGES)
    replicate_layers(base, RANGES)  # there already
    assert base.config.num_hidden_layers == 4
    assert_close(logits(base, IDS), logits(deeper(), IDS))


def test_clones() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        shared, own = clone_module(layer, share_weights=True), clone_module(layer)
    assert shared[0] is not layer[0]
    assert shared[0].weight is layer[0].weight
    assert shared[1].running_mean is layer[1].running_mean
    assert own[0].weight is not layer[0].weight
    assert_equal(own[0].weight, layer[0].weight)
