# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Merged models as files for other programs: safetensors, GGUF, ONNX.

A tied matrix is in each file once, and a model whose members were trained apart is written so that its reader keeps
them apart.
"""

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .anatomy.walking import adapter_modules
from .checkpoints.aliases import aliases_to_header, split_aliases
from .tying.flag import configs_that_tie
from .tying.groups import find_tied_groups
from .tying.report import weight_tying_report
from .utils.error import PeftNotImplementedError, PeftRuntimeError, PeftValueError
from .utils.files import write_atomically


# a protobuf message, and so an ONNX file that holds its weights, cannot be larger than 2 GiB
ONNX_SINGLE_FILE_BYTES = 2**31 - 2**24

# model type of transformers -> architecture in GGUF, and whether the architecture rotates neighbouring features of
# queries and keys, where transformers rotates the two halves of a head
GGUF_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}


def export_safetensors(model: nn.Module, folder: str | os.PathLike) -> Path:
    """
    Write a merged model to safetensors.

    A model of transformers is written with its config, the way it writes itself: without the keys that its config says
    are tied. Any other model is written to `model.safetensors`: a tied tensor has its owner's key, and the header's
    entry `tied_aliases` names the other keys.

    Args:
        model: a model without adapters.
        folder: folder for the files; made if it is missing.

    Returns:
        The folder.

    Raises:
        PeftValueError: if the model has adapters, or if its config contradicts its tensors about what is tied, so that
            a reader would get another model.

    Example:

        >>> import tempfile, torch
        >>> from safetensors import safe_open
        >>> from peft.utils.export import export_safetensors
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
        >>> net[1].weight = net[0].weight
        >>> with safe_open(export_safetensors(net, tempfile.mkdtemp()) / "model.safetensors", "pt") as file:
        ...     print(file.keys(), file.metadata()["tied_aliases"])
        ['0.weight'] {"1.weight": ["0.weight", false]}
    """
    _refuse_adapters(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        _refuse_contradiction(model)
        model.save_pretrained(folder)
        return folder
    owners = {group.owner for group in find_tied_groups(model)}
    state = sorted(model.state_dict().items(), key=lambda item: item[0] not in owners)
    tensors, aliases = split_aliases(dict(state))
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    header = {"format": "pt", **aliases_to_header(aliases)}
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path, header))
    return folder


def export_gguf(
    model: nn.Module, path: str | os.PathLike, tokenizer: Any = None, tokenizer_pre: str = "default"
) -> Path:
    """
    Write a merged model of the Llama family to GGUF, the format of llama.cpp.

    Where the head is tied to the embedding the file has no tensor `output.weight`, which is how GGUF says so. Matrices
    keep their type (float32, float16, bfloat16; others become float32), vectors are float32.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 model of transformers with a language modelling head, without adapters.
        path: file to write.
        tokenizer: a fast byte-level BPE tokenizer; its vocabulary and merges are written too. Programs that generate
            text from the file need them.
        tokenizer_pre: what GGUF calls the tokenizer's way of splitting text, such as "llama-bpe" or "smollm".

    Returns:
        The path.

    Raises:
        PeftNotImplementedError: for models and tokenizers that the file could not describe in full.
        PeftValueError: if the model has adapters.
        PeftRuntimeError: if the package gguf is missing.
    """
    gguf = _import("gguf", "gguf")
    _refuse_adapters(model)
    config = model.config
    architecture, rotates_neighbours = _gguf_architecture(config)
    frequencies = _rope_factors(model, architecture)
    writer_arguments = _gguf_settings(config, _matrix_type(model))

    names = gguf.get_tensor_name_map(_enumerated(gguf, architecture), config.num_hidden_layers)
    tensors = {}
    for name, parameter in _gguf_parameters(model):
        file_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if file_name is None:
            raise PeftNotImplementedError(f"GGUF architecture {architecture!r} has no place for {name!r}")
        tensor = parameter.detach().cpu()
        if rotates_neighbours and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = interleave_halves(tensor, heads)
        tensors[file_name] = tensor
    if frequencies is not None:
        tensors["rope_freqs.weight"] = frequencies
    vocabulary = None if tokenizer is None else _gguf_vocabulary(gguf, tokenizer, config.vocab_size)

    def write(temporary: str) -> None:
        writer = gguf.GGUFWriter(temporary, architecture)
        for method, value in writer_arguments.items():
            getattr(writer, method)(value)
        if vocabulary is not None:
            writer.add_tokenizer_pre(tokenizer_pre)
            for method, value in vocabulary.items():
                getattr(writer, method)(value)
        for name, tensor in tensors.items():
            _add_gguf_tensor(gguf, writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(path, write)
    return Path(path)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    inputs: Mapping[str, torch.Tensor],
    output: str = "logits",
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> Path:
    """
    Write the forward pass of a merged model to ONNX.

    Every parameter becomes one initializer under its own name, whatever reads it. (The exporter's optimiser is left
    out for that: it stores a transposed second copy of a tied matrix for the head. Runtimes optimise when they load.)

    Args:
        model: any model without adapters, in eval mode.
        path: file to write. Weights of 2 GiB and more go to a second file beside it.
        inputs: name of an argument of `forward` -> example tensor. Sizes that are to stay free must be 2 or larger.
        output: attribute of the model's result to return, where the result is no tensor.
        dynamic_shapes: as for `torch.export`; left out, the first size of each input is free, and the second one of
            those that hold integers.

    Returns:
        The path.

    Raises:
        PeftValueError: if the model has adapters.
        PeftRuntimeError: if a package that torch's exporter needs is missing.
    """
    _import("onnx", "onnx")
    _import("onnxscript", "onnxscript")
    _refuse_adapters(model)
    if dynamic_shapes is None:
        dynamic_shapes = {name: _free_sizes(tensor) for name, tensor in inputs.items()}
    program = torch.onnx.export(
        _OneOutput(model, tuple(inputs), output),
        tuple(inputs.values()),
        input_names=list(inputs),
        output_names=[output],
        # of a function with variable arguments the exporter knows their order, not their names
        dynamic_shapes=(tuple(dynamic_shapes[name] for name in inputs),),
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size >= ONNX_SINGLE_FILE_BYTES:
        program.save(os.fspath(path), external_data=True)
    else:
        write_atomically(path, lambda temporary: program.save(temporary, external_data=False))
    return Path(path)


def interleave_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """
    Bring the rows of each head from the order 0, d/2, ... that GGUF wants into place.

    Transformers rotates feature i of a head together with feature i + d/2; GGUF's llama architecture keeps the two
    beside each other.

    Args:
        tensor: (heads * d, ...).
        heads: number of heads.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


# ------------------------------------------------------------------------------------------ checks
def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeftRuntimeError(f"this export needs the package {package}: pip install {package}") from error


def _refuse_adapters(model: nn.Module) -> None:
    """Refuse what is no merged model with weights."""
    if any(True for _ in adapter_modules(model)):
        raise PeftValueError("the model has adapters; export what merge_and_unload() gives")
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise PeftValueError(f"{len(meta)} parameters have no storage (the first: {meta[0]!r}); load the model first")


def _refuse_contradiction(model: nn.Module) -> None:
    """Refuse models whose config says something else about ties than their tensors, since readers go by the config."""
    apart = [row.members for row in weight_tying_report(model).rows if not row.shared]
    if apart:
        raise PeftValueError(
            f"the config says that {' and '.join(map(repr, apart[0]))} are tied, but they are two tensors; set "
            "tie_word_embeddings=False in the model's config to keep both, or call tie_weights() to keep the first"
        )
    groups = find_tied_groups(model)
    if groups and not any(configs_that_tie(module) for module in model.modules()):
        raise PeftValueError(
            f"{' and '.join(map(repr, groups[0].members))} are one tensor, but the config says "
            "tie_word_embeddings=False, so a reader would find only one of them and draw the others at random; set it "
            "to True"
        )


# ------------------------------------------------------------------------------------------ ONNX
class _OneOutput(nn.Module):
    """A model that takes tensors in a fixed order and gives one tensor."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str):
        super().__init__()
        self.model, self.names, self.output = model, names, output
        self.training = model.training
        config = getattr(model, "config", None)
        self.options = {"use_cache": False} if getattr(config, "use_cache", False) else {}

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        result = self.model(**dict(zip(self.names, inputs, strict=True)), **self.options)
        return result if torch.is_tensor(result) else getattr(result, self.output)


def _free_sizes(tensor: torch.Tensor) -> dict[int, Any]:
    free = torch.export.Dim.DYNAMIC
    holds_integers = not tensor.is_floating_point() and tensor.dim() > 1
    return {0: free, 1: free} if holds_integers else {0: free}


# ------------------------------------------------------------------------------------------ GGUF
def _gguf_architecture(config: Any) -> tuple[str, bool]:
    """Give the architecture's name and its way to rotate; refuse what the format's keys could not say."""
    kind = getattr(config, "model_type", None)
    if kind not in GGUF_ARCHITECTURES:
        raise PeftNotImplementedError(
            f"models of type {kind!r} cannot be written to GGUF by this version; it has "
            f"{', '.join(GGUF_ARCHITECTURES)}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise PeftNotImplementedError(f"GGUF has no key for hidden_act={config.hidden_act!r}; it means silu")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise PeftNotImplementedError(
            f"readers of GGUF know no sliding window for this architecture, and sliding_window={window} is shorter "
            f"than max_position_embeddings={config.max_position_embeddings}; lower the latter if that is enough"
        )
    return GGUF_ARCHITECTURES[kind]


def _enumerated(gguf: ModuleType, architecture: str) -> Any:
    return next(member for member, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def _gguf_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what the file holds; GGUF knows one tie, that of the head with the embedding."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not (parameter is embedding and model.get_submodule(name.rpartition(".")[0]) is head):
            yield name, parameter


def _rope_settings(config: Any) -> dict[str, Any]:
    settings = getattr(config, "rope_parameters", None)  # transformers 5
    if settings is None:
        settings = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    return settings


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_factors(model: nn.Module, architecture: str) -> torch.Tensor | None:
    """Give what divides each rotary frequency, None if nothing does."""
    settings = _rope_settings(model.config)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default" and settings.get("partial_rotary_factor", 1.0) == 1.0:
        return None
    if kind not in ("linear", "llama3") or architecture != "llama":
        raise PeftNotImplementedError(
            f"rotary embeddings of the kind {settings} cannot be written to GGUF by this version; it has the default "
            "kind, and 'linear' and 'llama3' for Llama"
        )
    frequencies = next(module.inv_freq for module in model.modules() if hasattr(module, "inv_freq")).float().cpu()
    exponents = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float64) / (2 * len(frequencies))
    return (settings["rope_theta"] ** -exponents / frequencies).float()


def _matrix_type(model: nn.Module) -> torch.dtype:
    return model.get_input_embeddings().weight.dtype


def _gguf_settings(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Map methods of the writer to what they write."""
    head_dim = _head_dim(config)
    # GGUF's numbers for what most matrices of a file are
    file_types = {torch.float16: 1, torch.bfloat16: 32}
    name = os.path.basename(getattr(config, "name_or_path", None) or "")
    return {
        "add_type": "model",
        **({"add_name": name} if name else {}),
        "add_file_type": file_types.get(dtype, 0),
        "add_vocab_size": config.vocab_size,
        "add_context_length": config.max_position_embeddings,
        "add_embedding_length": config.hidden_size,
        "add_block_count": config.num_hidden_layers,
        "add_feed_forward_length": config.intermediate_size,
        "add_head_count": config.num_attention_heads,
        "add_head_count_kv": config.num_key_value_heads,
        "add_key_length": head_dim,
        "add_value_length": head_dim,
        "add_rope_dimension_count": head_dim,
        "add_rope_freq_base": float(_rope_settings(config)["rope_theta"]),
        "add_layer_norm_rms_eps": config.rms_norm_eps,
    }


def _add_gguf_tensor(gguf: ModuleType, writer: Any, name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() < 2 or tensor.dtype not in (torch.float16, torch.bfloat16):
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.contiguous().numpy())
    else:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)


def _gguf_vocabulary(gguf: ModuleType, tokenizer: Any, size: int) -> dict[str, Any]:
    """Map methods of the writer to a tokenizer's tokens, their kinds, merges and special tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    model = backend.get("model") or {}
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(backend.get("pre_tokenizer")):
        raise PeftNotImplementedError("only fast byte-level BPE tokenizers can be written to GGUF by this version")
    kinds = gguf.TokenType
    # rows of the matrix that no token uses need names too
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [kinds.UNUSED] * size
    for token, index in tokenizer.get_vocab().items():
        tokens[index], types[index] = token, kinds.NORMAL
    for index, token in tokenizer.added_tokens_decoder.items():
        types[index] = kinds.CONTROL if token.special else kinds.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    vocabulary = {
        "add_tokenizer_model": "gpt2",
        "add_token_list": tokens,
        "add_token_types": types,
        "add_token_merges": merges,
    }
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            vocabulary[f"add_{name}_token_id"] = index
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        vocabulary["add_chat_template"] = tokenizer.chat_template
    return vocabulary
