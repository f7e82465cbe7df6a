# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Tell what somebody says from what the author tells: LoRA on a classifier of sentences.

The author herself has labelled the sentences, by putting what is said in quotation marks. They are taken away, so the
model has to go by the words. Chapters 1 to 6 are trained on, chapter 7 is held out.
"""

import re
from pathlib import Path

from examples import classification
from transformers import AutoModelForSequenceClassification

from peft import AutoPeftModelForSequenceClassification


TEXT = Path(__file__).parents[1] / "tied_embeddings" / "data" / "pride_and_prejudice.txt"
LABELS = ["told", "said"]
HELD_OUT = 7
WORDS = range(4, 41)  # shorter pieces are mostly "said he", longer ones take long


def sentences_of(chapter: str) -> list[tuple[str, int]]:
    """The sentences of a chapter without quotation marks, each with its label."""
    found = []
    for paragraph in chapter.split("\n\n"):
        pieces = " ".join(paragraph.replace("_", "").split()).split('"')
        for index, piece in enumerate(pieces):
            for sentence in re.split(r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bSt\.)(?<=[.!?;])\s+", piece.strip()):
                if len(sentence.split()) in WORDS:
                    found.append((sentence, index % 2))  # every second piece stands between quotation marks
    return found


def read(tokenizer) -> tuple[list[dict], list[dict]]:
    """The samples to train on, and those that are held out."""
    chapters = re.split(r"Chapter \d+\n", TEXT.read_text(encoding="utf-8"))[1:]
    samples = []
    for chapter in chapters:
        encoded = [(tokenizer(text).input_ids, label) for text, label in sentences_of(chapter)]
        samples.append([{"input_ids": ids, "labels": label} for ids, label in encoded])
    return sum(samples[: HELD_OUT - 1], []), samples[HELD_OUT - 1]


def accuracy(predictions: list, samples: list[dict]) -> float:
    """Share of the samples whose class was told."""
    return sum(int(p) == s["labels"] for p, s in zip(predictions, samples, strict=True)) / len(samples)


def chance(samples: list[dict]) -> float:
    """What always naming the most frequent class would give."""
    return max(accuracy([label] * len(samples), samples) for label in range(len(LABELS)))


def main(argv: list[str] | None = None) -> list[classification.Result]:
    task = classification.Task(
        name="sequence_classification",
        task_type="SEQ_CLS",
        model_class=AutoModelForSequenceClassification,
        adapter_class=AutoPeftModelForSequenceClassification,
        labels=LABELS,
        read=read,
        score=accuracy,
        score_name="accuracy",
    )
    return classification.main(task, chance, argv)


if __name__ == "__main__":
    main()
