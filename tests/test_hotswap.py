# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Swapping adapters in place: equal to loading them, not compiled again, with ties kept, whole or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, differs, llama, logits, randomise, refused, token_ids, warned
from torch import nn

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
)
from peft.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


def lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})


def adapted(seed: int = 1, tied: bool = False, **options: object) -> PeftModel:
    model = get_peft_model(llama(tied), lora(**options)).eval()
    randomise(model, "lora_|modules_to_save", seed)
    return model


def saved(folder: Path, **options: object) -> tuple[Path, torch.Tensor]:
    """Save another adapter; give its folder and what the model computes with it."""
    model = adapted(seed=7, **options)
    model.save_pretrained(folder / "other")
    return folder / "other", logits(model, token_ids())


def query(model: nn.Module, layer: int = 0) -> nn.Module:
    return model.get_base_model().model.layers[layer].self_attn.q_proj


class TestSwapping:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"lora_alpha": 3},
            {"r": 6, "lora_alpha": 3},
            {"r": 2},
            {"rank_pattern": {"q_proj": 3}},
            {"target_modules": ["q_proj"]},
        ],
        ids=str,
    )
    def test_model_computes_as_if_the_other_adapter_had_been_loaded(self, options: dict, tmp_path: Path) -> None:
        folder, expected = saved(tmp_path, **options)
        model = adapted()
        assert differs(logits(model, token_ids()), expected)
        parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
        hotswap_adapter(model, folder, "default")
        assert_close(logits(model, token_ids()), expected)
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters

    @pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
    def test_what_both_adapters_have(self, options: dict, tmp_path: Path) -> None:
        folder, expected = saved(tmp_path, **options)
        model = adapted(**options)
        hotswap_adapter(model, folder, "default")
        assert_close(logits(model, token_ids()), expected)

    def test_the_result_can_be_saved_merged_and_trained(self, tmp_path: Path) -> None:
        folder, expected = saved(tmp_path, r=6)
        model = adapted()
        hotswap_adapter(model, folder, "default")
        model.save_pretrained(tmp_path / "again")
        assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "again"), token_ids()), expected)
        model.train()
        model(token_ids()).logits.sum().backward()
        assert query(model).lora_A["default"].weight.grad.shape == (6, 16)
        assert_close(logits(model.eval().merge_and_unload(), token_ids()), expected, atol=1e-4)

    def test_of_two_adapters_one_is_swapped(self, tmp_path: Path) -> None:
        folder, expected = saved(tmp_path)
        model = adapted()
        model.add_adapter("second", lora(init_lora_weights=False))
        before = logits(model, token_ids())
        hotswap_adapter(model, folder, "second")
        assert_equal(logits(model, token_ids()), before)
        model.set_adapter("second")
        assert_close(logits(model, token_ids()), expected)

    def test_model_without_wrapper_and_both_forms_of_keys(self, tmp_path: Path) -> None:
        folder, expected = saved(tmp_path)
        weights = {key.removeprefix("base_model.model."): value for key, value in load_peft_weights(folder).items()}
        live = {key.replace(".weight", ".default.weight"): value for key, value in weights.items()}
        for tensors in (weights, live):
            model = inject_adapter_in_model(lora(), llama()).eval()
            hotswap_adapter_from_state_dict(model, tensors, "default", lora())
            assert_close(logits(model, token_ids()), expected)


class TestTies:
    @pytest.mark.parametrize("rank", [4, 6])
    @pytest.mark.parametrize("prepared", [False, True])
    def test_tied_adapters_stay_tied(self, rank: int, prepared: bool, tmp_path: Path) -> None:
        options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
        folder, expected = saved(tmp_path, tied=True, r=rank, **options)
        model = adapted(tied=True, **options)
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        count = len(list(model.parameters()))
        hotswap_adapter(model, folder, "default")
        assert_close(logits(model, token_ids()), expected)
        assert len(list(model.parameters())) == count
        base = model.get_base_model()
        embedding, head = base.model.embed_tokens, base.lm_head
        factor = embedding.lora_embedding_B["default"]
        assert head.lora_A["default"].weight.data_ptr() == factor.data_ptr()
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert_close(logits(merged, token_ids()), expected, atol=1e-4)

    def test_copies_that_are_trained_in_full_stay_tied(self, tmp_path: Path) -> None:
        options = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
        folder, expected = saved(tmp_path, tied=True, **options)
        model = adapted(tied=True, **options)
        hotswap_adapter(model, folder, "default")
        assert_close(logits(model, token_ids()), expected)
        base = model.get_base_model()
        copies = [module.modules_to_save["default"] for module in (base.model.embed_tokens, base.lm_head)]
        assert copies[0].weight is copies[1].weight


class TestPreparing:
    def test_model_computes_what_it_did(self) -> None:
        model = adapted()
        before = logits(model, token_ids())
        prepare_model_for_compiled_hotswap(model, target_rank=9)
        assert query(model).lora_A["default"].weight.shape == (9, 16)
        assert query(model).lora_B["default"].out_features == 16
        assert_close(logits(model, token_ids()), before, atol=1e-6)
        model.merge_adapter()
        assert_close(logits(model, token_ids()), before, atol=1e-4)

    def test_no_new_compilation_across_ranks_and_scalings(self, tmp_path: Path) -> None:
        graphs = []

        def count(graph: torch.fx.GraphModule, inputs: list) -> object:
            graphs.append(graph)
            return graph.forward

        model = adapted()
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=count)
        logits(compiled, token_ids())
        first = len(graphs)
        assert first > 0
        for rank, alpha in ((2, 3), (6, 8), (8, 5), (1, 16)):
            folder, expected = saved(tmp_path / str(rank), r=rank, lora_alpha=alpha)
            hotswap_adapter(compiled, folder, "default")
            assert_close(logits(compiled, token_ids()), expected)
        assert len(graphs) == first

    def test_without_a_rank_only_scalings_change(self, tmp_path: Path) -> None:
        folder, expected = saved(tmp_path, lora_alpha=3)
        model = adapted()
        prepare_model_for_compiled_hotswap(model)
        scaling = query(model).scaling["default"]
        hotswap_adapter(model, folder, "default")
        assert query(model).scaling["default"] is scaling
        assert_close(logits(model, token_ids()), expected)

    def test_refusals(self) -> None:
        model = adapted()
        with refused(model, ValueError, "rank 4", "target_rank=3"):
            prepare_model_for_compiled_hotswap(model, target_rank=3)
        with refused(model, ValueError, "rank 12", "target_rank=8"):
            prepare_model_for_compiled_hotswap(model, target_rank=8, config={"next": lora(rank_pattern={"q": 12})})
        with refused(model, ValueError, "check_compiled", "'sometimes'"):
            prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="sometimes")
        base = llama()
        with refused(base, ValueError, "no LoRA layer"):
            prepare_model_for_compiled_hotswap(base, target_rank=8)

    def test_models_that_are_compiled_already(self) -> None:
        model = adapted()
        compiled = torch.compile(model, backend="eager")
        with refused(model, ValueError, "before torch.compile"):
            prepare_model_for_compiled_hotswap(compiled, target_rank=8)
        with warned("compiled already"):
            prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
        prepare_model_for_compiled_hotswap(compiled, target_rank=9, check_compiled="ignore")
        assert query(model).lora_A["default"].weight.shape[0] == 9


class Shared(nn.Module):
    """A layer with two names, and one whose weight is adapted as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.own = nn.Linear(8, 8), nn.Linear(8, 8)
        self.back = self.front

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(torch.tanh(self.back(self.front(x))))


class Convolutions(nn.Module):
    """Convolutions with groups, behind one without."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 6, 3, groups=3), nn.Conv1d(6, 4, 1, groups=2, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


KINDS: dict[str, tuple[Callable[[], nn.Module], dict, torch.Tensor]] = {
    "tied": (
        lambda: llama(tied=True),
        {"target_modules": ["embed_tokens", "q_proj", "down_proj"], "ensure_weight_tying": True},
        token_ids(),
    ),
    "two_names": (
        Shared,
        {"target_modules": ["front", "back"], "rank_pattern": {"back": 2}, "alpha_pattern": {"back": 12}},
        torch.linspace(-1, 1, 16).view(2, 8),
    ),
    "parameters": (
        Shared,
        {
            "target_modules": ["back"],
            "target_parameters": ["own.weight"],
            "rank_pattern": {"own.weight": 3},
            "alpha_pattern": {"own.weight": 12},
        },
        torch.linspace(-1, 1, 16).view(2, 8),
    ),
    "groups": (
        Convolutions,
        {"r": 6, "target_modules": ["layers.0", "layers.1", "layers.2"]},
        torch.linspace(-1, 1, 60).view(1, 6, 10),
    ),
    "rslora": (Convolutions, {"target_modules": ["layers.0", "layers.2"], "use_rslora": True}, torch.ones(1, 6, 9)),
}


@pytest.mark.filterwarnings("ignore:an adapter on a convolution with")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
class TestKindsOfLayers:
    """Whatever a layer is, and however many names it has, it computes, swaps and saves as it does without room."""

    def model(self, kind: str, seed: int, **changes: object) -> PeftModel:
        make_base, options, _ = KINDS[kind]
        torch.manual_seed(0)
        model = get_peft_model(make_base(), lora(**{**options, **changes})).eval()
        randomise(model, "lora_", seed)
        return model

    def output(self, kind: str, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found = model(KINDS[kind][2])
        return getattr(found, "logits", found)

    def prepare(self, model: PeftModel, kind: str, prepared: bool) -> None:
        before = self.output(kind, model)
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=12)  # a multiple of all groups
        assert_close(self.output(kind, model), before)

    def test_swapped_adapter_computes_what_it_did(self, kind: str, prepared: bool, tmp_path: Path) -> None:
        model = self.model(kind, seed=1)
        self.prepare(model, kind, prepared)
        for name, changes in {"same": {}, "larger": {"r": 12}}.items():
            other = self.model(kind, seed=7, **changes)
            other.save_pretrained(tmp_path / name)
            hotswap_adapter(model, tmp_path / name, "default")
            assert_close(self.output(kind, model), self.output(kind, other))

    def test_saved_adapter_can_be_loaded(self, kind: str, prepared: bool, tmp_path: Path) -> None:
        model = self.model(kind, seed=1)
        expected = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}
        self.prepare(model, kind, prepared)
        before = self.output(kind, model)
        for options in ({}, {"deduplicate_tied": True}):
            model.save_pretrained(tmp_path, **options)
            torch.manual_seed(0)
            again = PeftModel.from_pretrained(KINDS[kind][0](), tmp_path, strict=True)
            assert_close(self.output(kind, again), before)
        assert {key: value.shape for key, value in get_peft_model_state_dict(model).items()} == expected
        # into the model with room too
        randomise(model, "lora_", seed=3)
        model.load_adapter(tmp_path, "default", strict=True)
        assert_close(self.output(kind, model), before)

    def test_combined_adapters(self, kind: str, prepared: bool) -> None:
        if kind in ("parameters", "groups"):
            pytest.skip("such adapters cannot be combined")
        model = self.model(kind, seed=1)
        self.prepare(model, kind, prepared)
        before = self.output(kind, model)
        model.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")
        model.set_adapter("same")
        assert_close(self.output(kind, model), before)


class TestRefusedSwaps:
    """Nothing is changed, not even a part of the tensors."""

    @pytest.mark.parametrize(
        ("options", "classes", "mention"),
        [
            ({"target_modules": ["q_proj", "k_proj"]}, RuntimeError, "k_proj"),
            ({"use_rslora": True}, ValueError, "use_rslora"),
            ({"lora_dropout": 0.1}, ValueError, "lora_dropout"),
            ({"alpha_pattern": {"q_proj": 3}}, ValueError, "alpha_pattern"),
            ({"use_dora": True}, ValueError, "use_dora"),
            ({"modules_to_save": ["lm_head"]}, RuntimeError, "lm_head"),
        ],
        ids=str,
    )
    def test_adapters_that_do_not_fit(self, options: dict, classes: type, mention: str, tmp_path: Path) -> None:
        folder, _ = saved(tmp_path, **options)
        model = adapted()
        with refused(model, classes, mention):
            hotswap_adapter(model, folder, "default")

    def test_what_is_no_factor_must_not_be_missing(self, tmp_path: Path) -> None:
        folder, _ = saved(tmp_path)
        model = adapted(modules_to_save=["lm_head"])
        with refused(model, RuntimeError, "lm_head", "nothing was changed"):
            hotswap_adapter(model, folder, "default")

    def test_unknown_and_merged_adapters(self, tmp_path: Path) -> None:
        folder, _ = saved(tmp_path)
        model = adapted()
        with refused(model, RuntimeError, "'nobody'", "'default'"):
            hotswap_adapter(model, folder, "nobody")
        model.merge_adapter()
        with refused(model, ValueError, "unmerge_adapter"):
            hotswap_adapter(model, folder, "default")

    def test_tensors_that_cannot_be(self, tmp_path: Path) -> None:
        weights = load_peft_weights(saved(tmp_path)[0])
        model = adapted()
        last = list(weights)[-1]
        with refused(model, ValueError, "not finite"):
            hotswap_adapter_from_state_dict(model, {**weights, last: weights[last] * torch.nan}, "default", lora())
        with refused(model, RuntimeError, "another base model"):
            hotswap_adapter_from_state_dict(model, {**weights, last: torch.zeros(5, 4)}, "default", lora())

    def test_a_compiled_model_without_room(self, tmp_path: Path) -> None:
        folder, _ = saved(tmp_path, r=6)
        model = adapted()
        with refused(model, RuntimeError, "prepare_model_for_compiled_hotswap"):
            hotswap_adapter(torch.compile(model, backend="eager"), folder, "default")

    def test_other_methods(self, tmp_path: Path) -> None:
        get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(tmp_path)
        model = adapted()
        with refused(model, ValueError, "IA3"):
            hotswap_adapter(model, tmp_path, "default")
        with refused(None, ValueError, "ADALORA"):
            check_hotswap_configs_compatible(lora(), AdaLoraConfig(total_step=3))

    def test_adapters_whose_start_changed_the_base(self) -> None:
        with refused(None, ValueError, "'pissa'", "path_initial_model_for_weight_conversion"):
            check_hotswap_configs_compatible(lora(), lora(init_lora_weights="pissa"))


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)).eval()


def test_groups_of_a_convolution_share_the_ranks(tmp_path: Path) -> None:
    x, outputs = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1)), {}
    for rank in (2, 4):
        model = get_peft_model(convolution(), lora(target_modules=["0"], r=rank)).eval()
        randomise(model, "lora_", rank)
        model.save_pretrained(tmp_path / str(rank))
        outputs[rank] = logits(model, x)
    model = PeftModel.from_pretrained(convolution(), tmp_path / "2")
    with refused(model, ValueError, "2 groups", "target_rank=3"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert model.get_base_model()[0].lora_B["default"].weight.shape[:2] == (4, 2)
    assert_close(logits(model, x), outputs[2])
    for rank in (4, 2):
        hotswap_adapter(model, tmp_path / str(rank), adapter_name="default")
        assert_close(logits(model, x), outputs[rank])


@pytest.mark.parametrize("whole", [False, True])
def test_a_config_counts_the_room_that_was_made_and_files_do_not(whole: bool, tmp_path: Path) -> None:
    model = adapted(r=5, rank_pattern={"v_proj": 7})
    config, expected = model.peft_config["default"], logits(model, token_ids())
    prepare_model_for_compiled_hotswap(model, target_rank=9, config=model.peft_config if whole else config)
    assert (config.r, config.rank_pattern, config.lora_alpha) == (9, {"v_proj": 9}, 8)
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path), token_ids()), expected)
    assert (config.r, config.rank_pattern) == (9, {"v_proj": 9})
