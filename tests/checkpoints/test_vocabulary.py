# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which base embeddings are saved unasked: those that are not what was published, whatever configs say about sizes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import VOCABULARY, WIDTH, assert_equal, gpt2, llama, logits, opt, seeded, warned
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

WEIGHTS = "adapter_model.safetensors"
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": WIDTH,
}
PALIGEMMA = {
    "vision_config": VISION,
    "text_config": {**TEXT, "model_type": "gemma"},
    "projection_dim": WIDTH,
    "image_token_index": 31,
}
IMAGE_TOKENS = {"mm_tokens_per_image": 4, "image_token_index": 31, "boi_token_index": 30, "eoi_token_index": 29}
BART = {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}


def hub(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Make a class of transformers, if the installed version has it."""

    def build() -> nn.Module:
        model_cls = getattr(transformers, name, None)
        if model_cls is None:
            pytest.skip(f"this version of transformers has no {name}")
        with seeded():
            return model_cls(model_cls.config_class(**options)).eval()

    return build


MODELS = {
    "llama": llama,
    "llama tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "opt": opt,
    "bert": hub("BertForMaskedLM", **{key: value for key, value in TEXT.items() if "key_value" not in key}),
    "t5": hub("T5ForConditionalGeneration", vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=1,
              num_heads=2, decoder_start_token_id=0),
    "bart": hub("BartForConditionalGeneration", vocab_size=VOCABULARY, **BART),
    "fsmt": hub("FSMTForConditionalGeneration", langs=["a", "b"], src_vocab_size=VOCABULARY, tgt_vocab_size=40,
                max_length=20, **BART),
    "paligemma": hub("PaliGemmaForConditionalGeneration", **PALIGEMMA),
    "gemma3": hub("Gemma3ForConditionalGeneration", text_config=TEXT, vision_config=VISION, **IMAGE_TOKENS),
    "t5gemma": hub("T5GemmaForConditionalGeneration", encoder=TEXT, decoder=TEXT, vocab_size=VOCABULARY),
    "t5gemma2": hub("T5Gemma2ForConditionalGeneration",
                    encoder={"text_config": {**TEXT, "model_type": "t5gemma2_text"}, "vision_config": VISION,
                             **IMAGE_TOKENS},
                    decoder={**TEXT, "model_type": "t5gemma2_decoder"}, image_token_index=31, vocab_size=VOCABULARY),
    "ovis2": hub("Ovis2ForConditionalGeneration", text_config={**TEXT, "model_type": "qwen2"},
                 vision_config={**VISION, "model_type": "ovis2_vision_model", "num_visual_indicator_tokens": 5,
                                "vocab_size": 20, "hidden_stride": 2},
                 image_token_id=31, visual_indicator_token_ids=[20, 21, 22, 23, 24], vocab_size=VOCABULARY,
                 hidden_size=WIDTH),
    "pi0": hub("PI0ForConditionalGeneration", vlm_config={**PALIGEMMA, "model_type": "paligemma"},
               dit_config={**TEXT, "model_type": "gemma"}, chunk_size=2, max_state_dim=4, max_action_dim=4),
    "canary": hub("CanaryForConditionalGeneration", vocab_size=VOCABULARY, decoder_config=TEXT,
                  encoder_config={"model_type": "parakeet_encoder", "hidden_size": WIDTH, "num_hidden_layers": 1,
                                  "num_attention_heads": 2, "intermediate_size": 24, "num_mel_bins": 8,
                                  "subsampling_conv_channels": 4}),
}  # fmt: skip
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
kinds = pytest.mark.parametrize("kind", ["files", pytest.param("config", marks=pytest.mark.wide)])


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def published(build: Callable[[], nn.Module], folder: Path) -> Callable[[], nn.Module]:
    """Save a base model; give what loads it."""
    base = build()
    base.save_pretrained(folder)
    return lambda: type(base).from_pretrained(folder).eval()


def adapted(base: nn.Module) -> PeftModel:
    config = LoraConfig(
        r=2, target_modules="all-linear", fan_in_fan_out=isinstance(base, transformers.GPT2LMHeadModel)
    )
    return get_peft_model(base, config)


def saved_base_tensors(model: PeftModel, folder: Path) -> set[str]:
    """Save, and give the names of the base model's tensors in the file."""
    model.save_pretrained(folder)
    return {key.removeprefix("base_model.model.") for key in load_file(folder / WEIGHTS) if "lora_" not in key}


@models
@kinds
def test_rows_of_a_resized_vocabulary_are_saved(tmp_path: Path, build: Callable[[], nn.Module], kind: str) -> None:
    load = published(build, tmp_path / "base")
    base, names = load(), shapes(build())
    base.resize_token_embeddings(VOCABULARY + 13)
    grown = {name for name, shape in shapes(base).items() if name in names and names[name] != shape}
    if kind == "config":  # files of another format tell nothing
        (tmp_path / "base" / "model.safetensors").rename(tmp_path / "elsewhere")
    model = adapted(base)
    with warned("differ from the published base model's", "save_embedding_layers=False"):
        saved = saved_base_tensors(model, tmp_path / "adapter")
    if kind == "config":
        (tmp_path / "elsewhere").rename(tmp_path / "base" / "model.safetensors")
    again = load()
    again.resize_token_embeddings(VOCABULARY + 13, mean_resizing=False)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter", strict=True)
    found, expected = (dict(m.get_base_model().named_parameters(remove_duplicate=False)) for m in (loaded, model))
    assert grown
    for name in grown:
        live = name if name in expected else name.replace(".weight", ".base_layer.weight")
        assert_equal(found[live], expected[live])
    assert len(saved) >= len({id(expected[name]) for name in grown if name in expected})


@models
@kinds
def test_embeddings_as_they_were_published_are_not_saved(
    tmp_path: Path, build: Callable[[], nn.Module], kind: str
) -> None:
    load = published(build, tmp_path / "base")
    base = load()
    if kind == "config":
        (tmp_path / "base" / "model.safetensors").unlink()
    assert saved_base_tensors(adapted(base), tmp_path / "adapter") == set()


def test_models_without_files_are_built_from_their_config(tmp_path: Path) -> None:
    test_rows_of_a_resized_vocabulary_are_saved(tmp_path, MODELS["fsmt"], "config")


def test_sizes_that_no_config_names(tmp_path: Path) -> None:
    """Gemma 3 was published like that: the size is a default of the code."""
    load = published(MODELS["gemma3"], tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    base = load()
    config = json.loads(path.read_text())
    del config["text_config"]["vocab_size"]
    path.write_text(json.dumps(config))
    assert saved_base_tensors(adapted(base), tmp_path / "adapter") == set()
    base = MODELS["gemma3"]()
    base.name_or_path = base.config.name_or_path = str(tmp_path / "base")
    base.resize_token_embeddings(VOCABULARY + 1)
    with warned("embed_tokens"):
        saved = saved_base_tensors(adapted(base), tmp_path / "adapter")
    assert "model.language_model.embed_tokens.weight" in saved


# ------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("tied", [False, True])
def test_rows_with_other_values_are_saved(tmp_path: Path, tied: bool) -> None:
    """As many rows as before, but not those that were published: tokens were put where there was room to spare."""
    load = published(lambda: llama(tied=tied), tmp_path / "base")
    base = load()
    with torch.no_grad():
        base.model.embed_tokens.weight[VOCABULARY - 2] = 0.5
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    with warned("model.embed_tokens.weight"):
        saved = saved_base_tensors(model, tmp_path / "adapter")
    assert saved == {"model.embed_tokens.weight", "lm_head.weight"}
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter", strict=True)
    ids = torch.tensor([[3, VOCABULARY - 2]])
    assert_equal(logits(again, ids), logits(model, ids))
    # what the file brought along is saved again, though it is not known any more what it is to be compared with
    again.peft_config["default"].base_model_name_or_path = None
    assert saved_base_tensors(again, tmp_path / "again") == saved


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half and back": lambda model: model.half().float(),
    "bfloat16 and back": lambda model: model.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_another_type_is_no_difference(tmp_path: Path, cast: Callable[[nn.Module], nn.Module]) -> None:
    load = published(llama, tmp_path / "base")
    assert saved_base_tensors(adapted(cast(load())), tmp_path / "adapter") == set()


def test_what_adapters_do_to_embeddings_is_no_difference(tmp_path: Path) -> None:
    load = published(lambda: llama(tied=True), tmp_path / "base")
    for options in ({"init_lora_weights": False}, {"init_lora_weights": "pissa"}):
        config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True, **options)
        model = get_peft_model(load(), config)
        assert saved_base_tensors(model, tmp_path / "adapter") == set()
        model.merge_adapter()
        assert saved_base_tensors(model, tmp_path / "adapter") == set()


def test_files_in_shards_and_under_other_prefixes(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base", max_shard_size="2KB")
    load = lambda: type(base).from_pretrained(tmp_path / "base").eval()  # noqa: E731
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert saved_base_tensors(adapted(load()), tmp_path / "adapter") == set()
    model = load()
    published(llama, tmp_path / "base")
    for path in (tmp_path / "base").glob("*.index.json"):
        path.unlink()
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    renamed = {key.replace("model.", "language_model.model.", 1): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "base" / "model.safetensors")
    assert saved_base_tensors(adapted(model), tmp_path / "adapter") == set()
    model = load()
    with torch.no_grad():
        model.lm_head.weight[3] = 1
    with warned("lm_head.weight"):
        assert "lm_head.weight" in saved_base_tensors(adapted(model), tmp_path / "adapter")


def test_what_is_divided_among_processes_tells_nothing(tmp_path: Path) -> None:
    model = adapted(published(llama, tmp_path / "base")())
    divided = {
        key: torch.empty(0) if "embed" in key or "lm_head" in key else t for key, t in model.state_dict().items()
    }
    assert not any("embed" in key for key in get_peft_model_state_dict(model, state_dict=divided))


@pytest.mark.parametrize("content", [b"", b"{", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_published_files_that_are_damaged_tell_nothing(tmp_path: Path, content: bytes) -> None:
    load = published(llama, tmp_path / "base")
    model = adapted(load())
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "base" / name).write_bytes(content)
        assert saved_base_tensors(model, tmp_path / "adapter") == set()


def test_nothing_is_known_of_a_model_that_was_not_published(tmp_path: Path) -> None:
    base = llama()
    base.resize_token_embeddings(VOCABULARY + 3)
    assert saved_base_tensors(adapted(base), tmp_path / "adapter") == set()
