# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Prompt learning: what stands in front of the inputs, computed by hand; generation; saving; several prompts; ties."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import (
    LAYERS,
    VOCABULARY,
    WIDTH,
    assert_close,
    assert_equal,
    bert_classifier,
    differs,
    gpt2,
    llama,
    logits,
    randomise,
    refused,
    seeded,
    token_ids,
    trainable,
    warned,
)
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    DynamicCache,
    EncoderDecoderCache,
    T5Config,
    T5ForConditionalGeneration,
)

from peft import (
    CartridgeConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PeftWarning,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.anatomy.embeddings import checkpoints_activations
from peft.utils import _prepare_prompt_learning_config


TOKENS = 3
IDS = token_ids()
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LEFT_PADDED = {
    "input_ids": torch.tensor([[3, 4, 5, 6, 7], [0, 0, 8, 9, 10]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
}

CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "prompt": lambda **kw: PromptTuningConfig(num_virtual_tokens=TOKENS, **kw),
    "mlp": lambda **kw: PromptEncoderConfig(num_virtual_tokens=TOKENS, encoder_hidden_size=8, **kw),
    "lstm": lambda **kw: PromptEncoderConfig(
        num_virtual_tokens=TOKENS, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **kw
    ),
    "prefix": lambda **kw: PrefixTuningConfig(num_virtual_tokens=TOKENS, **kw),
    "projection": lambda **kw: PrefixTuningConfig(
        num_virtual_tokens=TOKENS, prefix_projection=True, encoder_hidden_size=8, **kw
    ),
    "cartridge": lambda **kw: CartridgeConfig(num_virtual_tokens=TOKENS, **kw),
    "multitask": lambda **kw: MultitaskPromptTuningConfig(
        num_virtual_tokens=TOKENS, **{"num_tasks": 2, "num_ranks": 2, **kw}
    ),
}
WITH_NETWORK = ("mlp", "lstm", "projection")
each_method = pytest.mark.parametrize("method", CONFIGS)


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0
    )
    with seeded():
        return T5ForConditionalGeneration(config).eval()


def bart(**changes: object) -> BartForConditionalGeneration:
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDE_SIZES.items()}
    config = BartConfig(vocab_size=VOCABULARY, d_model=WIDTH, max_position_embeddings=32, **{**sizes, **changes})
    with seeded():
        return BartForConditionalGeneration(config).eval()


SIDE_SIZES = {"layers": LAYERS, "attention_heads": 2, "ffn_dim": 24}


def bert(model_class: type[nn.Module]) -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=2 if model_class is BertForQuestionAnswering else 3,
    )
    with seeded():
        return model_class(config).eval()


def prompted(base: nn.Module, method: str, task_type: str = "CAUSAL_LM", **kw: object) -> PeftModel:
    """A model with a prompt that has an effect."""
    model = get_peft_model(base, CONFIGS[method](task_type=task_type, **kw)).eval()
    randomise(model, "prompt_encoder")
    return model


def extra(method: str, batch: int = 2) -> dict[str, torch.Tensor]:
    return {"task_ids": torch.arange(batch) % 2} if method == "multitask" else {}


def in_front(model: PeftModel, embeds: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """Put the table of prompt tuning in front of embeddings, by hand."""
    table = model.prompt_encoder["default"].embedding.weight[rows]
    return torch.cat([table.expand(len(embeds), -1, -1), embeds], dim=1)


def ones_in_front(mask: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones(len(mask), TOKENS, dtype=mask.dtype), mask], dim=1)


def prefix_cache(table: torch.Tensor, batch: int, heads: int) -> DynamicCache:
    """Fill a cache by hand: a row of the table holds keys and values of the first layer, then of the second."""
    cache = DynamicCache()
    for layer, columns in enumerate(table.chunk(LAYERS, dim=1)):
        key, value = (part.reshape(TOKENS, heads, -1).transpose(0, 1) for part in columns.chunk(2, dim=1))
        cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
    return cache


# ------------------------------------------------------------------------------------------ by hand
class TestVirtualTokens:
    def test_causal_lm(self) -> None:
        base = llama()
        model = prompted(base, "prompt")
        labels = IDS.clone()
        expected = base(
            inputs_embeds=in_front(model, base.get_input_embeddings()(IDS)),
            attention_mask=ones_in_front(MASK),
            labels=torch.cat([torch.full((2, TOKENS), -100), labels], dim=1),
        )
        output = model(input_ids=IDS, attention_mask=MASK, labels=labels)
        assert_equal(output.logits, expected.logits)
        assert_equal(output.loss, expected.loss)
        embeds = base.get_input_embeddings()(IDS)
        assert_equal(logits(model, inputs_embeds=embeds, attention_mask=MASK), expected.logits.detach())

    @pytest.mark.parametrize("method", ["mlp", "lstm"])
    def test_network_of_p_tuning(self, method: str) -> None:
        model = prompted(llama(), method)
        encoder = model.prompt_encoder["default"]
        table = encoder.embedding.weight
        if method == "lstm":
            table = encoder.lstm_head(table.unsqueeze(0))[0].squeeze(0)
        for layer in encoder.mlp_head:
            table = layer(table)
        assert_close(model.get_prompt(2), table.expand(2, -1, -1))
        assert_close(model.get_prompt_embedding_to_save("default"), table.detach())

    @pytest.mark.parametrize("training", [True, False])
    def test_dropout_of_the_network_follows_the_base_model(self, training: bool) -> None:
        config = CONFIGS["lstm"](task_type="CAUSAL_LM", encoder_dropout=0.5)
        model = get_peft_model(llama().train(training), config)
        model.add_adapter("other", config)
        for name in ("default", "other"):
            model.set_adapter(name)
            prompts = [model.get_prompt(1).detach() for _ in range(4)]
            assert any(differs(prompt, prompts[0]) for prompt in prompts) == training

    def test_multitask(self) -> None:
        model = prompted(llama(), "multitask")
        encoder = model.prompt_encoder["default"]
        for row, task in enumerate([1, 0, 1]):
            scale = encoder.prefix_task_cols[task] @ encoder.prefix_task_rows[task]
            prompt = model.get_prompt(3, task_ids=torch.tensor([1, 0, 1]))[row]
            assert_close(prompt, encoder.embedding.weight * scale)
        with refused(model, ValueError, "task_ids"):
            model(input_ids=IDS)
        with refused(model, ValueError, "3 entries", "batch of 2"):
            model(input_ids=IDS, task_ids=torch.tensor([0, 1, 1]))

    def test_token_classification(self) -> None:
        base = bert(BertForTokenClassification)
        model = prompted(base, "prompt", "TOKEN_CLS")
        labels = torch.tensor([[0, 1, 2, 0, 1], [2, 1, 0, -100, -100]])
        types = torch.ones_like(IDS)
        expected = base(
            inputs_embeds=in_front(model, base.get_input_embeddings()(IDS)),
            attention_mask=ones_in_front(MASK),
            token_type_ids=torch.cat([torch.zeros(2, TOKENS, dtype=torch.long), types], dim=1),
        ).logits
        output = model(input_ids=IDS, attention_mask=MASK, token_type_ids=types, labels=labels)
        assert_equal(output.logits, expected)
        # the release cannot compute this loss: virtual tokens have no labels
        assert_close(output.loss, nn.functional.cross_entropy(expected[:, TOKENS:].reshape(-1, 3), labels.reshape(-1)))

    def test_sequence_classification(self) -> None:
        base = bert_classifier()
        model = prompted(base, "prompt", "SEQ_CLS")
        embeds = in_front(model, base.get_input_embeddings()(IDS))
        expected = logits(base, inputs_embeds=embeds, attention_mask=ones_in_front(MASK))
        assert_equal(logits(model, input_ids=IDS, attention_mask=MASK), expected)

    def test_question_answering(self) -> None:
        base = bert(BertForQuestionAnswering)
        model = prompted(base, "prompt", "QUESTION_ANS")
        start, end = torch.tensor([3, 4]), torch.tensor([5, 4])
        expected = base(
            inputs_embeds=in_front(model, base.get_input_embeddings()(IDS)), start_positions=start, end_positions=end
        )
        output = model(input_ids=IDS, start_positions=start, end_positions=end)
        assert_equal(output.start_logits, expected.start_logits)
        assert_equal(output.loss, expected.loss)

    @pytest.mark.parametrize("method", ["prompt", "mlp", "lstm", "prefix"])
    def test_positions_of_answers_are_read_where_they_were_given(self, method: str) -> None:
        model = prompted(bert(BertForQuestionAnswering), method, "QUESTION_ANS")
        shift = 0 if method == "prefix" else TOKENS  # to the rows of the tokens
        wanted = {"start_positions": torch.tensor([1, 0]) + shift, "end_positions": torch.tensor([4, 2]) + shift}
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(30):
            model(input_ids=IDS, **wanted).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        output = model(input_ids=IDS)
        assert_equal(output.start_logits.argmax(-1), wanted["start_positions"])
        assert_equal(output.end_logits.argmax(-1), wanted["end_positions"])

    def test_positions_of_virtual_tokens_are_no_answers(self) -> None:
        positions = {"start_positions": torch.tensor([3, 2]), "end_positions": torch.tensor([4, 4])}
        model = prompted(bert(BertForQuestionAnswering), "prompt", "QUESTION_ANS")
        with warned("start_positions", "2", "num_virtual_tokens=3"):
            model(input_ids=IDS, **positions)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftWarning)
            prompted(bert(BertForQuestionAnswering), "prefix", "QUESTION_ANS")(input_ids=IDS, **positions)
            model(input_ids=IDS, **{name: position + TOKENS for name, position in positions.items()})

    def test_feature_extraction(self) -> None:
        base = bert(BertModel)
        model = prompted(base, "prompt", "FEATURE_EXTRACTION")
        embeds = in_front(model, base.get_input_embeddings()(IDS))
        expected = base(inputs_embeds=embeds, attention_mask=ones_in_front(MASK)).last_hidden_state
        assert_equal(model(input_ids=IDS, attention_mask=MASK).last_hidden_state, expected)

    @pytest.mark.parametrize("build", [t5, bart, lambda: bart(scale_embedding=True)], ids=["t5", "bart", "scaled"])
    def test_encoder(self, build: Callable[[], nn.Module]) -> None:
        base = build()
        model = prompted(base, "prompt", "SEQ_2_SEQ_LM")
        assert model.prompt_encoder["default"].embedding.weight.shape == (2 * TOKENS, WIDTH)
        embeds = base.get_encoder().get_input_embeddings()(IDS)
        target = token_ids(2, 4)
        expected = base(
            inputs_embeds=in_front(model, embeds, slice(TOKENS)), attention_mask=ones_in_front(MASK), labels=target
        )
        output = model(input_ids=IDS, attention_mask=MASK, labels=target)
        assert_equal(output.logits, expected.logits)
        assert_equal(output.loss, expected.loss)

    @pytest.mark.parametrize("build", [t5, bart])
    def test_decoder(self, build: Callable[[], nn.Module]) -> None:
        base = build()
        model = prompted(base, "multitask", "SEQ_2_SEQ_LM")
        target, task_ids = token_ids(2, 4), torch.tensor([1, 0])
        prompt = model.get_prompt(2, task_ids)
        read = base.prepare_decoder_input_ids_from_labels(labels=target)
        expected = base(
            inputs_embeds=torch.cat([prompt[:, :TOKENS], base.get_input_embeddings()(IDS)], dim=1),
            decoder_inputs_embeds=torch.cat([prompt[:, TOKENS:], base.get_input_embeddings()(read)], dim=1),
        ).logits
        output = model(input_ids=IDS, labels=target, task_ids=task_ids)
        assert_equal(output.logits, expected)
        loss = nn.functional.cross_entropy(expected[:, TOKENS:].reshape(-1, VOCABULARY), target.reshape(-1))
        assert_close(output.loss, loss)
        assert_equal(logits(model, input_ids=IDS, decoder_input_ids=read, task_ids=task_ids), expected.detach())

    @pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
    def test_inputs_without_a_place(self, name: str) -> None:
        model = prompted(llama(), "prompt")
        with warned(name, "ignored"):
            output = logits(model, input_ids=IDS, **{name: torch.zeros_like(IDS)})
        assert_equal(output, logits(model, input_ids=IDS))

    def test_masks_that_cannot_be_lengthened(self) -> None:
        model = prompted(llama(), "prompt")
        with refused(model, ValueError, "attention_mask", "(2, 1, 5, 5)"):
            model(input_ids=IDS, attention_mask=torch.ones(2, 1, 5, 5))


class TestPrefix:
    @pytest.mark.parametrize("kv_heads", [1, 2])
    def test_causal_lm(self, kv_heads: int) -> None:
        base = llama(num_key_value_heads=kv_heads)
        model = prompted(base, "prefix")
        table = model.prompt_encoder["default"].embedding.weight
        assert table.shape == (TOKENS, LAYERS * 2 * kv_heads * WIDTH // 2)
        cache = prefix_cache(table, 2, kv_heads)
        expected = base(input_ids=IDS, attention_mask=ones_in_front(MASK), past_key_values=cache, labels=IDS)
        output = model(input_ids=IDS, attention_mask=MASK, labels=IDS)
        assert_equal(output.logits, expected.logits)
        assert_equal(output.loss, expected.loss)

    def test_projection(self) -> None:
        model = prompted(llama(), "projection")
        encoder = model.prompt_encoder["default"]
        first, _, last = encoder.transform
        table = last(torch.tanh(first(encoder.embedding.weight)))
        expected, cache = prefix_cache(table, 2, 2), model.get_prompt(2)
        for layer in range(LAYERS):
            assert_close(cache.layers[layer].keys, expected.layers[layer].keys)
            assert_close(cache.layers[layer].values, expected.layers[layer].values)

    def test_classifier_that_takes_no_cache(self) -> None:
        base = bert_classifier()
        model = prompted(base, "prefix", "SEQ_CLS")
        cache = prefix_cache(model.prompt_encoder["default"].embedding.weight, 2, 2)
        pooled = base.bert(IDS, attention_mask=ones_in_front(MASK), past_key_values=cache).pooler_output
        assert_close(logits(model, input_ids=IDS, attention_mask=MASK), base.classifier(pooled).detach())
        assert len(base.bert._forward_pre_hooks) == 0

    @pytest.mark.parametrize(("build", "heads"), [(t5, 4), (bart, 2)], ids=["t5", "bart"])
    def test_decoder(self, build: Callable[[], nn.Module], heads: int) -> None:
        base = build()
        model = prompted(base, "prefix", "SEQ_2_SEQ_LM", num_transformer_submodules=1)
        cache = prefix_cache(model.prompt_encoder["default"].embedding.weight, 2, heads)
        target, mask = token_ids(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        expected = base(
            input_ids=IDS,
            attention_mask=MASK,
            decoder_input_ids=target,
            decoder_attention_mask=ones_in_front(mask),
            past_key_values=EncoderDecoderCache(cache, DynamicCache()),
        ).logits.detach()
        inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": target}
        assert_equal(logits(model, **inputs, decoder_attention_mask=mask), expected)

    def test_positions_count_the_prefix(self) -> None:
        model = prompted(gpt2(), "prefix")
        assert_close(
            logits(model, input_ids=IDS, position_ids=torch.arange(5).expand(2, -1)), logits(model, input_ids=IDS)
        )

    def test_zero_init(self) -> None:
        for method in ("prefix", "projection"):
            encoder = get_peft_model(
                llama(), CONFIGS[method](task_type="CAUSAL_LM", init_weights="zero")
            ).prompt_encoder
            assert encoder["default"].finished_table().abs().max() == 0

    def test_load_prompt_embeddings(self) -> None:
        encoder = prompted(llama(), "prefix").prompt_encoder["default"]
        values = torch.randn_like(encoder.embedding.weight)
        encoder.load_prompt_embeddings(values)
        assert_equal(encoder.embedding.weight.detach(), values)
        with refused(encoder, ValueError, "shape"):
            encoder.load_prompt_embeddings(values[:1])
        computed = prompted(llama(), "projection").prompt_encoder["default"]
        with refused(computed, ValueError, "prefix_projection"):
            computed.load_prompt_embeddings(values)

    def test_gradient_checkpointing(self) -> None:
        base = llama()
        base.gradient_checkpointing_enable()
        with refused(base, ValueError, "gradient checkpointing"):
            get_peft_model(base, CONFIGS["prefix"](task_type="CAUSAL_LM"))
        model = prompted(llama(), "prefix").train()
        expected = model(input_ids=IDS).logits
        model.gradient_checkpointing_enable()
        with warned("gradient checkpointing is switched off", "prompt tuning"):
            outputs = model(input_ids=IDS, labels=IDS)
        assert_equal(outputs.logits, expected)
        outputs.loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        assert not checkpoints_activations(model.base_model)
        model(input_ids=IDS)  # with one warning in all


# ------------------------------------------------------------------------------------------ generation
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@each_method
@pytest.mark.parametrize("build", [llama, gpt2])
class TestGenerateCausal:
    def step_by_step(self, model: PeftModel, inputs: dict[str, torch.Tensor], **more: torch.Tensor) -> torch.Tensor:
        """Generate without `generate`: call the model with all tokens, one sample at a time, without padding."""
        rows = []
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            own, some = ids[mask.bool()].unsqueeze(0), {key: value[row : row + 1] for key, value in more.items()}
            for _ in range(GREEDY["max_new_tokens"]):
                own = torch.cat([own, logits(model, input_ids=own, **some)[:, -1].argmax(-1, keepdim=True)], dim=1)
            rows.append(torch.cat([ids[~mask.bool()], own[0]]))
        return torch.stack(rows)

    def test_with_and_without_cache(self, build: Callable[[], nn.Module], method: str) -> None:
        model = prompted(build(), method)
        expected = self.step_by_step(model, LEFT_PADDED, **extra(method))
        for use_cache in (True, False):
            found = model.generate(**LEFT_PADDED, **extra(method), **GREEDY, use_cache=use_cache)
            assert found.tolist() == expected.tolist()
        assert not model.get_base_model()._forward_pre_hooks

    def test_beams(self, build: Callable[[], nn.Module], method: str) -> None:
        model = prompted(build(), method)
        found = [
            model.generate(
                **LEFT_PADDED, **extra(method), **GREEDY, num_beams=3, num_return_sequences=2, use_cache=use
            )
            for use in (True, False)
        ]
        assert found[0].shape == (4, 11)
        assert found[0].tolist() == found[1].tolist()

    def test_own_loop_with_a_cache(self, build: Callable[[], nn.Module], method: str) -> None:
        model = prompted(build(), method)
        whole = logits(model, input_ids=IDS, **extra(method))[:, -1]
        first = model(input_ids=IDS[:, :3], **extra(method), use_cache=True)
        rest = model(
            input_ids=IDS[:, 3:],
            attention_mask=torch.ones_like(IDS),
            past_key_values=first.past_key_values,
            **extra(method),
        )
        assert_close(rest.logits[:, -1].detach(), whole)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_caches_of_fixed_size(method: str) -> None:
    model = prompted(llama(), method)
    with refused(model, ValueError, "fixed size"):
        model.generate(**LEFT_PADDED, **GREEDY, cache_implementation="static")


@each_method
@pytest.mark.parametrize("build", [t5, bart])
def test_generate_from_encoder(build: Callable[[], nn.Module], method: str) -> None:
    model = prompted(build(), method, "SEQ_2_SEQ_LM")
    inputs = {"input_ids": IDS, "attention_mask": MASK, **extra(method)}
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    expected = start
    for _ in range(4):
        step = logits(model, **inputs, decoder_input_ids=expected)[:, -1]
        expected = torch.cat([expected, step.argmax(-1, keepdim=True)], dim=1)
    generation = model.get_base_model().generation_config
    generation.eos_token_id = generation.forced_eos_token_id = None
    options = {**GREEDY, "max_new_tokens": 4}
    for use_cache in (True, False):
        assert model.generate(**inputs, **options, use_cache=use_cache).tolist() == expected.tolist()
    beams = [model.generate(**inputs, **options, num_beams=2, use_cache=use).tolist() for use in (True, False)]
    assert beams[0] == beams[1]
    with refused(model, ValueError, "input_ids"):
        model.generate(**options)


# ------------------------------------------------------------------------------------------ training
@each_method
def test_gradients_reach_the_prompt_alone(method: str) -> None:
    model = prompted(llama(), method)
    model.train()
    model(input_ids=IDS, labels=IDS, **extra(method)).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    prompt = model.prompt_encoder["default"]
    own = {
        f"prompt_encoder.default.{name}" for name, _ in prompt.named_parameters() if name not in prompt.frozen_names
    }
    assert with_gradient == own == trainable(model)
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in own)


@each_method
def test_head_is_trained_beside_the_prompt(method: str, tmp_path: Path) -> None:
    model = prompted(bert_classifier(), method, "SEQ_CLS")
    model.train()
    model(input_ids=IDS, labels=torch.tensor([0, 2]), **extra(method)).loss.backward()
    assert "base_model.classifier.modules_to_save.default.weight" in trainable(model)
    assert all(model.get_parameter(name).grad is not None for name in trainable(model))
    head = model.get_base_model().classifier
    torch.nn.init.normal_(head.modules_to_save["default"].weight)
    model.eval().save_pretrained(tmp_path)
    assert "base_model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(bert_classifier(), tmp_path)
    assert_close(logits(again, input_ids=IDS, **extra(method)), logits(model, input_ids=IDS, **extra(method)))


def test_half_precision() -> None:
    for method in CONFIGS:
        base = llama().to(torch.bfloat16)
        model = prompted(base, method)
        model.train()
        output = model(input_ids=IDS, labels=IDS, **extra(method))
        assert output.logits.dtype == torch.bfloat16
        output.loss.backward()
        own = dict(model.prompt_encoder["default"].named_parameters())
        assert {parameter.dtype for parameter in own.values()} == {torch.float32}
        without = {name for name, parameter in own.items() if parameter.grad is None}
        assert without == set(model.prompt_encoder["default"].frozen_names)


def test_inference_mode() -> None:
    for method in CONFIGS:
        model = get_peft_model(llama(), CONFIGS[method](task_type="CAUSAL_LM", inference_mode=True))
        assert trainable(model) == set()


# ------------------------------------------------------------------------------------------ files
@each_method
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(method: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = prompted(llama(), method)
    expected = logits(model, input_ids=IDS, **extra(method))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    tasks = {"prefix_task_cols", "prefix_task_rows"} if method == "multitask" else set()
    assert set(saved) == {"prompt_embeddings", *tasks}
    assert_equal(saved["prompt_embeddings"], model.get_prompt_embedding_to_save("default"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["token_dim"] == WIDTH
    assert config["num_layers"] == LAYERS
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_close(logits(again, input_ids=IDS, **extra(method)), expected)
    assert not any(parameter.is_meta for parameter in again.parameters())
    again.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    again.set_adapter("second")
    assert_close(logits(again, input_ids=IDS, **extra(method)), expected)
    again.save_pretrained(tmp_path / "again", selected_adapters=["second"])
    written = load_file(tmp_path / "again" / "second" / "adapter_model.safetensors")
    assert all(torch.equal(written[key], tensor) for key, tensor in saved.items())


@pytest.mark.parametrize("method", WITH_NETWORK)
def test_a_finished_prompt_replaces_the_network(method: str, tmp_path: Path) -> None:
    model = prompted(llama(), method)
    expected = logits(model, input_ids=IDS)
    model.save_pretrained(tmp_path)
    weights = load_peft_weights(str(tmp_path), device="cpu")
    other = get_peft_model(llama(), CONFIGS[method](task_type="CAUSAL_LM")).eval()
    with refused(other, RuntimeError, "shape"):
        set_peft_model_state_dict(other, {"prompt_embeddings": weights["prompt_embeddings"][:1]})
    with warned("the network is dropped"):
        set_peft_model_state_dict(other, weights)
    assert_close(logits(other, input_ids=IDS), expected)
    assert trainable(other) == {"prompt_encoder.default.embedding.weight"}
    assert_equal(get_peft_model_state_dict(other)["prompt_embeddings"], weights["prompt_embeddings"])


def test_a_saved_prompt_is_trained_further(tmp_path: Path) -> None:
    model = prompted(llama(), "prompt")
    model.save_pretrained(tmp_path)
    with refused(None, ValueError, "is_trainable"):
        PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    with refused(model, ValueError, "is_trainable"):
        model.load_adapter(tmp_path, "more", is_trainable=True)
    again = get_peft_model(llama(), CONFIGS["prompt"](task_type="CAUSAL_LM"))
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert_equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))
    assert trainable(again) == {"prompt_encoder.default.embedding.weight"}


def test_a_checkpoint_that_lacks_tensors(tmp_path: Path) -> None:
    model = prompted(llama(), "multitask")
    weights = get_peft_model_state_dict(model)
    weights.pop("prefix_task_rows")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**model.peft_config["default"].to_dict()}))
    torch.save(weights, tmp_path / "adapter_model.bin")
    with warned("lacks 1 of 3", "prefix_task_rows"):
        again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in again.parameters())


# ------------------------------------------------------------------------------------------ several prompts
@each_method
def test_several_adapters(method: str) -> None:
    base = llama()
    expected_base = logits(base, input_ids=IDS)
    model = prompted(base, method)
    model.add_adapter("longer", type(model.peft_config["default"])(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    # rows of the prompt have logits of their own; those of the real tokens are compared
    first, tokens = logits(model, input_ids=IDS, **extra(method))[:, -5:], IDS.shape[1]
    more = {"task_ids": torch.zeros(2, dtype=torch.long)} if method == "multitask" else {}
    model.set_adapter("longer")
    assert all(name.startswith("prompt_encoder.longer.") for name in trainable(model))
    assert differs(logits(model, input_ids=IDS, **more)[:, -tokens:], first)
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()
    assert_equal(logits(model, input_ids=IDS, **extra(method))[:, -tokens:], first)
    with model.disable_adapter():
        assert_equal(logits(model, input_ids=IDS, **extra(method)), expected_base)
    assert_equal(logits(model, input_ids=IDS, **extra(method))[:, -tokens:], first)
    with warned("'default' was deleted", "'longer' is active"):
        model.delete_adapter("default")
    assert model.active_adapter == "longer"
    assert list(model.prompt_encoder) == list(model.peft_config) == ["longer"]
    assert not any("default" in name for name, _ in model.named_parameters())
    model.delete_adapter("longer")
    assert_equal(logits(model, input_ids=IDS), expected_base)


def test_heads_of_several_adapters() -> None:
    base = bert_classifier()
    expected_base = logits(base, input_ids=IDS)
    model = prompted(base, "prompt", "SEQ_CLS")
    model.add_adapter("other", CONFIGS["prompt"](task_type="SEQ_CLS"))
    torch.nn.init.normal_(base.classifier.modules_to_save["other"].weight)
    first = logits(model, input_ids=IDS)
    model.set_adapter("other")
    assert {name.split(".")[-2] if "encoder" not in name else "prompt" for name in trainable(model)} == {
        "other",
        "prompt",
    }
    assert differs(logits(model, input_ids=IDS), first)
    with model.disable_adapter():  # in the release this ends in an UnboundLocalError
        assert_equal(logits(model, input_ids=IDS), expected_base)
    model.delete_adapter("default")
    assert list(base.classifier.modules_to_save) == ["other"]


@each_method
def test_copies(method: str) -> None:
    model = prompted(llama(), method)
    expected = logits(model, input_ids=IDS, **extra(method))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.prompt_encoder.base_model is again.get_base_model()
        randomise(again, "prompt_encoder", seed=5)
        assert differs(logits(again, input_ids=IDS, **extra(method)), expected)
        assert_equal(logits(model, input_ids=IDS, **extra(method)), expected)


# ------------------------------------------------------------------------------------------ starts
class _Tokenizer:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}


class TestStarts:
    @pytest.mark.parametrize("config_cls", [PromptTuningConfig, MultitaskPromptTuningConfig])
    @pytest.mark.parametrize(("text", "letters"), [("ab", "abab"), ("abcdef", "abcd")])
    def test_text(
        self, config_cls: type[PeftConfig], text: str, letters: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        loader = classmethod(lambda cls, *args, **kwargs: asked.append((args, kwargs)) or _Tokenizer())
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", loader)
        base = llama()
        config = config_cls(
            num_virtual_tokens=4,
            task_type="CAUSAL_LM",
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path="somewhere",
            tokenizer_kwargs={"use_fast": False},
        )
        model = get_peft_model(base, config)
        expected = base.get_input_embeddings().weight[[ord(letter) % VOCABULARY for letter in letters]]
        assert_equal(model.prompt_encoder["default"].embedding.weight.detach(), expected.detach())
        assert asked == [(("somewhere",), {"use_fast": False})]

    def test_sample_vocab(self) -> None:
        base = llama().to(torch.bfloat16)
        config = PromptTuningConfig(num_virtual_tokens=9, task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB")
        table = get_peft_model(base, config).prompt_encoder["default"].embedding.weight
        rows = base.get_input_embeddings().weight.float()
        assert all(any(torch.equal(row, known) for known in rows) for row in table)

    def test_unknown(self) -> None:
        for config in (
            PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", prompt_tuning_init="BAD"),
            PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", init_weights="BAD"),
            PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", encoder_reparameterization_type="BAD"),
        ):
            base = llama()
            with refused(base, ValueError, "'BAD'"):
                get_peft_model(base, config)

    def test_mlp_has_two_layers(self) -> None:
        with warned("encoder_num_layers=3"):
            get_peft_model(llama(), CONFIGS["mlp"](task_type="CAUSAL_LM", encoder_num_layers=3))

    @pytest.mark.parametrize("as_file", ["folder", "adapter_model.safetensors", "copy.bin"])
    def test_from_source_tasks(self, as_file: str, tmp_path: Path) -> None:
        source = prompted(llama(), "multitask", num_tasks=3)
        source.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        torch.save(saved, tmp_path / "copy.bin")
        path = str(tmp_path if as_file == "folder" else tmp_path / as_file)

        def started(init: str, **kw: object) -> nn.Module:
            config = CONFIGS["multitask"](
                task_type="CAUSAL_LM", prompt_tuning_init=init, prompt_tuning_init_state_dict_path=path, **kw
            )
            return get_peft_model(llama(), config).prompt_encoder["default"]

        for init, chosen in (("AVERAGE_SOURCE_TASKS", lambda x: x.mean(0)), ("EXACT_SOURCE_TASK", lambda x: x[2])):
            encoder = started(init, prompt_tuning_init_task=2)
            assert_equal(encoder.embedding.weight.detach(), saved["prompt_embeddings"])
            for task in range(2):
                assert_equal(encoder.prefix_task_cols[task].detach(), chosen(saved["prefix_task_cols"]))
                assert_equal(encoder.prefix_task_rows[task].detach(), chosen(saved["prefix_task_rows"]))
        encoder = started("ONLY_SOURCE_SHARED")
        assert_equal(encoder.embedding.weight.detach(), saved["prompt_embeddings"])
        assert encoder.prefix_task_cols.std() < 0.1
        with refused(None, ValueError, "prompt_tuning_init_task=3", "3 tasks"):
            started("EXACT_SOURCE_TASK", prompt_tuning_init_task=3)
        with refused(None, ValueError, "shape", "num_ranks"):
            started("AVERAGE_SOURCE_TASKS", num_ranks=1)

    def test_source_is_missing(self, tmp_path: Path) -> None:
        config = CONFIGS["multitask"](task_type="CAUSAL_LM", prompt_tuning_init="EXACT_SOURCE_TASK")
        base = llama()
        with refused(base, ValueError, "prompt_tuning_init_state_dict_path"):
            get_peft_model(base, config)
        prompted(llama(), "prompt").save_pretrained(tmp_path)
        config.prompt_tuning_init_state_dict_path = str(tmp_path)
        with refused(base, ValueError, "prefix_task_cols"):
            get_peft_model(base, config)


# ------------------------------------------------------------------------------------------ ties
@each_method
def test_tied_base_stays_tied(method: str) -> None:
    base = llama(tied=True)
    model = prompted(base, method)
    assert base.lm_head.weight is base.model.embed_tokens.weight is model.word_embeddings.weight
    model.train()
    model(input_ids=IDS, labels=IDS, **extra(method)).loss.backward()
    again = copy.deepcopy(model).to(torch.bfloat16).get_base_model()
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
def test_saved_embedding_keeps_its_tie(named: str, tmp_path: Path) -> None:
    base = llama(tied=True)
    config = CONFIGS["prompt"](task_type="CAUSAL_LM", modules_to_save=[named], ensure_weight_tying=True)
    model = get_peft_model(base, config).eval()
    embedding, head = base.model.embed_tokens.modules_to_save, base.lm_head.modules_to_save
    assert embedding["default"].weight is head["default"].weight
    randomise(model, "prompt_encoder|modules_to_save")
    # what was trained is what the prompt is put in front of
    embeds = nn.functional.embedding(IDS, embedding["default"].weight)
    assert_equal(logits(model, input_ids=IDS), logits(base, inputs_embeds=in_front(model, embeds)))
    model.save_pretrained(tmp_path)
    other = llama(tied=True)
    again = PeftModel.from_pretrained(other, tmp_path)
    assert_equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))
    assert other.model.embed_tokens.modules_to_save["default"].weight is (
        other.lm_head.modules_to_save["default"].weight
    )
    again.add_adapter("second", config)
    again.set_adapter("second")
    assert other.model.embed_tokens.modules_to_save["second"].weight is other.lm_head.modules_to_save["second"].weight
    again.delete_adapter("default")
    with again.disable_adapter():
        assert_equal(logits(again, input_ids=IDS), logits(llama(tied=True), input_ids=IDS))


def test_warnings_about_ties() -> None:
    with warned("no longer tied", "ensure_weight_tying=True"):
        get_peft_model(llama(tied=True), CONFIGS["prompt"](task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    with warned("ensure_weight_tying=True has no effect"):
        get_peft_model(llama(tied=True), CONFIGS["prompt"](task_type="CAUSAL_LM", ensure_weight_tying=True))


# ------------------------------------------------------------------------------------------ refusals
class TestRefusals:
    def test_models_and_configs(self) -> None:
        base = llama()
        with refused(base, KeyError, "task_type"):
            get_peft_model(base, CONFIGS["prompt"]())
        with refused(base, ValueError, "num_virtual_tokens"):
            get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM"))
        with refused(base, ValueError, "token_dim", "num_attention_heads=3"):
            get_peft_model(base, CONFIGS["prefix"](task_type="CAUSAL_LM", num_attention_heads=3))
        with refused(base, KeyError, "'word_embeddings'"):
            get_peft_model(base, CONFIGS["prompt"](task_type="CAUSAL_LM"), adapter_name="word_embeddings")
        plain = nn.Sequential(nn.Linear(4, 4))
        with refused(plain, ValueError, "token_dim"):
            get_peft_model(plain, CONFIGS["prompt"](task_type="CAUSAL_LM"))
        with refused(plain, ValueError, "get_input_embeddings"):
            get_peft_model(plain, CONFIGS["prompt"](task_type="CAUSAL_LM", token_dim=4))

    def test_other_kinds_of_models(self) -> None:
        config = CONFIGS["prompt"](task_type="CAUSAL_LM")
        with refused(None, ValueError):
            inject_adapter_in_model(config, llama())
        with refused(None, ValueError):
            PeftMixedModel(llama(), config)
        model = prompted(llama(), "prompt")
        with refused(model, ValueError, "PROMPT_TUNING", "PREFIX_TUNING"):
            model.add_adapter("other", CONFIGS["prefix"](task_type="CAUSAL_LM"))
        lora = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))
        with refused(lora, TypeError, "LORA"):
            lora.get_prompt(2)

    def test_calls(self) -> None:
        model = prompted(llama(), "prompt")
        with refused(model, ValueError, "adapter_names"):
            model(input_ids=IDS, adapter_names=["default", "__base__"])
        with refused(model, ValueError, "input_ids"):
            model(attention_mask=MASK)
        with refused(model, ValueError, "'nope'"):
            model.get_prompt_embedding_to_save("nope")
        with refused(model, ValueError, "one prompt"):
            model.prompt_encoder.set_adapter(["default", "other"])
        for name in ("merge_and_unload", "merge_adapter", "unload"):
            with pytest.raises(AttributeError):
                getattr(model, name)


def test_sizes_are_filled_in_from_the_fields_of_a_model() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = llama()
    assert _prepare_prompt_learning_config(config, model.config.to_dict()) is config
    expected = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    for name in ("num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"):
        assert getattr(config, name) == getattr(expected.peft_config["default"], name), name
    with pytest.raises(ValueError, match="does not tell token_dim"):
        _prepare_prompt_learning_config(PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), {})


def test_prompts_are_trained_by_being_in_use() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with refused(model, TypeError, "set_adapter", "inference_mode"):
        model.set_requires_grad("default")


class OwnConfig(dict):
    """What a model of one's own may call its config."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class OwnModel(nn.Module):
    """A model that does not say which its embedding is, if it has one."""

    def __init__(self, vocabulary: int | None = 10) -> None:
        super().__init__()
        sizes = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "model_type": "own"}
        self.config = OwnConfig(vocab_size=vocabulary, **sizes)
        self.mix, self.words = nn.Linear(4, 4), nn.Embedding(10, 4)
        self.seen: dict[str, Any] = {}

    def prepare_inputs_for_generation(self) -> None:
        """Asked for by the class for language models."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> torch.Tensor:
        self.seen = kwargs
        return self.mix(self.words(input_ids) if inputs_embeds is None else inputs_embeds)


@pytest.mark.parametrize(
    ("config_cls", "tokens"), [(PrefixTuningConfig, 5), (PromptTuningConfig, 8), (PromptEncoderConfig, 8)]
)
def test_models_that_do_not_say_which_their_embedding_is(config_cls: type, tokens: int, tmp_path: Path) -> None:
    config = config_cls(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=4, num_attention_heads=2)
    model = get_peft_model(OwnModel(), config).eval()
    ids = torch.arange(5)[None]
    assert model(input_ids=ids).shape == (1, tokens, 4)
    if config_cls is PrefixTuningConfig:
        assert model.get_base_model().seen["past_key_values"].get_seq_length() == 3
        get_peft_model(OwnModel(vocabulary=None), config)(input_ids=ids)  # it needs no embedding at all
    else:
        with refused(None, ValueError, "get_input_embeddings", "vocab_size"):
            get_peft_model(OwnModel(vocabulary=None), config)
    model.save_pretrained(tmp_path)
    base = OwnModel()
    base.load_state_dict(model.get_base_model().state_dict(), strict=False)
    assert_equal(PeftModel.from_pretrained(base, tmp_path)(input_ids=ids), model(input_ids=ids))
