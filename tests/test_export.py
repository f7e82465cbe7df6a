# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Merged models in files for other programs, read back by readers that know nothing of this package."""

import json
import struct
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_model
from support.tied_models import _LLAMA, TIED_MODELS, TiedModel, llama
from torch import nn

from peft import LoraConfig, PeftError, PeftWarning, get_peft_model
from peft.export import export_gguf, export_onnx, export_safetensors, interleave_halves


ROUTES = {"saved": {"modules_to_save": ["embed_tokens"]}, "targeted": {"target_modules": ["q_proj", "embed_tokens"]}}
TIES = {"tied": True, "apart": False}


def merged_llama(route: str = "saved", tie: bool = True, base: nn.Module | None = None) -> nn.Module:
    """Give a model that an adapter with an effect was merged into."""
    config = LoraConfig(
        **{"target_modules": ["q_proj", "v_proj"], **ROUTES[route]},
        ensure_weight_tying=tie,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        if not tie:
            warnings.simplefilter("ignore", PeftWarning)
        model = get_peft_model(llama() if base is None else base, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        return model.merge_and_unload().eval()


def causal(model_cls: str, **settings) -> nn.Module:
    """Make a tiny causal language model of another family."""
    cls = getattr(transformers, model_cls)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**_LLAMA, "tie_word_embeddings": True, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


IDS = torch.tensor([[3, 5, 7, 11, 13], [4, 6, 8, 10, 12]])


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits


each_merge = [
    pytest.mark.parametrize("route", ROUTES),
    pytest.mark.parametrize("tie", TIES.values(), ids=TIES),
]


def for_each_merge(test):
    """Run a test for models that were adapted by each route, tied and apart."""
    for mark in each_merge:
        test = mark(test)
    return test


# ------------------------------------------------------------------------------------------ safetensors
def header_of(path) -> dict:
    """Read a safetensors header by hand: its length as eight bytes, then JSON."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


@for_each_merge
def test_safetensors(route, tie, tmp_path):
    model = merged_llama(route, tie)
    folder = export_safetensors(model, tmp_path / "out")
    keys = set(header_of(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    assert {"model.embed_tokens.weight", "lm_head.weight"} & keys == (
        {"model.embed_tokens.weight"} if tie else {"model.embed_tokens.weight", "lm_head.weight"}
    )
    assert config["tie_word_embeddings"] is tie
    again = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["plain", "plain_output_first", "plain_two_linears"])
def test_safetensors_of_a_plain_model(name, tmp_path):
    tied = TIED_MODELS[name]
    model = tied.build()
    path = export_safetensors(model, tmp_path) / "model.safetensors"
    header = header_of(path)
    owner, *followers = tied.members
    assert owner in header
    assert not set(followers) & set(header)
    assert json.loads(header["__metadata__"]["tied_aliases"])[followers[0]] == [owner, False]
    again = different(tied)
    load_model(again, path)
    assert torch.equal(tied.forward(again), tied.forward(model))


def different(tied: TiedModel) -> nn.Module:
    """Build the model with other values."""
    model = tied.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def test_config_that_contradicts_the_tensors_is_refused(tmp_path):
    """Transformers would write these files, and read another model from them."""
    model = llama()
    model.config.tie_word_embeddings = False
    with pytest.raises(PeftError, match="'model.embed_tokens.weight' and 'lm_head.weight' are one tensor"):
        export_safetensors(model, tmp_path)
    model = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(PeftError, match="they are two tensors"):
        export_safetensors(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ GGUF
def read_gguf(path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read metadata and tensors, as float32, with the package gguf."""
    gguf = pytest.importorskip("gguf", reason="the reader of GGUF files is the package gguf")
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def gguf_logits(path, ids: torch.Tensor) -> torch.Tensor:
    """Compute a Llama from a GGUF file by hand, in the layout that the format prescribes."""
    settings, loaded = read_gguf(path)
    tensors = {name: torch.from_numpy(tensor.copy()) for name, tensor in loaded.items()}
    kind = settings["general.architecture"]
    heads, kv_heads = settings[f"{kind}.attention.head_count"], settings[f"{kind}.attention.head_count_kv"]
    size, theta = settings[f"{kind}.rope.dimension_count"], settings[f"{kind}.rope.freq_base"]
    angles = theta ** (-torch.arange(0, size, 2) / size) / tensors.get("rope_freqs.weight", 1.0)
    angles = torch.arange(ids.shape[1])[:, None, None] * angles

    def normed(x, name):
        rms = (x.pow(2).mean(-1, keepdim=True) + settings[f"{kind}.attention.layer_norm_rms_epsilon"]).rsqrt()
        return x * rms * tensors[name]

    def rotated(x):  # neighbouring features are a pair
        first, second = x[..., 0::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)

    x = tensors["token_embd.weight"][ids]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
    for block in range(settings[f"{kind}.block_count"]):
        w = {name.removeprefix(f"blk.{block}."): t for name, t in tensors.items() if name.startswith(f"blk.{block}.")}
        h = normed(x, f"blk.{block}.attn_norm.weight")
        q = rotated((h @ w["attn_q.weight"].T).unflatten(-1, (heads, size)))
        k = rotated((h @ w["attn_k.weight"].T).unflatten(-1, (kv_heads, size)))
        v = (h @ w["attn_v.weight"].T).unflatten(-1, (kv_heads, size))
        k, v = (t.repeat_interleave(heads // kv_heads, 2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5 + mask
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2)
        x = x + mixed @ w["attn_output.weight"].T
        h = normed(x, f"blk.{block}.ffn_norm.weight")
        gate = torch.nn.functional.silu(h @ w["ffn_gate.weight"].T)
        x = x + (gate * (h @ w["ffn_up.weight"].T)) @ w["ffn_down.weight"].T
    return normed(x, "output_norm.weight") @ tensors.get("output.weight", tensors["token_embd.weight"]).T


@for_each_merge
def test_gguf(route, tie, tmp_path):
    model = merged_llama(route, tie)
    path = export_gguf(model, tmp_path / "model.gguf")
    settings, tensors = read_gguf(path)
    assert ("output.weight" in tensors) == (not tie)
    assert np.array_equal(tensors["token_embd.weight"], model.model.embed_tokens.weight.detach().numpy())
    assert len(tensors) == len(list(model.parameters()))
    assert (settings["general.architecture"], settings["llama.vocab_size"]) == ("llama", 48)
    torch.testing.assert_close(gguf_logits(path, IDS), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tie", TIES.values(), ids=TIES)
@pytest.mark.parametrize(
    ("model_cls", "settings"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"rope_theta": 500.0}),
        ("MistralForCausalLM", {"sliding_window": None}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"head_dim": 128}),
    ],
    ids=str,
)
def test_transformers_reads_the_gguf_file(model_cls, settings, tie, tmp_path):
    """Its reader of GGUF is no part of this package, and undoes the order of rows by code of its own."""
    pytest.importorskip("gguf", reason="transformers reads GGUF files with the package gguf")
    model = merged_llama("saved", tie, causal(model_cls, **settings))
    export_gguf(model, tmp_path / "model.gguf")
    options = {}
    if hasattr(transformers, "GgufConfig"):  # later releases may keep quantised weights as they are
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **options)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
    ],
    ids=lambda scaling: scaling["rope_type"],
)  # fmt: skip
def test_scaled_rotary_frequencies(scaling, tmp_path):
    model = causal("LlamaForCausalLM", head_dim=16, rope_parameters={"rope_theta": 100.0, **scaling})
    ids = torch.arange(20).reshape(1, 20)
    path = export_gguf(model, tmp_path / "model.gguf")
    factors = read_gguf(path)[1]["rope_freqs.weight"]
    assert factors.shape == (8,)
    assert factors.max() == pytest.approx(scaling["factor"], rel=1e-4)
    torch.testing.assert_close(gguf_logits(path, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gguf_keeps_half_precision(dtype, tmp_path):
    model = llama().to(dtype)
    settings, tensors = read_gguf(export_gguf(model, tmp_path / "model.gguf"))
    assert settings["general.file_type"] == {torch.float16: 1, torch.bfloat16: 32}[dtype]
    assert np.array_equal(tensors["token_embd.weight"], model.model.embed_tokens.weight.detach().float().numpy())
    assert (tmp_path / "model.gguf").stat().st_size < 2 * 2 * sum(p.numel() for p in model.parameters())


def test_order_of_rows_in_gguf():
    rows = torch.arange(16).reshape(16, 1)
    assert interleave_halves(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert interleave_halves(rows.flatten(), 4).tolist()[:4] == [0, 2, 1, 3]


def byte_tokenizer():
    """Make a byte-level tokenizer with a merge, a special token and one that is not special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "ab", "abc"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_tokens(["<word>"])
    return fast


def test_vocabulary_in_gguf(tmp_path):
    tokenizer = byte_tokenizer()
    model = causal("LlamaForCausalLM", vocab_size=len(tokenizer) + 3)
    path = export_gguf(model, tmp_path / "model.gguf", tokenizer, tokenizer_pre="smollm")
    settings, _ = read_gguf(path)
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    assert (settings["tokenizer.ggml.model"], settings["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(tokens) == len(kinds) == model.config.vocab_size
    assert [kinds[tokens.index(t)] for t in ("a", "<|end|>", "<word>")] == [1, 3, 4]
    assert kinds[-3:] == [5, 5, 5]
    assert settings["tokenizer.ggml.merges"] == ["a b", "ab c"]
    assert settings["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert again("abcab<|end|>")["input_ids"] == tokenizer("abcab<|end|>")["input_ids"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (TIED_MODELS["gpt2"].build, "'gpt2' cannot be written to GGUF"),
        (lambda: causal("LlamaForCausalLM", hidden_act="gelu"), "no key for hidden_act='gelu'"),
        (lambda: causal("MistralForCausalLM", sliding_window=8), "sliding_window=8 is shorter"),
        (
            lambda: causal("LlamaForCausalLM", rope_parameters={
                "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "rotary embeddings of the kind",
        ),
        (
            lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).get_base_model(),
            "export what merge_and_unload",
        ),
    ],
    ids=["architecture", "activation", "window", "rope", "adapters"],
)  # fmt: skip
def test_what_gguf_cannot_say_is_refused(build, message, tmp_path):
    pytest.importorskip("gguf", reason="the export needs it before it looks at the model")
    with pytest.raises(PeftError, match=message):
        export_gguf(build(), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ ONNX
def onnx_session(path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the reader of ONNX files is the package onnxruntime")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def initializers(path) -> dict[str, tuple[int, ...]]:
    """Give name and shape of every tensor in an ONNX file."""
    onnx = pytest.importorskip("onnx", reason="the content of ONNX files is read with the package onnx")
    return {tensor.name: tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(("route", "tie"), [("saved", True), ("targeted", True), ("saved", False)])
def test_onnx(route, tie, tmp_path):
    pytest.importorskip("onnxscript", reason="torch's exporter needs the package onnxscript")
    model = merged_llama(route, tie)
    path = export_onnx(model, tmp_path / "model.onnx", {"input_ids": IDS})
    shapes = list(initializers(path).values())
    assert shapes.count((48, 16)) == (1 if tie else 2)
    assert shapes.count((16, 48)) == 0  # a transposed copy would be a copy too
    longer = torch.arange(21).reshape(3, 7)  # sizes of the example are not burnt in
    (result,) = onnx_session(path).run(None, {"input_ids": longer.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), logits(model, longer), rtol=1e-4, atol=1e-5)


def test_onnx_of_a_model_without_config(tmp_path):
    pytest.importorskip("onnxscript", reason="torch's exporter needs the package onnxscript")
    tied = TIED_MODELS["plain"]
    model = tied.build()
    path = export_onnx(model, tmp_path / "model.onnx", tied.keywords())
    assert sum(sorted(shape) == [16, 48] for shape in initializers(path).values()) == 1
    (result,) = onnx_session(path).run(None, {"input_ids": IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), tied.forward(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "export"),
    [
        ("gguf", lambda path: export_gguf(llama(), path)),
        ("onnxscript", lambda path: export_onnx(llama(), path, {"input_ids": IDS})),
        ("onnx", lambda path: export_onnx(llama(), path, {"input_ids": IDS})),
    ],
)
def test_missing_package_is_named(module, export, tmp_path, monkeypatch):
    for name in ("gguf", "onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, sys)  # present, whatever is installed
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PeftError, match=f"pip install {module}"):
        export(tmp_path / "model")
