# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How much a checkpoint of an adapter holds."""

from torch import nn

from .state_dict import collect_tensors


def count_saved(model: nn.Module, adapter_name: str, prefix: str) -> tuple[int, int]:
    """
    Count what a checkpoint of an adapter holds, in the form in which it is written.

    Args:
        model: a model with injected adapters.
        adapter_name: name.
        prefix: what the names of its method's tensors start with.

    Returns:
        Number of the method's own entries, and number of others, such as of biases and of modules that are trained in
        full. Integers count as the bytes that they take, in units of 4 bytes.
    """
    tensors = collect_tensors(model, None, adapter_name, save_embedding_layers=False)
    sizes = {
        key: tensor.numel() * (1 if tensor.is_floating_point() else tensor.element_size() / 4)
        for key, tensor in tensors.items()
    }
    own = sum(size for key, size in sizes.items() if prefix in key)
    return int(own), int(sum(sizes.values()) - own)
