# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which layers of a model are replicas of others (`layer_replication`)."""

from collections.abc import Iterator

from torch import nn


# attribute of a list of layers: for each place the index of the layer that it was made of
REPLICATED_FROM = "replicated_from"


def origins_in(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """
    Say which layers of a list are replicas.

    Args:
        name: full name of a module.
        module: the module; it has none unless it is a list of layers that were replicated.

    Yields:
        For each layer what the names of everything in it start with, and what they start with in its original.
    """
    for place, source in enumerate(module.__dict__.get(REPLICATED_FROM, ())):
        yield f"{name}.{place}.", f"{name}.{source}."
