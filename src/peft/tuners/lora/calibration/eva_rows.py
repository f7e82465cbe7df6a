# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which rows of a layer's inputs EVA looks at, and how a model is run with a batch: what callers may replace."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ....utils.error import PeftTypeError, PeftValueError
from ..config import EvaConfig, LoraConfig


# (inputs of the layer, what the other function made of the batch, name of the layer) -> (rows, in)
LayerInputs = Callable[[tuple[Any, ...], Any, str], torch.Tensor]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """
    Run a model with a batch that holds its arguments by name.

    Args:
        model: the model.
        inputs: name -> argument.
    """
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: LoraConfig) -> torch.Tensor:
    """
    Say which positions of a batch of texts count: those that are no padding, and that have a label if asked for.

    Args:
        model_input: arguments of the model by name; `attention_mask` and `labels` are used if they are there.
        peft_config: its `eva_config` says whether labels count.

    Returns:
        (positions, 2): number in the batch, and position in the text.

    Raises:
        PeftTypeError: if the batch does not hold arguments by name.
        PeftValueError: if nothing in it has positions.
    """
    if not isinstance(model_input, Mapping):
        raise PeftTypeError(
            f"a batch must be a dictionary with the model's arguments, found {type(model_input).__name__}; give "
            "prepare_model_inputs_fn (None to use all positions) and forward_fn for batches of another form"
        )
    eva_config = peft_config.eva_config or EvaConfig()
    mask, labels = model_input.get("attention_mask"), model_input.get("labels")
    if mask is None:
        texts = next((model_input[key] for key in ("input_ids", "inputs_embeds") if key in model_input), labels)
        if texts is None:
            raise PeftValueError(
                f"a batch with {', '.join(map(repr, model_input)) or 'nothing'} does not say which positions it has; "
                "give prepare_model_inputs_fn (None to use all positions)"
            )
        mask = torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device)
    # labels of whole texts say nothing about positions
    if eva_config.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask.bool() & (labels != eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: tuple[Any, ...] | torch.Tensor, model_input: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """
    Take the rows at given positions out of a layer's inputs.

    Args:
        layer_input: arguments of the layer, of which the first is (batch, length, in), or that one.
        model_input: (positions, 2), as `prepare_model_inputs_fn_language_modeling` gives them; None for all.
        layer_name: name of the layer.

    Returns:
        (positions, in)

    Raises:
        PeftValueError: if the layer does not get one row for each position.
    """
    inputs = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if model_input is None:
        return inputs.reshape(-1, inputs.shape[-1])
    positions = model_input.to(inputs.device)
    most = positions.amax(0) if len(positions) else None
    if inputs.dim() != 3 or (most is not None and (most.cpu() >= torch.tensor(inputs.shape[:2])).any()):
        raise PeftValueError(
            f"{layer_name!r} gets inputs of shape {tuple(inputs.shape)}, not one row for each position of the texts; "
            "give a function for this layer in prepare_layer_inputs_fn={...}, or prepare_model_inputs_fn=None to use "
            "all rows"
        )
    return inputs[positions[:, 0], positions[:, 1]]


def functions_by_layer(
    given: LayerInputs | Mapping[str, LayerInputs] | None, names: list[str]
) -> Mapping[str, LayerInputs]:
    """
    Give the function that picks rows for each layer.

    Args:
        given: one for all, or those of single layers by name; None for all rows.
        names: names of all layers.

    Raises:
        PeftValueError: for a name that is none of them.
    """
    usual = prepare_layer_inputs_fn_language_modeling
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, _all_rows if given is None else given)
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise PeftValueError(
            f"prepare_layer_inputs_fn names {', '.join(map(repr, unknown))}, which EVA does not look at; the layers "
            f"are {', '.join(names)}"
        )
    return {name: given.get(name, usual) for name in names}


def _all_rows(layer_input: tuple[Any, ...], model_input: Any, layer_name: str) -> torch.Tensor:
    return prepare_layer_inputs_fn_language_modeling(layer_input, None, layer_name)
