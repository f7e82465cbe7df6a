# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Activated LoRA: an adapter that is active from certain tokens on, so that what comes before needs no second cache.

Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics", 2025, arXiv:2504.12397.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ....layers.call_context import Call, begin, calling, current_call, end, remember
from ....layers.undo import on_failure
from ....utils.caches import given_cache
from ....utils.error import PeftNotImplementedError, PeftValueError
from ....utils.warning import warn
from ..config import LoraConfig
from ..low_rank import LowRankLayer
from ..maths import NEVER, find_invocations
from ..starts import changes_base
from ..whole_weight import OnWholeWeight
from .base import LoraVariant
from .registry import register_variant


# attribute of a cache of keys and values: adapter -> where each of its sequences invokes it
_STARTS = "_alora_starts"


@register_variant("alora_invocation_tokens")
class ActivatedLora(LoraVariant):
    """
    aLoRA: W x before the invocation tokens of a sequence, W x + scaling * B A x from the first of them on.

    Where an adapter is invoked several times, the last time counts; a sequence without an invocation is computed by
    the base model.
    """

    name = "aLoRA (alora_invocation_tokens)"
    kept_by_conversion = ("alora_invocation_tokens",)
    invocations: "Invocations | None" = None

    @classmethod
    def has_weighted_sum(cls, configs: Sequence[LoraConfig]) -> bool:
        """Say whether the adapters are invoked by the same tokens, and so act at the same positions."""
        return len({tuple(config.alora_invocation_tokens) for config in configs}) == 1

    @classmethod
    def supports(cls, layer: LowRankLayer) -> bool:
        """Say whether the layer is a linear one."""
        return isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)) and not isinstance(layer, OnWholeWeight)

    @classmethod
    def refusal(
        cls, config: LoraConfig, target: str, base: nn.Module, layer: nn.Module, rank: int
    ) -> Exception | None:
        """Say that what comes before the invocation needs the base weights as they are."""
        if changes_base(config.init_lora_weights):
            return PeftValueError(
                f"{cls.name} leaves a part of the outputs as they are, and init_lora_weights="
                f"{config.init_lora_weights!r} changes the base weights that they come from; use True or 'gaussian'"
            )
        return super().refusal(config, target, base, layer, rank)

    def attach(self, model: nn.Module, adapter: str, config: LoraConfig) -> None:
        """Have the base model note where its inputs invoke the adapter."""
        self.invocations = Invocations.of(model)
        self.invocations.note(adapter, config.alora_invocation_tokens)

    def detach(self, adapter: str) -> None:
        """Stop noting it."""
        if self.invocations is not None:
            self.invocations.forget(adapter)

    def forward(
        self, layer: LowRankLayer, adapter: str, x: torch.Tensor, earlier: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Add the delta at the positions from the invocation on."""
        result = layer.adapted(earlier, x, *args, **kwargs)
        call = current_call()
        noted = None if call is None else call.notes.get(self.invocations)
        offsets = None if noted is None else noted.offsets.get(adapter)
        if offsets is None:
            return result
        rows = call.notes.get(self)
        if rows is not None:
            offsets = offsets[rows]
        if x.dim() not in (2, 3) or x.shape[0] % len(offsets) or (x.dim() == 3 and x.shape[0] != len(offsets)):
            raise PeftValueError(
                f"aLoRA needs an input (batch, length, features) for a batch of {len(offsets)}, found "
                f"{tuple(x.shape)}: the layer cannot tell which token stands where. Leave it out of target_modules"
            )
        # some models flatten batch and length
        length = x.shape[1] if x.dim() == 3 else x.shape[0] // len(offsets)
        from_end = torch.arange(length, 0, -1, device=offsets.device)
        is_active = (from_end <= offsets.unsqueeze(1)).to(x.device).view(*x.shape[:-1], 1)
        return torch.where(is_active, (result + layer.delta_forward(adapter, x)).to(result.dtype), result)

    def forward_rows(
        self, layer: LowRankLayer, adapter: str, rows: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute samples of a batch, each from its own invocation on."""
        with calling(notes={self: rows}):
            return super().forward_rows(layer, adapter, rows, x, *args, **kwargs)

    def check_mergeable(self, layer: LowRankLayer, adapter: str) -> None:
        """
        Refuse to merge.

        Raises:
            PeftNotImplementedError: always.
        """
        raise PeftNotImplementedError(
            f"adapter {adapter!r} is active from its invocation tokens on (aLoRA), which a merged weight cannot be; "
            "keep it unmerged"
        )


@dataclass
class Noted:
    """
    Where the sequences of one call invoke adapters.

    Attributes:
        offsets: adapter -> (batch,) number of tokens from the invocation to the end, 0 without one; empty if it is not
            known.
        starts: adapter -> (batch,) places from the start of the sequence, what a cache holds of it included.
        call: the call.
    """

    offsets: dict[str, torch.Tensor] = field(default_factory=dict)
    starts: dict[str, torch.Tensor] = field(default_factory=dict)
    call: Call | None = None


class Invocations:
    """
    Where the sequences that a model is given at the moment invoke its adapters.

    It hooks into the base model, and reads the token ids of each call, be it by a trainer or one of the steps of
    `generate`. Where the ids continue sequences in a cache, what was found in the earlier part is read from the cache.

    What is found stands in the context of the call (`Noted`), and nothing of it here.

    Attributes:
        tokens: adapter -> its invocation tokens.
    """

    def __init__(self, model: nn.Module):
        self.tokens: dict[str, list[int]] = {}
        self._handles = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )

    @classmethod
    def of(cls, model: nn.Module) -> "Invocations":
        """Find what hooks into a model already, or make it."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), cls):
                return hook.__self__
        return cls(model)

    def note(self, adapter: str, tokens: Sequence[int]) -> None:
        """Look for an adapter's invocation tokens too."""
        on_failure(partial(self._restore, dict(self.tokens)))
        self.tokens[adapter] = list(tokens)

    def _restore(self, tokens: dict[str, list[int]]) -> None:
        self.tokens = tokens

    def forget(self, adapter: str) -> None:
        """Leave an adapter out; the hooks are removed with the last one."""
        on_failure(partial(self._restore, dict(self.tokens)))
        self.tokens.pop(adapter, None)
        if not self.tokens:
            for handle in self._handles:
                handle.remove()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Note the invocations of a call; `alora_offsets` says them where there are no token ids."""
        noted = Noted()
        kwargs = dict(kwargs)
        given = kwargs.pop("alora_offsets", None)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if given is not None:
            offsets = torch.tensor([offset or 0 for offset in given])
            noted.offsets = dict.fromkeys(self.tokens, offsets)
        elif isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            cache = given_cache(kwargs)
            past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
            for adapter, tokens in self.tokens.items():
                starts = find_invocations(ids, tokens)
                starts = torch.where(starts < NEVER, starts + past, _recorded(cache, adapter, starts))
                noted.starts[adapter] = starts
                noted.offsets[adapter] = (past + ids.shape[1] - starts).clamp(min=0)
        else:
            warn(
                f"the input has no token ids, so that it is not known where it invokes {', '.join(self.tokens)} "
                "(aLoRA); the base model computes it. Give input_ids, or alora_offsets, the number of tokens from the "
                "invocation to the end of each sequence"
            )
        noted.call = begin(notes={self: noted if noted.offsets else None, (self, "open"): noted})
        return args, kwargs

    def _after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Leave a note in the cache, for calls that continue it, and one for layers that are computed again."""
        call = current_call()
        noted = None if call is None else call.notes.get((self, "open"))
        if noted is None:  # the call was refused before anything was noted
            return
        end(noted.call)
        cache = given_cache(output) if isinstance(output, Mapping) else None
        cache = given_cache(kwargs) if cache is None else cache
        if noted.starts and hasattr(cache, "get_seq_length"):
            setattr(cache, _STARTS, noted.starts)
        if torch.is_grad_enabled():
            remember(noted.call, output)


def _recorded(cache: Any, adapter: str, like: torch.Tensor) -> torch.Tensor:
    """Read where sequences in a cache invoke an adapter; a cache that the base model has filled tells nothing."""
    starts = getattr(cache, _STARTS, {}).get(adapter)
    if starts is None or len(like) % len(starts):
        return torch.full_like(like, NEVER)
    return starts.to(like.device).repeat_interleave(len(like) // len(starts))


def calculate_alora_offsets(
    peft_config: Mapping[str, LoraConfig],
    active_adapter: str,
    input_ids: torch.Tensor,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """
    Count how many tokens of each sequence an adapter is active on.

    Args:
        peft_config: adapter name -> config.
        active_adapter: adapter of all samples, unless each has its own.
        input_ids: (batch, length) token ids.
        adapter_names: adapter of each sample.

    Returns:
        Tokens from the invocation, itself included, to the end; None where there is none, or the adapter is none that
        is invoked.

    Example:

        >>> import torch
        >>> from peft import LoraConfig
        >>> from peft.tuners.lora.variants import calculate_alora_offsets
        >>> config = LoraConfig(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
        >>> calculate_alora_offsets({"default": config}, "default", torch.tensor([[1, 5, 6, 2], [1, 2, 3, 4]]))
        [3, None]
    """
    offsets: list[int | None] = []
    for row, name in enumerate(adapter_names if adapter_names is not None else [active_adapter] * len(input_ids)):
        tokens = getattr(peft_config.get(name), "alora_invocation_tokens", None)
        start = int(find_invocations(input_ids[row : row + 1], tokens)) if tokens else NEVER
        offsets.append(input_ids.shape[1] - start if start < NEVER else None)
    return offsets


def is_alora_relevant_in_batch(model: nn.Module, adapter_names: Sequence[str] | None = None) -> bool:
    """
    Say whether an adapter that is invoked takes part in a batch.

    Args:
        model: a `PeftModel`.
        adapter_names: adapter of each sample; the active one of all if left out.
    """
    names = adapter_names if adapter_names is not None else model.active_adapters
    return any(getattr(model.peft_config.get(name), "alora_invocation_tokens", None) for name in names)


def get_alora_offsets_for_forward(
    model: nn.Module,
    input_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """
    Say where a batch invokes its adapters, for those who call the base model by themselves.

    A `PeftModel` finds that out of the token ids that it is given, and needs none of it.

    Args:
        model: a `PeftModel`.
        input_ids: (batch, length) token ids.
        inputs_embeds: embeddings in their place, of which it is not known.
        kwargs: other arguments of the forward pass, among them `adapter_names`.

    Returns:
        The other arguments, with `alora_offsets` if an adapter that is invoked takes part and they are not given.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft.peft_model import get_alora_offsets_for_forward
        >>> config = LoraConfig(target_modules=["1"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
        >>> net = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
        >>> net.prepare_inputs_for_generation = None
        >>> model = get_peft_model(net, config)
        >>> get_alora_offsets_for_forward(model, torch.tensor([[1, 5, 6, 2]]))
        {'alora_offsets': [3]}
    """
    names = kwargs.get("adapter_names")
    if kwargs.get("alora_offsets") is not None or not is_alora_relevant_in_batch(model, names):
        return kwargs
    if input_ids is None:
        warn(
            "without token ids it is not known where the input invokes the adapter (aLoRA), and the base model "
            "computes it; give input_ids, or alora_offsets"
        )
        return {**kwargs, "alora_offsets": None}
    active = next(iter(model.active_adapters), "")
    return {**kwargs, "alora_offsets": calculate_alora_offsets(model.peft_config, active, input_ids, names)}


def get_alora_offsets_for_generate(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """
    Do what `get_alora_offsets_for_forward` does for the arguments of `generate`.

    Args:
        model: a `PeftModel`.
        args: arguments by position, of which the first is the token ids.
        kwargs: arguments by name.

    Returns:
        The arguments by name, with `alora_offsets` if an adapter that is invoked takes part.
    """
    ids = next((kwargs[name] for name in ("input_ids", "inputs") if kwargs.get(name) is not None), None)
    found = get_alora_offsets_for_forward(
        model,
        ids if ids is not None or not args else args[0],
        **{name: value for name, value in kwargs.items() if name not in ("input_ids", "inputs_embeds")},
    )
    return {**kwargs, **found}
