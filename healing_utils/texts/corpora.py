"""Corpora whose words carry a linguistic label: what a probe is trained and scored on."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from healing_utils import organism
from healing_utils.base.errors import HealingError, choose
from healing_utils.base.records import canonical, digest
from healing_utils.texts.tasks import Split, one_line, text_lines

# Where the ten fields of a CoNLL-U line (universaldependencies.org) have what can be probed.
CONLLU = {"upos": 3, "xpos": 4, "lemma": 2, "deprel": 7, "head": 6, "feats": 5}
# Columns of the corpora that have names, the default first.
COLUMNS = {"organism": organism.TAGS, "conll2000": ("chunk", "pos"), "treebank": ("pos",)}
HELD_OUT = 0.2  # the share that is scored where the source has no test part
# Between sentences: blank lines, and where a document begins (CoNLL-2003) or ends (CoNLL-2011).
GAP = re.compile(r"\s*$|-DOCSTART-(\s|$)|#(begin|end) document")
HEADER = re.compile(r"(word|token|form|text|tag|label|[ux]?pos|ner|chunk|lemma)s?(_\w+)?", re.I)
Pairs = list[tuple[str, str]]  # a sentence while it is read: words with their labels
# What is taken from a line, by its number and how many words of its sentence stand before it.
Pick = Callable[[int, str, int], tuple[str, str] | None]


class TaggedSentences(Split):
    """Sentences as lists of words, and one label a word."""

    @property
    def words(self) -> list[list[str]]:
        return self.texts

    @property
    def size(self) -> int:
        """Words in all sentences."""
        return sum(map(len, self.words))

    def sample(self, count: int | None, seed: str) -> TaggedSentences:
        """So many sentences, drawn at random, in their order; all where `count` is None."""
        if count is None:
            return self
        if not 0 < count <= len(self):
            raise HealingError(f"{count} sentences asked for: need 1 to {len(self)}, or None")
        return self.take(sorted(random.Random(seed).sample(range(len(self)), count)))

    def sha(self) -> str:
        lines = (canonical(pair) + "\n" for pair in zip(self.words, self.labels, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Corpus:
    """A word-tagged corpus; `dropped` says how much of what reading left out, over both parts.

    `test` is only ever scored. Its labels that never occur in `train` stay: no probe can answer
    them, and they count as errors (see `unseen`)."""

    name: str
    column: str
    train: TaggedSentences
    test: TaggedSentences
    dropped: dict[str, int]

    @property
    def unseen(self) -> dict[str, int]:
        """Test words by label, for the labels that never occur in training."""
        known = set(chain.from_iterable(self.train.labels))
        return dict(Counter(x for x in chain.from_iterable(self.test.labels) if x not in known))

    def draw(
        self, seed: int, train_sentences: int | None, test_sentences: int | None = None
    ) -> Corpus:
        """A random part: training by seed, test the same for every seed; None takes all. Raises
        HealingError for more sentences than there are, or none."""
        train = self.train.sample(train_sentences, f"{seed}")
        return replace(self, train=train, test=self.test.sample(test_sentences, "test"))


def load_corpus(
    name: str, column: str | int | None = None, test: str | None = None, words: int = 0
) -> Corpus:
    """Load a corpus by name or by file; `column` says which of its labels (the first by default).

    - ``organism``: ``pos``, ``chunk``, ``sem``; ``conll2000`` (Tjong Kim Sang and Buchholz 2000, by
      NLTK): ``chunk``, ``pos``; ``treebank`` (NLTK's sample of the Penn Treebank): ``pos``.
    - A ``.conllu`` file, or a folder with one named ``*-ud-train.conllu``: a key of `CONLLU`, or
      one feature of FEATS such as ``Number`` (``_`` where it is missing).
    - Any other file, a word and its labels a line, blank lines between sentences, separated by tabs
      where the first line is, else by blanks: ``last``, or a number counted from 0 (from the end,
      -1); `words` is the column of the words.

    The test part is the file `test`, or the source's own, or the file beside ``...-train...`` with
    ``test`` in its place. Else one distinct sentence in five is held out, by content alone.

    Left out and counted in `Corpus.dropped`: sentences without words; ranges of multiword tokens
    (their words stay) and empty nodes of CoNLL-U; traces; marks of documents (`GAP`). Raises
    HealingError for what is not there, and for a malformed line or a header, naming file and line.
    """
    dropped: Counter[str] = Counter()
    if name in COLUMNS:
        if test is not None:
            raise HealingError(f"corpus {name!r} has its own test part: test does not apply")
        label, column = name, COLUMNS[name][0] if column is None else str(column)
        parts = _named(name, choose(column, COLUMNS[name], f"column of {name}"), dropped)
    else:
        files, features = _files(name, test), set()
        conllu = files[0].suffix == ".conllu"
        # What a table calls it: where the file lies is nobody else's business.
        label = re.sub(r"[-_.](ud[-_.])?train$", "", files[0].name.split(".")[0]) or name
        column = ("upos" if conllu else "last") if column is None else str(column)
        parts = []
        for file in files:
            with one_line(f"cannot read {file}"):
                pick = (
                    _conllu(column, dropped, features) if conllu else _columns(file, column, words)
                )
                parts.append(_read(file, pick, dropped))
        if conllu:
            choose(column, [*CONLLU, *sorted(features - {"_"})], f"column of {files[0]}")
    tagged = [
        TaggedSentences(*([[pair[i] for pair in s] for s in part if s] for i in (0, 1)))
        for part in parts
    ]
    dropped["empty sentences"] += sum(map(len, parts)) - sum(map(len, tagged))
    train, scored = tagged if len(tagged) == 2 else _hold_out(name, tagged[0])
    if not (len(train) and len(scored)):
        there = f"{len(train)} sentences to train on and {len(scored)} to score"
        raise HealingError(f"corpus {name!r} has {there}: need some of both")
    if len(labels := set(chain.from_iterable(train.labels))) < 2:
        raise HealingError(f"corpus {name!r}: column {column!r} has only the label {min(labels)!r}")
    return Corpus(label, column, train, scored, {k: v for k, v in dropped.items() if v})


def _hold_out(name: str, whole: TaggedSentences) -> list[TaggedSentences]:
    """Training and test part: distinct sentences, shuffled by their content, a fifth for test."""
    distinct = list(dict.fromkeys(map(tuple, whole.words)))
    if len(distinct) < 2:
        hint = "are there blank lines between sentences? Or name a test file"
        raise HealingError(f"corpus {name!r} has {len(distinct)} distinct sentences: {hint}")
    random.Random(digest(distinct)).shuffle(distinct)  # the same for every column of labels
    held_out = set(distinct[: max(1, round(HELD_OUT * len(distinct)))])
    sides: tuple[list[int], list[int]] = ([], [])
    for row, words in enumerate(whole.words):
        sides[tuple(words) in held_out].append(row)
    return [whole.take(rows) for rows in sides]


def _named(name: str, column: str, dropped: Counter[str]) -> list[list[Pairs]]:
    if name == "organism":
        splits = map(organism.tagged_sentences, ("train", "test"))
        return [[list(zip(w, tags[column], strict=True)) for w, tags in split] for split in splits]
    reader = nltk_reader(name)
    if name == "conll2000":
        field = {"pos": 1, "chunk": 2}[column]
        splits = map(reader.iob_sents, ("train.txt", "test.txt"))
        return [[[(token[0], token[field]) for token in s] for s in split] for split in splits]
    files = sorted(reader.fileids())  # the sample has no official split
    first = len(files) - max(1, round(HELD_OUT * len(files)))
    splits = [list(reader.tagged_sents(part)) for part in (files[:first], files[first:])]
    parts = [[[p for p in s if p[1] != "-NONE-"] for s in split] for split in splits]
    dropped["traces"] = sum(p[1] == "-NONE-" for split in splits for s in split for p in s)
    return parts


def nltk_reader(corpus: str) -> Any:
    """NLTK's reader of a corpus, whose data are there."""
    import nltk.corpus

    reader = getattr(nltk.corpus, corpus)
    try:
        reader.fileids()  # looks for the data
    except LookupError as error:
        hint = f"import nltk; nltk.download({corpus!r}), or set NLTK_DATA to the folder with it"
        raise HealingError(f"the data of corpus {corpus!r} is not there: {hint}") from error
    return reader


def _path(name: str) -> Path:
    path = Path(os.path.expanduser(os.path.expandvars(name)))
    if os.path.isdir(path) or os.path.isfile(path):  # a pipe would be waited for
        return path
    if missing := re.search(r"\$\{?\w+\}?", str(path)):
        raise HealingError(f"variable {missing[0]} in {name!r} is not set")
    if os.sep not in name and "." not in name:
        choose(name, COLUMNS, "corpus (or give a file or a folder)")
    raise HealingError(f"no such file or folder: {path}")


def _files(name: str, test: str | None) -> list[Path]:
    """The training file, and the test file if there is one."""
    path, pattern = _path(name), "*-ud-train.conllu"
    if path.is_dir():
        found = sorted(path.glob(pattern))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            said = f"folder {path} holds {len(found)} files named {pattern} ({names})"
            raise HealingError(f"{said}: need one, or name a file")
        path = found[0]
    if test:
        return [path, _path(test)]
    sibling = path.with_name(re.sub(r"-train(?![a-z])", "-test", path.name))
    return [path, sibling] if sibling != path and sibling.is_file() else [path]


def _read(path: Path, pick: Pick, dropped: Counter[str]) -> list[Pairs]:
    """Sentences of a file; more than one blank line between two of them stands for empty ones."""
    sentences: list[Pairs] = []
    numbered, empty = enumerate(text_lines(path), 1), 0
    for gap, lines in groupby(numbered, lambda line: bool(GAP.match(line[1]))):
        if gap:
            marks = [bool(line.strip()) for _, line in lines]
            dropped["document marks"] += sum(marks)
            empty = len(marks) - 1 if sentences and not any(marks) else 0
            continue
        sentences += [[] for _ in range(empty + 1)]
        for number, line in lines:
            if pair := pick(number, line.rstrip("\r\n"), len(sentences[-1])):
                sentences[-1].append(pair)
    return sentences


def _columns(path: Path, column: str, words: int) -> Pick:
    """A word and its label, in columns of which the first line says how many there are."""
    if not re.fullmatch(r"last|-?\d{1,9}", column):
        raise ValueError(f"unknown column {column!r}; allowed: a number, counted from 0, or last")
    lines = (line.rstrip("\r\n") for line in text_lines(path) if not GAP.match(line))
    first = next(lines, "no lines")

    def split(line: str) -> list[str]:
        # Not str.split(): a no-break space is part of its word.
        return line.split("\t") if "\t" in first else re.split(" +", line.strip(" "))

    width, label = len(split(first)), int(column.replace("last", "-1"))
    if not -width <= label < width or not 0 <= words < width or label % width == words:
        said = f"it has {width} columns, with the words in column {words}: {column} has no labels"
        raise ValueError(f"{said}; allowed are the others of 0 to {width - 1}")
    if HEADER.fullmatch(split(first)[words]) and HEADER.fullmatch(split(first)[label]):
        raise ValueError(f"it seems to begin with a header ({first!r}): take it out")

    def pick(number: int, line: str, _: int) -> tuple[str, str]:
        fields = split(line)
        if len(fields) != width:  # a blank inside a word shifts its label
            said = f"line {number} has {len(fields)} columns"
            raise ValueError(f"{said} where the first line has {width}")
        if not fields[words] or not fields[label]:
            raise ValueError(f"line {number} has an empty word or label")
        return fields[words], fields[label]

    return pick


def _conllu(column: str, dropped: Counter[str], features: set[str]) -> Pick:
    """A word and its label, of the lines with a word; collects the names of features."""

    def pick(number: int, line: str, before: int) -> tuple[str, str] | None:
        if line.startswith("#"):
            return None
        fields = line.split("\t")
        if len(fields) != 10:
            raise ValueError(f"line {number} has {len(fields)} columns; need 10")
        if between := re.fullmatch(r"\d+([-.])\d+", fields[0]):
            dropped["multiword ranges" if between[1] == "-" else "empty nodes"] += 1
            return None
        if fields[0] != str(before + 1):  # a line, or the blank one between sentences, is lost
            said = f"line {number} begins with {fields[0]!r}"
            raise ValueError(f"{said} where word {before + 1} comes next")
        word = fields[1] or "_"
        if column != "feats" and column in CONLLU:
            return word, fields[CONLLU[column]] or "_"
        pairs = sorted(pair.partition("=") for pair in (fields[5] or "_").split("|"))
        if column == "feats":
            return word, "|".join(map("".join, pairs))
        features.update(name for name, *_ in pairs)
        return word, {name: value for name, _, value in pairs}.get(column, "_")

    return pick
