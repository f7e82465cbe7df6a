# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Combining adapters: the functions of tensors, and `add_weighted_adapter`.

What a combination should be is computed from the adapters' deltas, or entry by entry, in plain loops.
"""

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    kinds,
    llama,
    logits,
    randomise,
    refused,
    seeded,
    token_ids,
    trainable,
    warned,
)
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from peft.utils.low_rank_sums import COMBINATION_TYPES


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")

IDS = token_ids(vocabulary=12)
TARGETS = ["emb", "conv", "lin", "head"]
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.5}
OPTIONS = {kind: {} if kind in ("cat", "svd", "linear") else {"density": 0.5} for kind in COMBINATION_TYPES}


def with_adapters(*configs: LoraConfig, base: nn.Module | None = None) -> PeftModel:
    """Put adapters a, b, ... with random factors on a model."""
    model = get_peft_model(kinds() if base is None else base, configs[0], adapter_name="a")
    for name, config in zip("bcd", configs[1:], strict=False):
        model.add_adapter(name, config)
    randomise(model)
    return model


def config(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **kwargs})


def layers(model: PeftModel, names: list[str] = TARGETS) -> dict[str, nn.Module]:
    return {name: model.get_base_model().get_submodule(name) for name in names}


def delta(layer: nn.Module, adapter: str) -> torch.Tensor:
    return layer.get_delta_weight(adapter).detach()


def weighted_sum(layer: nn.Module) -> torch.Tensor:
    return sum(weight * delta(layer, name) for name, weight in WEIGHTS.items() if layer.has_adapter(name))


def combine(model: PeftModel, kind: str, **options) -> None:
    names = [name for name in model.peft_config if name in WEIGHTS]
    options = {**OPTIONS[kind], **options}
    model.add_weighted_adapter(names, [WEIGHTS[n] for n in names], "new", combination_type=kind, **options)


# ------------------------------------------------------------------------------------------ functions of tensors
TENSORS = [torch.tensor([[4.0, -1.0, 0.5], [-3.0, 2.0, 0.0]]), torch.tensor([[-2.0, -5.0, 1.0], [6.0, 1.5, 0.0]])]
COEFFICIENTS = torch.tensor([0.5, 2.0])


def test_task_arithmetic() -> None:
    expected = torch.tensor([[2.0 - 4, -0.5 - 10, 0.25 + 2], [-1.5 + 12, 1.0 + 3, 0.0]])
    assert_close(merge_utils.task_arithmetic(TENSORS, COEFFICIENTS), expected)
    assert_close(merge_utils.task_arithmetic(TENSORS[:1], COEFFICIENTS[:1]), TENSORS[0] / 2)


def test_magnitude_prune() -> None:
    # of 6 entries 3 stay: 4, -3, 2 and -5, 6, -2
    expected = torch.tensor([[2.0 - 4, -10.0, 0.0], [-1.5 + 12, 1.0, 0.0]])
    assert_close(merge_utils.magnitude_prune(TENSORS, COEFFICIENTS, 0.5), expected)
    assert_equal(merge_utils.prune(TENSORS[0], 0.4, "magnitude"), torch.tensor([[4.0, 0, 0], [-3, 0, 0]]))


def test_ties() -> None:
    # all entries stay; the sums are 2, -6, 1.5, 3, 3.5 and 0
    expected = torch.tensor([[2.0, (-0.5 - 10) / 2, (0.25 + 2) / 2], [12.0, (1 + 3) / 2, 0.0]])
    assert_close(merge_utils.ties(TENSORS, COEFFICIENTS, 1.0, "total"), expected)


def test_the_two_majorities() -> None:
    tensor = torch.tensor([[5.0], [-1.0], [-1.0]])
    assert merge_utils.calculate_majority_sign_mask(tensor, "total").flatten().tolist() == [True, False, False]
    assert merge_utils.calculate_majority_sign_mask(tensor, "frequency").flatten().tolist() == [False, True, True]
    assert_equal(merge_utils.ties(list(tensor), torch.ones(3), 1.0, "total"), torch.tensor([5.0]))
    assert_equal(merge_utils.ties(list(tensor), torch.ones(3), 1.0, "frequency"), torch.tensor([-1.0]))


def test_disjoint_merge_of_nothing_is_zero() -> None:
    assert_equal(merge_utils.disjoint_merge(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)), torch.zeros(3))


def test_random_pruning_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    ones = torch.ones(20_000)
    kept = merge_utils.prune(ones, 0.25, "random", rescale=True)
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert kept.mean() == pytest.approx(1.0, abs=0.05)
    assert set(merge_utils.prune(ones, 0.25, "random").unique().tolist()) == {0.0, 1.0}
    assert_equal(merge_utils.prune(ones, 0.0, "random", rescale=True), torch.zeros_like(ones))


@pytest.mark.parametrize("function", [merge_utils.dare_linear, merge_utils.dare_ties])
def test_dare_with_all_entries_is_the_method_without(function) -> None:
    plain = merge_utils.task_arithmetic(TENSORS, COEFFICIENTS)
    if function is merge_utils.dare_ties:
        plain = merge_utils.ties(TENSORS, COEFFICIENTS, 1.0)
    assert_equal(function(TENSORS, COEFFICIENTS, 1.0), plain)


@pytest.mark.parametrize("density", [-0.1, None, "half", True, math.nan])
def test_densities_that_cannot_be(density) -> None:
    with refused(None, (ValueError, TypeError), "density", repr(density)):
        merge_utils.prune(TENSORS[0], density, "magnitude")


def test_unknown_methods() -> None:
    with refused(None, ValueError, "largest", "magnitude", "random"):
        merge_utils.prune(TENSORS[0], 0.5, "largest")
    with refused(None, (ValueError, RuntimeError), "vote", "total", "frequency"):
        merge_utils.ties(TENSORS, COEFFICIENTS, 0.5, "vote")
    with warned("density=1.5"):
        assert merge_utils.prune(TENSORS[0], 1.5, "magnitude") is TENSORS[0]


# ------------------------------------------------------------------------------------------ the math
@pytest.mark.parametrize("use_rslora", [False, True])
def test_cat_is_the_weighted_sum(use_rslora: bool) -> None:
    model = with_adapters(
        config(use_rslora=use_rslora), config(r=2, lora_alpha=1), config(r=1, target_modules=["lin", "emb"])
    )
    combine(model, "cat")
    for name, layer in layers(model).items():
        assert_close(delta(layer, "new"), weighted_sum(layer))
        assert layer.r["new"] == (6 if name in ("lin", "emb") else 5)


@pytest.mark.parametrize("rank", [1, 2, 4, None, 12])
def test_svd_is_the_best_approximation_of_the_sum(rank: int | None) -> None:
    """The singular values that are left out are the smallest ones of the sum; with enough rank, none is."""
    model = with_adapters(config(), config(r=2), config(use_rslora=True))
    combine(model, "svd", svd_rank=rank)
    for layer in layers(model).values():
        whole, got = weighted_sum(layer), delta(layer, "new")
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        kept = slice(0, rank or 3)
        assert_close(got, (u[:, kept] * s[kept]) @ vh[kept], atol=1e-4)
        assert layer.r["new"] == (rank or 3)
    assert model.peft_config["new"].r == (rank or 3)


def test_factors_are_combined_entry_by_entry() -> None:
    model = with_adapters(config(), config(lora_alpha=1))
    combine(model, "linear")
    for layer in layers(model).values():
        pairs = {name: layer.factor_weights(name) for name in ("a", "b", "new")}
        c = {name: math.sqrt(abs(WEIGHTS[name]) * layer.scaling[name]) for name in ("a", "b")}
        assert_close(pairs["new"][0], c["a"] * pairs["a"][0] - c["b"] * pairs["b"][0])  # A gets the sign
        assert_close(pairs["new"][1], c["a"] * pairs["a"][1] + c["b"] * pairs["b"][1])
        assert layer.scaling["new"] == 1.0


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_one_adapter_with_a_weight(kind: str) -> None:
    """Of one adapter alone every kind makes the same, if nothing is left out: the adapter times its weight."""
    model = with_adapters(config())
    options = {"density": 1.0} if OPTIONS[kind] else {}
    model.add_weighted_adapter(["a"], [-0.6], "new", combination_type=kind, **options)
    for layer in layers(model).values():
        assert_close(delta(layer, "new"), -0.6 * delta(layer, "a"), atol=1e-4)


PATTERNS = {"rank_pattern": {"lin": 2, "conv": 5}, "alpha_pattern": {"head": 3}}


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
@pytest.mark.parametrize("patterns", [{}, PATTERNS], ids=["one_rank", "patterns"])
def test_scaling_by_the_root_of_the_rank(kind: str, patterns: dict) -> None:
    """One adapter with weight 1 is itself, and combinations do not depend on how the sources come by their scaling."""
    options = {"density": 1.0} if OPTIONS[kind] else {}
    model = with_adapters(config(use_rslora=True, **patterns), config(lora_alpha=1, **patterns))
    model.add_weighted_adapter(["a"], [1.0], "same", combination_type=kind, **options)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", combination_type=kind, **options)
    assert model.peft_config["new"].use_rslora
    plain = with_adapters(config(**patterns), config(lora_alpha=1, **patterns))
    for name, layer in layers(model).items():
        assert_close(delta(layer, "same"), delta(layer, "a"), atol=1e-4)
        other = layers(plain)[name]
        other.scaling["a"] = layer.scaling["a"]
        for adapter in "ab":
            for here, there in zip(other.factor_weights(adapter), layer.factor_weights(adapter), strict=True):
                here.data.copy_(there.data)
    plain.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", combination_type=kind, **options)
    for name, layer in layers(model).items():
        assert_close(delta(layer, "new"), delta(layers(plain)[name], "new"), atol=1e-4)


def loop_over_entries(kind: str, tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Combine with a density of 1/2, one entry at a time."""
    kept = []
    for tensor in tensors:
        limit = tensor.abs().flatten().sort().values[-(tensor.numel() // 2)]
        kept.append(torch.where(tensor.abs() >= limit, tensor, torch.zeros(())))
    result = torch.zeros_like(tensors[0])
    for place in torch.cartesian_prod(*(torch.arange(size) for size in result.shape)).tolist():
        entries = [tensor[tuple(place)].item() for tensor in kept]
        if kind == "magnitude_prune":
            result[tuple(place)] = sum(w * x for w, x in zip(weights, entries, strict=True))
        else:
            positive = sum(entries) >= 0
            agreeing = [w * x for w, x in zip(weights, entries, strict=True) if x and (x > 0) == positive]
            result[tuple(place)] = sum(agreeing) / max(1, len(agreeing))
    return result


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
def test_sparse_kinds_on_factors(kind: str) -> None:
    model = with_adapters(config(), config(lora_alpha=1))
    combine(model, kind)
    for layer in layers(model).values():
        for side, sign in ((0, -1), (1, 1)):
            tensors = [layer.factor_weights(name)[side].detach() for name in ("a", "b")]
            c = [math.sqrt(abs(WEIGHTS[name]) * layer.scaling[name]) for name in ("a", "b")]
            expected = loop_over_entries(kind, tensors, [c[0], sign * c[1]])
            assert_close(layer.factor_weights("new")[side], expected)


@pytest.mark.parametrize("kind", ["ties_svd", "magnitude_prune_svd"])
def test_sparse_kinds_on_deltas(kind: str) -> None:
    model = with_adapters(config(), config(lora_alpha=1, r=2))
    combine(model, kind, svd_rank=8)
    for layer in layers(model).values():
        deltas = [delta(layer, name) for name in ("a", "b")]
        expected = loop_over_entries(kind.removesuffix("_svd"), deltas, [WEIGHTS["a"], WEIGHTS["b"]])
        assert_close(delta(layer, "new"), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in COMBINATION_TYPES if kind.startswith("dare")])
def test_random_kinds(kind: str) -> None:
    """With nothing left out they are those without chance; else they are something else each time."""
    model = with_adapters(config(), config())
    combine(model, kind, density=1.0)
    calm = {"dare_linear": "linear", "dare_linear_svd": "svd", "dare_ties": "ties", "dare_ties_svd": "ties_svd"}[kind]
    options = {"density": 1.0} if "ties" in calm else {}
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "calm", combination_type=calm, **options)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "wild", combination_type=kind, density=0.5)
    layer = layers(model)["lin"]
    assert_close(delta(layer, "new"), delta(layer, "calm"), atol=1e-4)
    assert differs(delta(layer, "wild"), delta(layer, "new"))


def test_clamping_cuts_off_large_entries() -> None:
    model = with_adapters(config(), config())
    combine(model, "svd", svd_clamp=0.8)
    for layer in layers(model).values():
        u, s, vh = torch.linalg.svd(weighted_sum(layer).T if layer.is_embedding else weighted_sum(layer))
        into, out = (weight.detach() for weight in layer.factor_weights("new"))
        assert into.abs().max() == out.abs().max()
        assert 0 < out.abs().max() < s[0]


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_biases_of_factors(kind: str) -> None:
    names = ["conv", "lin"]
    model = with_adapters(*(config(target_modules=names, lora_bias=True, fan_in_fan_out=False) for _ in range(2)))
    combine(model, kind)
    for layer in layers(model, names).values():
        biases = {n: layer.scaling[n] * layer.lora_B[n].bias.detach() for n in ("a", "b", "new")}
        assert_close(biases["new"], 0.7 * biases["a"] - 0.4 * biases["b"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "linear"])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    settings = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**settings), adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", LoraConfig(**settings), autocast_adapter_dtype=False)
    combine(model, kind)
    assert torch.isfinite(delta(base[0], "new")).all()


# ------------------------------------------------------------------------------------------ the new adapter
@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_the_new_adapter_is_one_like_any_other(kind: str, tmp_path: Path) -> None:
    model = with_adapters(config(), config())
    before, active = {name: logits_with(model, name) for name in ("a", "b")}, model.active_adapters
    trained = trainable(model)
    combine(model, kind)
    assert (model.active_adapters, trainable(model)) == (active, trained)
    assert list(model.peft_config) == ["a", "b", "new"]
    for name, expected in before.items():
        assert_equal(logits_with(model, name), expected)
    output = logits_with(model, "new")
    assert model.peft_config["new"].target_modules == set(TARGETS)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(kinds(), tmp_path / "new")
    assert_equal(logits(again, IDS), output)
    model.delete_adapter("b")
    assert_equal(logits_with(model, "new"), output)
    assert_close(logits(model.merge_and_unload(adapter_names=["new"]), IDS), output)


def logits_with(model: PeftModel, adapter: str) -> torch.Tensor:
    model.set_adapter(adapter)
    output = logits(model, IDS)
    model.set_adapter(next(iter(model.peft_config)))
    return output


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_adapters_on_different_layers(kind: str, tmp_path: Path) -> None:
    """The new adapter is where one of them is, and nowhere else, with the rank that each layer needs."""
    model = with_adapters(
        config(target_modules=["lin", "emb"], rank_pattern={"lin": 1}, alpha_pattern={"emb": 1}),
        config(target_modules=TARGETS, exclude_modules=["emb", "head"]),
    )
    combine(model, kind)
    assert [name for name, layer in layers(model, TARGETS[:3]).items() if layer.has_adapter("new")] == TARGETS[:3]
    assert isinstance(model.get_base_model().head, nn.Linear)
    for layer in layers(model, TARGETS[:3]).values():
        u, s, vh = torch.linalg.svd(weighted_sum(layer), full_matrices=False)
        rank = layer.r["new"]
        assert_close(delta(layer, "new"), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    again = PeftModel.from_pretrained(kinds(), tmp_path / "new")
    assert_equal(logits(again, IDS), logits_with(model, "new"))


def test_regular_expressions_are_joined() -> None:
    model = with_adapters(config(target_modules="l.n|emb"), config(target_modules="head"))
    combine(model, "cat")
    assert model.peft_config["new"].target_modules == "(l.n|emb)|(head)"
    assert sorted(n for n, m in layers(model, ["lin", "emb", "head"]).items() if m.has_adapter("new")) == [
        "emb",
        "head",
        "lin",
    ]


def test_modules_trained_in_full_come_along() -> None:
    model = with_adapters(config(target_modules=["lin"], modules_to_save=["head"]), config(target_modules=["lin"]))
    randomise(model, "modules_to_save")
    combine(model, "cat")
    head = model.get_base_model().head
    assert_equal(head.modules_to_save["new"].weight, head.modules_to_save["a"].weight)
    assert head.modules_to_save["new"].weight is not head.modules_to_save["a"].weight


def test_what_is_changed_at_hand_counts() -> None:
    """The adapters are combined as strong as they are at the moment."""
    model = with_adapters(config(), config())
    for layer in layers(model).values():
        layer.set_scale("b", 3.0)
    combine(model, "cat")
    for layer in layers(model).values():
        assert_close(delta(layer, "new"), weighted_sum(layer))


def test_a_name_that_comes_twice() -> None:
    model = with_adapters(config())
    model.add_weighted_adapter(["a", "a"], [0.5, 0.25], "new", combination_type="linear")
    layer = layers(model)["lin"]
    assert_close(delta(layer, "new"), 0.75 * delta(layer, "a"))


GROUPS = "an adapter on a convolution with 2 groups cannot be merged"


class Others(nn.Module):
    """Convolutions, one of them with groups, and an attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.plain = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.plain(torch.tanh(self.grouped(x))).transpose(1, 2)
        return self.attention(hidden, hidden, hidden)[0]


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_convolutions_and_attention(kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    warnings.filterwarnings("always", message=GROUPS)
    with seeded():
        base, x = Others().eval(), torch.randn(2, 8, 5)
    names = ["grouped", "plain", "attention"]
    bare = copy.deepcopy(base)
    model = with_adapters(config(r=4, target_modules=names), config(r=4, target_modules=names), base=base).eval()
    combine(model, kind, **({"svd_rank": 8} if kind == "svd" else {}))
    assert model.peft_config["new"].target_modules == set(names)
    if kind in ("cat", "svd"):  # what it adds to each convolution is the sum of what the adapters add
        for layer in (base.grouped, base.plain):
            added = {name: layer.delta_forward(name, x) for name in ("a", "b", "new")}
            assert_close(added["new"], 0.7 * added["a"] - 0.4 * added["b"])
        for layer in (base.attention, base.attention.base_layer.out_proj):
            assert_close(delta(layer, "new"), weighted_sum(layer))
    model.set_adapter("new")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bare, tmp_path / "new").eval()
    assert_close(logits(again, x), logits(model, x))
    assert {str(warning.message) for warning in recwarn} == {GROUPS}


# ------------------------------------------------------------------------------------------ ties
def tied_llama(*ensure: bool) -> PeftModel:
    settings = {"r": 2, "target_modules": ["lm_head", "q_proj"]}
    return with_adapters(
        *(LoraConfig(ensure_weight_tying=tying, **settings) for tying in ensure), base=llama(tied=True)
    )


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_a_combination_of_tied_adapters_is_tied(kind: str, tmp_path: Path) -> None:
    model = tied_llama(True, True)
    combine(model, kind)
    base = model.get_base_model()
    embedding, head = base.model.embed_tokens, base.lm_head
    assert head.source("new") is embedding
    assert_equal(delta(head, "new"), delta(embedding, "new"))
    assert model.peft_config["new"].target_modules_to_tie == {"lm_head": "model.embed_tokens"}
    if kind == "cat":
        assert_close(delta(head, "new"), weighted_sum(embedding))
    model.set_adapter("new")
    output = logits(model, IDS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(tied=True), tmp_path / "new")
    assert_equal(logits(again, IDS), output)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, IDS), output)


def test_adapters_that_disagree_about_a_tie() -> None:
    with pytest.warns(match="share a weight"):
        model = tied_llama(True, False)
    with refused(model, ValueError, "lm_head", "ensure_weight_tying", "tied"):
        combine(model, "cat")


# ------------------------------------------------------------------------------------------ tokens, invocations
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("others", [[1, 2], [2, 5]])
@pytest.mark.parametrize("kind", ["svd", "linear", "cat"])
def test_changes_of_tokens_add_up(kind: str, others: list[int], tied: bool, tmp_path: Path) -> None:
    settings = [LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=t) for t in ([1, 2], others)]
    model = with_adapters(*settings, base=llama(tied=tied))
    randomise(model, "trainable_tokens_delta", seed=4)
    base = llama(tied=tied).get_input_embeddings().weight
    layer = model.get_input_embeddings().token_adapter
    rows = {a: dict(zip(layer.token_indices[a], layer.trainable_tokens_delta[a], strict=True)) for a in "ab"}
    combine(model, kind)
    model.set_adapter("new")
    expected = base.clone()
    for adapter, tokens in rows.items():
        for token, row in tokens.items():
            expected[token] += WEIGHTS[adapter] * (row - base[token])
    assert layer.active_adapters == ["new"]
    assert_close(model.get_input_embeddings().weight, expected)
    if others == [1, 2]:
        assert model.peft_config["new"].trainable_token_indices == [1, 2]
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    again = PeftModel.from_pretrained(llama(tied=tied), tmp_path / "new")
    assert_close(logits(again, token_ids()), logits(model, token_ids()))


def test_tokens_that_are_merged_count_once() -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1])
    model, twin = (with_adapters(settings, settings, base=llama()) for _ in range(2))
    model.merge_adapter(["a"])
    combine(model, "cat")
    combine(twin, "cat")
    new, expected = (m.get_input_embeddings().token_adapter.trainable_tokens_delta["new"] for m in (model, twin))
    assert_close(new, expected)


@pytest.mark.parametrize("kind", ["svd", "linear", "cat"])
def test_adapters_that_are_invoked_alike_add_up(kind: str) -> None:
    def invoked(*tokens: int) -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=list(tokens))

    model = with_adapters(invoked(3), invoked(3), base=llama())
    combine(model, kind)
    assert model.peft_config["new"].alora_invocation_tokens == [3]
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    changed = (logits_of(model, "new", ids) - logits(llama(), ids)).abs().amax(-1)[0]
    assert (changed[:2] == 0).all() and (changed[2:] > 0).all()
    for other in (invoked(4), LoraConfig(r=2, target_modules=["q_proj"])):
        model = with_adapters(invoked(3), other, base=llama())
        with refused(model, ValueError, "alora_invocation_tokens", "no sum of deltas"):
            combine(model, kind)


def logits_of(model: PeftModel, adapter: str, ids: torch.Tensor) -> torch.Tensor:
    model.set_adapter(adapter)
    return logits(model.eval(), ids)


# ------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("arguments", "options", "mentions"),
    [
        ((["a", "z"], [1.0, 1.0]), {}, ("'z'", "'a', 'b'")),
        (([], []), {}, ("at least one",)),
        (("a", [1.0]), {}, ("list", "'a'")),
        ((["a", "b"], []), {}, ("weights",)),
        ((["a", "b"], [1.0, math.nan]), {}, ("finite", "nan")),
        ((["a", "b"], [1.0, 1.0]), {"combination_type": "mean"}, ("mean", "svd", "cat", "ties_svd")),
        ((["a", "b"], [1.0, 1.0]), {"combination_type": "linear_svd"}, ("linear_svd",)),
        ((["a", "b"], [1.0, 1.0]), {"combination_type": "linear"}, ("one rank", "3, 2", "svd")),
        ((["a", "b"], [1.0, 1.0]), {"combination_type": "ties"}, ("density", "None")),
        ((["a", "b"], [1.0, 1.0]), {"combination_type": "ties_svd", "density": -1}, ("density", "-1")),
        (
            (["a", "b"], [1.0, 1.0]),
            {"combination_type": "ties_svd", "density": 0.5, "majority_sign_method": "vote"},
            ("vote", "frequency"),
        ),
        ((["a", "b"], [1.0, 1.0]), {"svd_rank": 0}, ("svd_rank", "0")),
        ((["a", "b"], [1.0, 1.0]), {"svd_clamp": 2}, ("svd_clamp", "2")),
    ],
    ids=str,
)
def test_refused_combinations(arguments: tuple, options: dict, mentions: tuple[str, ...]) -> None:
    model = with_adapters(config(), config(r=2))
    with refused(model, ValueError, *mentions):
        model.add_weighted_adapter(*arguments, "new", **options)


def test_refused_names() -> None:
    model = with_adapters(config(), config(r=2))
    with refused(model, KeyError, "a.b"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "a.b", combination_type="cat")


def test_refused_mixtures() -> None:
    model = with_adapters(config(target_modules="lin"), config(target_modules=["lin"]))
    with refused(model, ValueError, "regular expression", "list"):
        combine(model, "cat")
    settings = {"target_modules": ["lin"], "modules_to_save": ["head"]}
    model = with_adapters(config(**settings), config(**settings))
    with refused(model, ValueError, "head", "modules_to_save"):
        combine(model, "cat")


def test_factors_without_content() -> None:
    model = get_peft_model(kinds(), config(), adapter_name="a", low_cpu_mem_usage=True)
    with refused(model, ValueError, "meta"):
        model.add_weighted_adapter(["a"], [1.0], "new", combination_type="cat")


def test_what_is_let_pass_with_a_warning() -> None:
    model = with_adapters(config(), config())
    with warned("'b'", "nothing was combined"):
        model.add_weighted_adapter(["a"], [1.0], "b", combination_type="linear")
    with warned("2 adapters", "1 weights"):
        model.add_weighted_adapter(["a", "b"], [2.0], "new", combination_type="linear")
    layer = layers(model)["lin"]
    assert_close(delta(layer, "new"), 2 * delta(layer, "a"))


def test_adapters_that_have_changed_the_base() -> None:
    model = get_peft_model(
        kinds(), LoraConfig(r=2, target_modules=["lin"], init_lora_weights="pissa"), adapter_name="a"
    )
    with warned("changed the base weights", "path_initial_model_for_weight_conversion"):
        model.add_weighted_adapter(["a"], [1.0], "new", combination_type="cat")
    assert model.peft_config["new"].init_lora_weights is True
    x = IDS
    assert_close(logits_with(model, "new"), logits(kinds(), x))


def test_kinds_are_all_there() -> None:
    """Each kind on factors has one on deltas, but for the plain sum, whose deltas `svd` takes."""
    on_factors = [kind for kind in COMBINATION_TYPES if not kind.endswith("svd") and kind != "cat"]
    assert {f"{kind}_svd" for kind in on_factors} - set(COMBINATION_TYPES) == {"linear_svd"}
    assert len(set(COMBINATION_TYPES)) == len(COMBINATION_TYPES)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_what_dare_drops_follows_the_seed(init: bool | str) -> None:
    """As in the released package: after the start of the new adapter, one layer after the other, factor A first."""

    def model() -> PeftModel:
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["0", "1"], init_lora_weights=init)
        made = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config, "a")
        made.add_adapter("b", config)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_" in name:
                    parameter.fill_(1 if ".a." in name else 100)
        return made

    combined, other = model(), model()
    torch.manual_seed(7)
    combined.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="dare_linear", density=0.5)
    torch.manual_seed(7)
    other.add_adapter("c", other.peft_config["a"])
    for layer in combined.get_base_model():
        for factor in (layer.lora_A["c"].weight, layer.lora_B["c"].weight):
            kept = [torch.bernoulli(torch.full(factor.shape, 0.5)) for _ in range(2)]
            assert_close(factor, 2 * (kept[0] + 100 * kept[1]))
