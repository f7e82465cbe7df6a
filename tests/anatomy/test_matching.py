# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Which modules a config targets: the pure functions, compared with slow and obvious ones where they are fast."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import assert_close, llama, logits, refused, seeded, warned
from support.method_options import OPTIONS
from torch import nn
from transformers import PhimoeConfig, PhimoeForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

from peft import LoraConfig, get_peft_model
from peft.anatomy.kinds import gives_features
from peft.anatomy.matching import (
    _ExcludedModule,
    check_target_module_exists,
    dotted_endings,
    ends_like,
    find_targets,
    get_pattern_key,
    layer_index,
    lies_in,
    matching_entry,
    near_names,
    pattern_lookup,
)
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,
    find_parameter_name_by_module,
    get_device_map,
    inspect_matched_modules,
)
from peft.utils import _is_valid_match


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

# few different parts, so that endings of different names often agree
PARTS = st.sampled_from(["a", "b", "ab", "layers", "0", "1", "12", "q_proj", "proj"])
DOTTED = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
NAMES = [
    "model",
    "model.embed_tokens",
    "model.layers",
    "model.layers.0",
    "model.layers.0.attn.q_proj",
    "model.layers.0.attn.v_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1",
    "model.layers.1.attn.q_proj",
    "model.layers.11.attn.q_proj",
    "lm_head",
]


# ------------------------------------------------------------------------------------------ endings and entries
@given(DOTTED)
def test_dotted_endings(name: str) -> None:
    endings = list(dotted_endings(name))
    assert endings[0] == name and endings == sorted(endings, key=len, reverse=True)
    parts = name.split(".")
    assert endings == [".".join(parts[i:]) for i in range(len(parts))]


@given(st.lists(DOTTED, max_size=6), DOTTED)
def test_entry_matches_at_a_dot_only(entries: list[str], key: str) -> None:
    entry = matching_entry(entries, key)
    fitting = [e for e in entries if key == e or key.endswith(f".{e}")]
    assert entry == max(fitting, key=len, default=None)
    for container in (set(entries), tuple(entries), dict.fromkeys(entries)):
        assert matching_entry(container, key) == entry


@pytest.mark.parametrize(
    ("pattern", "key", "fits"),
    [
        (r".*\.q_proj", "a.q_proj", True),
        (r".*\.q_proj", "a.q_proj.x", False),
        ("q_proj", "a.q_proj", False),
        ("a|b", "b", True),
        ("a|b", "ab", False),
    ],
)
def test_expression_has_to_match_the_whole_name(pattern: str, key: str, fits: bool) -> None:
    assert (matching_entry(pattern, key) is not None) == fits


def test_nothing_wanted_matches_nothing() -> None:
    assert matching_entry(None, "a") is None
    assert matching_entry([], "a") is None


@given(st.lists(DOTTED, max_size=3), DOTTED)
def test_lies_in(entries: list[str], key: str) -> None:
    parts = key.split(".")
    parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
    assert lies_in(entries, key) == any(parent.endswith(entry) for parent in parents for entry in entries)
    assert ends_like(entries, key) == any(key.endswith(entry) for entry in entries)


# ------------------------------------------------------------------------------------------ layers
@pytest.mark.parametrize(
    ("key", "pattern", "index"),
    [
        ("model.layers.3.attn.q_proj", None, 3),
        ("model.layers.3.attn.q_proj", "layers", 3),
        ("model.layers.3.attn.q_proj", "h", None),
        ("model.layers.3.attn.q_proj", ["h", "layers"], 3),
        ("layers.12.q_proj", "layers", 12),
        ("model.my_layers.3.q_proj", "layers", None),
        ("model.layers.3", "layers", None),
        ("model.layers.3.experts.7.w1", None, 3),
        ("layers.3.attn.q_proj", None, 3),
        ("encoder.block.1.layer.0.q", None, 1),
        ("a.0.b.1.q", None, 1),
        ("layers.1.mlp.layers.0.q", "layers", 1),
        ("net.blocks.3.blocks.7.up", "blocks", 3),
        ("net.blocks.3.blocks.7.up", r"\d+\.blocks", 7),
        ("x.y.0.z.1.q", ["z", "y"], 1),
        ("x.y.0.z.1.q", ["y", "z"], 0),
        ("model.layers.3.experts.7.w1", "layers", 3),
        ("model.layers.3.experts.7.w1", "experts", 7),
        ("lm_head", None, None),
        ("model.layers.3.attn.q_proj", r"(?:blocks|layers)", 3),
    ],
)
def test_layer_index(key: str, pattern: Any, index: int | None) -> None:
    assert layer_index(key, pattern) == index


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"target_modules": ["q_proj"]}, [4, 8, 9]),
        ({"target_modules": ["attn.q_proj", "lm_head"]}, [4, 8, 9, 10]),
        ({"target_modules": ["proj"]}, []),
        ({"target_modules": r".*_proj"}, [4, 5, 6, 8, 9]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 11]}, [4, 9]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, [8]),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, [4, 8, 9]),
        ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}, [4, 10]),
        ({"target_modules": ["q_proj", "model.layers.1.attn.q_proj"], "layers_to_transform": [0]}, [4, 8]),
        ({"target_modules": ["layers.1.attn.q_proj", "lm_head"], "layers_to_transform": [0]}, [10]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"}, []),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.attn.q_proj"]}, [5, 8, 9]),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"}, [8, 9]),
    ],
)
def test_targets(kwargs: dict[str, Any], expected: list[int]) -> None:
    config = LoraConfig(**kwargs)
    wanted = [NAMES[i] for i in expected]
    assert find_targets(config, NAMES).names == wanted
    assert [name for name in NAMES if check_target_module_exists(config, name)] == wanted


@pytest.mark.parametrize("pattern", [None, "block"])
def test_layers_are_counted_where_they_lie_in_others(pattern: str | None) -> None:
    names = [f"encoder.block.{i}.layer.{j}.q" for i in (0, 1) for j in (0, 1)]
    config = LoraConfig(target_modules=["q"], layers_to_transform=[1], layers_pattern=pattern)
    assert find_targets(config, names).names == names[2:]


def test_what_was_excluded_and_what_matched_nothing_is_told() -> None:
    config = LoraConfig(target_modules=["q_proj", "k_proj", "o"], exclude_modules=["layers.0.attn.q_proj"])
    targets = find_targets(config, NAMES)
    assert targets.excluded == ["model.layers.0.attn.q_proj"]
    assert targets.unmatched == ["k_proj", "o"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["q_proj", "model.layers.0.attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["model.layers.0.attn.q_proj", "q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {
            "target_modules": ["q_proj", "v_proj", "layers.0.attn.v_proj"],
            "exclude_modules": ["layers.0.attn.v_proj"],
        },
        {"target_modules": ["v_proj", "layers.0.attn.v_proj", "q_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.q_proj"},
    ],
    ids=str,
)
def test_entries_that_are_met_are_not_called_unmatched(kwargs: dict[str, Any]) -> None:
    """An entry has met a module also where a longer entry, a layer or an exclusion then decides."""
    assert find_targets(LoraConfig(**kwargs), NAMES).unmatched == []


# ------------------------------------------------------------------------------------------ near names
@pytest.mark.parametrize(
    ("wanted", "first"),
    [
        ("q_prj", "q_proj"),
        ("qproj", "q_proj"),
        ("atn.q_proj", "attn.q_proj"),
        ("model.embed_token", "model.embed_tokens"),
        (r".*\.lm_heads", "lm_head"),
    ],
)
def test_near_names_finds_what_was_meant(wanted: str, first: str) -> None:
    assert near_names(wanted, NAMES)[0] == first


def test_near_names_finds_nothing_near() -> None:
    assert near_names("zzz", NAMES) == []
    assert near_names("q_proj", []) == []


@given(DOTTED, st.lists(DOTTED, max_size=8), st.integers(1, 4))
def test_near_names_are_endings_of_names(wanted: str, names: list[str], most: int) -> None:
    near = near_names(wanted, names, most)
    assert len(near) == len(set(near)) <= most
    assert set(near) <= {ending for name in names for ending in dotted_endings(name)}


@pytest.mark.parametrize(
    ("target", "near"),
    [(["q_prj"], "q_proj"), (r".*q_prj", "q_proj"), (["0.self_atn"], "0.self_attn"), (["zzz"], "q_proj")],
)
def test_a_model_that_has_no_such_module_says_which_it_has(target: Any, near: str) -> None:
    model = llama()
    with refused(model, ValueError, str(target if isinstance(target, str) else target[0]), near):
        get_peft_model(model, LoraConfig(target_modules=target))


def test_unmatched_entries_are_warned_about_each() -> None:
    with warned("'q_prj'", "did you mean q_proj"):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["v_proj", "q_prj"]))
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"v_proj"}


# ------------------------------------------------------------------------------------------ patterns
def naive_lookup(patterns: dict[str, Any], key: str, default: Any) -> Any:
    """What `pattern_lookup` promises, said as simply as can be."""
    for pattern, value in patterns.items():
        literal = re.fullmatch(r"[\w.\-]+", pattern)
        expression = re.escape(pattern) if literal else pattern
        start = "" if pattern.startswith("^") else r"(?:.*\.)?"
        if re.match(rf"{start}(?:{expression})$", key):
            return value
    return default


EXPRESSIONS = st.sampled_from(
    [r"^a", r"^layers\.\d+\.a", r".*proj", r"layers\.(0|12)\..*", r"\d+", r"a|b", r"^.*\.b$", r"(q_)?proj", r"[ab]+"]
)


@given(st.lists(DOTTED | EXPRESSIONS, unique=True, max_size=6), DOTTED)
def test_pattern_lookup_is_the_naive_one(patterns: list[str], key: str) -> None:
    values = {pattern: position for position, pattern in enumerate(patterns)}
    assert pattern_lookup(values)(key, "default") == naive_lookup(values, key, "default")
    assert get_pattern_key(patterns, key) == naive_lookup({p: p for p in patterns}, key, key)


def test_pattern_lookup_without_patterns() -> None:
    assert pattern_lookup({})("a.b", 3) == 3
    assert pattern_lookup(None)("a.b", 3) == 3


@pytest.mark.parametrize(
    ("patterns", "ranks"),
    [
        ({"q_proj": 2}, (2, 2)),
        ({"layers.1.self_attn.q_proj": 2}, (8, 2)),
        ({"layers.1.self_attn.q_proj": 2, "q_proj": 3}, (3, 2)),
        ({"q_proj": 3, "layers.1.self_attn.q_proj": 2}, (3, 3)),
        ({"proj": 2}, (8, 8)),
        ({"^q_proj": 2, r"^model\..*0.*q_proj": 3}, (3, 8)),
        ({r"layers\.[1-9]\..*": 2}, (8, 2)),
        ({"k_proj": 2}, (8, 8)),
    ],
    ids=str,
)
def test_rank_pattern_on_a_model(patterns: dict[str, int], ranks: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rank_pattern entry .* matches no module")
        model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], rank_pattern=patterns))
    layers = [layer.self_attn.q_proj for layer in model.model.model.layers]
    assert tuple(layer.r["default"] for layer in layers) == ranks
    assert tuple(layer.lora_A["default"].weight.shape[0] for layer in layers) == ranks


# ------------------------------------------------------------------------------------------ linear layers and more
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def phimoe() -> PhimoeForCausalLM:
    """A model whose routers derive from `nn.Linear`, and whose experts are parameters."""
    config = PhimoeConfig(**SIZES, num_local_experts=2, num_key_value_heads=2, num_experts_per_tok=2)
    with seeded(0):
        return PhimoeForCausalLM(config).eval()


def test_all_linear_on_routers_and_experts() -> None:
    model = get_peft_model(phimoe(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    attention = {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
    assert set(model.base_model.targeted_module_names) == attention
    assert not model.peft_config["default"].target_parameters
    ids = torch.tensor([[1, 2, 3]])
    assert_close(logits(copy.deepcopy(model).merge_and_unload(), ids), logits(model, ids))


@pytest.mark.parametrize("method", ["LORA", "LOHA", "OFT", "IA3"])
def test_layers_that_are_more_than_linear_are_refused(method: str) -> None:
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    with refused(model := phimoe(), (ValueError, TypeError), "router", "PhimoeTopKRouter", "router.weight"):
        get_peft_model(model, config_cls(target_modules=["q_proj", "router"], **OPTIONS[method]))
    model = get_peft_model(model, LoraConfig(r=2, target_parameters=["router.weight"], init_lora_weights=False))
    ids = torch.tensor([[1, 2, 3]])
    assert_close(logits(copy.deepcopy(model).merge_and_unload(), ids), logits(model, ids))


def test_linear_layers_of_other_classes_are_linear() -> None:
    class Raising(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[x.sum().item() :])

    assert gives_features(FalconLinear(4, 3)) and gives_features(Raising(4, 3)) and gives_features(nn.ReLU())
    assert not gives_features(phimoe().model.layers[0].mlp.router)


def test_what_is_excluded_is_told_from_what_is_not_targeted() -> None:
    config = LoraConfig(target_modules=["q", "v"], exclude_modules=["v"])
    assert check_target_module_exists(config, "a.q")
    for name, is_excluded in {"a.v": True, "a.k": False}.items():
        found = check_target_module_exists(config, name)
        assert not found and isinstance(found, _ExcludedModule) == is_excluded
    assert _is_valid_match("a.b", "b") and _is_valid_match("b", "b") and not _is_valid_match("ab", "b")


def test_names_in_the_place_of_all_linear() -> None:
    model = llama()
    config = LoraConfig(target_modules="ALL-linear")
    assert _maybe_include_all_linear_layers(config, model) is config
    assert "model.layers.0.self_attn.q_proj" in config.target_modules and "lm_head" not in config.target_modules
    other = LoraConfig(target_modules="q.*")
    assert _maybe_include_all_linear_layers(other, model).target_modules == "q.*"


def test_names_of_parts_of_a_model() -> None:
    net = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    found = inspect_matched_modules(net.base_model)
    assert found["matched"] == ["0"] and {"", "1", "0.base_layer"} <= set(found["unmatched"])
    with pytest.raises(ValueError, match="no adapter named 'x'|'x'"):
        inspect_matched_modules(net.base_model, "x")
    assert find_parameter_name_by_module(net, net.base_model.model[1]) == "base_model.model.1"
    assert find_parameter_name_by_module(net, nn.Linear(1, 1)) == ""
    assert get_device_map(net) == {"": torch.device("cpu")}
    net.hf_device_map = {"base_model": 0}
    assert get_device_map(net) == {"base_model": 0}
