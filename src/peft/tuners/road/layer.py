# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""RoAd: outputs are taken in pairs, and each pair is turned and stretched."""

from functools import partial

import torch
from torch import nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING
from ...utils.error import PeftValueError
from ...utils.old_names import old_names
from ..declared.method import method
from ..declared.mixing import DeclaredMixing
from ..declared.tensors import Shape, Tensors, Trained
from .config import RoadConfig
from .maths import determinants, pair_factors, turn_pairs


class TurningLayer(DeclaredMixing):
    """A layer whose outputs are turned in pairs, with what the released package lets do with it."""

    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """
        Start an adapter anew.

        Args:
            adapter_name: name.
            init_weights: True for no turn, False for random ones.
        """
        self.restart(adapter_name, init_weights=init_weights)


@method(
    "ROAD",
    RoadConfig,
    kinds={nn.Linear: "Linear"},
    targets=TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING,
    settings={"variant": "variant", "group_size": "group_size"},
    rule=TurningLayer,
)
class Road:
    """A layer whose outputs are turned in pairs."""

    trained = ("theta", "alpha")

    def tensors(shape: Shape, c: RoadConfig) -> dict[str, Trained]:
        """Tell angles and lengths, (out / 2,), (out,) or (2 out,)."""
        if shape[0] % c.group_size:
            raise PeftValueError(
                f"group_size must divide the output features of every target, found group_size={c.group_size} and a "
                f"layer with {shape[0]}"
            )
        size = (shape[0] * {"road_1": 1, "road_2": 2, "road_4": 4}[c.variant] // 2,)
        theta, alpha = (partial(nn.init.normal_, mean=mean, std=0.5) for mean in (0.0, 1.0))
        if c.init_weights:
            theta, alpha = 0.0, 1.0
        return {"theta": Trained(size, theta), "alpha": Trained(size, alpha)}

    def factors_of(t: Tensors, c: RoadConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the factor of each output, and that of its partner."""
        return pair_factors(t.theta, t.alpha, c.variant, c.group_size // 2)

    def mix(t: Tensors, y: torch.Tensor, c: RoadConfig) -> torch.Tensor:
        """Turn and stretch outputs."""
        return turn_pairs(y, *Road.factors_of(t, c))

    def unmix(t: Tensors, y: torch.Tensor, c: RoadConfig) -> torch.Tensor:
        """Turn and stretch them back."""
        own, others = Road.factors_of(t, c)
        size = determinants(own, others)
        return turn_pairs(y, own.flip(1) / size, -others / size)

    def can_unmix(t: Tensors, c: RoadConfig) -> bool:
        """Say whether no pair has become a line, or nearly one."""
        own, others = Road.factors_of(t, c)
        lengths = (own**2 + others**2).sum(dim=1, keepdim=True)
        return bool((determinants(own, others).abs() > 1e-2 * lengths).all())


RoadLayer, Linear = Road.Layer, Road.Linear


__getattr__ = old_names(__name__)
