# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Count what each method costs, and print the tables of the architecture guide; `--write` puts them there.

A line of code is a line that holds something else than a comment or a docstring. What several methods share is listed
by itself, so that nothing is hidden in it.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
from peft.registry import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    ActivationLayer,
    AdditiveLayer,
    BasePromptEncoder,
    BaseTuner,
    ReplacementLayer,
    WeightLayer,
)


PACKAGE = Path(peft.__file__).parent
TUNERS = PACKAGE / "tuners"
GUIDE = Path(__file__).parents[1] / "docs/source/developer_guides/architecture.md"
RULES = (AdditiveLayer, WeightLayer, ActivationLayer, ReplacementLayer)

# Files outside of the methods' packages that exist for some methods only.
SHARED = {
    "layers/scaling.py": "LoRA, LoHa, LoKr: setting and resetting the scaling",
    "layers/trainable_tokens.py": "trained tokens, as a method and beside other ones",
    "tuners/families/projections.py": "VeRA, PVeRA: random projections that all layers share",
    "tuners/families/lycoris.py": "LoHa, LoKr: settings, dropout, deltas that are added to the weight",
    "tuners/families/rotations.py": "OFT, BOFT, HRA: their rule, and rotations that are never built as matrices",
    "tuners/families/sparse.py": "SHiRA, Super-Tuning: their rule, one product with a weight of which entries change",
    "tuners/families/scales.py": "IA3: combining adapters whose factors multiply features",
    "tuners/families/ranks.py": "LoRA, AdaLoRA: factors that are saved with fewer ranks than they have",
    "tuners/families/quantized.py": "LoRA, AdaLoRA, IA3: a class and a function for each library that quantises",
    "anatomy/parameters.py": "`target_parameters`: which ones are reached",
    "surgery/replication.py": "`layer_replication`",
    "layers/base_changes.py": "starts that change base weights (PiSSA, OLoRA), put off until all is checked",
    "layers/standing_in.py": "`target_parameters`: what the base layer computes with",
    "layers/combined_modules.py": "combinations of adapters: modules that are trained in full",
    "layers/combined_tokens.py": "combinations of adapters: trained tokens",
    "utils/merge_utils.py": "combinations of adapters: pruning and signs",
    "utils/low_rank_sums.py": "combinations of adapters: one product of factors for a sum of such",
    "utils/kept_values.py": "DoRA: norms that are kept while nothing changes",
    "utils/tensor_parallel.py": "tensors that are divided among processes",
    "prompts/encoder.py": "prompt learning: what prompts have in common",
    "prompts/computing.py": "prompt learning: the prompt of a batch",
    "prompts/sizes.py": "prompt learning: sizes that the model tells",
    "prompts/learning.py": "prompt learning: making, saving and switching prompts",
    "prompts/inputs.py": "prompt learning: putting prompts in front of inputs, for all tasks",
}

# Lines of methods that were rewritten, before layers were made from declarations and LoRA was cut by trade.
BEFORE = {
    "LORA": 1952,
    "ADALORA": 366,
    "TRAINABLE_TOKENS": 202,
    "BOFT": 194,
    "OFT": 162,
    "LOHA": 160,
    "VBLORA": 150,
    "IA3": 99,
    "LOKR": 97,
    "VERA": 87,
    "HRA": 78,
    "LN_TUNING": 26,
}

OLD_NAMES = re.compile(r"^(from .* import|__getattr__ =) old_names\b")

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class MethodSize:
    """
    What one method costs.

    Attributes:
        name: its `peft_type`.
        rule: the rule that its layers follow, or what its prompts are.
        lines: lines of code beside its config, its registration and its maths.
        maths: those of `maths.py`, which has functions of tensors that know nothing of layers.
        config: those of its config.
        registration: those of `__init__.py` and of tables of names, and those elsewhere that give old names.
        kinds: names of the kinds of layers that it adapts.
    """

    name: str
    rule: str
    lines: int
    maths: int
    config: int
    registration: int
    kinds: tuple[str, ...]


def count_lines(source: str) -> int:
    """
    Count the lines of code.

    Args:
        source: text of a Python file.
    """
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - set(_docstring_lines(ast.parse(source))))


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def count_files(paths: Iterable[Path]) -> int:
    """Count the lines of code of several files."""
    return sum(count_lines(path.read_text(encoding="utf-8")) for path in paths)


def is_table(path: Path) -> bool:
    """Say whether a file is nothing but a table of names."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").startswith("Table of names: ")


def method_sizes() -> list[MethodSize]:
    """Measure every registered method that has a package of its own in `tuners`, the largest first."""
    methods = {getattr(key, "value", key): PEFT_TYPE_TO_TUNER_MAPPING[key] for key in PEFT_TYPE_TO_TUNER_MAPPING}
    own = {name: cls for name, cls in methods.items() if cls.__module__.startswith("peft.tuners.")}
    return sorted((_measure(name, cls) for name, cls in own.items()), key=lambda size: (-size.lines, size.name))


def _measure(name: str, model_cls: type) -> MethodSize:
    files = set(Path(sys.modules[model_cls.__module__].__file__).parent.rglob("*.py"))
    config = {path for path in files if path.name == "config.py"}
    registration = {path for path in files if path.name == "__init__.py" or is_table(path)}
    maths = {path for path in files if path.name == "maths.py"}
    rest = files - config - registration - maths
    counts = [count_files(group) for group in (rest, maths, config, registration)]
    for index, group in ((0, rest), (2, config)):
        old_names = sum(
            OLD_NAMES.search(line) is not None for path in group for line in path.read_text("utf-8").splitlines()
        )
        counts[index] -= old_names
        counts[3] += old_names
    return MethodSize(name, rule_of(model_cls), *counts, kinds_of(model_cls))


def rule_of(model_cls: type) -> str:
    """Name the rule that a method's layers follow; for prompt learning, what its prompts are."""
    if issubclass(model_cls, BasePromptEncoder):
        return "prefix" if model_cls.fills_cache else "virtual tokens"
    return next((rule.__name__ for rule in RULES if issubclass(model_cls.tuner_layer_cls, rule)), "wrapper")


def kinds_of(model_cls: type) -> tuple[str, ...]:
    """Name the kinds of layers that a method adapts; a kind of a kind is not named."""
    if not issubclass(model_cls, BaseTuner):
        return ()
    declared = [kind for kind in model_cls.layer_classes if not set(kind.__mro__[1:]) & set(model_cls.layer_classes)]
    names = sorted("any module" if kind.__name__ == "Module" else kind.__name__ for kind in declared)
    return (*names, *(["parameters"] if model_cls.parameter_layer_cls is not None else []))


def shared_sizes() -> dict[str, int]:
    """Measure what stands outside of the methods' packages: what it is for -> lines of code."""
    some = {f"`{path}`: {purpose}": count_files([PACKAGE / path]) for path, purpose in SHARED.items()}
    declared = count_files((TUNERS / "declared").glob("*.py"))
    base = count_files([path for path in TUNERS.glob("*.py") if path.name != "__init__.py" and not is_table(path)])
    return {
        **some,
        "`tuners/declared/`: layers and models that are made from declarations": declared,
        "all other files of `tuners/`: the base of every method": base,
    }


def tables() -> str:
    """Write the tables in Markdown."""
    methods = [
        f"| {size.name} | {size.rule} | {size.lines:,d} | {size.maths} | {size.config} | {size.registration} | "
        f"{', '.join(size.kinds) or '-'} |"
        for size in method_sizes()
    ]
    shared = [f"| {what} | {lines:,d} |" for what, lines in shared_sizes().items()]
    now = {size.name: size for size in method_sizes()}
    changes = [
        f"| {name} | {lines:,d} | {now[name].lines:,d} ({now[name].lines + now[name].maths:,d}) |"
        for name, lines in BEFORE.items()
    ]
    return "\n".join(
        [
            "| method | rule | lines | maths | config | registration | kinds of layers |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *methods,
            "",
            "| shared | lines |",
            "| --- | --- |",
            *shared,
            "",
            "| rewritten | lines before | lines now (with maths) |",
            "| --- | --- | --- |",
            *changes,
        ]
    )


# all rows from the first one on, and so those too that merging two versions of the tables may have left behind
TABLES_IN_GUIDE = re.compile(r"^\| method \| rule \| lines .*(?:\n+\|.*)*", re.MULTILINE)


def tables_in(text: str) -> str:
    """Find the tables in the text of the guide."""
    return TABLES_IN_GUIDE.search(text)[0]


def main() -> int:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the tables in the architecture guide")
    if parser.parse_args().write:
        text = GUIDE.read_text(encoding="utf-8")
        GUIDE.write_text(text.replace(tables_in(text), tables()), encoding="utf-8")
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
