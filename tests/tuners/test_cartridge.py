# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Cartridges: prefixes with frozen rows, which start from caches and texts and can be put together."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import assert_close, assert_equal, llama, logits, refused, seeded, token_ids, trainable

from peft import (
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    compose_cartridge_adapters,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)


IDS = token_ids()
TEXT = token_ids(batch=1, length=4)


def config(tokens: int = 4, cls: type = CartridgeConfig, **fields: Any) -> Any:
    return cls(num_virtual_tokens=tokens, task_type="CAUSAL_LM", **fields)


def adapted(*args: Any, **fields: Any) -> PeftModel:
    with seeded(5):
        return get_peft_model(llama(), config(*args, **fields)).eval()


def cache_of(ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return llama()(input_ids=ids, use_cache=True).past_key_values


class Tokenizer:
    """Texts are numbers; the template puts a token in front."""

    def __init__(self, template: bool = True) -> None:
        if template:
            self.apply_chat_template = self._template

    def _template(self, messages: list[dict], **options: Any) -> torch.Tensor:
        assert messages[0]["role"] == "system" and options["return_tensors"] == "pt"
        return torch.tensor([[1, *map(int, messages[0]["content"].split())]])

    def __call__(self, text: str, truncation: bool, max_length: int | None, return_tensors: str) -> dict:
        return {"input_ids": torch.tensor([list(map(int, text.split()))[:max_length]])}


def written(ids: torch.Tensor) -> str:
    return " ".join(map(str, ids[0].tolist()))


@pytest.mark.parametrize("frozen", [0, 1, 4])
def test_start_and_training(frozen: int) -> None:
    with seeded(5):
        model = get_peft_model(llama(), config(num_frozen_tokens=frozen))
    width = model.prompt_encoder["default"].weight.shape[1]
    with seeded(5):
        parts = [torch.randn(rows, width) for rows in (frozen, 4 - frozen) if rows or not frozen]
        assert_equal(model.prompt_encoder["default"].weight, torch.cat(parts))
    assert trainable(model) == {"prompt_encoder.default.trainable_embedding"}
    model.add_adapter("other", config(num_frozen_tokens=frozen))
    model.set_adapter("other")
    assert trainable(model) == {"prompt_encoder.other.trainable_embedding"}
    model.set_adapter("other", inference_mode=True)
    assert not trainable(model)


@pytest.mark.parametrize("frozen", [0, 1, 4])
def test_files(frozen: int, tmp_path: Path) -> None:
    model = adapted(num_frozen_tokens=frozen)
    model.save_pretrained(tmp_path)
    table = model.prompt_encoder["default"].embedding.weight
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == {"prompt_embeddings"}
    assert_equal(saved["prompt_embeddings"], table)
    assert_equal(model.get_prompt_embedding_to_save("default"), table)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_equal(logits(again, input_ids=IDS), logits(model, input_ids=IDS))


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    adapted(3).save_pretrained(tmp_path)
    model = adapted(4)
    with refused(model, RuntimeError, "trainable_embedding"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("cls", [CartridgeConfig, PrefixTuningConfig])
def test_started_from_a_text_it_computes_what_follows_the_text(cls: type) -> None:
    expected = llama()(input_ids=torch.cat([TEXT.expand(2, -1), IDS], dim=1)).logits[:, 4:]
    model = adapted(cls=cls)
    table = initialize_kv_prefix_from_text(model, Tokenizer(False), text=written(TEXT))
    assert_close(logits(model, input_ids=IDS), expected)
    assert_equal(model.prompt_encoder["default"].embedding.weight, table)
    assert not table.requires_grad
    with torch.no_grad():
        model.prompt_encoder["default"].load_prompt_embeddings(torch.zeros_like(table))
    model.train()
    from_cache = initialize_kv_prefix_from_past_key_values(model, past_key_values=cache_of(TEXT), num_virtual_tokens=4)
    assert_equal(from_cache, table)
    assert_close(logits(model.eval(), input_ids=IDS), expected)


def test_templates_and_lengths() -> None:
    model, tokenizer = adapted(), Tokenizer()
    start = torch.cat([torch.tensor([[1]]), TEXT], dim=1)
    expected = prompt_embeddings_from_past_key_values(cache_of(start), num_virtual_tokens=4)
    assert_close(initialize_kv_prefix_from_text(model, tokenizer, text=written(TEXT)), expected)
    assert_close(initialize_kv_prefix_from_text(model, tokenizer, text=written(TEXT), max_length=4), expected)
    plain = prompt_embeddings_from_past_key_values(cache_of(TEXT), num_virtual_tokens=4)
    assert_close(initialize_kv_prefix_from_text(model, tokenizer, text=written(TEXT), use_chat_template=False), plain)

    def no_template(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no template")

    tokenizer.apply_chat_template = no_template
    assert_close(initialize_kv_prefix_from_text(model, tokenizer, text=written(TEXT)), plain)
    with refused(model, ValueError, "3 positions", "num_virtual_tokens=4"):
        initialize_kv_prefix_from_text(model, tokenizer, text=written(TEXT), max_length=3)


def test_dropout_takes_no_part_in_the_start() -> None:
    model = get_peft_model(llama(attention_dropout=0.5), config()).train()
    table = initialize_kv_prefix_from_text(model, Tokenizer(False), text=written(TEXT))
    assert_close(table, prompt_embeddings_from_past_key_values(cache_of(TEXT), num_virtual_tokens=4))
    assert all(module.training for module in model.modules())


def test_kinds_of_caches() -> None:
    pairs = [(torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 3)) for _ in range(2)]
    rows = [torch.cat([tensor[0, head, 1] for pair in pairs for tensor in pair for head in range(2)])]
    for cache in (
        pairs,
        tuple(pairs),
        SimpleNamespace(to_legacy_cache=lambda: pairs),
        iter((*p, None) for p in pairs),
    ):
        table = prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=3)
        assert table.shape == (3, 24)
        assert_equal(table[1], rows[0])


@pytest.mark.parametrize(
    ("cache", "error", "said"),
    [
        ([], ValueError, "no layers"),
        (3, TypeError, "int"),
        ([torch.zeros(1, 2, 5, 3)], TypeError, "Tensor"),
        ([(torch.zeros(2, 5, 3),) * 2], ValueError, r"\(2, 5, 3\)"),
        ([(torch.zeros(2, 2, 5, 3),) * 2], ValueError, r"\(2, 2, 5, 3\)"),
        ([(torch.zeros(1, 2, 2, 3),) * 2], ValueError, "2 positions"),
        ([(torch.zeros(1, 2, 5, 3),) * 2, (torch.zeros(1, 2, 5, 4),) * 2], ValueError, "differ"),
    ],
)
def test_caches_that_do_not_fit(cache: Any, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=3)
    with pytest.raises(ValueError, match="positive"):
        prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=0)


def test_what_cannot_start_from_a_cache() -> None:
    cache = cache_of(TEXT)
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    network = adapted(cls=PrefixTuningConfig, prefix_projection=True)
    for model, said, options in (
        (lora, "LORA", {}),
        (network, "prefix_projection", {}),
        (adapted(), "num_virtual_tokens=4", {"num_virtual_tokens": 3}),
        (adapted(), "'nobody'", {"adapter_name": "nobody"}),
    ):
        with refused(model, ValueError, said):
            initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, **options)


@pytest.mark.parametrize("safe", [True, False])
def test_composing(tmp_path: Path, safe: bool) -> None:
    parts = {"one": (3, 1), "two": (4, 2)}
    tables = {}
    for seed, (name, (tokens, frozen)) in enumerate(parts.items()):
        with seeded(seed):
            model = get_peft_model(llama(), config(tokens, num_frozen_tokens=frozen)).eval()
        tables[name] = model.prompt_encoder["default"].weight.detach()
        model.save_pretrained(tmp_path / name)
    output = tmp_path / "deep" / "both"
    paths = [tmp_path / name for name in parts]
    assert compose_cartridge_adapters(paths, output_path=output, safe_serialization=safe) is None
    assert (output / f"adapter_model.{'safetensors' if safe else 'bin'}").exists()
    both = PeftModel.from_pretrained(llama(), output)
    in_order = get_peft_model(llama(), config(7)).eval()
    in_order.prompt_encoder["default"].load_prompt_embeddings(torch.cat([*tables.values()]))
    assert_close(logits(both, input_ids=IDS), logits(in_order, input_ids=IDS))
    frozen = both.prompt_encoder["default"].frozen_embedding
    assert_equal(frozen, torch.cat([tables["one"][:1], tables["two"][:2]]))


def test_what_cannot_be_composed(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "a")
    adapted(cls=PrefixTuningConfig).save_pretrained(tmp_path / "prefix")
    get_peft_model(llama(num_hidden_layers=1), config()).save_pretrained(tmp_path / "short")
    for base in ("x", "y"):
        adapted(base_model_name_or_path=base).save_pretrained(tmp_path / base)
    for names, said in (
        (["a"], "two"),
        (["a", "prefix"], "PREFIX_TUNING"),
        (["a", "short"], "num_layers"),
        (["x", "y"], "base_model_name_or_path"),
    ):
        with pytest.raises(ValueError, match=said):
            compose_cartridge_adapters([tmp_path / name for name in names], output_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("frozen", [-1, 5])
def test_configs_that_cannot_work(frozen: int) -> None:
    with pytest.raises(ValueError, match="num_frozen_tokens"):
        config(4, num_frozen_tokens=frozen)


def test_the_number_of_tokens_is_needed_by_a_model_first() -> None:
    base, alone = llama(), CartridgeConfig(task_type="CAUSAL_LM")
    with refused(base, ValueError, "num_virtual_tokens"):
        get_peft_model(base, alone)
