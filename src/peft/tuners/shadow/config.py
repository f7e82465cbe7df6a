# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of ShadowPEFT."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.checks import check_layer_selection
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType
from ...utils.old_names import old_names


MIRROR = "mirror"
_SIZES = ("shadow_num_hidden_layers", "shadow_hidden_size", "shadow_num_attention_heads", "shadow_intermediate_size")


@dataclass
class ShadowConfig(TyingConfig):
    """
    Config of ShadowPEFT (Li et al. 2026, arXiv:2604.19254).

    A small trained model computes a state beside the frozen one. Each block gets the difference between its input and
    that state through a bottleneck, and updates the state by its output.

    Args:
        target_modules: names of the blocks to adapt, which have to be neighbours: a list of names (or their endings,
            from a dot on), or a regular expression that must match the whole name. Left out, all blocks of the model.
        exclude_modules: modules to leave out, in the same forms.
        r: width of the bottleneck through which the difference to the shadow state is fed back.
        shadow_alpha: what the feedback is multiplied by.
        shadow_dropout: probability of dropping entries of the difference while training.
        init_weights: start with feedback of zero, which changes nothing.
        shadow_model: "mirror" for a small model of the base's own kind; otherwise folder or hub id of another one.
        shadow_num_hidden_layers: layers of the small model; 1 if left out.
        shadow_hidden_size: its width; the base model's if left out.
        shadow_num_attention_heads: its attention heads; the base model's if left out.
        shadow_intermediate_size: width of its feed forward layers; the base model's if left out.
        share_embeddings: give it the base model's embeddings instead of a table of its own, if it is as wide.
        update_hidden_size: width of the networks that update the shadow state; `r` if left out.
        auxiliary_loss_weight: weight of the loss of the small model by itself, which is added to that of the model.
        layers_to_transform: indices of the blocks to adapt.
        layers_pattern: name of the list of blocks that the indices count.
        modules_to_save: names of modules that are trained and saved in full.

    Raises:
        ValueError: for values that cannot work together, such as sizes of a small model that is loaded.

    Example:

        >>> from peft import ShadowConfig
        >>> ShadowConfig(r=4, task_type="CAUSAL_LM").shadow_model
        'mirror'
    """

    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    r: int = option(8, "Width of the feedback's bottleneck.")
    shadow_alpha: float = option(0.1, "What the feedback is multiplied by.")
    shadow_dropout: float = option(0.2, "Probability of dropout in the feedback.")
    init_weights: bool = option(True, "Start with feedback of zero.")
    shadow_model: str = option(MIRROR, "Small model: 'mirror', or where to load it from.")
    shadow_num_hidden_layers: int | None = option(None, "Layers of the small model.")
    shadow_hidden_size: int | None = option(None, "Its width.")
    shadow_num_attention_heads: int | None = option(None, "Its attention heads.")
    shadow_intermediate_size: int | None = option(None, "Width of its feed forward layers.")
    share_embeddings: bool = option(True, "Give it the base model's embeddings.")
    update_hidden_size: int | None = option(None, "Width of the networks that update the state.")
    auxiliary_loss_weight: float = option(0.05, "Weight of the small model's own loss.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    modules_to_save: list[str] | None = shared_field("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SHADOW
        check_layer_selection(self)
        sizes = [name for name in _SIZES if getattr(self, name) is not None]
        if self.shadow_model != MIRROR and sizes:
            raise ValueError(f"{', '.join(sizes)} cannot be chosen for a model that is loaded; leave them out")


__getattr__ = old_names(__name__)
