# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Attention modules that also attend to a few trained tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...layers.adapter_module import AdapterModule
from ...layers.new_tensors import on_meta
from ...utils.old_names import old_names
from .maths import gpt2_compute_query_states, llama_compute_query_states, split_heads


_PROMPT, _GATE = "adaption_prompt", "adaption_gate"


class _BaseAdaptedAttention(AdapterModule, nn.Module):
    """
    An attention module with trained tokens for one or more adapters.

    What the module adds is a softmax of its own over these tokens, behind a gate. The tensors of one adapter, the
    active one if it is here, stand on this module itself, so that their names do not hold the adapter's; those of
    others stand in `others`.

    Args:
        model_type: type of the base model.
        adapter_len: number of tokens.
        model: the attention module.
        target_dtype: type of the tokens.
        adapter_name: the adapter that they belong to.
    """

    _base_names = ("model",)
    supports_mixed_batch = False
    # of the attention module; the first one tells the type of the tokens
    projections: tuple[str, ...] = ()

    def __init__(
        self,
        model_type: str,
        adapter_len: int,
        model: nn.Module,
        target_dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:
        super().__init__()
        self.model_type = model_type
        self.model = model
        self.target_dtype = target_dtype
        self.others = nn.ModuleDict()
        self._shown: str | None = None
        self._active_adapter = []
        self.add_adapter(adapter_name, adapter_len)
        self._active_adapter = [adapter_name]

    def __getattr__(self, name: str) -> Any:
        """Answer as the attention module would."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)

    # ------------------------------------------------------------------------------------------------------- adapters
    def add_adapter(self, adapter_name: str, adapter_len: int) -> None:
        """
        Make the tokens of an adapter, which is not active yet.

        Args:
            adapter_name: name.
            adapter_len: number of tokens.
        """
        device = "meta" if on_meta() else next(self.model.parameters()).device
        width = self.model.config.hidden_size
        tensors = nn.ParameterDict(
            {
                _PROMPT: torch.empty(1, adapter_len, width, device=device, dtype=self.target_dtype).normal_(),
                _GATE: torch.zeros(1, device=device, dtype=self.target_dtype),
            }
        )
        self.others[adapter_name] = tensors
        if self._shown is None:
            self._show(adapter_name)

    def _show(self, adapter_name: str | None) -> None:
        """Let the tensors of an adapter stand on this module itself, and those of no other one."""
        if adapter_name == self._shown:
            return
        if self._shown is not None:
            own = {name: self._parameters.pop(name) for name in (_PROMPT, _GATE)}
            self.others[self._shown] = nn.ParameterDict(own)
        if adapter_name is not None:
            tensors = self.others.pop(adapter_name)
            for name in (_PROMPT, _GATE):
                self.register_parameter(name, tensors[name])
        self._shown = adapter_name

    @property
    def available_adapters(self) -> set[str]:
        """Names of the adapters that have tokens here."""
        return {*self.others, *([] if self._shown is None else [self._shown])}

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the adapter that is used; others are frozen.

        Args:
            adapter_names: its name.
            inference_mode: freeze it too.
        """
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in self.available_adapters:
            if name in self._active_adapter:
                self._show(name)
            self.set_requires_grad(name, name in self._active_adapter and not inference_mode)

    def remove_adapter(self, adapter_name: str) -> None:
        """
        Remove the tokens of an adapter, if they are here.

        Args:
            adapter_name: name.
        """
        if adapter_name not in self.available_adapters:
            return
        if adapter_name == self._shown:
            self._show(next(iter(self.others), None))
        del self.others[adapter_name]
        self.forget_trained_before(adapter_name)

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of one adapter."""
        if adapter_name == self._shown:
            yield from (self._parameters[name] for name in (_PROMPT, _GATE))
        elif adapter_name in self.others:
            yield from self.others[adapter_name].values()

    def adapter_keys(self, adapter_name: str) -> Iterator[tuple[str, str]]:
        """Yield for each tensor of an adapter its key in a checkpoint and its key in this module's state dict."""
        if adapter_name in self.available_adapters:
            place = "" if adapter_name == self._shown else f"others.{adapter_name}."
            yield from ((name, place + name) for name in (_PROMPT, _GATE))

    # --------------------------------------------------------------------------------------------------- forward pass
    @property
    def _in_use(self) -> bool:
        return self._shown in self._active_adapter and not self._disable_adapters

    def _with_prompt(self, outputs: tuple, queries: torch.Tensor) -> tuple:
        """
        Add what the tokens give.

        Args:
            outputs: what the attention module gives, (batch, length, width) first.
            queries: (batch, heads, length, width of a head).
        """
        keys, values = self._keys_and_values(self.adaption_prompt)
        scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
        weights = self.adaption_gate * F.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
        added = self._joined((weights @ values).transpose(1, 2).flatten(2))
        return ((outputs[0] + added).to(queries.dtype), *outputs[1:])

    def _keys_and_values(self, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute keys and values of tokens, (1, heads, tokens, width of a head)."""
        raise NotImplementedError

    def _joined(self, heads: torch.Tensor) -> torch.Tensor:
        """Give what is added to the output for heads that are joined, (batch, length, heads * width of a head)."""
        return heads


class AdaptedAttention(_BaseAdaptedAttention):
    """
    An attention module of LLaMA or Mistral with trained tokens (Zhang et al. 2023, arXiv:2303.16199).

    Args:
        model_type: type of the base model.
        adapter_len: number of tokens.
        model: the attention module.
        adapter_name: the adapter that they belong to.
    """

    projections = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self, model_type: str, adapter_len: int, model: nn.Module, adapter_name: str = "default") -> None:
        super().__init__(model_type, adapter_len, model, _trained_dtype(model.q_proj), adapter_name)

    def forward(self, **kwargs: Any) -> tuple:
        """
        Attend to the input and to the tokens.

        Args:
            kwargs: for the attention module.
        """
        outputs = self.model(**kwargs)
        if not self._in_use:
            return outputs
        return self._with_prompt(outputs, llama_compute_query_states(self.model, **kwargs))

    def _keys_and_values(self, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attention = self.model
        heads = attention.config.num_attention_heads
        keys, values = (
            split_heads(projection(prompt), attention.head_dim) for projection in (attention.k_proj, attention.v_proj)
        )
        times = heads // keys.shape[1]
        return keys.repeat_interleave(times, dim=1), values.repeat_interleave(times, dim=1)

    def _joined(self, heads: torch.Tensor) -> torch.Tensor:
        return self.model.o_proj(heads)


class AdaptedAttentionGPT(_BaseAdaptedAttention):
    """
    An attention module of GPT-2 with trained tokens (Zhang et al. 2023, arXiv:2303.16199).

    Args:
        model_type: type of the base model.
        adapter_len: number of tokens.
        model: the attention module.
        adapter_name: the adapter that they belong to.
    """

    projections = ("c_proj", "c_attn")

    def __init__(self, model_type: str, adapter_len: int, model: nn.Module, adapter_name: str = "default") -> None:
        super().__init__(model_type, adapter_len, model, _trained_dtype(model.c_proj), adapter_name)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_past: Any = None,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple:
        """
        Attend to the input and to the tokens.

        Args:
            hidden_states: (batch, length, width).
            layer_past: for the attention module, as all that follows.
            attention_mask: likewise.
            head_mask: likewise.
            encoder_hidden_states: likewise; given if it attends to an encoder.
            encoder_attention_mask: likewise.
            use_cache: likewise.
            output_attentions: likewise.
            kwargs: likewise.
        """
        named = {
            "layer_past": layer_past,
            "attention_mask": attention_mask,
            "head_mask": head_mask,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "use_cache": use_cache or None,
            "output_attentions": output_attentions or None,
        }
        # versions of transformers differ in which of these the module takes
        given = {name: value for name, value in named.items() if value is not None}
        outputs = self.model(hidden_states, **given, **kwargs)
        if not self._in_use:
            return outputs
        return self._with_prompt(outputs, gpt2_compute_query_states(self.model, hidden_states, encoder_hidden_states))

    def _keys_and_values(self, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, keys, values = self.model.c_attn(prompt).chunk(3, dim=-1)
        return split_heads(keys, self.model.head_dim), split_heads(values, self.model.head_dim)


def _trained_dtype(projection: nn.Module) -> torch.dtype:
    """Give the type of a projection's weight, float32 if that cannot be trained."""
    dtype = projection.weight.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32


__getattr__ = old_names(__name__)
