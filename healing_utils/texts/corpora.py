"""Corpora whose words carry a linguistic label: what a probe is trained and scored on."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from healing_utils import organism
from healing_utils.base.errors import HealingError, choose
from healing_utils.base.records import canonical, digest

# Columns of the corpora that have names, the default first.
COLUMNS = {
    "organism": organism.TAGS,
    "conll2000": ("chunk", "pos"),
    "treebank": ("pos",),
}
# Where the ten fields of a CoNLL-U line (universaldependencies.org) have what can be probed.
CONLLU = {"upos": 3, "xpos": 4, "lemma": 2, "deprel": 7, "head": 6, "feats": 5}
HELD_OUT = 0.2  # the share that is scored where the source has no test part


@dataclass(frozen=True)
class TaggedSentences:
    """Sentences as lists of words, and one label a word."""

    words: list[list[str]]
    labels: list[list[str]]

    def __post_init__(self) -> None:
        if list(map(len, self.words)) != list(map(len, self.labels)):
            raise HealingError("words and labels differ in shape: need one label a word")

    def __len__(self) -> int:
        return len(self.words)

    @property
    def size(self) -> int:
        """Words in all sentences."""
        return sum(map(len, self.words))

    def select(self, indices: Iterable[int]) -> TaggedSentences:
        """The sentences at `indices`, in that order."""
        indices = list(indices)
        return TaggedSentences([self.words[i] for i in indices], [self.labels[i] for i in indices])

    def sha(self) -> str:
        """Hash of the content, which stands for it in a cell's key."""
        hashed = hashlib.sha256()
        for pair in zip(self.words, self.labels, strict=True):
            hashed.update((canonical(pair) + "\n").encode())
        return hashed.hexdigest()[:20]


@dataclass(frozen=True)
class Corpus:
    """A word-tagged corpus. `test` is only ever scored.

    `dropped` says how much of what reading left out, over both parts. Labels of `test` that never
    occur in `train` stay: no probe can answer them, and they count as errors (see `unseen`).
    """

    name: str
    column: str
    train: TaggedSentences
    test: TaggedSentences
    dropped: dict[str, int]

    @property
    def unseen(self) -> dict[str, int]:
        """Test words by label, for the labels that never occur in training."""
        known = {label for sentence in self.train.labels for label in sentence}
        return dict(Counter(x for s in self.test.labels for x in s if x not in known))

    def draw(
        self, seed: int, train_sentences: int | None, test_sentences: int | None = None
    ) -> Corpus:
        """A random part in whole sentences: training by seed, test the same for every seed.

        None takes all. Raises HealingError for more sentences than there are, or none.
        """

        def part(name: str, sentences: TaggedSentences, count: int | None, source: str):
            if count is None:
                return sentences
            if type(count) is not int or not 0 < count <= len(sentences):
                raise HealingError(
                    f"{name}_sentences is {count!r}; corpus {self.name!r} has {len(sentences)} "
                    f"{name} sentences: need a whole number, 1 to {len(sentences)}, or None for all"
                )
            rows = random.Random(source).sample(range(len(sentences)), count)
            return sentences.select(sorted(rows))

        return replace(
            self,
            train=part("train", self.train, train_sentences, f"{seed}"),
            test=part("test", self.test, test_sentences, "test"),
        )


def load_corpus(
    name: str, column: str | int | None = None, test: str | None = None, words: int = 0
) -> Corpus:
    """Load a corpus by name or by file; `column` says which of its labels (the first by default).

    - ``organism``: ``pos``, ``chunk``, ``sem``; ``conll2000`` (Tjong Kim Sang and Buchholz 2000, by
      NLTK): ``chunk``, ``pos``; ``treebank`` (NLTK's sample of the Penn Treebank): ``pos``.
    - A ``.conllu`` file, or a folder with ``*-ud-train.conllu`` and ``*-ud-test.conllu``: ``upos``,
      ``xpos``, ``lemma``, ``deprel``, ``head``, ``feats``, or one feature of FEATS such as
      ``Number`` (``_`` where it is missing).
    - Any other file, a word and its labels a line, blank lines between sentences, as semantic tags
      (Parallel Meaning Bank) and CCG supertags come: ``last``, or a number counted from 0 (from the
      end, -1); `words` is the column of the words. A file with a tab in it is tab-separated, any
      other by blanks.

    Variables such as ``$UD_EWT`` in a path are expanded. The test part is the file `test`, or the
    source's own: the sibling with ``test`` in the place of ``train``, for a file named
    ``...-train...``. Else one sentence in five is held out, always the same ones of the same
    content, and equal sentences stay on one side. Treebank has no official split of the sample: its
    last fifth of files is the test part.

    Left out and counted in `Corpus.dropped`: empty sentences; in CoNLL-U the ranges of multiword
    tokens (their words stay) and the empty nodes of enhanced graphs; in the Penn Treebank its
    traces, which are not words. Raises HealingError for a name, column, file or NLTK data that is
    not there, and for a malformed line, naming file and line.
    """
    dropped: Counter[str] = Counter()
    path = None if name in COLUMNS else _path(name)
    if test is not None and (path is None or path.is_dir()):
        raise HealingError(f"corpus {name!r} has its own test part: test does not apply")
    if path is None:
        label = name
        column = COLUMNS[name][0] if column is None else str(column)
        choose(column, COLUMNS[name], f"column of {name}")
        read = {"organism": _organism, "conll2000": _conll2000, "treebank": _treebank}[name]
        parts = list(read(column, dropped))
    else:
        files = [path, _path(test)] if test else _with_test(path)
        column, parts = _from_files(files, column, words, dropped)
        # What a table calls it: where the file lies is nobody else's business.
        label = re.sub(r"[-_.](ud[-_.])?train$", "", files[0].name.split(".")[0]) or name
    train, scored = parts if len(parts) == 2 else _hold_out(name, parts[0])
    for which, sentences in (("training", train), ("test", scored)):
        if not len(sentences):
            raise HealingError(f"corpus {name!r} has no {which} sentences")
    if len({found for sentence in train.labels for found in sentence}) < 2:
        raise HealingError(
            f"corpus {name!r}: column {column!r} has one label only, {train.labels[0][0]!r}"
        )
    return Corpus(label, column, train, scored, {k: v for k, v in dropped.items() if v})


def _tagged(
    sentences: Sequence[Sequence[Sequence[str]]], field: int, dropped: Counter[str]
) -> TaggedSentences:
    """Words, and the label in `field`, of sentences of (word, label, ...)."""
    kept = [sentence for sentence in sentences if len(sentence)]
    dropped["empty sentences"] += len(sentences) - len(kept)
    return TaggedSentences(
        [[token[0] for token in sentence] for sentence in kept],
        [[token[field] for token in sentence] for sentence in kept],
    )


# -- by name -------------------------------------------------------------------------------------


def _organism(column: str, dropped: Counter[str]) -> Iterator[TaggedSentences]:
    for split in ("train", "test"):
        pairs = organism.tagged_sentences(split)
        yield TaggedSentences([words for words, _ in pairs], [tags[column] for _, tags in pairs])


def _conll2000(column: str, dropped: Counter[str]) -> Iterator[TaggedSentences]:
    reader = nltk_reader("conll2000")
    for file in ("train.txt", "test.txt"):
        sentences = reader.iob_sents(file)  # (word, part of speech, chunk)
        yield _tagged(sentences, 2 if column == "chunk" else 1, dropped)


def _treebank(column: str, dropped: Counter[str]) -> Iterator[TaggedSentences]:
    reader = nltk_reader("treebank")
    files = sorted(reader.fileids())
    held_out = max(1, round(HELD_OUT * len(files)))
    for part in (files[:-held_out], files[-held_out:]):
        sentences = []
        for tagged in reader.tagged_sents(part) if part else []:
            kept = [pair for pair in tagged if pair[1] != "-NONE-"]
            dropped["traces"] += len(tagged) - len(kept)
            sentences.append(kept)
        yield _tagged(sentences, 1, dropped)


def nltk_reader(corpus: str) -> Any:
    """NLTK's reader of a corpus, whose data are there."""
    import nltk.corpus

    reader = getattr(nltk.corpus, corpus)
    try:
        reader.fileids()  # looks for the data
    except LookupError as error:
        raise HealingError(
            f"the data of corpus {corpus!r} is not there: import nltk; nltk.download({corpus!r}), "
            "or set NLTK_DATA to the folder that holds it"
        ) from error
    return reader


# -- from files ----------------------------------------------------------------------------------


def _path(name: str) -> Path:
    """The file or folder of that name, with its variables expanded."""
    expanded = os.path.expanduser(os.path.expandvars(name))
    path = Path(expanded)
    if path.exists():
        return path
    if missing := re.search(r"\$\{?\w+\}?", expanded):
        raise HealingError(f"variable {missing[0]} in {name!r} is not set")
    if os.sep not in name and "." not in name:
        choose(name, COLUMNS, "corpus (or give a file or a folder)")
    raise HealingError(f"no such file or folder: {path}")


def _with_test(path: Path) -> list[Path]:
    """The training file, and the test file in its folder if there is one."""
    if not path.is_dir():
        test = path.with_name(re.sub(r"-train(?![a-z])", "-test", path.name))
        return [path, test] if test != path and test.is_file() else [path]
    files = []
    for pattern in ("*-ud-train.conllu", "*-ud-test.conllu"):
        found = sorted(path.glob(pattern))
        if len(found) != 1:
            names = f" ({', '.join(f.name for f in found)})" if found else ""
            raise HealingError(
                f"folder {path} holds {len(found)} files named {pattern}{names}: need one, or name "
                "a file"
            )
        files += found
    return files


def _from_files(
    files: list[Path], column: str | int | None, words: int, dropped: Counter[str]
) -> tuple[str, list[TaggedSentences]]:
    """The column's name, and the sentences of the training file and of the test file if given."""
    conllu = files[0].suffix == ".conllu"
    if (files[-1].suffix == ".conllu") != conllu:
        raise HealingError(f"{files[0].name} and {files[-1].name} differ in format")
    if conllu:
        column = "upos" if column is None else str(column)
        if column not in CONLLU:
            tokens = (token for sentence in _conllu(files[0], Counter()) for token in sentence)
            features = {pair.split("=")[0] for token in tokens for pair in token[5].split("|")}
            allowed = [*CONLLU, *sorted(features - {"_"})]
            choose(column, allowed, f"column of {files[0]}")
        read = [
            [[(token[1], _conllu_label(token, column)) for token in s] for s in _conllu(f, dropped)]
            for f in files
        ]
        return column, [_tagged(sentences, 1, dropped) for sentences in read]
    if words < 0:
        raise HealingError(f"words is {words}: need the number of a column, counted from 0")
    column = "last" if column is None else str(column)
    if not re.fullmatch(r"last|-?\d+", column):
        raise HealingError(
            f"unknown column {column!r} of {files[0]}: its columns have no names; allowed: a "
            "number, counted from 0, or last"
        )
    return column, [_read_columns(file, column, words, dropped) for file in files]


def _blocks(path: Path, dropped: Counter[str]) -> Iterator[list[tuple[int, str]]]:
    """The numbered lines of each block between blank lines.

    Lines may end in LF, CRLF or CR, and the file may begin with a byte order mark. A blank line
    more than one between two blocks is an empty sentence; those around all blocks are nothing.
    """
    begun, extra = False, 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            numbered = enumerate(file, 1)
            for filled, group in groupby(numbered, lambda pair: bool(pair[1].strip())):
                lines = [(number, line.rstrip("\n")) for number, line in group]
                if filled:
                    dropped["empty sentences"] += extra
                    begun = True
                    yield lines
                elif begun:
                    extra = len(lines) - 1
    except UnicodeDecodeError as error:
        raise HealingError(f"{path} is not UTF-8 text: {error.reason} in it") from error
    except OSError as error:
        raise HealingError(f"cannot read {path}: {error.strerror or error}") from error


def _read_columns(path: Path, column: str, words: int, dropped: Counter[str]) -> TaggedSentences:
    """A word and a label a line; the last column is that of as many as the first line has."""
    tabs = any("\t" in line for block in _blocks(path, Counter()) for _, line in block)
    columns = label = 0
    sentences = []
    for block in _blocks(path, dropped):
        sentence = []
        for number, line in block:
            # Not str.split(): a no-break space is part of its word.
            fields = line.split("\t") if tabs else re.split(" +", line.strip(" "))
            if not columns:
                columns = len(fields)
                label = int(column.replace("last", "-1"))
                if not -columns <= label < columns or label % columns == words:
                    raise HealingError(
                        f"{path} has {columns} columns, with the words in column {words}: column "
                        f"{column} has no labels; allowed are the others of 0 to {columns - 1}"
                    )
                label %= columns
            if len(fields) <= max(label, words) or (column == "last" and len(fields) != columns):
                raise HealingError(
                    f"{path}, line {number} has {len(fields)} columns where the first line has "
                    f"{columns}"
                )
            if not fields[words] or not fields[label]:
                raise HealingError(f"{path}, line {number} has an empty word or label")
            sentence.append((fields[words], fields[label]))
        sentences.append(sentence)
    return _tagged(sentences, 1, dropped)


def _conllu(path: Path, dropped: Counter[str]) -> Iterator[list[list[str]]]:
    """The ten fields of every word, sentence by sentence."""
    for block in _blocks(path, dropped):
        sentence = []
        for number, line in block:
            fields = [field or "_" for field in line.split("\t")]
            if line.startswith("#"):
                continue
            if len(fields) != 10:
                raise HealingError(f"{path}, line {number} has {len(fields)} columns; need 10")
            if fields[0].isdecimal():
                sentence.append(fields)
            elif re.fullmatch(r"\d+-\d+", fields[0]):
                dropped["multiword ranges"] += 1
            elif re.fullmatch(r"\d+\.\d+", fields[0]):
                dropped["empty nodes"] += 1
            else:
                raise HealingError(f"{path}, line {number}: {fields[0]!r} does not number a word")
        yield sentence


def _conllu_label(token: list[str], column: str) -> str:
    if column in CONLLU and column != "feats":
        return token[CONLLU[column]]
    features = [pair.partition("=") for pair in token[5].split("|")]
    if column == "feats":
        return "|".join(map("".join, sorted(features)))
    return {name: value for name, _, value in features}.get(column, "_")


def _hold_out(name: str, all_of_it: TaggedSentences) -> list[TaggedSentences]:
    """Training and test part: distinct sentences, shuffled by their content, a fifth for test."""
    distinct = list(dict.fromkeys(map(tuple, all_of_it.words)))
    if len(distinct) < 2:
        raise HealingError(
            f"corpus {name!r} has {len(distinct)} distinct sentences: too few to hold some out; "
            "are there blank lines between sentences? Or name a test file"
        )
    random.Random(digest(distinct)).shuffle(distinct)  # the same for every column of labels
    held_out = set(distinct[: max(1, round(HELD_OUT * len(distinct)))])
    sides = [tuple(words) in held_out for words in all_of_it.words]
    return [
        all_of_it.select(row for row, side in enumerate(sides) if side is wanted)
        for wanted in (False, True)
    ]
