# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""MiSS: W + one small matrix that is repeated, or a change by such matrices that depends on W."""

from torch import Tensor, nn

from ...layers.scaling import Unscaled
from ...utils.constants import TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.either import DeclaredEither
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained
from .config import MissConfig
from .maths import change_of, repeated, repeated_product, without_change


class ShardLayer(Unscaled, DeclaredEither):
    """A layer with shards, with what the released package lets do with it."""

    def get_delta_weight(self, adapter: str, orig_weight: Tensor | None = None, reverse: bool = False) -> Tensor:
        """
        Compute what an adapter adds to a weight.

        Args:
            adapter: name.
            orig_weight: another weight than the base layer's, for adapters that transform it.
            reverse: give the weight from which that one was made instead.
        """
        if orig_weight is None or not self.transforms(adapter):
            return super().get_delta_weight(adapter)
        return (without_change if reverse else change_of)(orig_weight, self.miss_block[adapter])

    def get_delta_weight_miss(self, adapter: str, orig_weight: Tensor, reverse: bool = False) -> Tensor:
        """
        Compute a weight with an adapter that adds to it.

        Args:
            adapter: name.
            orig_weight: the weight without it.
            reverse: take it out instead.
        """
        return orig_weight + self.get_delta_weight(adapter).to(orig_weight) * (-1 if reverse else 1)

    def reset_miss_parameters(self, adapter_name: str, r: int) -> None:
        """Start an adapter anew that adds one row per input of a shard."""
        self.restart(adapter_name, init_weights=True, r=r)

    def reset_bat_parameters(self, adapter_name: str, r: int) -> None:
        """Start an adapter anew that transforms the weight."""
        self.restart(adapter_name, init_weights="bat", r=r)

    def reset_mini_parameters(self, adapter_name: str, r: int, mini_r: int) -> None:
        """Start an adapter anew whose rows are repeated too."""
        self.restart(adapter_name, init_weights="mini", r=r, mini_r=mini_r)

    def reset_miss_parameters_random(self, adapter_name: str) -> None:
        """Start an adapter anew, at random."""
        self.restart(adapter_name, init_weights=False)


@method(
    "MISS",
    MissConfig,
    kinds={nn.Linear: "MissLinear"},
    targets=TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING,
    dropout="miss_dropout",
    settings={"miss_r": "r", "miss_mini_r": "mini_r"},
    rule=ShardLayer,
)
class Miss:
    """A layer with shards that all parts of its weight share."""

    trained = ("block",)

    def tensors(shape: Shape, c: MissConfig) -> dict[str, Trained]:
        """Tell the shard, (r, out) or (r, mini_r), or one for each r outputs, (out / r, r, r)."""
        (out, inputs), r = shape, c.r
        if not 0 < r <= inputs:
            raise PeftValueError(f"r must be positive and at most the {inputs} inputs of a target, found {r}")
        if c.init_weights == "bat" and (out % r or inputs % r):
            raise PeftValueError(
                f"for 'bat' r must divide the {inputs} inputs and {out} outputs of a target, found {r}"
            )
        if c.init_weights == "mini" and (c.mini_r <= 0 or out % c.mini_r):
            raise PeftValueError(f"mini_r must divide the {out} outputs of a target, found {c.mini_r}")
        size = {"bat": (out // r, r, r), "mini": (r, c.mini_r)}.get(c.init_weights, (r, out))
        start = 0.0 if c.init_weights else lambda block: block.uniform_(-(out**-0.5), out**-0.5)
        return {"block": Trained(size, start)}

    def transforms(c: MissConfig) -> bool:
        """Say whether the change depends on the weight."""
        return c.init_weights == "bat"

    def weight(t: Tensors, w: Tensor, c: MissConfig) -> Tensor:
        """Change the weight block by block, (out, in)."""
        return w + change_of(w, t.block).to(w.dtype)

    def delta(t: Tensors, shape: Shape, c: MissConfig) -> Tensor:
        """Repeat the shard, (out, in)."""
        return repeated(t.block, shape)

    def apply(t: Tensors, x: Tensor, shape: Shape, c: MissConfig) -> Tensor:
        """Sum up the parts of the input, and multiply by the shard."""
        return repeated_product(x, t.block, shape[0])


MissLayer, MissLinear = Miss.Layer, Miss.MissLinear


__getattr__ = old_names(__name__)
