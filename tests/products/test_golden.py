# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Adapters saved by release 0.21.2 load, compute, train, merge and save here as they did there.

Each golden case (an adapter) and each golden script (a sequence of calls) is one test, named as in `tests/golden`.
What is not implemented yet is written down below and stays visible: what needs a method that the package lacks is
counted in the one test `test_methods_not_implemented`, what needs a missing feature is a strict expected failure.
`pytest -rx` lists both with their reasons.
"""

import fnmatch
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from golden import store
from golden.bases import Base
from golden.cases import STAGES, Case
from golden.compare import compare_tensors
from golden.machines import reason_to_skip
from golden.scripts import Script

from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING


# The cases warn on purpose, many of them about ties; what is warned about has tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES, SCRIPTS = store.facts()["cases"], store.facts()["scripts"]
METHOD_OF_CLASS = {facts["config_class"]: facts["peft_type"] for facts in CASES.values()}
METHODS = {getattr(method, "value", method) for method in PEFT_TYPE_TO_CONFIG_MAPPING}

# Once a method is registered it has to leave this list, and its cases enter the tests by themselves.
METHODS_NOT_IMPLEMENTED: set[str] = set()

Condition = Callable[[str, list[dict]], bool]


def uses(field: str, *values: object) -> Condition:
    """A feature that a config asks for by setting a field: to one of `values`, or to anything if none are given."""

    def is_asked_for(name: str, configs: list[dict]) -> bool:
        return any(config.get(field) in values if values else bool(config.get(field)) for config in configs)

    return is_asked_for


def named(*patterns: str) -> Condition:
    """A feature that no config tells of; the cases and scripts that need it are named."""
    return lambda name, configs: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


# What needs one of these has to fail; once it passes, the entry has to go.
FEATURES_NOT_IMPLEMENTED: dict[str, Condition] = {}


# Where the release does something wrong, the case has to fail, for the reason that stands here.
DEFECTS_OF_THE_RELEASE = {
    **dict.fromkeys(
        (
            "bert_seqcls/ia3_mts",
            "roberta_seqcls/beft",
            "roberta_seqcls/delora",
            "roberta_seqcls/fourierft",
            "roberta_seqcls/ia3",
            "roberta_seqcls/loha",
            "roberta_seqcls/lokr",
            "roberta_seqcls/randlora",
            "roberta_seqcls/miss",
            "roberta_seqcls/vera",
        ),
        "the release cannot unload a module of several layers that is trained in full",
    ),
    **dict.fromkeys(
        (
            "bert_seqcls/c3a",
            *(f"llama/c3a{end}" for end in ("", "_block8", "_gaussian", "_init_true", "_kaiming", "_pattern")),
            "mlp/c3a",
            "t5/c3a",
            "vit/c3a",
        ),
        "the release computes wrong gradients of the inputs of layers with C3A",
    ),
    **dict.fromkeys(
        (*(name for name in CASES if "/psoft" in name), "init/buffers_psoft"),
        "files of the release lack the subspace in which PSOFT turns, so the function depends on where they are read",
    ),
    **dict.fromkeys((name for name in CASES if "/osf" in name), "the release refuses to unmerge OSF"),
    "gpt2/shadow": "the release trains and saves embeddings of the small model that nothing looks up",
    "llama/hira_embed": "the release trains HiRA's row of the padding token",
    "conv/loha_effective_conv": "the release computes wrong gradients of LoHa's factors in Tucker form",
    "bert_mlm/trainable_tokens": "the release drops the head's bias when the head's tokens are trained",
    **dict.fromkeys(
        ("roberta_seqcls/boft", "roberta_seqcls/hra", "roberta_seqcls/oft"),
        "the release cannot unload a module of several layers that is trained in full",
    ),
    **dict.fromkeys(
        ("conv/oft", "conv/oft_conv"),
        "the release adds up overlapping windows of a Conv2d, so that even a fresh OFT adapter changes the outputs",
    ),
}

# What rests on bases that its file leaves out -> a case on the same base model whose file has them.
WITH_BASES = dict.fromkeys(("llama/frod_key", "llama/frod_noproj", "init/buffers_frod"), "llama/frod")


def configs_in(facts: dict) -> list[dict]:
    """Return the configs that a case or a script makes or loads."""
    made = [step["config_kwargs"] for step in (facts, *facts.get("steps", [])) if "config_kwargs" in step]
    saved = [facts["adapter_config"]] if "adapter_config" in facts else facts["adapters"].values()
    return [*made, *saved]


def methods_in(facts: dict) -> set[str]:
    """Return the methods that a case or a script needs."""
    made = {
        METHOD_OF_CLASS[step["config_class"]] for step in (facts, *facts.get("steps", [])) if "config_class" in step
    }
    return made | {config["peft_type"] for config in facts.get("adapters", {}).values()}


def implemented(all_facts: dict[str, dict]) -> list:
    """Return the names of the cases or scripts whose methods the package has, those with missing features marked."""
    parameters = []
    for name, facts in all_facts.items():
        if methods_in(facts) <= METHODS:
            configs = configs_in(facts)
            missing = [feature for feature, needs in FEATURES_NOT_IMPLEMENTED.items() if needs(name, configs)]
            reasons = [f"not implemented: {', '.join(missing)}"] if missing else []
            reasons += [DEFECTS_OF_THE_RELEASE[name]] if name in DEFECTS_OF_THE_RELEASE else []
            marks = [pytest.mark.xfail(strict=True, reason=reason) for reason in reasons]
            parameters.append(pytest.param(name, id=name, marks=marks))
    return parameters


@pytest.fixture
def required_packages(name: str) -> None:
    """Skip what the method needs a further package for."""
    for package in (CASES.get(name) or SCRIPTS[name]).get("requires", []):
        pytest.importorskip(package, reason=f"the method needs {package}")


def skip_elsewhere(name: str, folder: Path, case: Case | None = None) -> None:
    """Skip what is true of the machine alone on which it was observed."""
    other = WITH_BASES.get(name)
    reason = reason_to_skip(name, case, other and Case(other, folder / "other"))
    if reason is not None:
        pytest.skip(reason)


def problems_in(title: str, problems: Iterable[str]) -> Iterator[str]:
    """Yield the problems, an exception as one of them, so that what comes after is still looked at."""
    try:
        for problem in problems:
            yield f"{title}: {problem}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        traceback.print_exc()
        yield f"{title}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def fail_if_any(problems: list[str]) -> None:
    """Fail with all problems; where each was found says more than the traceback of this test."""
    if problems:
        pytest.fail("\n".join([f"{len(problems)} differences from the release", *problems]), pytrace=False)


@pytest.mark.parametrize("name", implemented(CASES))
@pytest.mark.usefixtures("required_packages")
def test_case(name: str, tmp_path: Path) -> None:
    """Every stage finds what was observed with the release."""
    case = Case(name, tmp_path / "adapter")
    skip_elsewhere(name, tmp_path, case)
    fail_if_any([problem for stage in STAGES for problem in problems_in(stage.__name__, stage(case))])


@pytest.mark.parametrize("name", implemented(SCRIPTS))
@pytest.mark.usefixtures("required_packages")
def test_script(name: str, tmp_path: Path) -> None:
    """Every step gives what was observed with the release."""
    skip_elsewhere(name, tmp_path)
    fail_if_any(list(problems_in(name, Script(name, tmp_path / "script").run())))


def test_methods_not_implemented() -> None:
    """The list above is up to date; what waits for it is shown as an expected failure, with its size."""
    missing = [methods_in(facts) - METHODS for facts in (*CASES.values(), *SCRIPTS.values())]
    waiting = Counter(method for methods in missing for method in methods)
    assert set(waiting) == METHODS_NOT_IMPLEMENTED
    if waiting:
        counts = ", ".join(f"{method} {count}" for method, count in sorted(waiting.items()))
        cases = f"{sum(map(bool, missing))} of {len(missing)} cases and scripts"
        pytest.xfail(f"{cases} need methods that are not implemented: {counts}")


@pytest.mark.parametrize("feature", FEATURES_NOT_IMPLEMENTED)
def test_feature_is_needed(feature: str) -> None:
    """No entry is left over: each is needed by some case or script."""
    needs = FEATURES_NOT_IMPLEMENTED[feature]
    assert any(needs(name, configs_in(facts)) for name, facts in (CASES | SCRIPTS).items())


@pytest.mark.parametrize("name", store.facts()["bases"])
def test_base(name: str) -> None:
    """The base models themselves compute what they did, so that a difference lies in the adapters."""
    base = Base.named(name)
    with torch.no_grad():
        output = base.forward(base.build())
    fail_if_any(list(compare_tensors("output", output, base.output, atol=1e-5)))
