# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The base models of the golden cases: tiny transformers models, and small graphs of plain torch modules."""

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import store


class ParamLinear(nn.Module):
    """A linear map whose `weight` (out, in) is a bare parameter."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class ParamExperts(nn.Module):
    """The mean of several maps with stacked weights: `up` (experts, in, hidden), `down` (experts, hidden, in)."""

    def __init__(self, experts: int, in_features: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(experts, in_features, hidden))
        self.down = nn.Parameter(torch.zeros(experts, hidden, in_features))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("...i,eih->...eh", x, self.up))
        return torch.einsum("...eh,ehi->...ei", hidden, self.down).mean(dim=-2)


class Block(nn.Module):
    """A residual block of a norm and two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a = nn.Linear(width, hidden)
        self.b = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(self.norm(x))))


class Stack(nn.Module):
    """A list `layers` of `n` blocks."""

    def __init__(self, n: int, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def make_module(kind: str, kwargs: dict) -> nn.Module:
    """Make one module of a plain graph."""
    if kind == "HFConv1D":
        from transformers.pytorch_utils import Conv1D

        return Conv1D(**kwargs)
    own = {cls.__name__: cls for cls in (ParamLinear, ParamExperts, Block, Stack)}
    return (own.get(kind) or getattr(nn, kind))(**kwargs)


class PlainGraph(nn.Module):
    """Modules called in a fixed order on named values, as the description says."""

    def __init__(self, spec: dict) -> None:
        super().__init__()
        self.steps, self.inputs, self.result = spec["steps"], spec["inputs"], spec["return"]
        for name, kind, kwargs in spec["modules"]:
            self.add_module(name, make_module(kind, kwargs))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        values = dict(zip(self.inputs, args, strict=False)) | kwargs
        for step in self.steps:
            values[step["out"]] = self.apply_step(step, *(values[name] for name in step["in"]))
        return values[self.result]

    def apply_step(self, step: dict, x: Tensor, *more: Tensor) -> Tensor:
        """Return the result of one step."""
        match step["op"]:
            case "call":
                result = getattr(self, step["module"])(x, *more)
                return result if step.get("item") is None else result[step["item"]]
            case "relu":
                return torch.relu(x)
            case "log_softmax":
                return torch.log_softmax(x, dim=-1)
            case "mean":
                return x.mean(step["dim"])
            case "add":
                return x + more[0]
            case "transpose":
                return x.transpose(*step["dims"])
            case "reshape":
                return x.reshape(x.shape[0], *step["shape"])
            case unknown:
                raise ValueError(f"a plain graph has no operation {unknown!r}")


def decode_inputs(values: dict | None) -> dict:
    """Turn lists of numbers, as JSON has them, into tensors; lists of names stay lists."""

    def is_names(value: list) -> bool:
        return bool(value) and isinstance(value[0], str)

    return {
        key: torch.tensor(value) if isinstance(value, list) and not is_names(value) else value
        for key, value in (values or {}).items()
    }


class Base:
    """One base model: how to build it, one batch of inputs, and its output for them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.spec = store.facts()["bases"][name]
        self.inputs = store.tensors(name, "base", "inputs")
        self.output = store.tensors(name, "base", "output")["out"]
        self.weights = store.tensors(name, "base", "weights")
        self.is_plain = self.spec["kind"] == "plain"

    @classmethod
    @functools.cache
    def named(cls, name: str) -> "Base":
        """Return the base of that name, read once."""
        return cls(name)

    @functools.cached_property
    def _model(self) -> nn.Module:
        if self.is_plain:
            model = PlainGraph(self.spec)
        else:
            import transformers

            config = getattr(transformers, self.spec["config_class"])(**self.spec["config_kwargs"])
            config._attn_implementation = "eager"
            model = getattr(transformers, self.spec["model_class"])(config)
        unexpected = model.load_state_dict(self.weights, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"base {self.name} has no {unexpected}")
        if not self.is_plain:
            model.tie_weights()
        return model.eval()

    def build(self) -> nn.Module:
        """Return a fresh copy of the model, in eval mode."""
        return copy.deepcopy(self._model)

    @property
    def state_dict_keys(self) -> set[str]:
        """The keys of the model's state dict, those of tied copies among them."""
        return {*self.weights, *self.spec["tied_state_dict_keys"]}

    def forward(self, model: nn.Module, extra: dict[str, Any] | None = None) -> Tensor:
        """Run a model on the batch; `extra` sets further arguments, and None drops an input."""
        extra = decode_inputs(extra)
        inputs = {key: tensor.clone() for key, tensor in self.inputs.items() if extra.get(key, tensor) is not None}
        extra = {key: value for key, value in extra.items() if value is not None}
        if self.is_plain:
            return model(*(inputs[name] for name in self.spec["inputs"]), **extra)
        result = model(**(inputs | extra))
        names = self.spec["output"]
        return getattr(result, names) if isinstance(names, str) else torch.stack([getattr(result, n) for n in names])
