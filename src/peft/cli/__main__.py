# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""`python -m peft.cli` is the same as `peft`."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
