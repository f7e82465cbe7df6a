# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The small model beside the base model: made anew or loaded, and what it is given."""

import copy
import inspect
import os

import torch
from safetensors.torch import load_file
from torch import nn

from ...layers.new_tensors import from_checkpoint, on_meta
from ...utils.error import PeftAttributeError, PeftValueError
from ...utils.files import read_json
from .config import MIRROR, ShadowConfig


_BACKBONES = ("model", "transformer", "base_model", "decoder")
_BLOCKS = ("layers", "h", "single_transformer_blocks", "transformer_blocks")
_WITH_PROJECTION = "causal_lm_with_hidden_projection"


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """
    Find the list of blocks of a model.

    Returns:
        Its full name, and the list.

    Raises:
        PeftAttributeError: if there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in _BLOCKS:
            return name, module
    raise PeftAttributeError(f"{type(model).__name__} has no list of blocks named {', '.join(_BLOCKS)}")


def width_of(model: nn.Module) -> int:
    """
    Read the width of a model's blocks.

    Raises:
        PeftValueError: if the model does not tell it.
    """
    config = getattr(model, "config", None)
    for name in ("hidden_size", "n_embd", "d_model"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "attention_head_dim"))
    if not heads or not width:
        raise PeftValueError(f"the config of {type(model).__name__} does not tell the width of its blocks")
    return heads * width


def backbone_of(model: nn.Module) -> nn.Module:
    """
    Find the part of a model that has the blocks.

    Raises:
        PeftAttributeError: if there is none.
    """
    for name in _BACKBONES:
        found = getattr(model, name, None)
        if isinstance(found, nn.Module):
            inner = getattr(found, "decoder", None)
            return inner if isinstance(inner, nn.Module) else found
    raise PeftAttributeError(f"{type(model).__name__} has no part named {', '.join(_BACKBONES)} to copy")


def make_backbone(model: nn.Module, config: ShadowConfig) -> tuple[nn.Module, nn.Module, frozenset[str]]:
    """
    Make the small model of an adapter.

    Args:
        model: the base model.
        config: which tells its sizes, or where it is loaded from.

    Returns:
        The small model, the projection of its outputs to the width of the base model, and the names of its parameters
        that are never trained.
    """
    width, frozen = width_of(model), frozenset()
    if config.shadow_model == MIRROR:
        backbone = mirror(backbone_of(model), config)
        projection = _projection(width_of(backbone), width)
        if shares_embeddings(backbone, config, width):
            _without_table(backbone)
    else:
        backbone, projection = _load(config.shadow_model, width)
        table = backbone.get_input_embeddings()
        own = {id(parameter) for parameter in (table.parameters() if table is not None else ())}
        frozen = frozenset(name for name, parameter in backbone.named_parameters() if id(parameter) in own)
    weight = next(model.parameters())
    for module in (backbone, projection):
        module.to(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)
        module.train(model.training)
        if on_meta():
            _without_storage(module)
    return backbone, projection, frozen


def mirror(backbone: nn.Module, config: ShadowConfig) -> nn.Module:
    """
    Make a smaller model of a model's class.

    Args:
        backbone: the model.
        config: which tells its sizes.

    Raises:
        PeftAttributeError: for a size that models of that class do not have.
    """
    small = copy.deepcopy(backbone.config)
    sizes = {
        "num_hidden_layers": config.shadow_num_hidden_layers or 1,
        "hidden_size": config.shadow_hidden_size,
        "num_attention_heads": config.shadow_num_attention_heads,
        "intermediate_size": config.shadow_intermediate_size,
    }
    for name, size in sizes.items():
        if size is None:
            continue
        if not hasattr(small, name):
            raise PeftAttributeError(f"the config of {type(backbone).__name__} has no {name} to choose")
        setattr(small, name, size)
    layers = small.num_hidden_layers
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:layers]
    if isinstance(getattr(small, "max_window_layers", None), int):
        small.max_window_layers = min(small.max_window_layers, layers)
    return type(backbone)(small)


def shares_embeddings(backbone: nn.Module, config: ShadowConfig, width: int) -> bool:
    """
    Say whether a small model is given the base model's embeddings.

    Args:
        backbone: the small model.
        config: its adapter's config.
        width: that of the base model.
    """
    asked = config.shadow_model == MIRROR and config.share_embeddings
    takes_them = "inputs_embeds" in inspect.signature(backbone.forward).parameters
    return asked and width_of(backbone) == width and takes_them


def _without_table(backbone: nn.Module) -> None:
    """Take the embeddings of a model away, which are never looked up."""
    table = backbone.get_input_embeddings()
    name = next((name for name, module in backbone.named_modules() if module is table), None)
    if name is not None:
        path, _, key = name.rpartition(".")
        setattr(backbone.get_submodule(path), key, None)


def _projection(width: int, out: int) -> nn.Module:
    return nn.Identity() if width == out else nn.Linear(width, out, bias=False)


def _load(path: str, out: int) -> tuple[nn.Module, nn.Module]:
    """Load a small model, and its projection if it was saved with one; only make them if a checkpoint fills them."""
    from transformers import AutoConfig, AutoModel

    file = os.path.join(path, "config.json")
    settings = read_json(file) if os.path.isfile(file) else {}
    if settings.get("model_type") != _WITH_PROJECTION:
        if from_checkpoint():
            backbone = AutoModel.from_config(AutoConfig.from_pretrained(path))
        else:
            backbone = AutoModel.from_pretrained(path)
        return backbone, _projection(width_of(backbone), out)
    inner = dict(settings["shadow_model_config"])
    backbone = AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner))
    if from_checkpoint():
        return backbone, nn.Linear(width_of(backbone), out, bias=False)
    tensors = load_file(os.path.join(path, "model.safetensors"))
    start = "shadow_model."
    backbone.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    weight, wanted = tensors.get("shadow_hidden_projection.weight"), (out, width_of(backbone))
    if weight is None or tuple(weight.shape) != wanted:
        found = None if weight is None else tuple(weight.shape)
        raise PeftValueError(f"{path!r} should hold shadow_hidden_projection.weight of shape {wanted}, found {found}")
    projection = nn.Linear(*wanted[::-1], bias=False)
    projection.weight.data.copy_(weight)
    return backbone, projection


def _without_storage(module: nn.Module) -> None:
    """Leave parameters to a checkpoint; what is computed from the config, such as frequencies, stays."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"))
