# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""One `PeftModel` per task: its `forward` takes what models of that task take."""

from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..registry import TaskType
from ..utils.constants import QUESTION_ANSWERING_HEAD_NAMES, SEQ_CLS_HEAD_NAMES
from ..utils.error import PeftTypeError
from .peft_model import PeftModel


class _TaskModel(PeftModel):
    """What the classes of all tasks share: arguments, and a call with those that models of most tasks take."""

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _forward_task(self, named: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """Call the base model with those of a task's arguments that were given."""
        named = {name: value for name, value in named.items() if value is not None}
        return PeftModel.forward(self, **named, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Call the base model.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 0 at positions to leave out.
            inputs_embeds: (batch, length, width), instead of `input_ids`.
            labels: (batch,) classes or values; or (batch, length) token ids or classes of tokens, -100 at positions
                without a loss.
            output_attentions: return the attention weights.
            output_hidden_states: return the hidden states.
            return_dict: return an object with names, not a tuple.
            task_ids: (batch,) for methods with several tasks.
            kwargs: passed on to the base model.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "task_ids": task_ids,
        }
        return self._forward_task(named, kwargs)


class _GeneratingModel(_TaskModel):
    """What the classes of language models share."""

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.base_model_prepare_inputs_for_generation = getattr(model, "prepare_inputs_for_generation", None)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """
        Prepare the inputs of one generation step as the base model does.

        Args:
            args: for the base model.
            task_ids: (batch,) for methods with several tasks.
            kwargs: for the base model.
        """
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForCausalLM(_GeneratingModel, task=TaskType.CAUSAL_LM):
    """
    A causal language model with adapters.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how.
        adapter_name: name of the adapter.
        kwargs: see `PeftModel`.
    """


class PeftModelForSeq2SeqLM(_GeneratingModel, task=TaskType.SEQ_2_SEQ_LM):
    """
    An encoder-decoder language model with adapters.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how.
        adapter_name: name of the adapter.
        kwargs: see `PeftModel`.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Call the base model.

        Args:
            input_ids: (batch, length) token ids of the source.
            attention_mask: (batch, length), 0 at positions to leave out.
            inputs_embeds: (batch, length, width), instead of `input_ids`.
            decoder_input_ids: (batch, length) token ids of the target.
            decoder_attention_mask: (batch, length) of the target.
            decoder_inputs_embeds: (batch, length, width), instead of `decoder_input_ids`.
            labels: (batch, length) token ids, -100 at positions without a loss.
            output_attentions: return the attention weights.
            output_hidden_states: return the hidden states.
            return_dict: return an object with names, not a tuple.
            task_ids: (batch,) for methods with several tasks.
            kwargs: passed on to the base model.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "task_ids": task_ids,
        }
        return self._forward_task(named, kwargs)

    def generate(self, **kwargs: Any) -> Any:
        """
        Generate with the base model.

        Args:
            kwargs: for the base model's `generate`, but for `adapter_names`; see `PeftModel.forward`.
        """
        return super().generate(**kwargs)


class PeftModelForSequenceClassification(_TaskModel, task=TaskType.SEQ_CLS):
    """
    A sequence classifier with adapters; its head is trained in full.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how.
        adapter_name: name of the adapter.
        kwargs: see `PeftModel`.
    """

    _head_names = tuple(SEQ_CLS_HEAD_NAMES[::-1])


class PeftModelForTokenClassification(_TaskModel, task=TaskType.TOKEN_CLS):
    """
    A token classifier with adapters; its head is trained in full.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how.
        adapter_name: name of the adapter.
        kwargs: see `PeftModel`.
    """

    _head_names = tuple(SEQ_CLS_HEAD_NAMES[::-1])

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None = None,
        adapter_name: str = "default",
        **kwargs: Any,
    ) -> None:
        if peft_config is None:
            raise PeftTypeError("peft_config is needed: it says what to adapt and how")
        super().__init__(model, peft_config, adapter_name, **kwargs)


class PeftModelForQuestionAnswering(_TaskModel, task=TaskType.QUESTION_ANS):
    """
    An extractive question answering model with adapters; its head is trained in full.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how.
        adapter_name: name of the adapter.
        kwargs: see `PeftModel`.
    """

    _head_names = tuple(QUESTION_ANSWERING_HEAD_NAMES)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Call the base model.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 0 at positions to leave out.
            token_type_ids: (batch, length), question or text.
            position_ids: (batch, length).
            inputs_embeds: (batch, length, width), instead of `input_ids`.
            start_positions: (batch,) first token of the answer, counted as the rows of the logits are, which begin
                with the virtual tokens of a prompt.
            end_positions: (batch,) last token of the answer, likewise.
            output_attentions: return the attention weights.
            output_hidden_states: return the hidden states.
            return_dict: return an object with names, not a tuple.
            task_ids: (batch,) for methods with several tasks.
            kwargs: passed on to the base model.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "task_ids": task_ids,
        }
        return self._forward_task(named, kwargs)


class PeftModelForFeatureExtraction(_TaskModel, task=TaskType.FEATURE_EXTRACTION):
    """
    An encoder with adapters, for embeddings of text.

    Args:
        model: the base model; it is changed in place.
        peft_config: what to adapt and how.
        adapter_name: name of the adapter.
        kwargs: see `PeftModel`.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Call the base model.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 0 at positions to leave out.
            inputs_embeds: (batch, length, width), instead of `input_ids`.
            output_attentions: return the attention weights.
            output_hidden_states: return the hidden states.
            return_dict: return an object with names, not a tuple.
            task_ids: (batch,) for methods with several tasks.
            kwargs: passed on to the base model.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "task_ids": task_ids,
        }
        return self._forward_task(named, kwargs)
