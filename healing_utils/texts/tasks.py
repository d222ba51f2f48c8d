"""Sentence tasks: where their texts and labels come from, and which split is scored.

A task is a registered name (`REGISTRY`), one of the organism's, any hub data set (``owner/name`` or
``owner/name:config``), or a local CSV, JSONL or Parquet file or a folder of them.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import ceil, isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from healing_utils import organism
from healing_utils.base.errors import HealingError, choose
from healing_utils.base.hub import reach_hub

METRICS = ("f1", "accuracy", "matthews", "spearman")
SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
# The first of these that is there and has labels is scored; of local files the next is validation.
SCORED = ("test", "validation", "valid", "val", "dev")
# Column names in use on the hub, most specific first; a pair stands for two text columns.
TEXT_COLUMNS = (
    "sentence1 sentence2", "premise hypothesis", "question1 question2", "question sentence",
    "text", "sentence", "content", "review", "tweet", "comment", "title",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "score")
MOST_CLASSES = 10_000
MOST_BYTES = 2 << 30  # of the columns read from a Parquet file, whose kilobytes can stand for more
# What stands for a missing number or text in a CSV file; among classes it is one, unless empty.
MISSING = {"", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None", "none"}


@dataclass(frozen=True)
class Task:
    """A data set on the hub, and the split of it that is scored: one with public labels.

    Nothing is ever chosen on it: validation examples come out of the training split.
    """

    hub: str
    text: tuple[str, ...]
    config: str | None = None
    metric: str = "f1"
    scored: str = "test"


def _glue(config: str, *text: str, metric: str = "f1", scored: str = "validation") -> Task:
    return Task("nyu-mll/glue", text, config, metric, scored)


REGISTRY: dict[str, Task] = {
    # Paper A's six (Han, Zhang and Simion 2024), scored by macro-F1.
    "sst2": Task("stanfordnlp/sst2", ("sentence",), scored="validation"),  # test labels are hidden
    "imdb": Task("stanfordnlp/imdb", ("text",)),
    "ag_news": Task("fancyzhx/ag_news", ("text",)),
    "emotion": Task("dair-ai/emotion", ("text",), "split"),
    "dbpedia": Task("fancyzhx/dbpedia_14", ("content",)),
    "twitter_financial": Task(
        "zeroshot/twitter-financial-news-topic", ("text",), scored="validation"  # has no test split
    ),
    # Paper B's GLUE tasks (Durrani, Sajjad and Dalvi 2021); test labels are hidden in all.
    "cola": _glue("cola", "sentence", metric="matthews"),
    "mrpc": _glue("mrpc", "sentence1", "sentence2"),
    "rte": _glue("rte", "sentence1", "sentence2"),
    "qnli": _glue("qnli", "question", "sentence"),
    "qqp": _glue("qqp", "question1", "question2"),
    "mnli": _glue("mnli", "premise", "hypothesis", scored="validation_matched"),
    "stsb": _glue("stsb", "sentence1", "sentence2", metric="spearman"),
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Sentences, or pairs of them, and their labels (class ids, or floats for regression)."""

    texts: list[Any]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> Self:
        rows = list(rows)
        return type(self)([self.texts[i] for i in rows], [self.labels[i] for i in rows])

    def shuffled(self) -> Self:
        """Always the same way."""
        return self.take(np.random.default_rng(0).permutation(len(self)).tolist())

    def sha(self) -> str:
        """Hash of the content, which stands for it in a cell's key."""
        text = json.dumps([self.texts, self.labels], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class TaskData:
    """A loaded task. `pool` is all that may be trained on; `test` is only ever scored.

    `classes` are names in the order of the class ids, empty for regression; `unused` are tables of
    a folder that nothing is read from.
    """

    name: str
    pool: Split
    test: Split
    classes: tuple[str, ...]
    metric: str
    validation: Split | None = None  # given by the source, else cut from the pool
    unused: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        return not self.classes

    @property
    def num_labels(self) -> int:
        return len(self.classes) or 1

    def sizes(self, train_size: int | None, validation_size: int) -> tuple[int, int]:
        """How many examples `draw` gives for training and for validation.

        Where the pool is too small for both, validation takes what training leaves, a tenth of the
        pool at least, or a fifth where all is asked for. Raises HealingError where that fails.
        """
        there = len(self.pool)
        if self.validation is not None:
            most, held_out = there, min(validation_size, len(self.validation))
        elif train_size is None:
            held_out = validation_size if validation_size < there else there // 5
            most = there - held_out
        else:
            most = there - min(validation_size, ceil(there / 10))
            held_out = min(validation_size, there - train_size)
        wanted = most if train_size is None else train_size
        if not 0 < wanted <= most:
            raise HealingError(
                f"train_size is {train_size} but task {self.name!r} has {there} examples to train "
                f"on: need train_size from 1 to {most} beside validation_size {validation_size}"
            )
        return wanted, held_out

    def draw(
        self, seed: int, train_size: int | None, validation_size: int
    ) -> tuple[Split, Split | None]:
        """Training and validation examples for one seed, sharing no example; see `sizes`."""
        wanted, held_out = self.sizes(train_size, validation_size)
        rows = list(range(len(self.pool)))
        random.Random(seed).shuffle(rows)
        if self.validation is not None:
            validation = self.validation.take(range(held_out))
        else:
            validation = self.pool.take(rows[:held_out])
            rows = rows[held_out:]
        return self.pool.take(rows[:wanted]), validation if held_out else None


def load_task(
    name: str,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    metric: str | None = None,
    revision: str | None = None,
    test_size: int | None = None,
) -> TaskData:
    """Load a task by registered name, organism's name, hub name or local path.

    Of a file alone a fifth is scored. In a folder the file named train is trained on; of those
    named like `SCORED` the first is scored, and a second is for validation. `text` and `label` name
    the columns where they cannot be found; two text columns make pairs. `test_size` scores only so
    many examples, drawn once with a fixed seed. Raises HealingError naming the columns, splits or
    names there are, or the row that cannot be used, counted from 1 and in CSV with the header.
    """
    if metric is not None:
        choose(metric, METRICS, "metric")
    if name not in organism.TASKS:
        data = _from_tables(name, text, label, revision)
    elif text or label or revision:
        raise HealingError(f"task {name!r} has no columns or revisions to name")
    else:
        splits = {split: Split(*pairs) for split, pairs in organism.sentence_task(name).items()}
        classes = tuple(organism.TASKS[name])
        data = TaskData(name, splits["train"], splits["test"], classes, "f1", splits["validation"])
    data = replace(data, metric=metric or data.metric)
    if (data.metric == "spearman") != data.regression:
        kind = "regression" if data.regression else "classification"
        raise HealingError(f"metric {data.metric!r} does not fit task {name!r}, which is {kind}")
    if test_size is not None and test_size < len(data.test):
        rows = sorted(random.Random(0).sample(range(len(data.test)), test_size))
        data = replace(data, test=data.test.take(rows))
    return data


class Source(NamedTuple):
    """A table: what people call it, its columns, and how some of these are read."""

    where: str
    names: list[str]
    read: Callable[[Sequence[str]], tuple[Sequence[int], list[list[Any]]]]  # row numbers, values
    metadata: dict[bytes, bytes] | None = None


def _from_tables(
    name: str, text: str | Sequence[str] | None, label: str | None, revision: str | None
) -> TaskData:
    """A task whose texts and labels are columns of the hub's tables or of files."""
    named = [t for key, t in REGISTRY.items() if name in (key, t.hub, f"{t.hub}:{t.config}")]
    task = named[0] if len(named) == 1 else None  # GLUE's hub name alone stands for seven
    path = Path(os.path.expanduser(name))
    no_hub_name = path.suffix in SUFFIXES or re.match(r"[/.~]|[^:]*/[^:]*/", name)
    local = task is None and (no_hub_name or os.path.exists(path))
    if not (task or local or "/" in name):
        what = "task (or give a hub name with its owner, or a file)"
        choose(name, [*organism.TASKS, *REGISTRY], what)
    sources, unused = _of_files(path) if local else (_of_hub(name, task, revision), [])

    first, *others = sources
    usual = [" ".join(task.text)] if task else TEXT_COLUMNS
    texts = (text,) if isinstance(text, str) else text or _usual("text", usual, first)
    label = label or _usual("label", LABEL_COLUMNS, first)[0]
    if len(texts) > 2:
        raise HealingError(f"{len(texts)} text columns named; one or two are possible")
    pool = _split(first, texts, label)
    parts = [pool]
    for source in others:
        wanted = len(parts) < (3 if local else 2)
        part = _split(source, texts, label, pool) if wanted else None
        if part is None:
            unused.append(source.where)
        else:
            parts.append(part)
    if pool is None or (others and len(parts) == 1):
        hidden = " and ".join([first.where] if pool is None else unused)
        said = f"all labels in column {label!r} of {hidden} are missing or hidden"
        raise HealingError(f"{said}: name a folder with train.csv and test.csv that have labels")
    if not others:  # a fifth is scored, the same fifth always
        shuffled, held_out = pool.shuffled(), ceil(0.2 * len(pool))
        parts = [shuffled.take(range(held_out, len(pool))), shuffled.take(range(held_out))]
    if not all(map(len, parts)):
        there = f"{len(parts[0])} rows to train on and {len(parts[1])} to score"
        raise HealingError(f"task {name!r} has {there}: need some of both")

    parts, classes = _numbered(name, label, parts, _class_names(first, label))
    metric = task.metric if task else ("f1" if classes else "spearman")
    given = [part.shuffled() for part in parts[2:]] or [None]  # whose first examples are drawn
    return TaskData(name, *parts[:2], classes, metric, *given, tuple(unused))


def _of_hub(name: str, task: Task | None, revision: str | None) -> list[Source]:
    """The training table, then those that may be scored."""
    import datasets  # takes seconds, and only the hub needs it

    datasets.disable_progress_bars()
    hub, _, config = (f"{task.hub}:{task.config or ''}" if task else name).partition(":")
    with _said(f"cannot load data set {name!r} from the hub, and no such folder is here"):
        owner, _, own = hub.rpartition("/")
        kept = f"{owner}___{datasets.naming.camelcase_to_snakecase(own)}"
        reach_hub("datasets", hub, Path(datasets.config.HF_DATASETS_CACHE, kept))
        found = datasets.load_dataset(hub, config or None, revision=revision)
    wanted = (task.scored,) if task else SCORED
    splits = [split for split in ("train", *wanted) if split in found]
    if splits[:1] != ["train"] or (len(splits) == 1 and len(found) > 1):
        need = f"need train and {' or '.join(wanted)}"
        raise HealingError(f"task {name!r} has splits {', '.join(found)}: {need}")
    return [_arrow(f"{name}, {split}", found[split].data.table) for split in splits]


def _of_files(path: Path) -> tuple[list[Source], list[str]]:
    """A file, or those of a folder that are named like splits; and its other tables."""
    files, others = [path], []
    if os.path.isdir(path):
        there = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
        splits = {split: [f for f in there if f.stem == split] for split in ("train", *SCORED)}
        files = [file for found in splits.values() for file in found]
        others = [str(file) for file in there if file not in files]
        if not splits["train"] or max(map(len, splits.values())) > 1:
            has = ", ".join(file.name for file in there) or "no tables"
            need = "need one train.csv, .jsonl, .json or .parquet, and one file a split"
            raise HealingError(f"folder {path} holds {has}: {need}")
    for file in files:
        if not os.path.isfile(file):  # a pipe would be waited for
            raise HealingError(f"no such file, or not a regular one: {file}")
        choose(file.suffix, SUFFIXES, f"file type of {file}")
    return list(map(_read, files)), others


def _read(path: Path) -> Source:
    """A file as it is now; handed over open, since libraries read patterns into a path."""
    with _said(f"cannot read {path}"), path.open("rb") as file:
        if path.suffix == ".parquet":
            return _parquet(path, pyarrow.parquet.read_schema(file))
        start = file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()
        if b"\0" in start:
            raise ValueError("it is not text in UTF-8")
        if path.suffix == ".csv":
            return _csv(path)
        if start[:1] != b"[":
            whole = pyarrow.json.ReadOptions(block_size=path.stat().st_size + 1)
            return _arrow(str(path), pyarrow.json.read_json(file, whole))
        objects = json.load(file)  # a list of them, not one a line
        if not all(isinstance(one, dict) for one in objects):
            raise ValueError("it is a list of other things than objects")
        return _arrow(str(path), pa.Table.from_pylist(objects))


def _arrow(where: str, table: pa.Table) -> Source:
    def read(wanted: Sequence[str]) -> tuple[Sequence[int], list[list[Any]]]:
        return range(1, len(table) + 1), [table[column].to_pylist() for column in wanted]

    return Source(where, table.column_names, read, table.schema.metadata)


def _parquet(path: Path, schema: pa.Schema) -> Source:
    """Read by batches, so that what does not fit is noticed in time."""

    def read(wanted: Sequence[str]) -> tuple[Sequence[int], list[list[Any]]]:
        columns, size = [[] for _ in wanted], 0
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            for values, name in zip(columns, wanted, strict=True):
                for piece in _unpacked(table, name):
                    size += piece.nbytes + 64 * len(piece)  # Python's own share
                    if size > MOST_BYTES:
                        said = f"columns {', '.join(wanted)} are over {MOST_BYTES >> 20:,} MiB"
                        raise ValueError(f"{said} once unpacked: keep fewer rows or shorter texts")
                    values += piece.to_pylist()
        return range(1, len(columns[0]) + 1), columns

    return Source(str(path), schema.names, read, schema.metadata)


def _unpacked(table: pyarrow.parquet.ParquetFile, name: str) -> Iterator[pa.Array]:
    """A column by pieces of 512 values; with pandas' categories, of which every batch brings all,
    batches are few."""
    coded = pa.types.is_dictionary(table.schema_arrow.field(name).type)
    for batch in table.iter_batches(1 << 16 if coded else 512, columns=[name]):
        for start in range(0, len(batch), 512):
            piece = batch[name].slice(start, 512)
            yield piece.dictionary_decode() if coded else piece


def _csv(path: Path) -> Source:
    """Its rows count from 1, the header and blank ones with them.

    pandas and pyarrow misread in silence what Python's own reader refuses where it is strict.
    """
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, strict=True), [])

    def read(wanted: Sequence[str]) -> tuple[Sequence[int], list[list[Any]]]:
        numbers, found, pick = [], [], itemgetter(*map(names.index, wanted))
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                for number, row in enumerate(reader, 1):
                    if row and len(row) != len(names):
                        said = f"row {number} has {len(row)} cells, the header {len(names)}"
                        raise ValueError(said)
                    if row:
                        numbers.append(number)
                        found.append(pick(row))
            except csv.Error as error:
                raise ValueError(f"line {reader.line_num}: {error}") from error
        columns = [cells[1:] for cells in zip(*found, strict=True)]  # without the header
        return numbers[1:], list(map(_typed, columns))

    return Source(str(path), names, read)


def _typed(cells: Sequence[str]) -> list[Any]:
    """Of a CSV file's column: numbers, where all its cells are numbers or missing; else words."""
    there = [cell for cell in cells if cell not in MISSING]
    for number in (int, float):
        with contextlib.suppress(ValueError):  # underscores group digits in Python alone
            if found := {cell: number(cell.replace("_", "?")) for cell in there}:
                return list(map(found.get, cells))
    return [cell if cell.strip() else None for cell in cells]


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Whatever goes wrong in one line, which a library may have said in several."""
    try:
        yield
    except Exception as error:
        # pyarrow counts the rows of JSON from 0.
        why = re.sub(r"(?<=in row )\d+", lambda found: f"{int(found[0]) + 1}", str(error))
        said = " ".join(why.split())[:300] or type(error).__name__
        raise HealingError(f"{what}: {said}") from error


def _usual(what: str, usual: Sequence[str], source: Source) -> tuple[str, ...]:
    there = source.names
    for columns in map(str.split, usual):
        if set(columns) <= set(there):
            return tuple(columns)
    said = f"no {what} column found in {source.where}, which has {', '.join(map(repr, there))}"
    raise HealingError(f"{said if there else said + 'none'}: name it ({what}_column)")


def _class_names(source: Source, column: str) -> list[str] | None:
    """What the hub's own files say that the numbers of a column stand for."""
    try:
        written = json.loads(source.metadata[b"huggingface"])
        return list(map(str, written["info"]["features"][column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _split(
    source: Source, texts: Sequence[str], label: str, train: Split | None = None
) -> Split | None:
    """Texts and labels, these by the names that the table itself has for its numbers; None where
    all labels are hidden."""
    where, names = source.where, source.names
    for column in (*texts, label):
        choose(column, names, f"column of {where}")
        if names.count(column) > 1:
            raise HealingError(f"{where} has {names.count(column)} columns named {column!r}")
    with _said(f"cannot read {where}"):
        rows, (*columns, labels) = source.read((*texts, label))
    if {list, dict, bytes} & set(map(type, labels)):
        raise HealingError(f"{where}: column {label!r} holds no single label a text")
    labels = [float(v) if isinstance(v, Decimal) else v for v in labels]
    if classes := _class_names(source, label):
        # Where classes have names, the hub writes -1 for a label that is kept secret.
        known = {None: None, -1: None, **dict(enumerate(classes))}
        if unknown := set(labels) - set(known):
            said = f"label {min(unknown)} in column {label!r} is none of its {len(classes)} classes"
            raise HealingError(f"{where}: {said}")
        labels = [known[v] for v in labels]
    void = {v for v in set(labels) if v in (None, "") or (type(v) is float and not isfinite(v))}
    missing = [row for row, value in zip(rows, labels, strict=True) if value in void]
    secret = train is not None and set(labels) == {-1} and -1 not in train.labels
    if labels and (secret or len(missing) == len(labels)):
        return None
    if missing:
        said = f"{len(missing)} of {len(labels)} labels in column {label!r} are missing or infinite"
        raise HealingError(f"{where}: {said}, the first in row {missing[0]}")
    pair, no_text = len(texts) == 2, MISSING if where.endswith(".csv") else ()
    for column, values in zip(texts, columns, strict=True):
        for row, value in zip(rows, values, strict=True):
            # Half of a pair may be blank (Quora has such questions); a whole text may not.
            if not isinstance(value, str) or value in no_text or not (pair or value.strip()):
                said = f"column {column!r} holds no text in row {row} ({value!r:.40})"
                raise HealingError(f"{where}: {said}")
    return Split(list(map(list, zip(*columns, strict=True))) if pair else columns[0], labels)


def _numbered(
    name: str, label: str, parts: list[Split], names: list[str] | None
) -> tuple[list[Split], tuple[str, ...]]:
    """The parts with class ids for labels, and what the classes are called; or with floats."""
    train, kinds = parts[0].labels, [set(map(type, part.labels)) for part in parts]
    # 0.0 and 1.0 are classes where another part calls them 0 and 1.
    if kinds[0] == {float} and not ({int} in kinds and all(map(float.is_integer, train))):
        if not all(kind <= {int, float} for kind in kinds):
            raise HealingError(f"task {name!r}: column {label!r} holds numbers in training only")
        return [Split(part.texts, list(map(float, part.labels))) for part in parts], ()

    def spelt(value: Any) -> str:
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)

    classes = names or list(map(spelt, sorted(set(train))))
    if not 1 < len(classes) <= MOST_CLASSES:
        said = f"column {label!r} has {len(classes):,} classes: need 2 to {MOST_CLASSES:,}"
        raise HealingError(f"task {name!r}: {said}")
    ids = {value: i for i, value in enumerate(classes)}
    numbered = []
    for part in parts:
        found = {value: spelt(value) for value in set(part.labels)}
        if unseen := sorted(set(found.values()) - set(ids)):
            count = sum(found[value] == unseen[0] for value in part.labels)
            said = f"class {unseen[0]!r} has {count} of the scored examples but none to train on"
            raise HealingError(f"task {name!r}: {said}: add some, or leave it out")
        numbered.append(Split(part.texts, [ids[found[value]] for value in part.labels]))
    return numbered, tuple(classes)
