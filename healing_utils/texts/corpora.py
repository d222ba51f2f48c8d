"""Corpora whose words carry a linguistic label: what a probe is trained and scored on."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
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
CONLLU_COLUMNS = ("upos", "xpos", "lemma", "deprel", "head", "feats")
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

    def select(self, indices: Sequence[int]) -> TaggedSentences:
        """The sentences at `indices`, in that order."""
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
        parts = {}
        for part, count, source in (
            ("train", train_sentences, f"{seed}"),
            ("test", test_sentences, "test"),
        ):
            sentences: TaggedSentences = getattr(self, part)
            if count is None:
                continue
            if isinstance(count, bool) or not isinstance(count, int):
                raise HealingError(f"{part}_sentences is {count!r}: need a whole number or None")
            if not 0 < count <= len(sentences):
                raise HealingError(
                    f"{part}_sentences is {count}; corpus {self.name!r} has {len(sentences)} "
                    f"{part} sentences: need 1 to {len(sentences)}, or None for all"
                )
            rows = random.Random(source).sample(range(len(sentences)), count)
            parts[part] = sentences.select(sorted(rows))
        return replace(self, **parts)


def load_corpus(
    name: str, column: str | int | None = None, test: str | None = None, words: int = 0
) -> Corpus:
    """Load a corpus by name or by file; `column` says which of its labels.

    =================================  ================================================  ==========
    name                               columns                                           default
    =================================  ================================================  ==========
    ``organism``                       ``pos``, ``chunk``, ``sem``                       ``pos``
    ``conll2000`` (NLTK)               ``chunk`` (Tjong Kim Sang and Buchholz 2000),     ``chunk``
                                       ``pos``
    ``treebank`` (NLTK's sample of     ``pos``                                           ``pos``
    the Penn Treebank)
    a ``.conllu`` file, or a folder    ``upos``, ``xpos``, ``lemma``, ``deprel``,        ``upos``
    with ``*-ud-train.conllu`` and     ``head``, ``feats``, or one feature of FEATS
    ``*-ud-test.conllu``               such as ``Number`` (``_`` where it is missing)
    any other file: a word and its     a number counted from 0 (or from the end, -1),    ``last``
    labels a line, blank lines         or ``last``; `words` is the column of the words
    between sentences
    =================================  ================================================  ==========

    The last kind is how semantic tags (Parallel Meaning Bank) and CCG supertags come. A file with
    a tab in it is tab-separated, any other by blanks. Variables such as ``$UD_EWT`` in a path are
    expanded.

    The test part is the file `test`, or the source's own: the sibling with ``test`` in the place of
    ``train``, for a file named ``...-train...``. Else one sentence in five is held out, always the
    same ones of the same content, and equal sentences stay on one side. Treebank has no official
    split of the sample: its last fifth of files is the test part.

    Left out and counted in `Corpus.dropped`: empty sentences; in CoNLL-U the ranges of multiword
    tokens (their words stay) and the empty nodes of enhanced graphs; in the Penn Treebank its
    traces, which are not words. Raises HealingError for a name, column, file, NLTK data or package
    that is not there, and for a malformed line, naming file and line.
    """
    if name in COLUMNS:
        if test is not None:
            raise HealingError(f"corpus {name!r} has its own test part: test does not apply")
        column = choose(
            COLUMNS[name][0] if column is None else str(column), COLUMNS[name], f"column of {name}"
        )
        read = {"organism": _organism, "conll2000": _conll2000, "treebank": _treebank}[name]
        dropped: Counter[str] = Counter()
        return _corpus(name, column, *read(column, dropped), dropped)
    path = _path(name)
    if path.is_dir():
        if test is not None:
            raise HealingError(f"{path} is a folder with its own test file: test does not apply")
        train_file, test_file = (_only(path, f"*-ud-{part}.conllu") for part in ("train", "test"))
    else:
        train_file, test_file = path, _path(test) if test else _sibling(path)
    return _from_files(name, column, train_file, test_file, words)


def _corpus(
    name: str, column: str, train: TaggedSentences, test: TaggedSentences, dropped: Counter[str]
) -> Corpus:
    for part, sentences in (("training", train), ("test", test)):
        if not len(sentences):
            raise HealingError(f"corpus {name!r} has no {part} sentences")
    if len({label for sentence in train.labels for label in sentence}) < 2:
        raise HealingError(
            f"corpus {name!r}: column {column!r} has one label only, {train.labels[0][0]!r}"
        )
    return Corpus(name, column, train, test, {k: v for k, v in dropped.items() if v})


# -- by name -------------------------------------------------------------------------------------


def _organism(column: str, dropped: Counter[str]) -> Iterator[TaggedSentences]:
    for split in ("train", "test"):
        pairs = organism.tagged_sentences(split)
        yield TaggedSentences([words for words, _ in pairs], [tags[column] for _, tags in pairs])


def _conll2000(column: str, dropped: Counter[str]) -> Iterator[TaggedSentences]:
    reader = _nltk("conll2000")
    for file in ("train.txt", "test.txt"):
        sentences = reader.iob_sents(file)  # (word, part of speech, chunk)
        yield _tagged(sentences, 2 if column == "chunk" else 1, dropped)


def _treebank(column: str, dropped: Counter[str]) -> Iterator[TaggedSentences]:
    reader = _nltk("treebank")
    files = sorted(reader.fileids())
    held_out = max(1, round(HELD_OUT * len(files)))
    for part in (files[:-held_out], files[-held_out:]):
        sentences = []
        for tagged in reader.tagged_sents(part) if part else []:
            kept = [pair for pair in tagged if pair[1] != "-NONE-"]
            dropped["traces"] += len(tagged) - len(kept)
            sentences.append(kept)
        yield _tagged(sentences, 1, dropped)


def _nltk(corpus: str) -> Any:
    reader = getattr(_package("nltk.corpus", f"corpus {corpus!r}"), corpus)
    try:
        reader.fileids()  # looks for the data
    except LookupError as error:
        raise HealingError(
            f"the data of corpus {corpus!r} is not there: import nltk; nltk.download({corpus!r}), "
            "or set NLTK_DATA to the folder that holds it"
        ) from error
    return reader


def _package(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise HealingError(
            f"{what} needs the package {package}, which is missing: pip install {package}"
        ) from error


def _tagged(
    sentences: Sequence[Sequence[tuple[str, ...]]], field: int, dropped: Counter[str]
) -> TaggedSentences:
    """Words, and the label in `field`, of sentences of (word, label, ...)."""
    kept = [sentence for sentence in sentences if len(sentence)]
    dropped["empty sentences"] += len(sentences) - len(kept)
    return TaggedSentences(
        [[token[0] for token in sentence] for sentence in kept],
        [[token[field] for token in sentence] for sentence in kept],
    )


# -- from files ----------------------------------------------------------------------------------


def _path(name: str) -> Path:
    """The file or folder of that name, with its variables expanded."""
    expanded = os.path.expanduser(os.path.expandvars(name))
    missing = re.search(r"\$\{?\w+\}?", expanded)
    path = Path(expanded)
    if path.exists():
        return path
    if missing:
        raise HealingError(f"variable {missing[0]} in {name!r} is not set")
    if os.sep not in name and "." not in name:
        choose(name, COLUMNS, "corpus (or give a file or a folder)")
    raise HealingError(f"no such file or folder: {path}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise HealingError(
            f"folder {folder} holds {len(found)} files named {pattern}"
            + (f" ({', '.join(f.name for f in found)})" if found else "")
            + ": need one, or name a file"
        )
    return found[0]


def _sibling(path: Path) -> Path | None:
    """The test file beside a training file, where there is one."""
    test = path.with_name(re.sub(r"-train(?![a-z])", "-test", path.name))
    return test if test != path and test.is_file() else None


def _from_files(
    name: str, column: str | int | None, train_file: Path, test_file: Path | None, words: int
) -> Corpus:
    dropped: Counter[str] = Counter()
    conllu = train_file.suffix == ".conllu"
    if test_file is not None and (test_file.suffix == ".conllu") != conllu:
        raise HealingError(f"{train_file.name} and {test_file.name} differ in format")
    if conllu:
        column = CONLLU_COLUMNS[0] if column is None else str(column)
        tables = [_read_conllu(f, dropped) for f in (train_file, test_file) if f is not None]
        features = {f for sentence in tables[0] for token in sentence for f in token["feats"]}
        choose(column, [*CONLLU_COLUMNS, *sorted(features)], f"column of {train_file}")
        parts = [_conllu_labels(table, column) for table in tables]
    else:
        column = _column_number(column, train_file)
        files = [f for f in (train_file, test_file) if f is not None]
        parts = [_read_columns(f, column, words, dropped) for f in files]
        column = "last" if column is None else str(column)
    train, test = parts if test_file is not None else _hold_out(name, parts[0])
    # What a table calls it: where the file lies is nobody else's business.
    label = re.sub(r"[-_.](ud[-_.])?train$", "", train_file.name.split(".")[0]) or name
    return _corpus(label, column, train, test, dropped)


def _blocks(path: Path, dropped: Counter[str]) -> Iterator[list[tuple[int, str]]]:
    """The numbered lines of each block between blank lines.

    Lines may end in LF, CRLF or CR, and the file may begin with a byte order mark. A blank line
    more than one between two blocks is an empty sentence; those around all blocks are nothing.
    """
    block: list[tuple[int, str]] = []
    blank, begun = 0, False
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip("\n")
                if line.strip():
                    if begun and blank > 1:
                        dropped["empty sentences"] += blank - 1
                    begun, blank = True, 0
                    block.append((number, line))
                    continue
                blank += 1
                if block:
                    yield block
                    block = []
    except UnicodeDecodeError as error:
        raise HealingError(f"{path} is not UTF-8 text: {error.reason} in it") from error
    except OSError as error:
        raise HealingError(f"cannot read {path}: {error.strerror or error}") from error
    if block:
        yield block


def _read_columns(
    path: Path, column: int | None, words: int, dropped: Counter[str]
) -> TaggedSentences:
    """A word and a label a line; `column` None is the last, of as many as the first line has."""
    tabs = any("\t" in line for block in _blocks(path, Counter()) for _, line in block)
    if words < 0:
        raise HealingError(f"words is {words}: need the number of a column, counted from 0")
    columns = 0
    sentences = []
    for block in _blocks(path, dropped):
        sentence = []
        for number, line in block:
            # Not str.split(): a no-break space is part of its word.
            fields = line.split("\t") if tabs else re.split(" +", line.strip(" "))
            columns = columns or len(fields)
            label = columns - 1 if column is None else column % max(columns, 1)
            if column is not None and not -columns <= column < columns:
                raise HealingError(
                    f"{path} has {columns} columns; column {column} is not there: allowed are "
                    f"0 to {columns - 1}, or last"
                )
            if label == words:
                raise HealingError(
                    f"{path}, line {number}: column {label} holds the words; there are {columns} "
                    "columns, and the labels need one of their own"
                )
            if len(fields) <= max(label, words) or (column is None and len(fields) != columns):
                raise HealingError(
                    f"{path}, line {number} has {len(fields)} columns where the first line has "
                    f"{columns}"
                )
            if not fields[words] or not fields[label]:
                raise HealingError(f"{path}, line {number} has an empty word or label")
            sentence.append((fields[words], fields[label]))
        sentences.append(sentence)
    return _tagged(sentences, 1, dropped)


def _column_number(column: str | int | None, path: Path) -> int | None:
    """A column of a file without column names; None is the last."""
    if column is None or column == "last":
        return None
    try:
        return int(column)
    except ValueError as error:
        raise HealingError(
            f"unknown column {column!r} of {path}: its columns have no names; allowed: a number, "
            "counted from 0, or last"
        ) from error


def _read_conllu(path: Path, dropped: Counter[str]) -> list[list[dict[str, Any]]]:
    """The words of each sentence as the `conllu` library reads them (universaldependencies.org)."""
    conllu = _package("conllu", f"corpus {path}")
    raw = {name: lambda fields, i: fields[i] for name in ("head", "deps", "misc")}
    sentences = []
    for block in _blocks(path, dropped):
        lines = [(number, line) for number, line in block if not line.startswith("#")]
        if not lines:
            dropped["empty sentences"] += 1
            continue
        try:
            tokens = conllu.parse("\n".join(line for _, line in lines), field_parsers=raw)[0]
        except conllu.exceptions.ParseException as error:
            raise HealingError(
                f"{path}, lines {lines[0][0]} to {lines[-1][0]}: {str(error).splitlines()[0]}"
            ) from error
        words = []
        for (number, _), token in zip(lines, tokens, strict=True):
            if "deprel" not in token:
                raise HealingError(f"{path}, line {number} has {len(token)} columns; need 10")
            if isinstance(token["id"], int):
                words.append({**token, "feats": token["feats"] or {}})
            elif token["id"][1] == "-":
                dropped["multiword ranges"] += 1
            else:
                dropped["empty nodes"] += 1
        sentences.append(words)
    kept = [sentence for sentence in sentences if sentence]
    dropped["empty sentences"] += len(sentences) - len(kept)
    return kept


def _conllu_labels(table: list[list[dict[str, Any]]], column: str) -> TaggedSentences:
    def label(token: dict[str, Any]) -> str:
        if column == "feats":
            return "|".join(f"{k}={v}" for k, v in sorted(token["feats"].items())) or "_"
        if column in CONLLU_COLUMNS:
            return token[column] or "_"
        return token["feats"].get(column) or "_"

    return TaggedSentences(
        [[token["form"] for token in sentence] for sentence in table],
        [[label(token) for token in sentence] for sentence in table],
    )


def _hold_out(name: str, all_of_it: TaggedSentences) -> tuple[TaggedSentences, TaggedSentences]:
    """Training and test part: distinct sentences, shuffled by their content, a fifth for test."""
    distinct = list(dict.fromkeys(map(tuple, all_of_it.words)))
    if len(distinct) < 2:
        raise HealingError(
            f"corpus {name!r} has {len(distinct)} distinct sentences: too few to hold some out; "
            "are there blank lines between sentences? Or name a test file"
        )
    random.Random(digest(distinct)).shuffle(distinct)  # the same for every column of labels
    held_out = set(distinct[: max(1, round(HELD_OUT * len(distinct)))])
    sides: tuple[list[int], list[int]] = ([], [])
    for row, words in enumerate(all_of_it.words):
        sides[tuple(words) in held_out].append(row)
    return all_of_it.select(sides[0]), all_of_it.select(sides[1])
