# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""C3A: W + a matrix of circulant blocks, each of them told by one kernel."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.layers import DeclaredAdditive
from ..declared.method import method
from ..declared.tensors import Shape, Tensors, Trained
from .config import C3AConfig
from .maths import BlockCircularConvolution as BlockCircularConvolution
from .maths import circular_convolution, get_circulant_fast


class CirculantLayer(DeclaredAdditive):
    """A layer with circulant blocks, with what the released package lets do with it."""

    def reset_c3a_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """
        Start an adapter anew.

        Args:
            adapter_name: name.
            init_weights: as in the config.
        """
        self.restart(adapter_name, init_weights=init_weights)


@method(
    "C3A",
    C3AConfig,
    kinds={nn.Linear: "C3ALinear"},
    patterns={"block_size": "block_size_pattern"},
    targets=TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING,
    settings={"block_size": "block_size"},
    rule=CirculantLayer,
)
class C3A:
    """A layer with a matrix of circulant blocks added to its weight."""

    trained = ("kernel",)

    def tensors(shape: Shape, c: C3AConfig) -> dict[str, Trained]:
        """Tell the kernels, (out / b, in / b, b)."""
        (out, inputs), size = shape, c.block_size
        if not isinstance(size, int) or size <= 0 or out % size or inputs % size:
            raise PeftValueError(
                f"block_size must divide the {inputs} inputs and {out} outputs of a target, found {size!r}; its "
                f"block_size_pattern can say another one, such as {math.gcd(out, inputs)}"
            )
        return {"kernel": Trained((out // size, inputs // size, size), start_of(shape, c))}

    def delta(t: Tensors, shape: Shape, c: C3AConfig) -> torch.Tensor:
        """Build the matrix, (out, in)."""
        return get_circulant_fast(t.kernel) / shape[1]

    def apply(t: Tensors, x: torch.Tensor, shape: Shape, c: C3AConfig) -> torch.Tensor:
        """Convolve the parts of the input with the kernels."""
        return circular_convolution(x, t.kernel) / shape[1]


def start_of(shape: Shape, c: C3AConfig) -> float | Callable[[torch.Tensor], torch.Tensor]:
    """Give what kernels start with."""
    out, inputs = shape
    if c.init_weights is True:
        return 0.0
    if c.init_weights == "gaussian":
        return nn.init.normal_
    bound = {False: math.sqrt(6 / (inputs + out)), "kaiming_uniform": 1 / math.sqrt(inputs)}
    bound["xavier_uniform"] = bound[False]
    if c.init_weights not in bound:
        raise PeftValueError(f"init_weights must be True, 'gaussian', or one of {[*bound]}, found {c.init_weights!r}")
    return lambda kernel: kernel.uniform_(-bound[c.init_weights], bound[c.init_weights])


C3ALayer, C3ALinear = C3A.Layer, C3A.C3ALinear


__getattr__ = old_names(__name__)
