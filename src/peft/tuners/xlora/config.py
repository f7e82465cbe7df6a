# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of X-LoRA."""

from dataclasses import dataclass

from ...config import TyingConfig
from ...configs.fields import option
from ...registry import PeftType
from ...utils.old_names import old_names
from ...utils.warning import warn


@dataclass
class XLoraConfig(TyingConfig):
    """
    Config of X-LoRA (Buehler, Buehler 2024, arXiv:2402.07148): each token has its own mixture of LoRA adapters.

    Args:
        hidden_size: width of the base model's hidden states; 4096 if left out.
        adapters: name of each expert -> folder or hub id of its LoRA adapter. They are in the order of their names.
        enable_softmax: weights are a softmax of what the classifier gives.
        enable_softmax_topk: weights are a softmax of those that `top_k_lora` leaves.
        layerwise_scalings: each layer has weights of its own.
        xlora_depth: how many linear layers the classifier has.
        xlora_size: width of those between the first and the last one.
        xlora_dropout_p: probability of dropping a feature between them, while training.
        use_trainable_adapters: train the experts along with the classifier; they are saved with it then.
        softmax_temperature: what is divided by before the softmax.
        top_k_lora: how many experts a token keeps; the weights of others become 0. All if left out.
        scaling_pass_value: weight of every expert in the pass that gives the classifier its hidden states.
        global_scaling_weight: what all experts are multiplied by.

    Example:

        >>> from peft import XLoraConfig
        >>> XLoraConfig(hidden_size=64, adapters={"maths": "folder/maths", "code": "folder/code"}).xlora_depth
        1
    """

    hidden_size: int = option(None, "Width of the base model's hidden states.")
    adapters: dict[str, str] = option(None, "Name of each expert -> folder or hub id.")
    enable_softmax: bool = option(True, "Weights are a softmax.")
    enable_softmax_topk: bool = option(False, "Weights are a softmax of those that top_k_lora leaves.")
    layerwise_scalings: bool = option(False, "Each layer has weights of its own.")
    xlora_depth: int = option(1, "Linear layers of the classifier.")
    xlora_size: int = option(2048, "Width between them.")
    xlora_dropout_p: float = option(0.2, "Probability of dropping a feature between them.")
    use_trainable_adapters: bool = option(False, "Train the experts, too.")
    softmax_temperature: float = option(1.0, "What is divided by before the softmax.")
    top_k_lora: int | None = option(None, "How many experts a token keeps.")
    scaling_pass_value: float = option(0.0, "Weight of every expert in the first pass.")
    global_scaling_weight: float = option(1.0, "What all experts are multiplied by.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.XLORA
        if self.hidden_size is None:
            warn("hidden_size was left out, and 4096 is used; give the width of the base model's hidden states")
            self.hidden_size = 4096
        if self.adapters is None:
            warn("adapters was left out, so there are no experts yet; name them before the model is made")
            self.adapters = {}
        if self.enable_softmax_topk and self.top_k_lora is None:
            warn("enable_softmax_topk has no effect without top_k_lora; say how many experts a token keeps")
        if self.enable_softmax_topk and self.enable_softmax:
            warn("enable_softmax and enable_softmax_topk take the softmax twice; switch one of them off")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            warn(f"top_k_lora={self.top_k_lora} leaves no expert at all; give at least 1")


__getattr__ = old_names(__name__)
