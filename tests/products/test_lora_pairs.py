# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
LoRA's options in pairs: whatever two of them are asked for together works through all stages, or is refused with a
reason before anything is changed.

Starts and variants enter by being registered. A combination of all options is drawn until each pair was in one.
"""

import copy
import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import assert_close, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import BdLoraConfig, KasaConfig, LoraConfig, MontecloraConfig, PeftModel, VeloraConfig, get_peft_model
from peft.tuners.lora.starts.registry import find_start, registered_starts
from peft.tuners.lora.variants.registry import find_variant, variants_by_field
from peft.utils.error import PeftError


WIDTH, TOKENS = 64, 24
INVOKED = [3, 4]


class Expert(nn.Module):
    """A parameter that is no weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the sum over both experts."""
        return torch.einsum("bti,eoi->bto", x, self.matrix)


class Block(nn.Module):
    """A linear layer, a transposed one, a convolution and a parameter."""

    def __init__(self, quantised: str | None) -> None:
        super().__init__()
        self.lin = linear(quantised)
        self.turned = Conv1D(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.expert = Expert()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the shape."""
        x = x + torch.tanh(self.lin(x) + self.turned(x))
        return x + torch.tanh(self.conv(x.transpose(1, 2)).transpose(1, 2) + self.expert(x))


class Model(nn.Module):
    """An embedding, blocks, and a head that is tied to the embedding."""

    def __init__(self, quantised: str | None = None) -> None:
        super().__init__()
        self.emb = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([Block(quantised) for _ in range(2)])
        self.last = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.emb.weight

    def get_input_embeddings(self) -> nn.Module:
        """Give the embedding."""
        return self.emb

    def get_output_embeddings(self) -> nn.Module:
        """Give the head."""
        return self.head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map (batch, length) token ids to logits."""
        x = self.emb(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.tanh(self.last(x)))


def linear(quantised: str | None) -> nn.Module:
    if quantised is None:
        return nn.Linear(WIDTH, WIDTH)
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if quantised == "4bit":
        return bnb.nn.Linear4bit(WIDTH, WIDTH)
    return bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)


def build(case: "Case") -> Model:
    quantised = None if case.get("quantised", "None") == "None" else case["quantised"]
    torch.manual_seed(0)
    return Model(quantised).to("cpu").eval()


def inputs() -> torch.Tensor:
    """Two sequences, of which the first invokes."""
    return torch.tensor([[1, 2, *INVOKED, 5, 6, 7], [8, 9, 10, 11, 12, 1, 2]])


# ------------------------------------------------------------------------------------------ the options
# what the field of a variant holds; one that is not here is switched on by True
VALUES: dict[str, Any] = {
    "alora_invocation_tokens": lambda: INVOKED,
    "use_bdlora": lambda: BdLoraConfig(target_modules_bd_a=["lin", "turned"], nblocks=2, match_strict=False),
    "kasa_config": KasaConfig,
    "monteclora_config": MontecloraConfig,
    "velora_config": lambda: VeloraConfig(num_groups=4),
}


# starts that are refused until the model was prepared for them, or quantise it; they have tests of their own
PREPARED = ("corda", "loftq")


def starts() -> list[bool | str]:
    """Name every start that needs nothing else, and one of each family."""
    return [name for name in (*registered_starts(), "pissa_niter_4") if name not in PREPARED]


def variant(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    more = {"qalora_group_size": 4} if name == "use_qalora" else {}
    return {name: VALUES.get(name, lambda: True)(), **more}


# the router of Arrow has nothing of its own that is trained: it mixes other adapters
VARIANTS = [name for name in variants_by_field() if name != "arrow_config"]
TARGETS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["lin"]},
    "transposed": {"target_modules": ["turned"]},
    "convolution": {"target_modules": ["conv"]},
    "embedding": {"target_modules": ["emb", "lin"]},
    "tied": {"target_modules": ["emb", "head"], "ensure_weight_tying": True},
    "parameter": {"target_modules": [], "target_parameters": ["expert.matrix"]},
}
OPTIONS: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "start": {str(name): (lambda name=name: {"init_lora_weights": name}) for name in starts()},
    "variant": {str(name): (lambda name=name: variant(name)) for name in (None, *VARIANTS)},
    "targets": {name: (lambda values=values: copy.deepcopy(values)) for name, values in TARGETS.items()},
    "bias": {bias: (lambda bias=bias: {"bias": bias}) for bias in ("none", "all", "lora_only")},
    "dropout": {str(p): (lambda p=p: {"lora_dropout": p}) for p in (0.0, 0.3)},
    "scaling": {
        "plain": dict,
        "rslora": lambda: {"use_rslora": True},
        "ranks": lambda: {"rank_pattern": {"layers.0": 2, "layers.0.lin": 2, "emb": 2}},
        "alphas": lambda: {"alpha_pattern": {"layers.1.lin": 2, "head": 2, "emb": 2}},
    },
    "lora_bias": {str(value): (lambda value=value: {"lora_bias": value}) for value in (False, True)},
    "beside": {
        "nothing": dict,
        "saved": lambda: {"modules_to_save": ["last"]},
        "tokens": lambda: {"trainable_token_indices": {"emb": [1, 5]}},
        "one layer": lambda: {"layers_to_transform": [0], "layers_pattern": "layers"},
    },
    "quantised": dict.fromkeys(("None", "4bit", "8bit"), dict),
}
Case = dict[str, str]


def config(case: Case) -> LoraConfig:
    """Make the config of a combination; options that it does not name are as usual."""
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, **TARGETS["linear"]}
    for name, value in case.items():
        fields.update(OPTIONS[name][value]())
    return LoraConfig(**fields)


def _is_config(case: Case) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config(case)
        except (ValueError, TypeError):
            return False
    return True


@functools.cache
def refusal(*case: tuple[str, str]) -> str | None:
    """Say why options cannot be combined, others being as usual; None if they can."""
    options = dict(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            get_peft_model(build(options), config(options))
        except (PeftError, ValueError, TypeError) as error:
            return str(error)
    return None


# options of which some values do not go together, which are the strategies' and the layers' to say
NOT_ALL_TOGETHER = [
    {"start", "targets"},
    {"start", "quantised"},
    {"start", "variant"},
    {"variant", "targets"},
    {"variant", "quantised"},
]
# other pairs that are refused, and why
REFUSED = {
    ("beside", "tokens", "targets", "embedding"): "a module is adapted in one way",
    ("beside", "tokens", "targets", "tied"): "a module is adapted in one way",
    ("dropout", "0.3", "targets", "parameter"): "there is no input to drop, the weight is adapted",
    ("lora_bias", "True", "targets", "parameter"): "a parameter has no bias",
    ("lora_bias", "True", "targets", "embedding"): "an embedding has no bias",
    ("lora_bias", "True", "targets", "tied"): "biases are not tied",
}


def is_refused_for_a_reason(pair: frozenset) -> bool:
    """Say whether a pair may be refused."""
    (a, x), (b, y) = sorted(pair)
    return (
        {a, b} in NOT_ALL_TOGETHER or (a, x, b, y) in REFUSED or "lora_bias" in (a, b) and not _is_config({a: x, b: y})
    )


def _is_possible(case: Case) -> bool:
    """Say whether no pair of it is refused, and all has a use: of all layers, only linear ones are quantised."""
    if case.get("quantised", "None") != "None" and case.get("targets", "linear") not in ("linear", "embedding"):
        return False
    return not any(refusal(*sorted(pair)) for pair in _pairs(case)) if len(case) > 1 else True


def all_pairs() -> set[frozenset]:
    names = itertools.combinations(OPTIONS, 2)
    return {frozenset([(a, x), (b, y)]) for a, b in names for x in OPTIONS[a] for y in OPTIONS[b]}


def pairwise() -> Iterator[Case]:
    """Draw combinations until every pair that can be was in one."""
    draw = random.Random(0)
    names = list(OPTIONS)
    left = {pair for pair in all_pairs() if _is_possible(dict(pair))}
    while left:
        case = dict(min(left, key=sorted))
        for name in draw.sample(names, len(names)):
            if name not in case:
                values = [value for value in OPTIONS[name] if _is_possible({**case, name: value})]
                draw.shuffle(values)
                case[name] = max(values, key=lambda value: len(left & _pairs({**case, name: value})))
        left -= _pairs(case)
        yield {name: case[name] for name in names}


def _pairs(case: Case) -> set[frozenset]:
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


@functools.cache
def cases() -> list[Case]:
    """List the combinations; not while tests are collected, since it takes models."""
    return list(pairwise())


# ------------------------------------------------------------------------------------------ the stages
def train(model: PeftModel) -> None:
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for step in range(2):
        torch.manual_seed(step)
        model(input_ids=inputs()).logsumexp(-1).mean().backward()
        assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=inputs())


def starts_as_base(case: Case) -> bool:
    """Say whether a new adapter computes what the base model does, also where a start has divided the weight."""
    chosen = find_variant(config(case))
    return case["start"] != "False" and (chosen is None or not chosen.changes_base())


def leaves_base(case: Case) -> bool:
    """Say whether the base weights stay as they are."""
    made = config(case)
    chosen = find_variant(made)
    changed = find_start(made.init_lora_weights).changes_base or (chosen is not None and chosen.changes_base())
    return case["bias"] == "none" and not changed


def assert_same(found: torch.Tensor, expected: torch.Tensor, case: Case, merged: bool = False) -> None:
    """Compare outputs; what is merged into a quantised weight is rounded to its codes anew."""
    if case["quantised"] == "None":
        assert_close(found, expected, 1e-3)
    else:
        assert (found - expected).norm() < (0.5 if merged else 0.02) * expected.norm()


PARTS = 16


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_of_options(part: int, tmp_path: Path) -> None:
    for number, case in enumerate(cases()[part::PARTS]):
        try:
            all_stages(case, tmp_path / str(number))
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


def all_stages(case: Case, folder: Path) -> None:
    """Start, train, switch off, save, load, switch, merge."""
    base = outputs(build(case))
    model = get_peft_model(build(case), config(case)).eval()
    start = outputs(model)
    assert start.isfinite().all()
    if starts_as_base(case):
        assert_same(start, base, case)

    train(model)
    trained = outputs(model)
    assert (trained - start).abs().max() > 1e-3, "nothing was trained"
    with model.disable_adapter():
        if leaves_base(case):
            assert_same(outputs(model), base, case)
    assert_same(outputs(model), trained, case)

    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(build(case), folder).eval()
    assert_same(outputs(loaded), trained, case)
    if leaves_base(case):
        loaded.load_adapter(folder, "other")
        loaded.set_adapter("other")
        assert_same(outputs(loaded), trained, case)
        loaded.delete_adapter("default")
        assert_same(outputs(loaded), trained, case)
    merge(loaded, trained, case)


def merge(model: PeftModel, trained: torch.Tensor, case: Case) -> None:
    """Merge, take out again, and merge for good; or be refused as it should be."""
    before = snapshot(model)
    try:
        model.merge_adapter(safe_merge=True)
    except PeftError as refusal:
        after = snapshot(model)
        assert {key for key in before if before[key] != after[key]} == set(), refusal
        assert_same(outputs(model), trained, case)
        return
    assert_same(outputs(model), trained, case, merged=True)
    model.unmerge_adapter()
    assert_same(outputs(model), trained, case, merged=True)
    merged = model.merge_and_unload()
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert_same(outputs(merged), trained, case, merged=True)


def test_the_combinations_hold_every_pair() -> None:
    found = set().union(*map(_pairs, cases()))
    assert {pair for pair in all_pairs() - found if _is_possible(dict(pair))} == set()
    # each start, variant and kind of target is adapted in some combination
    assert {(name, value) for name in OPTIONS for value in OPTIONS[name]} == set().union(*found)


def test_pairs_that_are_refused_have_a_reason_and_leave_the_model_alone() -> None:
    refused = [pair for pair in all_pairs() if refusal(*sorted(pair)) is not None]
    assert [sorted(pair) for pair in refused if not is_refused_for_a_reason(pair)] == []
    for pair in refused:
        case = dict(pair)
        # it names one of the two, or what that is in the model
        fields = {field for name, value in pair for field in OPTIONS[name][value]()} | {"quantised", "target"}
        assert any(field in refusal(*sorted(pair)) for field in fields), (case, refusal(*sorted(pair)))
        if _is_config(case):
            base = build(case)
            before = snapshot(base)
            with pytest.raises(PeftError):
                get_peft_model(base, config(case))
            after = snapshot(base)
            assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {}
