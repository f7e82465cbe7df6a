# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Arrow: which experts tokens get, general knowledge that is subtracted, later changes, files, and what is refused."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import (
    assert_close,
    assert_equal,
    differs,
    features,
    llama,
    logits,
    randomise,
    refused,
    stack,
    token_ids,
)
from torch import nn

from peft import ArrowConfig, BdLoraConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


def saved(folder: Path, seed: int, base: Any = stack, **changes: Any) -> str:
    """The folder of a trained adapter."""
    settings = {"r": 2, "lora_alpha": 2 * seed, "target_modules": ["up", "head"], **changes}
    model = get_peft_model(base(), LoraConfig(**settings))
    randomise(model, seed=seed)
    model.save_pretrained(folder / str(seed))
    return str(folder / str(seed))


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [saved(tmp_path, seed) for seed in (2, 3, 4)]


def routed(paths: list[str], general: list[str] | None = None, **settings: Any) -> PeftModel:
    return create_arrow_model(stack(), paths, ArrowConfig(**settings), general).eval()


def by_hand(model: PeftModel, name: str, x: torch.Tensor, top_k: int, temperature: float = 1.0, gks: int = 0) -> Any:
    """What a layer gives, token by token, from dense products."""
    layer = model.base_model.model.get_submodule(name)
    experts = [n for n in sorted(layer.lora_A) if n.startswith("task_")]
    a, b = ({n: side[n].weight for n in side} for side in (layer.lora_A, layer.lora_B))
    if gks:
        general = [f"gks_{i}" for i in range(gks)]
        a, b = ({n: side[n] - sum(side[g] for g in general) / gks for n in experts} for side in (a, b))
    first = {n: torch.linalg.svd(b[n] @ a[n]).Vh[0] for n in experts}
    rows = []
    for token in x:
        answers = torch.stack([(token @ first[n]).abs() for n in experts])
        chosen = answers.argsort(descending=True)[:top_k]
        shares = torch.exp(answers[chosen] / temperature)
        added = sum(
            share / shares.sum() * layer.scaling[experts[i]] * token @ a[experts[i]].T @ b[experts[i]].T
            for i, share in zip(chosen, shares, strict=True)
        )
        rows.append(layer.base_layer(token) + added)
    return torch.stack(rows)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 4.0)])
def test_the_formula(paths: list[str], top_k: int, temperature: float) -> None:
    model = routed(paths, top_k=top_k, router_temperature=temperature)
    assert sorted(model.peft_config) == ["arrow_router", "task_0", "task_1", "task_2"]
    assert model.active_adapter == "arrow_router"
    for name in ("layers.0.up", "head"):
        x = features(5)
        layer = model.base_model.model.get_submodule(name)
        assert_close(layer(x), by_hand(model, name, x, top_k, temperature))
        assert_close(layer(x.view(1, 5, 8))[0], layer(x))
        assert layer.lora_arrow["arrow_router"].prototypes.shape == (3, 8)
    with model.disable_adapter():
        assert_equal(logits(model, features()), logits(stack(), features()))
    assert_equal(logits(model.unload(), features()), logits(stack(), features()))


def test_general_knowledge(paths: list[str], tmp_path: Path) -> None:
    general = [saved(tmp_path, seed) for seed in (5, 6)]
    model = routed(paths, general, top_k=2, use_gks=True)
    x = features(5)
    layer = model.base_model.model.head
    assert_close(layer(x), by_hand(model, "head", x, 2, gks=2))
    assert differs(layer(x), by_hand(model, "head", x, 2))
    settings = model.peft_config["arrow_router"].arrow_config
    assert settings.task_adapter_names == ["task_0", "task_1", "task_2"]
    assert settings.gks_adapter_names == ["gks_0", "gks_1"]
    # the experts are what they were
    model.save_pretrained(tmp_path / "again")
    for number, path in enumerate(paths):
        before = load_file(Path(path) / "adapter_model.safetensors")
        after = load_file(tmp_path / "again" / f"task_{number}" / "adapter_model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_general_adapters_are_not_loaded_in_vain(paths: list[str]) -> None:
    model = routed(paths[:2], paths[2:], top_k=1)
    assert sorted(model.peft_config) == ["arrow_router", "task_0", "task_1"]
    assert model.peft_config["arrow_router"].arrow_config.gks_adapter_names == []


def test_experts_that_come_go_and_change(paths: list[str]) -> None:
    model, x = routed(paths[:2], top_k=2), features(5)
    layer = model.base_model.model.head
    two = layer(x)
    model.load_adapter(paths[2], "task_2")
    model.set_adapter("arrow_router")
    assert_close(layer(x), by_hand(model, "head", x, 2))
    assert differs(layer(x), two)
    model.delete_adapter("task_2")
    assert_close(layer(x), two)
    with torch.no_grad():
        layer.lora_A["task_0"].weight.mul_(-2).add_(0.1)
    assert_close(layer(x), by_hand(model, "head", x, 2))
    model.delete_adapter("task_0")
    with pytest.raises(RuntimeError, match=r"top_k=2 experts, and the layer has 1 \(task_1\)"):
        layer(x)


def test_prototypes_are_computed_once(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = routed(paths, top_k=2), features(5)
    expected = logits(model, x)
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert_equal(logits(model, x), expected)


def test_copies(paths: list[str]) -> None:
    model, x = routed(paths, top_k=2), features(5)
    expected = logits(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(logits(other, x), expected)
    assert_close(logits(model.double(), x.double()).float(), expected)


def test_gradients_reach_the_experts_and_the_input(paths: list[str]) -> None:
    model, x = routed(paths, top_k=3), features(5).requires_grad_()
    head = model.base_model.model.head
    head.set_requires_grad(["task_0", "task_1", "task_2"])
    model(x).square().sum().backward()
    assert x.grad.any()
    for name in ("task_0", "task_1", "task_2"):
        assert head.lora_A[name].weight.grad.any() and head.lora_B[name].weight.grad.any()


def test_dropout_is_for_the_sum(paths: list[str]) -> None:
    model = routed(paths, top_k=2)
    layer, x = model.base_model.model.head, features(64)
    added = layer(x) - layer.base_layer(x)
    layer.lora_dropout["arrow_router"] = nn.Dropout(0.5)
    layer.train()
    dropped = layer(x) - layer.base_layer(x)
    kept = dropped.abs() > 1e-6
    assert 0.3 < kept.float().mean() < 0.7
    assert_close(dropped[kept], 2 * added[kept])


def test_a_batch_with_several_adapters(paths: list[str]) -> None:
    model, x = routed(paths, top_k=2), features(4)
    with_router = logits(model, x)
    model.set_adapter("task_1")
    alone = logits(model, x)
    mixed = logits(model, x, adapter_names=["arrow_router", "task_1", "__base__", "arrow_router"])
    base = logits(stack(), x)
    assert_close(mixed, torch.stack([with_router[0], alone[1], base[2], with_router[3]]))


def test_a_saved_router_is_loaded(paths: list[str], tmp_path: Path) -> None:
    model, x = routed(paths, top_k=2), features(5)
    model.save_pretrained(tmp_path / "all")
    again = PeftModel.from_pretrained(stack(), tmp_path / "all" / "arrow_router", adapter_name="arrow_router").eval()
    assert again.peft_config["arrow_router"].arrow_config.task_adapter_names == ["task_0", "task_1", "task_2"]
    for name in ("task_2", "task_0", "task_1"):
        again.load_adapter(tmp_path / "all" / name, name)
    again.set_adapter("arrow_router")
    assert_close(logits(again, x), logits(model, x))


def test_a_router_made_by_hand(paths: list[str]) -> None:
    model = PeftModel.from_pretrained(stack(), paths[0], adapter_name="task_0").eval()
    model.load_adapter(paths[1], "task_1")
    config = LoraConfig(r=2, target_modules=["up", "head"], arrow_config=ArrowConfig(top_k=1))
    model.add_adapter("router", config)
    model.set_adapter("router")
    assert_close(logits(model, features()), logits(routed(paths[:2], top_k=1), features()))


def test_experts_of_a_variant_with_a_delta(tmp_path: Path) -> None:
    blocks = BdLoraConfig(target_modules_bd_a=["head"], target_modules_bd_b=["up"], nblocks=2)
    paths = [saved(tmp_path, seed, use_bdlora=blocks) for seed in (2, 3)]
    model, x = routed(paths, top_k=2), features(5)
    layer = model.base_model.model.head
    dense = [layer.get_delta_weight(name) for name in ("task_0", "task_1")]
    first = torch.stack([torch.linalg.svd(delta).Vh[0] for delta in dense])
    shares = torch.softmax((x @ first.T).abs(), -1)
    expected = layer.base_layer(x) + sum(shares[:, i : i + 1] * (x @ dense[i].T) for i in range(2))
    assert_close(layer(x), expected)


def test_targets_whose_last_parts_reach_others(tmp_path: Path) -> None:
    only = {"target_modules": ["layers.0.up", "head"]}
    model = routed([saved(tmp_path, seed, **only) for seed in (2, 3)], top_k=1)
    assert set(model.targeted_module_names) == {"layers.0.up", "head"}


def test_a_language_model(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    paths = [saved(tmp_path, seed, llama, **settings) for seed in (2, 3)]
    model = create_arrow_model(llama(), paths, ArrowConfig(top_k=1)).eval()
    assert differs(logits(model, token_ids()), logits(llama(), token_ids()))
    assert set(model.peft_config["arrow_router"].target_modules) == {"q_proj", "v_proj"}
    generated = model.generate(input_ids=token_ids(), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 8)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_nothing_can_be_merged(paths: list[str], how: str, safe_merge: bool) -> None:
    model = routed(paths, top_k=2)
    with refused(model, RuntimeError, "chooses experts for each token"):
        getattr(model, how)(safe_merge=safe_merge)


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"r": 3}, "adapters of one rank, found 2 (task_0), 3 (task_1)"),
        ({"target_modules": ["up"]}, "only one of 'task_0' and 'task_1' adapts 'head'"),
        ({"rank_pattern": {"head": 4}}, "factors of the same shapes"),
        ({"use_dora": True}, "has to be a product of factors"),
    ],
)
def test_adapters_that_do_not_go_together(tmp_path: Path, changes: dict[str, Any], mention: str) -> None:
    paths, base, settings = [saved(tmp_path, 2), saved(tmp_path, 3, **changes)], stack(), ArrowConfig(top_k=1)
    with refused(base, ValueError, mention):
        create_arrow_model(base, paths, settings)
    assert settings == ArrowConfig(top_k=1)


def test_paths_that_are_refused(paths: list[str], tmp_path: Path) -> None:
    base = stack()
    for wrong, mention in (
        ([], "a list of one adapter at least"),
        (paths[0], "a list of one adapter at least"),
        ([str(tmp_path)], "has no adapter_config.json"),
        ([str(tmp_path / "missing")], "is no folder, and no id of the hub"),
    ):
        with refused(base, ValueError, mention):
            create_arrow_model(base, wrong, ArrowConfig(top_k=1))
    with refused(base, ValueError, "give general_adapter_paths"):
        create_arrow_model(base, paths, ArrowConfig(use_gks=True))


def test_embeddings_are_refused(tmp_path: Path) -> None:
    paths = [saved(tmp_path, seed, llama, target_modules=["embed_tokens"]) for seed in (2, 3)]
    base = llama()
    with refused(base, TypeError, "adapts 'model.embed_tokens', a Embedding"):
        create_arrow_model(base, paths, ArrowConfig(top_k=1))


def test_the_module_of_the_router_by_itself() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    router = ArrowLoraLinearLayer(6, ArrowConfig(top_k=1))
    vector = router.top_right_singular_vec_from_BA(a, b)
    assert_close(vector.norm(), torch.tensor(1.0))
    assert_close((b @ a @ vector).norm(), torch.linalg.svdvals(b @ a)[0])
    side_a = nn.ModuleDict({"x": nn.Linear(6, 2, bias=False)})
    side_b = nn.ModuleDict({"x": nn.Linear(2, 5, bias=False)})
    x = torch.randn(3, 6)
    expected = 2.0 * side_b["x"](side_a["x"](x))
    assert_close(router(x, side_a, side_b, nn.Identity(), {"x": 2.0}), expected)
    router.on_adapter_change(side_a, side_b)
    assert router.prototypes.shape == (1, 6) and not router.state_dict()
