# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tiny base models, and what tests ask of a model again and again."""

import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.error import PeftError
from peft.utils.warning import PeftWarning


VOCABULARY, WIDTH, LAYERS = 32, 16, 2


# ------------------------------------------------------------------------------------------ base models
@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw the same random numbers inside, and leave those outside alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def llama(tied: bool = False, **changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers, in eval mode."""
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with seeded():
        return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of two layers: its linear layers are `Conv1D`, its head is tied."""
    with seeded():
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH, n_layer=LAYERS, n_head=2)
        ).eval()


def opt() -> OPTForCausalLM:
    """An OPT of two layers: its linear layers have biases."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        ffn_dim=24,
        max_position_embeddings=32,
        num_attention_heads=2,
        word_embed_proj_dim=WIDTH,
    )
    with seeded():
        return OPTForCausalLM(config).eval()


def bert_classifier() -> BertForSequenceClassification:
    """A BERT of two layers with a head for three classes."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    )
    with seeded():
        return BertForSequenceClassification(config).eval()


def token_ids(batch: int = 2, length: int = 5, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Some token ids, none of them special."""
    return torch.arange(3, 3 + batch * length).remainder(vocabulary).clamp(min=3).reshape(batch, length)


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies its rows by a constant, as Gemma's does."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up and scale."""
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Kinds(nn.Module):
    """One layer of each kind, each of another size: an embedding, a `Conv1D`, two linear layers."""

    def __init__(self, embedding: nn.Embedding | None = None) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 8) if embedding is None else embedding
        self.conv = Conv1D(10, 8)
        self.norm = nn.LayerNorm(10)
        self.lin = nn.Linear(10, 6)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map (batch, length) token ids to (batch, length, 4)."""
        hidden = self.norm(torch.tanh(self.conv(self.emb(ids))))
        return self.head(torch.tanh(self.lin(hidden)))


def kinds(embedding: nn.Embedding | None = None) -> Kinds:
    """The model above, with weights of a size that matters, in eval mode."""
    with seeded():
        model = Kinds(embedding).eval()
        for name, parameter in model.named_parameters():
            if not name.startswith("norm"):
                nn.init.normal_(parameter, std=0.4)
    return model


class Block(nn.Module):
    """A residual layer with names that patterns can choose from."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the shape."""
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """A list of blocks and a head: `layers.0.up`, `layers.0.down`, ..., `head`."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, 8) to (batch, 4)."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack(depth: int = 3) -> Stack:
    """The model above, in eval mode."""
    with seeded():
        return Stack(depth).eval()


def linears(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, in eval mode."""
    with seeded():
        return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))).eval()


def stack_config(**changes: Any) -> LoraConfig:
    """A small LoRA for `stack`: 8 tensors."""
    return LoraConfig(**{"r": 2, "target_modules": ["up", "head"], **changes})


def adapted_stack(**changes: Any) -> PeftModel:
    """`stack` with that, whose tensors all have an effect."""
    model = get_peft_model(stack(), stack_config(**changes)).eval()
    randomise(model, "lora_|modules_to_save")
    return model


def features(batch: int = 3, width: int = 8) -> torch.Tensor:
    """Some input for `stack`."""
    with seeded(1):
        return torch.randn(batch, width)


# ------------------------------------------------------------------------------------------ looking at models
def logits(model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute without gradients; of a transformers model take the logits."""
    with torch.no_grad():
        output = model(*args, **kwargs)
    return output.logits if hasattr(output, "logits") else output


def first_layer(model: PeftModel) -> Any:
    """Give the adapter layer around the first of several layers."""
    return model.get_base_model()[0]


def through_a_file(model: nn.Module) -> nn.Module:
    """Save a model as a whole, and load it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def randomise(model: nn.Module, marker: str = "lora_", seed: int = 2) -> None:
    """Give adapter tensors (those whose names `marker` is found in) values that all have an effect."""
    with seeded(seed), torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(marker, name):
                nn.init.normal_(parameter, std=0.3)


def trainable(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two outputs differ by more than rounding."""
    return not torch.allclose(a, b, atol=1e-4)


def assert_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    """Fail if two tensors differ at all, with the largest difference."""
    torch.testing.assert_close(a, b, check_device=False, atol=0.0, rtol=0.0)


def assert_close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    """Fail with the largest difference."""
    torch.testing.assert_close(a, b, check_device=False, atol=atol, rtol=1e-4)


def _fingerprint(tensor: torch.Tensor) -> tuple:
    content = None if tensor.is_meta else hashlib.sha1(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy())
    return id(tensor), tensor.requires_grad, tensor.shape, tensor.dtype, content and content.hexdigest()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a refused call must leave alone."""
    return {
        "modules": [(name, type(m), id(m)) for name, m in model.named_modules(remove_duplicate=False)],
        "parameters": [(n, _fingerprint(p)) for n, p in model.named_parameters(remove_duplicate=False)],
        "buffers": [(n, _fingerprint(b)) for n, b in model.named_buffers(remove_duplicate=False)],
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "configs": {name: str(config) for name, config in (getattr(model, "peft_config", None) or {}).items()},
        "active": getattr(model, "active_adapters", None) if hasattr(model, "peft_config") else None,
        "merged": [list(m.merged_adapters) for m in model.modules() if hasattr(m, "merged_adapters")],
    }


def files_below(folder: Path) -> dict[str, str]:
    """Each file below a folder, with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha1(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ------------------------------------------------------------------------------------------ refusals and warnings
@contextmanager
def refused(
    model: nn.Module | None, classes: type | tuple[type, ...], *mentions: str, folder: Path | None = None
) -> Iterator[None]:
    """
    Expect that what happens inside is refused, in the way that holds for the whole package.

    Args:
        model: has to stay exactly as it was.
        classes: built-in classes that the exception must also derive from.
        mentions: parts of the message: what was found, and what to do.
        folder: no file below it may change, appear or vanish.
    """
    before = None if model is None else snapshot(model)
    files = None if folder is None else files_below(folder)
    with pytest.raises((PeftError, *_as_tuple(classes))) as caught:
        yield
    assert isinstance(caught.value, PeftError), repr(caught.value)
    for cls in _as_tuple(classes):
        assert isinstance(caught.value, cls), repr(caught.value)
    text = str(caught.value)
    assert [part for part in mentions if part not in text] == [], text
    if model is not None:
        after = snapshot(model)
        assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {}
    if folder is not None:
        assert files_below(folder) == files


def _as_tuple(classes: type | tuple[type, ...]) -> tuple[type, ...]:
    return classes if isinstance(classes, tuple) else (classes,)


@contextmanager
def warned(*mentions: str) -> Iterator[None]:
    """Expect exactly one warning of the package inside, which holds these texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, PeftWarning)]
    assert len(texts) == 1, texts
    assert [part for part in mentions if part not in texts[0]] == [], texts[0]
