# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""When two tensors are one."""

from collections.abc import Hashable

import torch


def identity_of(tensor: torch.Tensor) -> Hashable:
    """
    Give a key that two tensors have in common if and only if they are one.

    They are if they are one object, or if they read the same memory in the same way, as two `nn.Parameter` objects
    do after `load_state_dict(..., assign=True)` or `nn.Parameter(other)`. Views that only overlap, such as those of a
    flat parameter of FSDP, are not one; tensors without memory of their own (on the meta device, partitioned, in a
    transform of `torch.func`) are compared as objects.

    Args:
        tensor: any tensor. The key holds as long as it lives and its memory is not replaced.

    Example:

        >>> import torch
        >>> from peft.utils.same_tensor import identity_of
        >>> flat = torch.zeros(8)
        >>> identity_of(flat) == identity_of(torch.nn.Parameter(flat)) != identity_of(flat[:4])
        True
    """
    try:
        address = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # tensors that only stand for others have no address
        address = 0
    if not address:
        return id(tensor)
    return address, tensor.shape, tensor.stride(), tensor.dtype, tensor.device
