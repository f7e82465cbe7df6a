# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What the environment says about configs, for clients that do not let their users set a field."""

import logging
import os

from ..utils.error import PeftConfigError


WEIGHT_TYING = "PEFT_ENSURE_WEIGHT_TYING"
_VALUES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def weight_tying_default() -> bool:
    """
    Give what the field `ensure_weight_tying` of new configs starts with: False, unless the environment says otherwise.

    Raises:
        PeftConfigError: if what it says is neither yes nor no.
    """
    said = os.environ.get(WEIGHT_TYING, "0")
    default = _VALUES.get(said.strip().lower() or "0")
    if default is None:
        raise PeftConfigError(
            f"the environment variable {WEIGHT_TYING} is {said!r}; set it to 1 to keep tied weights tied in every new "
            "config, or to 0, or unset it"
        )
    if default:
        logging.getLogger(__name__).warning(
            "%s=%s: new configs have ensure_weight_tying=True, unless they are told otherwise", WEIGHT_TYING, said
        )
    return default
