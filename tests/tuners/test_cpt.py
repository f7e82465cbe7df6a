# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Context-aware prompt tuning: balls around the embeddings of a context, and a loss that counts its labels."""

import copy
from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, llama, logits, refused, seeded, token_ids, trainable, warned
from torch import nn
from torch.nn import functional as F

from peft import CPTConfig, PeftModel, get_peft_model


IDS = token_ids()
CONTEXT, TYPES = [5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 6, 8]
N = len(CONTEXT)
MASK = torch.tensor([[1, 2, 3, 4, 4], [2, 4, 6, 8, 8]])


def config(**fields: object) -> CPTConfig:
    return CPTConfig(**{"cpt_token_ids": CONTEXT, "cpt_tokens_type_mask": TYPES, "task_type": "CAUSAL_LM", **fields})


def adapted(delta: float = 0.0, name: str = "default", **fields: object) -> PeftModel:
    model = get_peft_model(llama(), config(**fields), adapter_name=name)
    with torch.no_grad(), seeded(3):
        model.prompt_encoder[name].delta_embedding.weight.normal_().mul_(delta)
    return model.eval()


def projected(delta: torch.Tensor, inputs: float = 0.1, templates: float = 0.1) -> torch.Tensor:
    """Row by row, as the paper has it."""
    radii = {1: templates, 2: inputs, 3: templates, 0: 0.0}
    rows = []
    for row, kind in zip(delta, TYPES, strict=True):
        radius = radii[kind % 4] * (delta.shape[1] / 2048) ** 0.5
        rows.append(row * min(1.0, radius / float(row.norm())))
    return torch.stack(rows)


def test_a_fresh_prompt_is_the_context() -> None:
    base = llama()
    expected = base(input_ids=torch.cat([torch.tensor(CONTEXT).expand(2, -1), IDS], dim=1)).logits
    model = get_peft_model(base, config()).eval()
    assert_close(logits(model, input_ids=IDS), expected)
    assert trainable(model) == {"prompt_encoder.default.delta_embedding.weight"}


def test_random_draws_are_those_of_two_embeddings() -> None:
    base = llama()
    with seeded():
        get_peft_model(base, config())
        found = torch.rand(1)
    with seeded():
        nn.Embedding(N, base.config.hidden_size), nn.Embedding(N, base.config.hidden_size)
        assert_equal(found, torch.rand(1))


@pytest.mark.parametrize("training", [False, True])
def test_moves_stay_within_balls(training: bool) -> None:
    model = adapted(delta=5.0, opt_projection_epsilon=0.3, opt_projection_format_epsilon=0.7).train(training)
    prompt = model.prompt_encoder["default"]
    delta = prompt.delta_embedding.weight.detach().clone()
    inside = projected(delta, inputs=0.3, templates=0.7)
    assert_close(prompt.get_projection(), inside, atol=1e-6)
    assert_close(model.get_prompt(1)[0], prompt.embedding.weight + inside, atol=1e-6)
    # what is trained goes on from inside; to evaluate changes nothing
    assert_close(prompt.delta_embedding.weight, inside if training else delta, atol=1e-6)


def test_balls_of_no_size_hold_their_centre() -> None:
    model = adapted(delta=1.0, opt_projection_epsilon=0.0, opt_projection_format_epsilon=0.0)
    assert_close(model.get_prompt(1)[0], model.prompt_encoder["default"].embedding.weight, atol=1e-6)


def test_labels_get_no_gradient_in_copies_either() -> None:
    model = adapted(delta=0.001)
    for each in (model, copy.deepcopy(model)):
        each(input_ids=IDS, labels=IDS).loss.backward()
        gradient = each.prompt_encoder["default"].delta_embedding.weight.grad
        assert [bool(row.any()) for row in gradient] == [kind % 4 != 0 for kind in TYPES]


def loss_by_hand(model: PeftModel, mask: torch.Tensor, factor: float) -> torch.Tensor:
    rows = logits(model, input_ids=IDS)
    total, count = 0.0, 0
    for sample in range(2):
        types = [*TYPES, *(int(kind) + 8 for kind in mask[sample])]
        ids = [*CONTEXT, *IDS[sample].tolist()]
        at = [i for i in range(1, len(ids)) if types[i] % 4 == 0]
        order = sorted({types[i] for i in at}, reverse=True)
        for i in at:
            total += factor ** order.index(types[i]) * F.cross_entropy(rows[sample, i - 1], torch.tensor(ids[i]))
            count += 1
    return total / count


@pytest.mark.parametrize("name", ["default", "other"])
def test_loss(name: str) -> None:
    for fields, factor in (({}, 1.0), ({"opt_weighted_loss_type": "decay"}, 0.5)):
        model = adapted(delta=0.001, name=name, opt_loss_decay_factor=0.5, **fields)
        mask = MASK.clone()
        expected = loss_by_hand(model, MASK, factor)
        outputs = model(input_ids=IDS, labels=IDS, input_type_mask=mask)
        assert_close(outputs.loss, expected)
        assert_equal(mask, MASK)
        assert outputs[0] is outputs.loss
        as_tuple = model(input_ids=IDS, labels=IDS, input_type_mask=mask, return_dict=False)
        assert_close(as_tuple[0], expected)
        everything = torch.full_like(MASK, 4)
        assert_close(model(input_ids=IDS, labels=IDS).loss, loss_by_hand(model, everything, factor))


def test_types_that_end_within_an_example() -> None:
    """The types of the input begin a new example, whichever the last type of the context is."""
    model = get_peft_model(llama(), config(cpt_tokens_type_mask=None)).eval()
    rows = logits(model, input_ids=IDS)[:, N - 1 : -1]
    assert_close(model(input_ids=IDS, labels=IDS).loss, F.cross_entropy(rows.flatten(0, 1), IDS.flatten()))


def test_each_adapter_has_its_own_loss() -> None:
    model = adapted(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    model.add_adapter("plain", config())
    model.set_adapter("plain")
    assert_close(model(input_ids=IDS, labels=IDS).loss, loss_by_hand(model, torch.full_like(MASK, 4), 1.0))


def test_disabled_it_is_the_base_model() -> None:
    model = adapted(delta=0.001)
    with model.disable_adapter():
        found = model(input_ids=IDS, labels=IDS, input_type_mask=MASK)
    assert_equal(found.loss, llama()(input_ids=IDS, labels=IDS).loss)


def test_a_file_tells_the_context_from_its_moves(tmp_path: Path) -> None:
    model = adapted(delta=0.001)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(logits(again, input_ids=IDS), logits(model, input_ids=IDS))
    further = get_peft_model(llama(), config()).eval()
    further.load_adapter(tmp_path, "default", is_trainable=True)
    prompt, saved = further.prompt_encoder["default"], model.prompt_encoder["default"]
    assert_equal(prompt.embedding.weight, saved.embedding.weight)
    assert_close(prompt.delta_embedding.weight, saved.get_projection(), atol=1e-6)
    assert trainable(further) == {"prompt_encoder.default.delta_embedding.weight"}


def test_a_prompt_from_elsewhere_becomes_the_context(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    other = get_peft_model(llama(), config()).eval()
    other.load_adapter(tmp_path, "default")
    assert_close(other.get_prompt(1), model.get_prompt(1), atol=1e-6)
    assert not other.prompt_encoder["default"].delta_embedding.weight.any()


def test_sizes_are_those_of_the_model() -> None:
    found = config(num_virtual_tokens=3, token_dim=99)
    assert (found.num_virtual_tokens, found.token_dim, found.num_transformer_submodules) == (N, None, 1)
    with warned("position_ids"):
        adapted()(input_ids=IDS, position_ids=torch.arange(5).expand(2, -1))


@pytest.mark.parametrize(
    "fields",
    [{"task_type": None}, {"task_type": "SEQ_CLS"}, {"cpt_mask": [1]}, {"opt_weighted_loss_type": "linear"}],
)
def test_configs_that_cannot_work(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        config(**fields)


def test_tokens_that_the_model_does_not_have() -> None:
    base = llama()
    with refused(base, ValueError, "cpt_token_ids"):
        get_peft_model(base, config(cpt_token_ids=[0, 1, 2, 3, 4, 4000]))
