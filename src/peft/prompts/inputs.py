# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What is put in front of a model's inputs, once for all methods and tasks.

There are two kinds of prompts. Virtual tokens are embeddings in front of those of the inputs. A prefix is keys and
values, which are put into the model's cache. A cache that holds tokens already holds the prompt too, so that a model
can be called step by step.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..anatomy import embeddings
from ..layers.call_context import calling, current_call
from ..registry import TaskType
from ..utils.caches import CACHE_NAMES, cache_parameter, given_cache
from ..utils.error import PeftValueError
from ..utils.warning import warn
from .computing import compute_prompt, fill_cache
from .learning import PromptEncoders, input_embedding, refuse_checkpointing


_IGNORED_LABEL = -100
_LANGUAGE_MODELS = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
_LABELLED_TOKENS = (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS)

Inputs = dict[str, Any]


def call_with_prompt(prompts: PromptEncoders, args: tuple, kwargs: Inputs) -> Any:
    """
    Call the base model with the active prompt in front of the inputs.

    Args:
        prompts: the prompts of the model.
        args: inputs by position.
        kwargs: inputs by name; `task_ids` for methods with several tasks, and what a method's own loss takes.
    """
    model = prompts.base_model
    task_ids = kwargs.pop("task_ids", None)
    of_loss = {name: kwargs.pop(name) for name in prompts.loss_inputs if name in kwargs}
    if not prompts.in_use:
        return model(*args, **kwargs)
    parameters = inspect.signature(model.forward).parameters
    inputs = {**dict(zip(parameters, args, strict=False)), **kwargs}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    _leave_out_what_has_no_place(prompts, inputs)
    labels = inputs.pop("labels", None) if prompts.active_encoder.has_loss else None
    outputs = _call(model, put_in_front(prompts, inputs, task_ids))
    return outputs if labels is None else prompts.active_encoder.add_loss(outputs, labels, **of_loss)


def _call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model with a prompt in its inputs, or in a cache, which is for the backbone if the head takes none."""
    if given_cache(inputs) is None or cache_parameter(model) is not None:
        return model(**inputs)
    parameters = inspect.signature(model.forward).parameters
    cache, backbone = _take_cache(inputs), _backbone_with_cache(model)
    if backbone is None and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return model(**inputs, past_key_values=cache)  # code of one's own, which may hand it on
    with _cache_for_backbone(model, cache):
        return model(**inputs)


def generate_with_prompt(prompts: PromptEncoders, args: tuple, kwargs: Inputs) -> Any:
    """
    Generate with the base model, with the active prompt in front of the inputs.

    Args:
        prompts: the prompts of the model.
        args: for the base model's `generate`.
        kwargs: likewise; `task_ids` for methods with several tasks.

    Raises:
        PeftValueError: if an encoder-decoder model gets no input.
    """
    model = prompts.base_model
    task_ids = kwargs.pop("task_ids", None)
    if not prompts.in_use:
        return model.generate(*args, **kwargs)
    if _has_encoder(model):
        kwargs = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        args = ()
        if "inputs" in kwargs:
            kwargs["input_ids"] = kwargs.pop("inputs")
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            raise PeftValueError("generate needs input_ids, the ids of the source, to put the prompt in front of them")
        if not prompts.active_encoder.fills_cache:  # generate calls the encoder once, by itself
            kwargs = _with_encoder_prompt(prompts, kwargs, task_ids)

    def rewrite(args: tuple, inputs: Inputs) -> tuple[tuple, Inputs]:
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if inputs.get("use_cache") is False:  # each step reads all tokens anew; a prefix has come back as a cache
            _take_cache(inputs)
        return args, put_in_front(prompts, inputs, task_ids)

    with _rewriting_inputs(model, rewrite):
        return model.generate(*args, **kwargs)


def put_in_front(prompts: PromptEncoders, inputs: Inputs, task_ids: torch.Tensor | None = None) -> Inputs:
    """
    Change the inputs of one call of the base model so that they begin with the active prompt.

    Args:
        prompts: the prompts of the model.
        inputs: arguments of the call by name, without those that are None.
        task_ids: (batch,) for methods with several tasks.

    Returns:
        The changed arguments.

    Raises:
        PeftValueError: if the prompt cannot be put in front of them.
    """
    inputs = dict(inputs)
    if getattr(given_cache(inputs), "is_compileable", False):
        raise PeftValueError("a cache of fixed size has no room for the prompt; generate with the default cache")
    if prompts.active_encoder.fills_cache:
        _put_prefix(prompts, inputs)
    elif not _has_encoder(prompts.base_model):
        _put_virtual_tokens(prompts, inputs, task_ids)
    else:
        if "encoder_outputs" not in inputs:
            inputs = _with_encoder_prompt(prompts, inputs, task_ids)
        if prompts.active_encoder.prompts_decoder and prompts.active_config.num_transformer_submodules > 1:
            _put_decoder_prompt(prompts, inputs, task_ids)
    return inputs


# ------------------------------------------------------------------------------------------ kinds of prompts
def _put_virtual_tokens(prompts: PromptEncoders, inputs: Inputs, task_ids: torch.Tensor | None) -> None:
    """Put virtual tokens in front of the inputs of a model without an encoder of its own."""
    config, tokens = prompts.active_config, prompts.active_config.num_virtual_tokens
    if _is_filled(given_cache(inputs)):
        _lengthen(inputs, "attention_mask", tokens, 1)
        _shift_positions(inputs, tokens)
        return
    prompt = compute_prompt(prompts, _batch_size(inputs), task_ids)
    _prepend(inputs, prompt, input_embedding(prompts.base_model))
    _shift_positions(inputs, tokens, in_front=True)
    _lengthen(inputs, "token_type_ids", tokens, 0)
    if config.task_type in _LABELLED_TOKENS:
        _lengthen(inputs, "labels", tokens, _IGNORED_LABEL)
    _warn_of_answers_in_prompt(inputs, tokens)


def _with_encoder_prompt(prompts: PromptEncoders, inputs: Inputs, task_ids: torch.Tensor | None) -> Inputs:
    """Put the first half of the virtual tokens in front of what the encoder reads."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    prompt = compute_prompt(prompts, _batch_size(inputs), task_ids)
    _prepend(inputs, prompt[:, : prompts.active_config.num_virtual_tokens], input_embedding(prompts.base_model))
    return inputs


def _put_decoder_prompt(prompts: PromptEncoders, inputs: Inputs, task_ids: torch.Tensor | None) -> None:
    """Put the second half of the virtual tokens in front of what the decoder reads."""
    model, tokens = prompts.base_model, prompts.active_config.num_virtual_tokens
    if _is_filled(given_cache(inputs)):
        _lengthen(inputs, "decoder_attention_mask", tokens, 1)
        _shift_positions(inputs, tokens)
        return
    if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        if "labels" not in inputs:
            raise PeftValueError("the decoder gets no input: give labels, decoder_input_ids or decoder_inputs_embeds")
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    prompt = compute_prompt(prompts, _batch_size(inputs, "decoder_"), task_ids)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    _prepend(inputs, prompt[:, tokens:], decoder.get_input_embeddings(), "decoder_")
    _shift_positions(inputs, tokens, in_front=True)
    _lengthen(inputs, "labels", tokens, _IGNORED_LABEL)


def _put_prefix(prompts: PromptEncoders, inputs: Inputs) -> None:
    """Put keys and values into the cache of the model, or of its decoder."""
    model, tokens = prompts.base_model, prompts.active_config.num_virtual_tokens
    side = "decoder_" if _has_encoder(model) else ""
    if model.training and embeddings.checkpoints_activations(model):
        _keep_activations(model)
    if not _is_filled(given_cache(inputs)):
        cache = _take_cache(inputs)
        name = cache_parameter(model) or CACHE_NAMES[0]
        inputs[name] = fill_cache(prompts, cache, _batch_size(inputs, side, "labels"))
    _lengthen(inputs, f"{side}attention_mask", tokens, 1)
    _shift_positions(inputs, tokens)


def _keep_activations(model: nn.Module) -> None:
    """
    Switch gradient checkpointing off, which trainers switch on by default: it uses no cache, where a prefix stands.

    Raises:
        PeftValueError: if the model has no switch for it.
    """
    names = ("activation_checkpointing_disable", "gradient_checkpointing_disable")  # transformers 5 has renamed it
    disable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if disable is None:
        refuse_checkpointing(model)
        return
    warn(
        "gradient checkpointing is switched off: it uses no cache in training, and a prefix stands in the cache. Set "
        "gradient_checkpointing=False to say so yourself, or use prompt tuning to keep it"
    )
    disable()


def _leave_out_what_has_no_place(prompts: PromptEncoders, inputs: Inputs) -> None:
    """Drop inputs that say nothing about virtual tokens, with a warning."""
    dropped = []
    if not prompts.active_encoder.fills_cache:
        dropped.append("position_ids")
    if prompts.active_config.task_type in _LANGUAGE_MODELS:
        dropped.append("token_type_ids")
    for name in dropped:
        if inputs.pop(name, None) is not None:
            warn(f"{name} cannot be used together with a prompt, and is ignored")


def _warn_of_answers_in_prompt(inputs: Inputs, tokens: int) -> None:
    """Notice positions of answers that do not count the virtual tokens, whose rows stand in the logits too."""
    for name in ("start_positions", "end_positions"):
        positions = inputs.get(name)
        if positions is not None and (inside := positions[(positions >= 0) & (positions < tokens)]).numel():
            warn(
                f"{name} holds {int(inside.max())}, which is the row of a virtual token: positions count the rows of "
                f"the logits, as in the released package, and these begin with num_virtual_tokens={tokens} of them. "
                "Add that number to the positions, and take it off those that you read from the logits"
            )
            return


# ------------------------------------------------------------------------------------------ tensors
def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _is_filled(cache: Any) -> bool:
    """Say whether a cache holds tokens; these begin with the prompt then."""
    if cache is None:
        return False
    return (cache.get_seq_length() if hasattr(cache, "get_seq_length") else len(cache)) > 0


def _take_cache(inputs: Inputs) -> Any:
    """Remove the cache from the inputs, under whatever name it stands there, and return it."""
    cache = given_cache(inputs)
    for name in CACHE_NAMES:
        inputs.pop(name, None)
    return cache


def _batch_size(inputs: Inputs, side: str = "", *others: str) -> int:
    """Read the number of samples from the inputs of the encoder or the decoder (`side`)."""
    names = (f"{side}input_ids", f"{side}inputs_embeds", *others)
    for name in names:
        if name in inputs:
            return len(inputs[name])
    raise PeftValueError(f"the model gets no input to put the prompt in front of; give one of {', '.join(names)}")


def _prepend(inputs: Inputs, prompt: torch.Tensor, embedding: Callable, side: str = "") -> None:
    """Replace token ids by embeddings that begin with the prompt, and lengthen the mask."""
    ids, embeds = inputs.pop(f"{side}input_ids", None), inputs.get(f"{side}inputs_embeds")
    if embeds is None:
        embeds = embedding(ids)
    inputs[f"{side}inputs_embeds"] = torch.cat([prompt.to(embeds.device, embeds.dtype), embeds], dim=1)
    _lengthen(inputs, f"{side}attention_mask", prompt.shape[1], 1)


def _lengthen(inputs: Inputs, name: str, tokens: int, value: int) -> None:
    """Put a value for each virtual token in front of a (batch, length) input, if it is given."""
    tensor = inputs.get(name)
    if tensor is None:
        return
    if tensor.dim() != 2:
        raise PeftValueError(
            f"{name} of shape {tuple(tensor.shape)} cannot be lengthened for the prompt; it must be (batch, length)"
        )
    inputs[name] = torch.cat([tensor.new_full((len(tensor), tokens), value), tensor], dim=1)


def _shift_positions(inputs: Inputs, tokens: int, in_front: bool = False) -> None:
    """Count virtual tokens in positions that `generate` passes; `in_front` if this call brings them along."""
    for name in ("position_ids", "decoder_position_ids", "cache_position"):
        positions = inputs.get(name)
        if positions is None:
            continue
        shifted = positions + tokens
        if in_front:
            first = torch.arange(tokens, dtype=positions.dtype, device=positions.device)
            shifted = torch.cat([first.expand(*positions.shape[:-1], tokens), shifted], dim=-1)
        inputs[name] = shifted


def _backbone_with_cache(model: nn.Module) -> nn.Module | None:
    """Find the backbone of a model, if that takes a cache by name."""
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return backbone if isinstance(backbone, nn.Module) and cache_parameter(backbone) is not None else None


def _cache_for_backbone(model: nn.Module, cache: Any) -> AbstractContextManager[None]:
    """Hand a cache to the backbone of a model whose head does not pass it on, such as a classifier."""
    backbone = _backbone_with_cache(model)
    if backbone is None:
        raise PeftValueError(f"{type(model).__name__} takes no past_key_values, which prefix tuning needs")
    name = cache_parameter(backbone)
    return _rewriting_inputs(backbone, lambda args, kwargs: (args, {**kwargs, name: cache}))


@contextmanager
def _rewriting_inputs(module: nn.Module, rewrite: Callable[[tuple, Inputs], tuple[tuple, Inputs]]) -> Iterator[None]:
    """Change the arguments of a module that is called inside, but not where another thread calls it meanwhile."""
    mine = object()

    # torch adds a hook before it notes that the hook takes keywords, so that another thread may call it without them
    def change(module: nn.Module, args: tuple, kwargs: Inputs | None = None) -> tuple[tuple, Inputs] | None:
        call = current_call()
        return rewrite(args, kwargs) if call is not None and mine in call.notes else None

    with calling(notes={mine: True}):
        handle = module.register_forward_pre_hook(change, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
