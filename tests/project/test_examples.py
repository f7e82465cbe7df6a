# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The examples of `examples/`, in the quick mode that each has; `tied_embeddings` is in `test_packaging.py`."""

import math
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers.utils import logging

from peft import PeftType


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # examples are run as modules, from the root

from examples.lora_variants import __main__ as lora_forms  # noqa: E402
from examples.lora_variants import settings as lora_settings  # noqa: E402
from examples.method_comparison import __main__ as comparison  # noqa: E402
from examples.method_comparison import methods as compared  # noqa: E402
from examples.multi_adapter import __main__ as multi_adapter  # noqa: E402
from examples.sequence_classification import __main__ as sequences  # noqa: E402
from examples.tied_embeddings.base_models import byte_tokenizer  # noqa: E402
from examples.token_classification import __main__ as tokens  # noqa: E402


@pytest.fixture(autouse=True)
def as_loud_as_before():
    """The examples turn messages and progress bars of transformers off for their process."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


# --------------------------------------------------------------------------------------------------- classification
@pytest.mark.parametrize("example", [sequences, tokens], ids=["sequences", "tokens"])
def test_a_classifier_is_trained_saved_and_reloaded(example, tmp_path, capsys):
    results = example.main(["--quick", "--epochs", "1", "--output", str(tmp_path)])

    head, lora, everything = results
    assert head.trained < lora.trained < everything.trained
    assert all(len(result.scores) == 1 and 0 <= result.scores[0] <= 1 for result in results)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert "base_model.model.score.weight" in file.keys(), "the head is saved with the adapter"
    assert "predictions of" in capsys.readouterr().out


def test_sentences_are_labelled_by_quotation_marks():
    chapter = '"You _flatter_ me, my dear. I will not go," said his\nwife to him. "Why not go there, Mr. Bennet?"'
    assert sequences.sentences_of(chapter) == [
        ("You flatter me, my dear.", 1),
        ("I will not go,", 1),
        ("said his wife to him.", 0),
        ("Why not go there, Mr. Bennet?", 1),
    ]


def test_chapter_seven_is_held_out(tokenizer):
    for example, sizes in ((sequences, (528, 130)), (tokens, (249, 100))):
        assert tuple(map(len, example.read(tokenizer))) == sizes


def test_marks_become_classes_of_tokens(tokenizer):
    text, marks = tokens.read_marked("[Jane|PERSON] went to [London|PLACE].")
    assert text == "Jane went to London."
    assert [(text[start:end], tokens.LABELS[label]) for start, end, label in marks] == [
        ("Jane", "PERSON"),
        ("London", "PLACE"),
    ]
    sample = tokens.encode("[Jane|PERSON] went to [London|PLACE].", tokenizer)
    assert len(sample["labels"]) == len(sample["input_ids"]) == len(text)  # a token is a byte here
    assert sample["labels"] == [1] * 4 + [0] * 9 + [2] * 6 + [0]


def test_every_mark_of_the_data_is_read(tokenizer):
    lines = [line for line in tokens.DATA.read_text(encoding="utf-8").splitlines() if not line.startswith("# ")]
    texts, marks = zip(*map(tokens.read_marked, lines), strict=True)
    assert sum(map(len, marks)) == sum(line.count("[") for line in lines) == 293
    assert not any(character in "".join(texts) for character in "[]|")
    train, held_out = tokens.read(tokenizer)
    assert sum(len(tokens.spans(sample["labels"])) for sample in train + held_out) == 293


@pytest.mark.parametrize(
    ("predicted", "score"),
    [
        ([0, 1, 1, 0, 2], 1.0),
        ([0, 0, 0, 0, 0], 0.0),
        ([0, 1, 1, 0, 0], 2 / 3),
        ([0, 1, 0, 0, 2], 1 / 2),  # half of a name is none
        ([0, 3, 3, 0, 2], 1 / 2),
    ],
)
def test_f1_counts_whole_names(predicted, score):
    assert math.isclose(tokens.f1([predicted], [{"labels": [0, 1, 1, 0, 2]}]), score)


# ---------------------------------------------------------------------------------------------------- multi_adapter
def test_the_server_gives_every_user_the_answers_of_that_users_adapter(tmp_path, capsys, monkeypatch):
    # adapters at random differ from each other; a few steps on a random base would leave them all alike
    config = multi_adapter.LoraConfig
    monkeypatch.setattr(
        multi_adapter,
        "LoraConfig",
        lambda **options: config(**{**options, "lora_alpha": 400}, init_lora_weights=False),
    )
    answered = multi_adapter.main(["--quick", "--output", str(tmp_path)])

    answers = {way: {(r.adapter, tuple(r.prompt)): r.answer for r in requests} for way, requests in answered.items()}
    assert answers["mixed batch"] == answers["switching"]
    assert len({tuple(answer) for answer in answers["switching"].values()}) > 1, "users have different adapters"
    assert all(request.seconds > 0 for requests in answered.values() for request in requests)
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert "the same answers: 8 of 8" in capsys.readouterr().out

    for user in multi_adapter.USERS:
        assert (tmp_path / "adapters" / user / "adapter_model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------- the comparison
def test_methods_are_compared(tmp_path, capsys):
    chosen = ["IA3", "LORA", "PROMPT_TUNING"]
    results = comparison.main(["--quick", "--steps", "2", "--output", str(tmp_path), "--methods", *chosen])

    assert [result.method for result in results] == chosen
    assert all(0 < result.bits < 9 and result.trained and result.kilobytes for result in results)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(chosen)
    assert "(no adapter)" in capsys.readouterr().out


def test_every_method_is_compared():
    assert set(compared.SETUPS) <= set(PeftType) and "LORA" in compared.methods()


# ------------------------------------------------------------------------------------------------- the forms of LoRA
def test_every_form_of_lora_is_trained(tmp_path, capsys):
    results = lora_forms.main(["--quick", "--steps", "2", "--output", str(tmp_path)])

    assert [r.name for r in results] == list(lora_settings.settings())
    assert all(math.isfinite(r.bits) and len(r.losses) == 2 and r.trained > 0 for r in results)
    assert {"start", "variant", "optimiser"} == {r.kind for r in results}
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "results.csv").read_text().splitlines()) == len(results) + 1
    assert "LoRA-FA" in capsys.readouterr().out


def test_a_form_that_does_not_exist(tmp_path, capsys):
    with pytest.raises(SystemExit):
        lora_forms.main(["--only", "LoRRA", "--output", str(tmp_path)])
    assert "LoRRA" in capsys.readouterr().err
