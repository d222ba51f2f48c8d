"""The model organism: a small English of the project's own, its gold labels, a BERT trained on it.

Everything comes out of `random.Random` seeded with text, so that sentences and labels are the same
on every machine, in every process and in every supported Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from healing_utils.base.errors import HealingError, choose

from .grammar import RAW, TOPICS, Sentence, Writer
from .vocabulary import held_out, lemmas, lexicon, tokenizer

__all__ = [
    "TASKS", "TAGS", "SPLITS", "folder", "held_out", "lemmas", "lexicon", "raw_text",
    "sentence_task", "tagged_sentences", "tokenizer",
]  # fmt: skip

TASKS = {
    "sentiment": ("negative", "positive"),
    "topic": TOPICS,
    "acceptability": ("unacceptable", "acceptable"),
}
TAGS = ("pos", "chunk", "sem")
SPLITS = {"train": 1000, "validation": 400, "test": 1000}


def folder() -> Path:
    """The shipped model: config.json, model.safetensors and the tokenizer's files.

    In a checkout `data/organism/`, in an installed package the copy inside it.
    """
    here = Path(__file__).resolve().parent
    places = [here.parents[1] / "data" / "organism", here / "weights"]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise HealingError(
        "the model organism's weights are missing; looked for config.json in "
        + " and ".join(map(str, places))
    )


def _labelled(task: str, writer: Writer) -> tuple[Sentence, int]:
    """One sentence of a task with its label; classes are equally likely."""
    if task == "sentiment":
        sentence = writer.sentence(polar=1.0)
        return sentence, int(sentence.polarity > 0)
    if task == "topic":
        sentence = writer.sentence(polar=0.3)
        while not any(word.topic for word in sentence.tokens):
            sentence = writer.sentence(polar=0.3)
        return sentence, TOPICS.index(sentence.topic)
    sentence = writer.agreement_pair()[writer.chance(0.5)]
    return sentence, int(sentence.acceptable)


@cache
def _splits(task: str) -> dict[str, list[tuple[Sentence, int]]]:
    seen: set[str] = set()
    splits: dict[str, list[tuple[Sentence, int]]] = {}
    for split, count in SPLITS.items():
        writer = Writer(f"{task} {split}", known_only=split == "train")
        splits[split] = []
        while len(splits[split]) < count:
            pair = _labelled(task, writer)
            if pair[0].text not in seen:
                seen.add(pair[0].text)
                splits[split].append(pair)
    return splits


def sentence_task(name: str) -> dict[str, tuple[list[str], list[int]]]:
    """Texts and labels (indices into `TASKS[name]`) of each split in `SPLITS`.

    No sentence stands in two splits; `train` has none of the `held_out()` words, `validation` and
    `test` draw on the whole lexicon. Raises HealingError for an unknown name.
    """
    choose(name, TASKS, "task of the organism")
    return {
        split: ([sentence.text for sentence, _ in pairs], [label for _, label in pairs])
        for split, pairs in _splits(name).items()
    }


@cache
def _tagged(split: str) -> list[Sentence]:
    seen: set[str] = set()
    for other in SPLITS:
        writer = Writer(f"tags {other}", known_only=other == "train")
        sentences: list[Sentence] = []
        while len(sentences) < SPLITS[other]:
            sentence = writer.sentence()
            if sentence.text not in seen:
                seen.add(sentence.text)
                sentences.append(sentence)
        if other == split:
            return sentences
    raise AssertionError(split)


def tagged_sentences(split: str) -> list[tuple[list[str], dict[str, list[str]]]]:
    """(words, tags) pairs of a split: `pos` (universal-dependency names), `chunk` (IOB2), `sem`.

    Punctuation marks are words. Raises HealingError for an unknown split.
    """
    choose(split, SPLITS, "split of the organism")
    return [(sentence.words, sentence.tags) for sentence in _tagged(split)]


def raw_text(count: int, seed: int = 0) -> Iterator[str]:
    """`count` sentences without labels, for masked language modelling; the whole lexicon occurs.

    Sentences of the tasks' validation and test splits are left out.
    """
    scored = {
        sentence.text
        for task in TASKS
        for split in ("validation", "test")
        for sentence, _ in _splits(task)[split]
    }
    writer = Writer(f"raw {seed}", style=RAW)
    while count > 0:
        text = writer.sentence().text
        if text not in scored:
            count -= 1
            yield text
