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
    """The shipped model, as `from_pretrained` takes it: in a checkout `data/organism/`, in an
    installed package the copy inside it."""
    here = Path(__file__).resolve().parent
    for place in (here.parents[1] / "data" / "organism", here / "weights"):
        if (place / "config.json").is_file():
            return place
    raise HealingError(f"the organism's weights are missing: no config.json in {place}")


def _draw(text: str, writer: Writer) -> tuple[Sentence, int]:
    """One sentence of a task, or of the tagged ones, with its label; classes are equally likely."""
    if text == "sentiment":
        sentence = writer.sentence(polar=1.0)
        return sentence, int(sentence.polarity > 0)
    if text == "topic":
        sentence = writer.sentence(polar=0.3)
        while not any(word.topic for word in sentence.tokens):
            sentence = writer.sentence(polar=0.3)
        return sentence, TOPICS.index(sentence.topic)
    if text == "acceptability":
        sentence = writer.agreement_pair()[writer.chance(0.5)]
        return sentence, int(sentence.acceptable)
    return writer.sentence(), 0


@cache
def splits(text: str) -> dict[str, list[tuple[Sentence, int]]]:
    """The sentences of a task, or of "tags", by split; none stands in two, or twice."""
    seen: set[str] = set()
    found: dict[str, list[tuple[Sentence, int]]] = {}
    for split, count in SPLITS.items():
        writer = Writer(f"{text} {split}", known_only=split == "train")
        found[split] = []
        while len(found[split]) < count:
            sentence, label = _draw(text, writer)
            if sentence.text not in seen:
                seen.add(sentence.text)
                found[split].append((sentence, label))
    return found


def sentence_task(name: str) -> dict[str, tuple[list[str], list[int]]]:
    """Texts and labels (indices into `TASKS[name]`) of each split in `SPLITS`; `train` has none of
    the `held_out()` words."""
    choose(name, TASKS, "task of the organism")
    return {
        split: ([sentence.text for sentence, _ in pairs], [label for _, label in pairs])
        for split, pairs in splits(name).items()
    }


def tagged_sentences(split: str) -> list[tuple[list[str], dict[str, list[str]]]]:
    """(words, tags by name in `TAGS`) pairs of a split; punctuation marks are words."""
    choose(split, SPLITS, "split of the organism")
    return [(sentence.words, sentence.tags) for sentence, _ in splits("tags")[split]]


def raw_text(count: int, seed: int = 0) -> Iterator[str]:
    """`count` sentences without labels, for masked language modelling; the whole lexicon occurs,
    but no sentence of the tasks' validation and test splits."""
    tasks = map(sentence_task, TASKS)
    scored = {t for task in tasks for split in ("validation", "test") for t in task[split][0]}
    writer = Writer(f"raw {seed}", style=RAW)
    while count > 0:
        if (text := writer.sentence().text) not in scored:
            count -= 1
            yield text
