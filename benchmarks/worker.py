# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
A worker: measures in one of the two packages what it is asked for.

Requests and answers are JSON, one to a line: `{"measure": CASE}` is answered by `{"figures": {...}}` or by
`{"error": "..."}`, `{"close": CASE}` by `{}`. The first line that it writes says which versions it has.
"""

import gc
import json
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from importlib import metadata
from typing import Any, TextIO


def own_output() -> TextIO:
    """Keep the pipe for answers, and let whatever else is printed go to the log."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    import peft

    others = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"peft": peft.__version__, "python": platform.python_version(), **others}


def answer(request: dict[str, str], running: dict[str, Iterator[dict[str, float]]]) -> dict[str, Any]:
    """Do what a request asks for."""
    from cases import CASES

    if "close" in request:
        running.pop(request["close"], None)
        gc.collect()
        return {}
    name = request["measure"]
    if name not in running:
        running[name] = iter(CASES[name].start())
    return {"figures": next(running[name])}


def main() -> None:
    """Answer requests until there are no more."""
    answers = own_output()
    import torch

    torch.set_num_threads(1)
    torch.set_default_device(os.environ["PEFT_BENCHMARK_DEVICE"])
    torch.manual_seed(0)
    print(json.dumps(versions()), file=answers)
    running: dict[str, Iterator[dict[str, float]]] = {}
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), running)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()
