# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""EVA: components of inputs, ranks that are shared out, and what an adapter is after it."""

from collections.abc import Iterator
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
    refused,
    seeded,
    through_a_file,
    token_ids,
    warned,
)
from support.processes import process_group, run_processes
from torch import nn

from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)


TARGETS = ["q_proj", "k_proj", "down_proj"]


def config(**changes) -> LoraConfig:
    eva = changes.pop("eva_config", None) or EvaConfig(rho=2.0)
    return LoraConfig(**{"r": 2, "target_modules": TARGETS, "init_lora_weights": "eva", "eva_config": eva, **changes})


def batches(count: int = 3, batch: int = 4, length: int = 9) -> list[dict[str, torch.Tensor]]:
    with seeded(7):
        return [{"input_ids": torch.randint(1, 30, (batch, length))} for _ in range(count)]


def adapted(base: nn.Module | None = None, **changes) -> PeftModel:
    return get_peft_model(llama() if base is None else base, config(**changes), low_cpu_mem_usage=True)


def search(model: nn.Module, data: list | None = None, *args, **options) -> dict[str, torch.Tensor]:
    return get_eva_state_dict(model, batches() if data is None else data, *args, show_progress_bar=False, **options)


def initialize(model: nn.Module, data: list | None = None, **options) -> PeftModel:
    options.setdefault("show_progress_bar", False)
    if "eva_state_dict" not in options:
        options["dataloader"] = batches() if data is None else data
    initialize_lora_eva_weights(model, **options)
    return model


def factor(model: PeftModel, name: str) -> torch.Tensor:
    return model.get_submodule(name).lora_A["default"].weight.detach()


# ------------------------------------------------------------------------------------------ components and ranks
def test_rows_are_the_principal_directions_of_the_inputs() -> None:
    """With all of the data in one batch they are those of all rows, by an exact decomposition."""
    model, data = adapted(eva_config=EvaConfig(rho=1.0)), batches(1, batch=8)
    seen = {}
    name = "base_model.model.model.layers.1.mlp.down_proj"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    found = search(model, data)
    hook.remove()
    x = seen["x"].flatten(0, 1).double()
    exact = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[: len(found[name])]
    assert_close((found[name] * exact).sum(1).abs(), torch.ones(len(exact)).double(), atol=1e-3)


def test_ranks_go_where_most_is_explained_and_their_sum_stays() -> None:
    with seeded():
        even = torch.randn(256, 8)
        line = torch.randn(256, 1) @ torch.ones(1, 8) + 0.01 * torch.randn(256, 8)
    base = nn.ModuleDict({"even": nn.Linear(8, 8), "line": nn.Linear(8, 8)})
    found = search(
        adapted(base, target_modules=["even", "line"]),
        [(even, line)] * 2,
        forward_fn=lambda model, batch: (base["even"](batch[0]), base["line"](batch[1])),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    )
    assert {name.rpartition(".")[2]: len(rows) for name, rows in found.items()} == {"even": 3, "line": 1}
    assert_close(found["base_model.model.line"].abs(), torch.full((1, 8), 8**-0.5).double(), atol=1e-2)


def test_layers_with_equal_inputs_share_their_components() -> None:
    found = search(adapted(eva_config=EvaConfig(rho=1.0)))
    prefix = "base_model.model.model.layers.0.self_attn."
    shared = min(len(found[f"{prefix}q_proj"]), len(found[f"{prefix}k_proj"]))
    assert shared
    assert_equal(found[f"{prefix}q_proj"][:shared], found[f"{prefix}k_proj"][:shared])


def test_whitening_divides_each_row_once() -> None:
    plain, white = (search(adapted(eva_config=EvaConfig(rho=1.0, whiten=whiten))) for whiten in (False, True))
    for prefix in ("q_proj", "k_proj"):
        name = f"base_model.model.model.layers.0.self_attn.{prefix}"
        assert_close(white[name] / white[name].norm(dim=1, keepdim=True), plain[name], atol=1e-9)
    owner, follower = (white[f"base_model.model.model.layers.0.self_attn.{n}"] for n in ("q_proj", "k_proj"))
    assert_equal(owner[: len(follower)], follower[: len(owner)])


def test_padding_and_positions_without_labels_do_not_count() -> None:
    data = batches()
    kept = [{"input_ids": batch["input_ids"][:, :6]} for batch in data]
    padded = [{**batch, "attention_mask": (torch.arange(9) < 6).expand(4, 9).long()} for batch in data]
    labelled = [{**batch, "labels": batch["input_ids"].where(torch.arange(9) < 6, -100)} for batch in data]
    expected = search(adapted(), kept)
    for other in (padded, labelled):
        for name, rows in search(adapted(), other).items():
            assert_close(rows, expected[name], atol=1e-4)
    everything = search(adapted(eva_config=EvaConfig(use_label_mask=False)), labelled)
    assert any(rows.shape != expected[n].shape or differs(rows, expected[n]) for n, rows in everything.items())


def test_a_base_model_gives_the_same() -> None:
    found, of_base = search(adapted()), search(llama(), None, config())
    assert [name.removeprefix("base_model.model.") for name in found] == list(of_base)
    for rows, other in zip(found.values(), of_base.values(), strict=True):
        assert_close(rows, other)
    model = initialize(adapted(), eva_state_dict=of_base)
    assert_close(factor(model, next(iter(found))).double(), next(iter(found.values())))


def test_the_model_is_left_as_it_was() -> None:
    model = adapted()
    model.train()
    model.get_submodule("base_model.model.model.layers.0.mlp").eval()
    before = {name: module.training for name, module in model.named_modules()}
    search(model)
    assert before == {name: module.training for name, module in model.named_modules()}
    assert not any(module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------ the adapter
@pytest.mark.parametrize("adjust", [True, False])
def test_an_adapter_gets_ranks_factors_and_config(adjust: bool, tmp_path: Path) -> None:
    expected = logits(llama(), token_ids())
    model = adapted(lora_alpha=6, eva_config=EvaConfig(rho=2.0, adjust_scaling_factors=adjust))
    found = search(model)
    initialize(model, eva_state_dict=found)
    assert_close(logits(model, token_ids()), expected)
    for name, rows in found.items():
        if not len(rows):
            assert isinstance(model.get_submodule(name), nn.Linear)
            continue
        layer = model.get_submodule(name)
        assert_close(factor(model, name), rows.float())
        assert not layer.lora_B["default"].weight.any()
        assert layer.r["default"] == len(rows)
        assert layer.scaling["default"] == pytest.approx(6 / 2 if adjust else 6 / len(rows))
        assert layer.lora_A["default"].weight.requires_grad
    nn.init.normal_(model.get_submodule(next(iter(found))).lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_close(logits(again, token_ids()), logits(model, token_ids()))


def test_layers_without_rank_lose_the_adapter() -> None:
    model = adapted()
    found = search(model)
    name = next(iter(found))
    found[name] = found[name][:0]
    initialize(model, eva_state_dict=found)
    assert type(model.get_submodule(name)) is nn.Linear
    assert name.removeprefix("base_model.model.") not in model.peft_config["default"].target_modules
    assert name.removeprefix("base_model.model.") not in model.targeted_module_names
    assert len(found[name]) == 0  # the caller's dictionary is not changed


def test_another_adapter_keeps_the_layer() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    found = search(model)
    name = next(iter(found))
    initialize(model, eva_state_dict={**found, name: found[name][:0]})
    assert model.get_submodule(name).available_adapters == {"other"}


def test_layers_that_are_not_found_are_named() -> None:
    model = adapted()
    found = search(model)
    name = next(iter(found))
    del found[name]
    with warned(name):
        initialize(model, eva_state_dict=found)
    assert not model.get_submodule(name).lora_A["default"].weight.is_meta


def test_a_tied_weight_gets_one_start() -> None:
    """The follower reads the factors of the layer that owns them, whatever rank that gets."""
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    base[2].weight = base[0].weight
    model = adapted(base, target_modules=["0", "2", "3"], ensure_weight_tying=True)
    with seeded():
        data = [torch.randn(32, 8) for _ in range(3)]
    options = {"forward_fn": lambda model, x: model(x), "prepare_model_inputs_fn": None}
    options["prepare_layer_inputs_fn"] = None
    found = search(model, data, **options)
    assert set(found) == {"base_model.model.0", "base_model.model.3"}
    initialize(model, data, **options)
    owner, follower = base[0], base[2]
    assert follower.lora_A["default"].weight.data_ptr() == owner.lora_A["default"].weight.data_ptr()
    assert follower.r["default"] == owner.r["default"] == len(found["base_model.model.0"])
    without = {**found, "base_model.model.0": found["base_model.model.0"][:0]}
    initialize(model, eva_state_dict=without)
    assert type(base[0]) is type(base[2]) is nn.Linear
    assert base[0].weight is base[2].weight


# ------------------------------------------------------------------------------------------ functions of the caller
def test_functions_of_the_caller_choose_rows() -> None:
    model, names = adapted(), set()

    def rows_of(inputs: tuple, prepared: dict, name: str) -> torch.Tensor:
        assert prepared.keys() == {"input_ids"}
        names.add(name)
        return inputs[0].flatten(0, 1)

    found = search(model, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=rows_of)
    assert names == set(found)
    expected = search(model)
    assert all(map(torch.equal, found.values(), expected.values()))
    first = next(iter(found))
    assert all(
        map(
            torch.equal,
            search(model, prepare_layer_inputs_fn={first: lambda x, _, __: x[0].flatten(0, 1)}).values(),
            expected.values(),
        )
    )


# ------------------------------------------------------------------------------------------ interrupting, resuming
class Interrupted:
    """Data that ends in an interrupt after some batches."""

    def __init__(self, after: int) -> None:
        self.after, self.given = after, 0

    def __len__(self) -> int:
        return len(batches())

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches():
            self.given += 1
            if self.given > self.after:
                raise KeyboardInterrupt
            yield batch


def test_a_search_goes_on_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "eva.pt"
    expected = search(adapted())
    with pytest.raises(KeyboardInterrupt):
        search(adapted(), Interrupted(after=3), cache_file=file)
    found = search(adapted(), cache_file=file)
    assert list(found) == list(expected)
    assert all(map(torch.equal, found.values(), expected.values()))
    done = Interrupted(after=1)  # the batch that shows which inputs are equal is all that is needed
    assert all(map(torch.equal, search(adapted(), done, cache_file=file).values(), expected.values()))
    with refused(None, ValueError, "eva.pt", "other layers"):
        search(adapted(r=3), cache_file=file)


def test_processes_join_their_rows(tmp_path: Path) -> None:
    run_processes(search_in_process, tmp_path, limit=120)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    first, second = batches(2)
    whole = search(adapted(), [{"input_ids": torch.cat([first["input_ids"], second["input_ids"]])}])
    assert list(one) == list(other) == list(whole)
    for name, rows in one.items():
        assert_equal(rows, other[name])
        assert_close(rows, whole[name], atol=1e-4)


def search_in_process(rank: int, folder: str) -> None:
    with process_group(rank, folder, limit=60):
        torch.save(search(adapted(), [batches(2)[rank]]), Path(folder) / f"{rank}.pt")


# ------------------------------------------------------------------------------------------ refusals
def test_refusals() -> None:
    model = adapted()
    with refused(model, ValueError, "empty"):
        search(model, [])
    with refused(model, TypeError):
        search(model, iter(batches()))
    with refused(model, TypeError, "dictionary", "Tensor"):
        search(model, [token_ids()])
    with refused(model, ValueError, "nonsense", "prepare_layer_inputs_fn"):
        search(model, prepare_layer_inputs_fn={"nonsense": lambda *_: None})
    with refused(model, ValueError, "rows", "4 components"):
        search(model, batches(2, batch=1, length=3))
    with refused(model, ValueError, "dataloader", "eva_state_dict"):
        initialize_lora_eva_weights(model)
    with refused(model, ValueError, "no layer"):
        initialize(model, eva_state_dict={"nonsense": torch.zeros(2, 2)})
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    with refused(model, ValueError, name, "(2, 3)"):
        initialize(model, eva_state_dict={name: torch.zeros(2, 3)})
    with refused(model, ValueError, name, "nan"):
        initialize(model, eva_state_dict={name: torch.full((2, 16), float("nan"))})
    with refused(None, ValueError, "get_peft_model"):
        initialize(llama())
    with refused(None, ValueError, "peft_config"):
        search(llama())
    with refused(None, ValueError, "'eva'", "True"):
        search(get_peft_model(llama(), LoraConfig(target_modules=TARGETS)))


def test_convolutions_are_refused_and_embeddings_start_neutrally() -> None:
    base = nn.Sequential(nn.Conv1d(4, 4, 1))
    with refused(base, ValueError, "'0'", "Conv1d"):
        adapted(base, target_modules=["0"])
    base = kinds()
    model = get_peft_model(base, config(target_modules=["emb"]), low_cpu_mem_usage=False)
    assert_equal(logits(model, token_ids(vocabulary=12)), logits(kinds(), token_ids(vocabulary=12)))


def test_advice() -> None:
    with warned("initialize_lora_eva_weights", "low_cpu_mem_usage"):
        model = get_peft_model(llama(), config())
    again = through_a_file(initialize(model))
    assert_close(logits(again, token_ids()), logits(llama(), token_ids()))
