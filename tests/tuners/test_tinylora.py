# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""TinyLoRA against sums over singular triples and directions, and what its layers share."""

from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, linears, llama, logits, refused, token_ids, trainable
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, TinyLoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.error import PeftTypeError, PeftValueError


pytestmark = [
    pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:save_projection=False:peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:peft.utils.warning.PeftWarning"),
]


def adapted(base: nn.Module, *targets: str, **fields: object) -> PeftModel:
    """TinyLoRA with vectors that have an effect."""
    config = TinyLoraConfig(**{"u": 3, "target_modules": list(targets), "init_weights": "uniform", **fields})
    return get_peft_model(base, config)


def rotated(weight: torch.Tensor, v: torch.Tensor, seed: int, r: int) -> torch.Tensor:
    """What is added to a matrix: its first singular triples, mixed."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    p = torch.normal(0.0, r**-0.5, (len(v), r, r), generator=torch.Generator().manual_seed(seed))
    delta = torch.zeros_like(weight)
    for i in range(r):
        for k in range(r):
            delta += (s[i] * s[k]).sqrt() * sum(v[n] * p[n, i, k] for n in range(len(v))) * torch.outer(u[:, i], vh[k])
    return delta


@pytest.mark.parametrize("base", [nn.Linear(12, 8), Conv1D(8, 12), nn.Embedding(12, 8)])
@pytest.mark.parametrize("r", [2, 20])
def test_delta(base: nn.Module, r: int) -> None:
    """The rank is at most that of the weight; layers that keep (in, out) count rows and columns by the map."""
    net = nn.Sequential(base)
    weight = base.weight.detach().clone()
    adapted(net, "0", r=r, projection_seed=5)
    layer = net[0]
    v = layer.tinylora_v["default"]["0"].detach()
    expected = rotated(weight.T, v, 5, min(r, 8)).T if isinstance(base, Conv1D) else rotated(weight, v, 5, min(r, 8))
    assert_close(layer.get_delta_weight("default"), expected)
    x = torch.tensor([[3, 0, 3]]) if isinstance(base, nn.Embedding) else torch.randn(2, 3, 12)
    output = layer(x)
    layer.merge()
    assert_close(layer(x), output)


def test_dropout_of_embeddings() -> None:
    """What is dropped are entries of the rows that are found."""
    net = nn.Sequential(nn.Embedding(6, 8))
    model = adapted(net, "0", tinylora_dropout=0.5).train()
    ids = torch.arange(6)
    torch.manual_seed(0)
    output = model(ids)
    torch.manual_seed(0)
    layer = net[0]
    core = torch.einsum("u,uij->ij", layer.tinylora_v["default"]["0"], layer.tinylora_P["default"])
    rows = nn.functional.dropout(layer.tinylora_B["default"], 0.5)
    assert_close(output, layer.base_layer(ids) + rows @ core @ layer.tinylora_A["default"])


@pytest.mark.parametrize(
    ("weight_tying", "groups"),
    [(0.0, [0, 1, 2, 3, 4]), (0.3, [0, 1, 2, 3, 3]), (0.5, [0, 0, 1, 1, 1]), (1.0, [0, 0, 0, 0, 0])],
)
def test_groups(weight_tying: float, groups: list[int]) -> None:
    """Layers in a row share a vector, the rest goes to the last."""
    net = linears(4, 4, 4, 4, 4, 4)
    model = adapted(net, *"01234", weight_tying=weight_tying)
    assert [layer.settings["default"].group for layer in net] == groups
    names = {f"base_model.model.0.tinylora_v.default.{group}" for group in groups}
    assert trainable(model) == names


def test_keys() -> None:
    """A vector is saved once."""
    saved = get_peft_model_state_dict(adapted(linears(4, 6, 2), "0", "1", weight_tying=1.0))
    assert set(saved) == {"base_model.tinylora_v.0"} | {
        f"base_model.model.{i}.tinylora_{name}" for i in range(2) for name in "ABP"
    }


@pytest.mark.parametrize("save_projection", [True, False])
def test_second_adapter_is_what_it_is_alone(tmp_path: Path, save_projection: bool) -> None:
    """Directions depend on the adapter's own targets, whatever was adapted before."""
    torch.manual_seed(0)
    base = linears(4, 4, 4, 4)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, "0", "1", "2", save_projection=save_projection)
    config = TinyLoraConfig(u=4, target_modules=["2", "1"], init_weights="uniform", save_projection=save_projection)
    model.add_adapter("second", config)
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    fresh = linears(4, 4, 4, 4)
    fresh.load_state_dict(state)
    x = torch.randn(3, 4)
    assert_equal(PeftModel.from_pretrained(fresh, tmp_path / "second")(x), model(x))


def test_tied_head_follows_the_embedding() -> None:
    base = llama(tied=True)
    model = adapted(base, "embed_tokens", "lm_head", ensure_weight_tying=True, u=4).eval()
    nn.init.normal_(model.base_model.tinylora_v["default"]["0"])
    expected = logits(model, token_ids())
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, token_ids()), expected)


def test_half_precision() -> None:
    """Vectors are drawn, and singular vectors rounded, in the type of the weight."""
    net = linears(8, 6).bfloat16()
    torch.manual_seed(3)
    adapted(net, "0", init_v_bound=0.5)
    torch.manual_seed(3)
    drawn = torch.empty(3, dtype=torch.bfloat16).uniform_(-0.5, 0.5)
    assert_equal(net[0].tinylora_v["default"]["0"], drawn.float())
    for name in ("tinylora_A", "tinylora_B", "tinylora_P"):
        tensor = getattr(net[0], name)["default"]
        assert tensor.dtype == torch.float32
        assert_equal(tensor, tensor.bfloat16().float())


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"r": 0}, "r and u"),
        ({"u": -1}, "r and u"),
        ({"weight_tying": 1.5}, "weight_tying"),
    ],
)
def test_refused_by_the_config(fields: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TinyLoraConfig(**fields)


def test_refused_beside_another() -> None:
    model = adapted(linears(4, 6, 2), "0")
    with refused(model, PeftTypeError, "save_projection"):
        model.add_adapter("two", TinyLoraConfig(target_modules=["0"], save_projection=False))


def test_starts_that_there_are_not() -> None:
    base = linears(4, 6)
    with refused(base, PeftValueError, "init_weights"):
        get_peft_model(base, TinyLoraConfig(target_modules=["0"], init_weights="ones"))


def test_leaving_directions_out_is_said() -> None:
    with pytest.warns(UserWarning, match="save_projection=False"):
        TinyLoraConfig(save_projection=False)
