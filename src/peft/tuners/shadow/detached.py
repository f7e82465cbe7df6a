# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The small model of an adapter by itself."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.utils import ModelOutput

from ...utils.caches import CACHE_NAMES, given_cache
from .maths import class_loss, last_token, next_token_loss


class DetachedShadowModel(PreTrainedModel, GenerationMixin):
    """
    A small model with the projection and the head that it had beside a base model.

    Args:
        backbone: the small model.
        projection: of its outputs to the width of the head.
        head: which gives logits; without one, the outputs of the projection are given.
        is_classification: whether the head is for the last token of a sample.
        input_embeddings: embeddings of the base model, if the small one has none. They are no part of the state dict.
    """

    config_class = None
    main_input_name = "input_ids"
    _no_split_modules: list[str] = []
    # the small model, which does the attention, has been asked when it was made
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        backbone: nn.Module,
        projection: nn.Module | None = None,
        head: nn.Module | None = None,
        is_classification: bool = False,
        input_embeddings: nn.Module | None = None,
    ) -> None:
        self.__dict__["is_classification"] = is_classification  # which the constructor of all models asks for
        super().__init__(backbone.config)
        self.backbone = backbone
        self.projection = nn.Identity() if projection is None else projection
        self.head = nn.Identity() if head is None else head
        self.__dict__["_shared_embeddings"] = input_embeddings

    def can_generate(self) -> bool:
        """Say whether there are logits of tokens to generate from."""
        return not self.is_classification

    def get_input_embeddings(self) -> nn.Module:
        """Give the embeddings of input ids, be they the base model's."""
        own = self._modules.get("input_embeddings") or self.__dict__.get("_shared_embeddings")
        return self.backbone.get_input_embeddings() if own is None else own

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings of input ids."""
        if self.__dict__.get("_shared_embeddings") is not None or "input_embeddings" in self._modules:
            self.input_embeddings = value
        else:
            self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Give the head of a language model."""
        return None if self.is_classification else self.head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """
        Compute logits.

        Args:
            input_ids: (batch, length) token ids; or `inputs_embeds` by name.
            attention_mask: (batch, length), 0 at positions to leave out.
            labels: (batch, length) token ids, or (batch,) classes.
            kwargs: for the small model.
        """
        for name in ("return_dict", "logits_to_keep"):
            kwargs.pop(name, None)
        embeds = kwargs.pop("inputs_embeds", None)
        if embeds is None:
            embeds = self.get_input_embeddings()(input_ids)
        outputs = self.backbone(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        hidden = self.projection(outputs[0])
        if self.is_classification:
            logits = self.head(last_token(hidden, attention_mask))
            loss = None if labels is None else class_loss(logits, labels)
            return SequenceClassifierOutputWithPast(loss=loss, logits=logits)
        logits = self.head(hidden)
        loss = None if labels is None else next_token_loss(logits, labels)
        made = CausalLMOutputWithPast(loss=loss, logits=logits)
        name = next((name for name in CACHE_NAMES if name in type(made).__dataclass_fields__), None)
        if name is not None and given_cache(outputs) is not None:
            made[name] = given_cache(outputs)
        return made
