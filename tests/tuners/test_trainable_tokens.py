# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Trainable tokens: rows of embeddings and heads, by themselves and beside LoRA, tied and untied."""

import copy
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import assert_close, refused, seeded, trainable
from support.helpers import logits as outputs
from support.tied_models import TIED_MODELS, TiedModel, llama
from torch import nn
from transformers import MarianConfig, MarianMTModel

from peft import (
    LoraConfig,
    PeftModel,
    PeftWarning,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
    weight_tying_report,
)
from peft.layers.add_columns import AddColumns
from peft.layers.trainable_tokens import TrainableTokensLayer, check_token_indices
from peft.utils import TrainableTokensWrapper
from peft.utils.error import NoMatchingPeftModuleError, PeftError


TOKENS = [3, 7, 11]
IDS = torch.tensor([[3, 5, 7, 9], [11, 11, 2, 1]])
each_model = pytest.mark.parametrize("tied", [t for n, t in TIED_MODELS.items() if n != "plain_two_linears"],
                                     ids=[n for n in TIED_MODELS if n != "plain_two_linears"])  # fmt: skip


def lora(tokens, targets=("q_proj",), **config) -> LoraConfig:
    """Make a LoRA config with trainable tokens."""
    return LoraConfig(r=2, target_modules=list(targets), trainable_token_indices=tokens, **config)


def wrap(model: nn.Module, config) -> tuple[PeftModel, list[str]]:
    """Adapt a model, and give the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, config)
    return adapted, [str(w.message) for w in caught if issubclass(w.category, PeftWarning)]


def deltas(model: nn.Module) -> list[nn.Parameter]:
    """Give the rows that are trained, each once."""
    return [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]


def randomise(model: nn.Module, seed: int = 3) -> None:
    """Give every trained tensor values that matter."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def logits(model: nn.Module, **keywords) -> torch.Tensor:
    """Run a model in eval mode."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **keywords).logits


# ------------------------------------------------------------------------------------------ against a reference
@pytest.mark.parametrize("tie", [True, False])
def test_forward_and_gradients_equal_rows_written_by_hand(tie: bool) -> None:
    """The reference is the base model with the rows written into its matrix, differentiated by torch."""
    model = get_peft_model(llama(tie).double(), lora(TOKENS, init_lora_weights=True))
    randomise(model)
    reference = llama(tie).double()
    for name, parameter in reference.named_parameters():
        if "q_proj" in name:
            layer = model.get_base_model().get_submodule(name.rpartition(".")[0])
            parameter.data += layer.get_delta_weight("default").detach()
    embedding = reference.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[TOKENS] = deltas(model)[0].double()
    loss = model(input_ids=IDS).logits.pow(2).mean()
    expected = reference(input_ids=IDS).logits.pow(2).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(deltas(model)[0].grad, embedding.weight.grad[TOKENS].to(deltas(model)[0].dtype))


@each_model
def test_a_fresh_adapter_changes_nothing(tied: TiedModel) -> None:
    """Head's biases and embedding scales included."""
    expected = tied.forward(tied.build())
    model = get_peft_model(tied.build(), TrainableTokensConfig(token_indices=TOKENS, target_modules=[tied.inputs]))
    torch.testing.assert_close(tied.forward(model), expected, rtol=0, atol=1e-6)


def test_head_with_a_bias_keeps_it() -> None:
    tied = TIED_MODELS["plain"]
    model = get_peft_model(tied.build(), TrainableTokensConfig(token_indices=TOKENS, target_modules=["lookup"]))
    randomise(model)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(tied.forward(merged), tied.forward(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("requires_grad_hook", [True, False])
def test_a_hook_that_makes_embeddings_require_grad_does_no_harm(requires_grad_hook: bool) -> None:
    model = llama()
    if requires_grad_hook:
        model.enable_input_require_grads()
    model = get_peft_model(model, lora(TOKENS))
    randomise(model)
    model(input_ids=IDS).logits.sum().backward()
    assert deltas(model)[0].grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpoint in (False, True):
        base = llama()
        if checkpoint:
            base.config.use_cache = False
            base.gradient_checkpointing_enable()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = get_peft_model(base, lora(TOKENS)).train()
        randomise(model)
        model(input_ids=IDS).logits.pow(2).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_matrix_is_never_built() -> None:
    """No tensor that the step makes beside the logits is of the vocabulary's length."""
    vocabulary, width = 5003, 8
    net = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False))
    net[1].weight = net[0].weight
    model = get_peft_model(net, TrainableTokensConfig(token_indices=TOKENS, target_modules=["0"]))
    sizes = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.tensor([[3, 4]])).sum().backward()
    held = [size for size in sizes if size >= vocabulary and size != net[0].base_layer.weight.numel()]
    assert held == []


# ------------------------------------------------------------------------------------------ the table of what is tied
INDICES = {
    "list": TOKENS,
    "embedding": {"embed_tokens": TOKENS},
    "both": {"embed_tokens": TOKENS, "lm_head": TOKENS},
    "both, other order": {"lm_head": TOKENS[::-1], "embed_tokens": TOKENS},
    "head": {"lm_head": TOKENS},
    "different": {"embed_tokens": TOKENS, "lm_head": [1, 2]},
}


@pytest.mark.parametrize("ensure", [True, False])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("indices", INDICES)
def test_what_is_tied(indices: str, tie: bool, ensure: bool) -> None:
    config = lora(INDICES[indices], ensure_weight_tying=ensure)
    if tie and ensure and indices == "different":
        with pytest.raises(PeftError, match="same indices"):
            get_peft_model(llama(), config)
        return
    model, texts = wrap(llama(tie), config)
    inner = model.get_base_model()
    named = [
        isinstance(layer, TrainableTokensWrapper)
        for layer in (inner.get_input_embeddings(), inner.get_output_embeddings())
    ]
    is_tied = tie and (ensure or indices not in ("head", "different"))
    if is_tied:
        assert named == [True, True]
        assert len(deltas(model)) == 1
        assert inner.get_output_embeddings().token_adapter.tied_adapter is inner.get_input_embeddings().token_adapter
    else:
        assert named == [indices != "head", indices not in ("list", "embedding")]
        assert len(deltas(model)) == sum(named)
    if is_tied or (not tie and not ensure):
        assert texts == []
    elif not tie:
        assert len(texts) == 1 and "has no effect" in texts[0]
    else:
        assert len(texts) == 1 and "ensure_weight_tying=True" in texts[0]


def test_what_is_trained_apart_is_merged_apart(tmp_path) -> None:
    model, _ = wrap(llama(), lora(INDICES["different"]))
    randomise(model)
    expected = logits(model)
    with pytest.warns(PeftWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(logits(again), logits(merged), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ several adapters
@pytest.mark.parametrize("name", [name for name, tied in TIED_MODELS.items() if len(tied.members) > 2])
def test_any_member_of_a_larger_tie_can_be_named(name: str) -> None:
    tied = TIED_MODELS[name]
    for member in tied.members:
        module = member.rpartition(".")[0]
        model = get_peft_model(tied.build(), lora({module: [3, 5]}, tied.targets, ensure_weight_tying=True)).eval()
        randomise(model)
        (rows,) = {id(rows): rows for rows in deltas(model)}.values()
        expected = tied.forward(model)
        merged = model.merge_and_unload()
        matrix = merged.get_parameter(tied.members[0])
        assert all(merged.get_parameter(other) is matrix for other in tied.members)
        torch.testing.assert_close(matrix[[3, 5]], rows)
        torch.testing.assert_close(tied.forward(merged), expected, rtol=1e-4, atol=1e-5)


def test_two_adapters_with_other_tokens_on_a_tied_model() -> None:
    model = get_peft_model(llama(), lora(TOKENS))
    model.add_adapter("other", lora([1, 2]))
    randomise(model)
    first = logits(model)
    model.set_adapter("other")
    randomise(model, seed=5)
    second = logits(model)
    assert not torch.equal(first, second)
    mixed = logits(model, adapter_names=["default", "other"])
    torch.testing.assert_close(mixed[0], first[0])
    torch.testing.assert_close(mixed[1], second[1])
    model.base_model.set_adapter(["default", "other"])
    together = logits(model)
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), together, rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


def test_a_tied_and_an_untied_adapter_side_by_side() -> None:
    model = get_peft_model(llama(), lora(TOKENS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        model.add_adapter("apart", lora(INDICES["different"]))
    randomise(model)
    first = logits(model)
    model.set_adapter("apart")
    randomise(model)
    assert len([p for p in deltas(model) if p.requires_grad]) == 2
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert len([p for p in deltas(model) if p.requires_grad]) == 1


def test_members_give_one_weight_while_somebody_holds_it() -> None:
    """Those who divide a model among processes ask for identity; values that were written since count nevertheless."""
    model = get_peft_model(TIED_MODELS["llama"].build(), lora([3, 5]))
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    assert embedding.weight is head.weight
    held = head.weight
    for factor in (2.0, 3.0):
        before = head.weight.detach().clone()
        deltas(model)[0].data.mul_(factor)
        torch.testing.assert_close(head.weight[[3, 5]], before[[3, 5]] * factor)
        assert head.weight is not held and head.weight is embedding.weight
        deltas(model)[0].data.div_(factor)
    for _ in range(2):  # the graph of what is held is gone after the first
        held = head.weight
        (held.sum() + embedding.weight.sum()).backward()
    with torch.no_grad():
        assert head.weight is not held and not head.weight.requires_grad
    with model.disable_adapter():
        assert head.weight is embedding.weight is base.get_input_embeddings().original_module.weight
    assert copy.deepcopy(model).get_base_model().lm_head.weight is not head.weight
    model.to("meta")
    base.tie_weights()
    assert head.weight is embedding.weight


def test_unmerging_restores_the_matrix_bit_for_bit() -> None:
    model = get_peft_model(llama(), lora(TOKENS))
    model.add_adapter("other", lora([5, 9]))
    randomise(model)
    weight = model.get_base_model().get_input_embeddings().original_module.weight
    before = weight.detach().clone()
    model.base_model.merge_adapter(["default", "other"])
    assert not torch.equal(weight, before)
    model.base_model.unmerge_adapter()
    assert torch.equal(weight, before)


# ------------------------------------------------------------------------------------------ two active adapters
def of_method(tokens: list[int], ensure: bool) -> TrainableTokensConfig:
    """The method by itself, on both members of the tie."""
    targets = ["embed_tokens", "lm_head"]
    return TrainableTokensConfig(token_indices=tokens, target_modules=targets, ensure_weight_tying=ensure)


def beside_lora(tokens: list[int], ensure: bool) -> LoraConfig:
    """The same beside LoRA, whose own factors stay without effect."""
    indices = {"embed_tokens": tokens, "lm_head": tokens}
    return lora(indices, init_lora_weights=True, ensure_weight_tying=ensure)


def two_active(route, others: list[int], tie: bool = True, order: tuple[str, str] = ("a", "b")) -> PeftModel:
    """Two adapters with trained rows, both active."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        model = get_peft_model(llama(tie), route(TOKENS, tie), "a")
        model.add_adapter("b", route(others, tie))
    for seed, name in enumerate("ab"):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for parameter in deltas(model):
                if f".{name}" in [n[-2:] for n, p in model.named_parameters() if p is parameter]:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.base_model.set_adapter(list(order))
    return model


def with_rows_of(model: PeftModel, order: tuple[str, str], tie: bool) -> nn.Module:
    """The base model with the rows of adapters written into it, the later ones over the earlier ones."""
    reference = llama(tie)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name in order:
        for module in ("embed_tokens", "lm_head"):
            key = next(key for key in tensors if module in key and key.endswith(f"trainable_tokens_delta.{name}"))
            layer = model.get_submodule(key.rpartition(".trainable_tokens_delta")[0])
            weight = next(m for n, m in reference.named_modules() if n.endswith(module)).weight
            with torch.no_grad():
                weight[layer.source(name).token_indices[name]] = tensors[key]
    return reference


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("others", [[7], [7, 11, 1], [1, 2], TOKENS[::-1]], ids=str)
@pytest.mark.parametrize("route", [of_method, beside_lora])
def test_the_later_of_two_active_adapters_counts(route, others: list[int], order: tuple[str, str], tie: bool) -> None:
    """In the embedding as in the head; gradients too are those of the rows that count."""
    model = two_active(route, others, tie, order)
    reference = with_rows_of(model, order, tie)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)
    model(input_ids=IDS).logits.pow(2).mean().backward()
    reference(input_ids=IDS).logits.pow(2).mean().backward()
    expected = reference.get_input_embeddings().weight.grad
    layer = next(m for m in model.modules() if isinstance(m, TrainableTokensLayer))
    for name in "ab":
        tokens = layer.token_indices[name]
        lost = set(layer.token_indices[order[1]]) if name == order[0] else set()
        counts = torch.tensor([[token not in lost] for token in tokens])
        torch.testing.assert_close(layer.trainable_tokens_delta[name].grad, expected[tokens] * counts)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("route", [of_method, beside_lora])
def test_adapters_that_share_a_token_are_not_merged_together(route, tie: bool) -> None:
    """One row only could be merged, at once or one after the other, into the model or into a layer."""
    model = two_active(route, [7, 1], tie)
    layer = next(m for m in model.modules() if isinstance(m, TrainableTokensLayer))
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with refused(model, ValueError, "'a'", "'b'", "[7]"):
            merge()
    model.merge_adapter(["a"])
    with refused(model, ValueError, "'a'", "'b'", "[7]"):
        model.merge_adapter(["b"])
    model.unmerge_adapter()
    apart = two_active(route, [1, 2], tie)
    expected = logits(apart)
    apart.merge_adapter()
    torch.testing.assert_close(logits(apart), expected, rtol=1e-5, atol=1e-5)


def test_checking_tokens_takes_a_time_in_proportion() -> None:
    """Of a whole vocabulary too."""
    embedding = nn.Embedding(200_000, 1)
    started = time.process_time()
    check_token_indices(embedding, "words", list(range(200_000)))
    with pytest.raises(PeftError, match=r"\[7\] more than once"):
        check_token_indices(embedding, "words", [*range(199_999), 7])
    assert time.process_time() - started < 10


# ------------------------------------------------------------------------------------------ combinations
def test_groups_are_handled_each_by_itself() -> None:
    """Two tied groups reached by two routes, beside LoRA on a layer that is not tied."""

    class TwoGroups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(20, 6), nn.Embedding(9, 6)
            self.hidden = nn.Linear(6, 6)
            self.to_words, self.to_places = nn.Linear(6, 20), nn.Linear(6, 9)
            self.to_words.weight, self.to_places.weight = self.words.weight, self.places.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.hidden(self.words(x) + self.places(x % 9)))
            return torch.cat([self.to_words(hidden), self.to_places(hidden)], -1)

    config = LoraConfig(
        r=2,
        target_modules=["hidden"],
        modules_to_save=["to_places"],
        trainable_token_indices={"words": [3, 4]},
        ensure_weight_tying=True,
    )
    model, texts = wrap(TwoGroups(), config)
    assert texts == []
    randomise(model)
    x = torch.tensor([[3, 5, 8, 4]])
    expected = model(x)
    merged = model.merge_and_unload()
    assert merged.to_words.weight is merged.words.weight
    assert merged.to_places.weight is merged.places.weight
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


def test_contradictory_requests_on_one_group() -> None:
    with pytest.raises(PeftError) as caught:
        get_peft_model(llama(), lora(TOKENS, ensure_weight_tying=True, targets=["q_proj", "lm_head"]))
    names = ("target_modules", "trainable_token_indices", "lm_head", "embed_tokens")
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("config", [{"modules_to_save": ["lm_head"]}, {"targets": ["q_proj", "lm_head"]}])
def test_tokens_of_one_member_beside_another_one(config: dict) -> None:
    model, texts = wrap(llama(), lora(TOKENS, **config))
    assert len(texts) == 1 and "share a weight" in texts[0]
    randomise(model)
    expected = logits(model)
    with pytest.warns(PeftWarning, match="no longer tied"):
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_tokens_of_an_embedding_that_is_trained_in_full() -> None:
    """A list names no module, so nothing contradicts itself: the tokens are trained with the rest."""
    asked = lora(TOKENS, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model, texts = wrap(llama(), asked)
    assert len(texts) == 1 and "trainable_token_indices has no effect" in texts[0]
    assert asked.trainable_token_indices == TOKENS and model.peft_config["default"].trainable_token_indices is None
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert trained == ["base_model.model.model.embed_tokens.modules_to_save.default.weight"]
    assert weight_tying_report(model).holds


# ------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("config", "kind", "mentions"),
    [
        (lora([99]), IndexError, ("99", "47", "resize_token_embeddings")),
        (lora([-1]), IndexError, ("-1",)),
        (lora([1, 2, 1]), ValueError, ("1", "more than once")),
        (lora(["a"]), TypeError, ("'a'", "integers")),
        (lora({"emb_tokens": [1]}), ValueError, ("emb_tokens", "embed_tokens")),
        (lora({"norm": [1]}), TypeError, ("norm", "Embedding")),
        (lora({"q_proj": [1]}, targets=["q_proj"]), TypeError, ("q_proj", "target")),
        (lora({"embed_tokens": [1]}, modules_to_save=["embed_tokens"]), ValueError, ("embed_tokens", "in full")),
        (TrainableTokensConfig(token_indices=[99]), IndexError, ("99",)),
        (TrainableTokensConfig(token_indices=[1], target_modules=["norm"]), TypeError, ("norm",)),
    ],
    ids=str,
)
def test_refused_before_anything_is_changed(config, kind: type, mentions: tuple[str, ...]) -> None:
    model = llama()
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(PeftError) as caught:
        get_peft_model(model, config)
    assert isinstance(caught.value, kind)
    assert all(text in str(caught.value) for text in mentions)
    after = dict(model.named_modules(remove_duplicate=False))
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_an_embedding_of_the_usual_name_is_taken_where_none_is_named() -> None:
    class Own(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.add_module(name, nn.Embedding(5, 4))

    config = TrainableTokensConfig(token_indices=[0])
    assert get_peft_model(Own("embed_tokens"), config).targeted_module_names == ["embed_tokens"]
    with refused(None, NoMatchingPeftModuleError, "target_modules was left out", "name it"):
        get_peft_model(Own("words"), config)


@pytest.mark.parametrize("route", [of_method, beside_lora])
def test_members_of_a_tie_tell_the_same_tokens(route) -> None:
    model = get_peft_model(llama(), route([1, 2], True))
    model.add_adapter("other", route([3], True))
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    assert len(layers) == 2
    assert all(layer.token_indices == {"default": [1, 2], "other": [3]} for layer in layers)
    model.delete_adapter("other")
    assert all(layer.token_indices == {"default": [1, 2]} for layer in layers)


def test_gradients_of_added_columns() -> None:
    """Numerically, in float64; the function writes to its input, so it gets a copy."""
    indices = torch.tensor([4, 1])
    result, columns = torch.randn(2, 3, 6).double().requires_grad_(), torch.randn(2, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda r, c: AddColumns.apply(r.clone(), c, indices), (result, columns))
    expected = result.index_add(-1, indices, columns)
    torch.testing.assert_close(AddColumns.apply(result.clone(), columns, indices), expected)


def test_layer_can_be_made_by_hand() -> None:
    embedding = nn.Embedding(10, 4)
    layer = TrainableTokensLayer(embedding, "default", TrainableTokensConfig(token_indices=[1, 2]))
    head = nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    tied = TrainableTokensLayer(head, "default", tied_adapter=layer)
    with torch.no_grad():
        layer.trainable_tokens_delta["default"] += 1
    x = torch.randn(2, 4)
    torch.testing.assert_close(tied(x), x @ layer.get_merged_weights(["default"]).T)
    torch.testing.assert_close(layer(torch.tensor([1, 5])), layer.get_merged_weights(["default"])[[1, 5]])


def marian() -> MarianMTModel:
    """A model that calls its encoder's embedding the input embedding, and has another name for it before that."""
    sides = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    with seeded(0):
        return MarianMTModel(MarianConfig(**sizes, **sides, **tokens)).eval()


@pytest.mark.parametrize(
    ("tokens", "saved"),
    [
        ([1, 3], {"encoder.embed_tokens"}),
        ({"encoder.embed_tokens": [1, 3]}, {"encoder.embed_tokens"}),
        ({"embed_tokens": [1, 3]}, {"encoder.embed_tokens", "decoder.embed_tokens"}),
    ],
)
def test_tokens_have_the_name_of_the_embedding_that_was_named(tokens: Any, saved: set[str], tmp_path: Path) -> None:
    model = get_peft_model(marian(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens))
    names = [name for name in trainable(model) if "token" in name]
    ending = "token_adapter.trainable_tokens_delta"
    assert names == [f"base_model.model.model.encoder.embed_tokens.{ending}.default"]
    keys = {key for key in get_peft_model_state_dict(model) if "token" in key}
    assert keys == {f"base_model.model.model.{name}.{ending}" for name in saved}
    randomise(model)
    ids = torch.tensor([[1, 5, 3]])
    expected = outputs(model, input_ids=ids, decoder_input_ids=ids)
    for deduplicate in (False, True):
        model.save_pretrained(tmp_path, deduplicate_tied=deduplicate)
        again = PeftModel.from_pretrained(marian(), tmp_path).eval()
        assert_close(outputs(again, input_ids=ids, decoder_input_ids=ids), expected)
    again = copy.deepcopy(again).train().eval()
    assert not any("model.shared" in key and "delta" in key for key in again.state_dict())
    merged = again.merge_and_unload()
    assert merged.model.shared.weight is merged.model.encoder.embed_tokens.weight is merged.lm_head.weight
    assert_close(outputs(merged, input_ids=ids, decoder_input_ids=ids), expected)
