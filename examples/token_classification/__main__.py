# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Find persons, places and times in a text: LoRA on a classifier of tokens.

The sentences of `data/names.txt` have been annotated by hand. Chapters 1 to 4 are trained on, chapter 7 is held out.
"""

import re
from itertools import groupby
from pathlib import Path

from examples import classification
from transformers import AutoModelForTokenClassification

from peft import AutoPeftModelForTokenClassification


DATA = Path(__file__).parent / "data" / "names.txt"
LABELS = ["-", "PERSON", "PLACE", "TIME"]
HELD_OUT = "Chapter 7"
Span = tuple[int, int, int]  # first token, last token, class


def read_marked(line: str) -> tuple[str, list[tuple[int, int, int]]]:
    """A sentence without its marks, and for each mark the first character, the one after the last, and the class."""
    text, marks = "", []
    for plain, marked, label in re.findall(r"([^\[]*)(?:\[([^|]*)\|([A-Z]+)\])?", line):
        text += plain
        if label:
            marks.append((len(text), len(text) + len(marked), LABELS.index(label)))
        text += marked
    return text, marks


def encode(line: str, tokenizer) -> dict:
    """A sample: the tokens of a sentence, and the class of each."""
    text, marks = read_marked(line)
    encoded = tokenizer(text, return_offsets_mapping=True)
    labels = []
    for start, end in encoded.offset_mapping:  # a token can begin with the space before its word
        labels.append(next((label for first, last, label in marks if start < last and end > first), 0))
    return {"input_ids": encoded.input_ids, "labels": labels}


def read(tokenizer) -> tuple[list[dict], list[dict]]:
    """The samples to train on, and those that are held out."""
    train, held_out, chapter = [], [], ""
    for line in DATA.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            chapter = line[2:]
        else:
            (held_out if chapter == HELD_OUT else train).append(encode(line, tokenizer))
    return train, held_out


def spans(classes: list[int]) -> set[Span]:
    """The runs of tokens of one class, but for the class of all other tokens."""
    found, start = set(), 0
    for label, run in groupby(classes):
        end = start + len(list(run))
        if label:
            found.add((start, end - 1, label))
        start = end
    return found


def f1(predictions: list, samples: list[dict]) -> float:
    """F1 of whole names: one counts if first token, last token and class are right."""
    found = [spans([int(label) for label in prediction]) for prediction in predictions]
    there = [spans(sample["labels"]) for sample in samples]
    right = sum(len(a & b) for a, b in zip(found, there, strict=True))
    return 2 * right / max(1, sum(map(len, found)) + sum(map(len, there)))


def chance(samples: list[dict]) -> float:
    """What naming the most frequent class of all tokens would give: no name is found."""
    return f1([[0] * len(sample["labels"]) for sample in samples], samples)


def main(argv: list[str] | None = None) -> list[classification.Result]:
    task = classification.Task(
        name="token_classification",
        task_type="TOKEN_CLS",
        model_class=AutoModelForTokenClassification,
        adapter_class=AutoPeftModelForTokenClassification,
        labels=LABELS,
        read=read,
        score=f1,
        score_name="F1",
    )
    return classification.main(task, chance, argv)


if __name__ == "__main__":
    main()
