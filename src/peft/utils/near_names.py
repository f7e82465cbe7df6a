# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What somebody may have meant who wrote a name that is not there."""

import difflib
from collections.abc import Collection, Iterable


# For how many names that are not there others are sought: a file can hold any number of them, and each is compared
# with all that there are.
FEW = 20


def nearest(wanted: str, known: Iterable[str], most: int = 3) -> list[str]:
    """
    Find names that come near another one, the most similar first.

    Args:
        wanted: what was written.
        known: what there is.
        most: how many to return at most.

    Example:

        >>> from peft.utils.near_names import nearest
        >>> nearest("gausian", ["gaussian", "olora", "orthogonal"])
        ['gaussian']
    """
    return difflib.get_close_matches(wanted, list(known), n=most, cutoff=0.5)


def did_you_mean(near: Collection[str]) -> str:
    """
    Write names that come near, to be put behind a message.

    Args:
        near: the names; without any, nothing is written.

    Example:

        >>> from peft.utils.near_names import did_you_mean
        >>> did_you_mean(["q_proj"])
        '; did you mean q_proj?'
    """
    return f"; did you mean {', '.join(near)}?" if near else ""


def explain_unknown_adapters(unknown: Collection[str], known: Collection[str]) -> str:
    """
    Write that adapters are not there, and which are.

    Args:
        unknown: names that are not there.
        known: names of the model's adapters.

    Example:

        >>> from peft.utils.near_names import explain_unknown_adapters
        >>> explain_unknown_adapters(["defualt"], ["default"])
        "there is no adapter 'defualt'; the model has 'default'; did you mean default?"
    """
    near = dict.fromkeys(name for wanted in unknown for name in nearest(str(wanted), known, most=1))
    return (
        f"there is no adapter {', '.join(map(repr, unknown))}; the model has "
        f"{', '.join(map(repr, known)) or 'none'}{did_you_mean(near)}"
    )
