# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Small models with tied weights, one per way of tying that is found in practice."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn


VOCABULARY, WIDTH = 48, 16


@dataclass(frozen=True)
class TiedModel:
    """
    One way of tying.

    Attributes:
        build: makes the model, in eval mode, with the same weights each time.
        targets: modules for LoRA to adapt.
        inputs: name of a module that reads the tied matrix at the input side; it owns the tie.
        outputs: name of a module that reads it at the output side.
        members: full names of the tied parameter, owner first.
        keywords: makes inputs for a forward pass.
        task_type: task for the config.
    """

    build: Callable[[], nn.Module]
    targets: list[str]
    inputs: str
    outputs: str
    members: tuple[str, ...]
    keywords: Callable[[], dict[str, torch.Tensor]]
    task_type: str | None = None

    def forward(self, model: nn.Module) -> torch.Tensor:
        """Run the model on its inputs and give its logits."""
        result = model(**self.keywords())
        return getattr(result, "logits", result)


class Transposed(nn.Module):
    """A plain model without a config: embedding, hidden layer, head with a bias; the head shares the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.project = nn.Linear(WIDTH, VOCABULARY)
        self.project.weight = self.lookup.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.project(torch.tanh(self.hidden(self.lookup(input_ids))))


class TwoLinears(nn.Module):
    """A plain model in which two linear layers share weight and bias, and no embedding takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.middle(torch.relu(self.first(x)))))


class OutputFirst(nn.Module):
    """A plain model that registers its head before its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.tokens.weight = self.head.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.tokens(input_ids)))


class Multimodal(nn.Module):
    """A picture encoder beside a text model whose own config says nothing to the outside."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(8, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.language_model = text

    def forward(self, input_ids: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        words = self.language_model.get_input_embeddings()(input_ids)
        seen = self.vision(picture).unsqueeze(1)
        return self.language_model(inputs_embeds=torch.cat([seen, words], 1)).logits


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build().eval()
            with torch.no_grad():  # norms and biases start at 0 and 1, which would hide mistakes
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    return seeded


def _hub(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """Make a model class of transformers with a tiny config."""

    def build() -> nn.Module:
        model_cls = getattr(transformers, name)
        config = model_cls.config_class(**kwargs)
        config._attn_implementation = "eager"
        return model_cls(config)

    return _seeded(build)


_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def _ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[3, 5, 7, 11, 13], [4, 6, 8, 10, 12]])}


def _source_and_target() -> dict[str, torch.Tensor]:
    return {**_ids(), "decoder_input_ids": torch.tensor([[2, 9, 7], [2, 4, 6]])}


def _ids_and_picture() -> dict[str, torch.Tensor]:
    return {**_ids(), "picture": torch.linspace(-1, 1, 16).reshape(2, 8)}


def _sound() -> dict[str, torch.Tensor]:
    sound = torch.linspace(-1, 1, 2 * 4 * 12).reshape(2, 4, 12)
    return {"input_features": sound, "decoder_input_ids": torch.tensor([[2, 9, 7], [2, 4, 6]])}


def _vectors() -> dict[str, torch.Tensor]:
    return {"x": torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)}


def llama(tie: bool = True, **changes: Any) -> nn.Module:
    """A causal language model; the tie can be left out, and the config changed."""
    return _hub("LlamaForCausalLM", **{**_LLAMA, **changes}, tie_word_embeddings=tie)()


def _causal(build: Callable, targets: list[str], inputs: str, prefix: str) -> TiedModel:
    return TiedModel(
        build, targets, inputs, "lm_head", (f"{prefix}{inputs}.weight", "lm_head.weight"), _ids, "CAUSAL_LM"
    )


TIED_MODELS = {
    "llama": _causal(llama, ["q_proj", "v_proj"], "embed_tokens", "model."),
    "qwen2": _causal(
        _hub("Qwen2ForCausalLM", **_LLAMA, tie_word_embeddings=True), ["q_proj"], "embed_tokens", "model."
    ),
    "gemma": _causal(
        _hub("GemmaForCausalLM", **_LLAMA, head_dim=8, tie_word_embeddings=True), ["q_proj"], "embed_tokens", "model."
    ),
    "gemma3": _causal(
        _hub("Gemma3ForCausalLM", **_LLAMA, head_dim=8, tie_word_embeddings=True),
        ["q_proj"],
        "embed_tokens",
        "model.",
    ),
    "gpt2": _causal(
        _hub("GPT2LMHeadModel", vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32),
        ["c_attn"],
        "wte",
        "transformer.",
    ),
    "opt": _causal(
        _hub(
            "OPTForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        ),
        ["q_proj"],
        "embed_tokens",
        "model.decoder.",
    ),
    "bloom": _causal(
        _hub("BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=2),
        ["query_key_value"],
        "word_embeddings",
        "transformer.",
    ),
    "bert": TiedModel(
        _hub("BertForMaskedLM", **_BERT),
        ["query"],
        "word_embeddings",
        "cls.predictions.decoder",
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        _ids,
    ),
    "roberta": TiedModel(
        _hub("RobertaForMaskedLM", **_BERT),
        ["query"],
        "word_embeddings",
        "lm_head.decoder",
        ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        _ids,
    ),
    "t5": TiedModel(
        _hub("T5ForConditionalGeneration", vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2,
             num_heads=2, decoder_start_token_id=0),
        ["q", "v"],
        "shared",
        "lm_head",
        ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        _source_and_target,
        "SEQ_2_SEQ_LM",
    ),
    "bart": TiedModel(
        _hub("BartForConditionalGeneration", vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
             encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
             max_position_embeddings=32),
        ["q_proj"],
        "shared",
        "lm_head",
        (
            "model.shared.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
        _source_and_target,
        "SEQ_2_SEQ_LM",
    ),
    "modernbert": TiedModel(
        _hub("ModernBertForMaskedLM", **_BERT, decoder_bias=True, bos_token_id=1, eos_token_id=2, cls_token_id=1,
             sep_token_id=2, reference_compile=False),
        ["Wqkv"],
        "tok_embeddings",
        "decoder",
        ("model.embeddings.tok_embeddings.weight", "decoder.weight"),
        _ids,
    ),
    "whisper": TiedModel(
        _hub("WhisperForConditionalGeneration", vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1,
             decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
             decoder_ffn_dim=24, num_mel_bins=4, max_source_positions=6, max_target_positions=16, pad_token_id=0,
             bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[]),
        ["q_proj"],
        "embed_tokens",
        "proj_out",
        ("model.decoder.embed_tokens.weight", "proj_out.weight"),
        _sound,
        "SEQ_2_SEQ_LM",
    ),
    "multimodal": TiedModel(
        _seeded(lambda: Multimodal(llama())),
        ["q_proj"],
        "embed_tokens",
        "lm_head",
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        _ids_and_picture,
    ),
    "plain": TiedModel(
        _seeded(Transposed), ["hidden"], "lookup", "project", ("lookup.weight", "project.weight"), _ids
    ),
    "plain_output_first": TiedModel(
        _seeded(OutputFirst), ["body.0", "body.2"], "tokens", "head", ("tokens.weight", "head.weight"), _ids
    ),
    "plain_two_linears": TiedModel(
        _seeded(TwoLinears), ["middle"], "first", "second", ("first.weight", "second.weight"), _vectors
    ),
}  # fmt: skip

# Models whose outputs may differ in the last bits between two copies with equal weights: Mamba's scan on a CPU depends
# on where its tensors lie in memory.
INEXACT_MODELS = {
    "mamba": TiedModel(
        _hub("MambaForCausalLM", vocab_size=VOCABULARY, hidden_size=WIDTH, state_size=4, num_hidden_layers=1,
             tie_word_embeddings=True, use_mambapy=False),
        ["in_proj"],
        "embeddings",
        "lm_head",
        ("backbone.embeddings.weight", "lm_head.weight"),
        _ids,
        "CAUSAL_LM",
    ),
}  # fmt: skip

ALL_MODELS = {**TIED_MODELS, **INEXACT_MODELS}
