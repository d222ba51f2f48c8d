"""Sentence tasks: where their texts and labels come from, and which split is scored."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain
from math import ceil, inf
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from healing_utils import organism
from healing_utils.base.errors import HealingError, choose
from healing_utils.base.hub import reach_hub
from healing_utils.base.records import digest

METRICS = ("f1", "accuracy", "matthews", "spearman")
# The first of these that is there and has labels is scored; of local files the next is validation.
SCORED = ("test", "validation", "valid", "val", "dev")
# Column names in use on the hub, most specific first; a pair stands for two text columns.
TEXT_COLUMNS = (
    "sentence1 sentence2", "premise hypothesis", "question1 question2", "question sentence",
    "text", "sentence", "content", "review", "tweet", "comment", "title",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "score")
MOST_CLASSES = 10_000
MOST_TEXT = 2 << 30  # characters of a file: kilobytes of Parquet can stand for more
NO_LABEL = (None, "", inf, -inf)
# What stands for a missing number or text in a CSV file; among classes it is one, unless empty.
MISSING = {"", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None", "none"}


@dataclass(frozen=True)
class Task:
    """A data set on the hub, and the split of it that is scored: one with public labels."""

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
        return digest([self.texts, self.labels])


@dataclass(frozen=True)
class TaskData:
    """A loaded task. `pool` is all that may be trained on; `test` is only ever scored.

    `classes` are names in the order of the class ids, none for regression; nothing is read from the
    tables that are `unused`."""

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
        """How many examples `draw` gives for training and for validation: where the pool is too
        small for both, validation takes what training leaves, a tenth of the pool at least, or a
        fifth where all is asked for. Raises HealingError where that fails."""
        there = len(self.pool)
        if self.validation is not None:
            most, held_out = there, min(validation_size, len(self.validation))
        elif train_size is None:
            held_out = validation_size if validation_size < there else max(1, there // 5)
            most = there - held_out
        else:
            most = there - min(validation_size, ceil(there / 10))
            held_out = min(validation_size, there - train_size)
        wanted = most if train_size is None else train_size
        if not 0 < wanted <= most:
            said = f"train_size is {train_size} but task {self.name!r} has {there} to train on"
            need = f"need train_size from 1 to {most} beside validation_size {validation_size}"
            raise HealingError(f"{said}: {need}")
        return wanted, held_out

    def draw(
        self, seed: int, train_size: int | None, validation_size: int
    ) -> tuple[Split, Split | None]:
        """Training and validation examples for one seed, sharing no example; see `sizes`."""
        wanted, held_out = self.sizes(train_size, validation_size)
        rows = list(range(len(self.pool)))
        random.Random(seed).shuffle(rows)
        validation = self.validation and self.validation.take(range(held_out))
        if validation is None:
            validation, rows = self.pool.take(rows[:held_out]), rows[held_out:]
        return self.pool.take(rows[:wanted]), validation if held_out else None


def load_task(
    name: str,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    metric: str | None = None,
    revision: str | None = None,
    test_size: int | None = None,
) -> TaskData:
    """Load a task: one of `REGISTRY` or of the organism's, any hub data set (``owner/name`` or
    ``owner/name:config``), or a CSV, JSONL or Parquet file or a folder of them.

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
    """A table: what people call it, its columns, how the values of one are read, what its own file
    says that classes are called, and rows where they are not numbered from 1."""

    where: str
    names: list[str]
    column: Callable[[str], list[Any]]
    classes: dict[str, list[str]] = {}
    rows: Sequence[int] = ()


def _from_tables(
    name: str, text: str | Sequence[str] | None, label: str | None, revision: str | None
) -> TaskData:
    """A task whose texts and labels are columns of the hub's tables or of files."""
    named = [k for k, t in REGISTRY.items() if name in (k, t.hub, f"{t.hub}:{t.config}")]
    task = REGISTRY[named[0]] if named else None
    path = Path(os.path.expanduser(name))
    no_hub_name = path.suffix in READERS or re.match(r"[/.~]|[^:]*/[^:]*/", name)
    local = not named and (no_hub_name or os.path.exists(path))
    if len(named) > 1 or not (named or local or "/" in name):  # GLUE's hub name stands for seven
        what = "task (or give a hub name with its owner, or a file)"
        choose(name, named or [*organism.TASKS, *REGISTRY], what)
    sources, unused = _of_files(path) if local else (_of_hub(name, task, revision), [])

    first, *others = sources
    usual = [" ".join(task.text)] if task else TEXT_COLUMNS
    texts = (text,) if isinstance(text, str) else text or _usual("text", usual, first)
    label = label or _usual("label", LABEL_COLUMNS, first)[0]
    if len(texts) > 2:
        raise HealingError(f"{len(texts)} text columns named; one or two are possible")
    parts = [_split(first, texts, label)]
    for source in others:
        if len(parts) < (3 if local else 2) and (part := _split(source, texts, label, parts[0])):
            parts.append(part)
        else:
            unused.append(source.where)
    if not others:  # a fifth is scored, the same fifth always
        held_out, rows = ceil(0.2 * len(parts[0])), parts[0].shuffled()
        parts = [rows.take(range(held_out, len(rows))), rows.take(range(held_out))]
    if len(parts) == 1 or not all(parts):
        counts = f"{len(parts[0])} labelled rows to train on, {sum(map(len, parts[1:]))} to score"
        need = "name a folder with train.csv and a test.csv or validation.csv that have labels"
        raise HealingError(f"task {name!r} has {counts} (column {label!r}): {need}")

    with one_line(f"column {label!r} of task {name!r}"):
        parts, classes = _numbered(parts, first.classes.get(label))
    metric = task.metric if task else ("f1" if classes else "spearman")
    given = [part.shuffled() for part in parts[2:]] or [None]  # whose first examples are drawn
    return TaskData(name, *parts[:2], classes, metric, *given, tuple(unused))


def _of_hub(name: str, task: Task | None, revision: str | None) -> list[Source]:
    """The training table, then those that may be scored."""
    import datasets  # takes seconds, and only the hub needs it

    datasets.disable_progress_bars()
    hub, _, config = (f"{task.hub}:{task.config or ''}" if task else name).partition(":")
    with one_line(f"cannot load data set {name!r} from the hub, and no such folder is here"):
        owner, _, own = hub.rpartition("/")
        kept = f"{owner}___{datasets.naming.camelcase_to_snakecase(own)}"
        reach_hub("datasets", hub, Path(datasets.config.HF_DATASETS_CACHE, kept))
        found = datasets.load_dataset(hub, config or None, revision=revision)
    wanted = (task.scored,) if task else SCORED
    splits = [split for split in ("train", *wanted) if split in found]
    if splits[:1] != ["train"] or (len(splits) == 1 and len(found) > 1):
        need = f"need train and {' or '.join(wanted)}"
        raise HealingError(f"task {name!r} has splits {', '.join(found)}: {need}")
    tables = [found[split].data.table for split in splits]
    return [_arrow(f"{name}, {s}", t.schema, t.column) for s, t in zip(splits, tables, strict=True)]


def _of_files(path: Path) -> tuple[list[Source], list[str]]:
    """A file, or those of a folder that are named like splits; and its other tables."""
    files, others = [path], []
    if os.path.isdir(path):
        there = [file for file in sorted(path.iterdir()) if file.suffix in READERS]
        splits = [[f for f in there if f.stem == split] for split in ("train", *SCORED)]
        files = list(chain.from_iterable(splits))
        others = [str(file) for file in there if file not in files]
        if not splits[0] or max(map(len, splits)) > 1:
            has = ", ".join(file.name for file in there) or "no tables"
            need = "need one train.csv, .jsonl, .json or .parquet, and one file a split"
            raise HealingError(f"folder {path} holds {has}: {need}")
    return list(map(_of_file, files)), others


def _of_file(path: Path) -> Source:
    if not os.path.isfile(path):  # a pipe would be waited for
        raise HealingError(f"no such file, or not a regular one: {path}")
    choose(path.suffix, READERS, f"file type of {path}")
    with one_line(f"cannot read {path}"):
        return READERS[path.suffix](path)


def text_lines(path: Path) -> Iterator[str]:
    """A file's lines with their ends (LF, CRLF or CR), without a byte order mark. Raises ValueError
    for what is not text in UTF-8."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise ValueError(f"line {number} is not text in UTF-8")
            yield line


def _csv(path: Path) -> Source:
    """Rows count from 1, with the header and blank ones. What Python's own reader refuses where it
    is strict, pandas and pyarrow misread in silence."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(text_lines(path), strict=True)
    try:
        names = next(reader, [])
        rows = {number: row for number, row in enumerate(reader, 2) if row}
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    for number, row in rows.items():
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} cells, the header {len(names)}")

    def column(name: str) -> list[Any]:
        place = names.index(name)
        return _typed([row[place] for row in rows.values()])

    return Source(str(path), names, column, rows=list(rows))


def _typed(cells: Sequence[str]) -> list[Any]:
    """Of a CSV file's column: numbers, where all its cells are numbers or missing; else words."""
    there = [cell for cell in cells if cell not in MISSING]
    for number in (int, float):
        with contextlib.suppress(ValueError):  # underscores group digits in Python alone
            if found := {cell: number(cell.replace("_", "?")) for cell in there}:
                return list(map(found.get, cells))
    return [cell if cell.strip() else None for cell in cells]


def _json(path: Path) -> Source:
    """Objects, one a line or in a list."""

    def row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("an object has two values of one name")
        return found

    lines = list(text_lines(path))
    filled = [number for number, line in enumerate(lines) if line.strip()]
    if not filled or lines[filled[0]].lstrip()[0] != "[":
        for number in filled[1:]:  # an object a line: a list, of which blank lines stay
            lines[number] = f",{lines[number]}"
        lines = ["[", *lines, "]"]
    rows = json.loads("".join(lines), object_pairs_hook=row)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it holds other things than objects")
    names = list(dict.fromkeys(chain.from_iterable(rows)))
    return Source(str(path), names, lambda name: [row.get(name) for row in rows])


def _parquet(path: Path) -> Source:
    with path.open("rb") as file:  # open, since a library reads patterns into a path
        metadata = pq.read_metadata(file)
    about, unpacked = metadata.schema, Counter()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for leaf in map(group.column, range(group.num_columns)):
            unpacked[leaf.path_in_schema.split(".")[0]] += leaf.total_uncompressed_size

    def read(name: str) -> pa.ChunkedArray:
        if unpacked[name] > MOST_TEXT:  # of equal texts only one counts: they stay one object
            raise ValueError(f"column {name!r} is over {MOST_TEXT >> 20:,} MiB once unpacked")
        with path.open("rb") as file:
            table = pq.ParquetFile(file, read_dictionary=[leaf.path for leaf in about])
            return table.read([name]).column(name)

    return _arrow(str(path), about.to_arrow_schema(), read)


def _arrow(where: str, schema: pa.Schema, read: Callable[[str], pa.ChunkedArray]) -> Source:
    classes = {}
    with contextlib.suppress(KeyError, TypeError, ValueError):  # no file of the hub's
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        named = {name: f for name, f in features.items() if isinstance(f, dict)}
        classes = {name: f["names"] for name, f in named.items() if "names" in f}

    def column(name: str) -> list[Any]:
        values = []
        for chunk in read(name).chunks:
            if pa.types.is_dictionary(chunk.type):  # equal texts stay one object
                once = [*chunk.dictionary.to_pylist(), None]
                values += map(once.__getitem__, chunk.indices.fill_null(-1).to_pylist())
            else:
                values += chunk.to_pylist()
        if name in classes:  # where the hub writes -1 for a label that is kept secret
            meant = {own: own for own in classes[name]}  # where the column holds the names
            meant |= {None: None, -1: None, **dict(enumerate(classes[name]))}
            if unknown := set(values) - meant.keys():
                said = f"label {min(unknown, key=str)} of column {name!r} is none of its"
                raise ValueError(f"{said} {len(classes[name])} classes")
            values = list(map(meant.__getitem__, values))
        return values

    return Source(where, schema.names, column, classes)


READERS = {".csv": _csv, ".jsonl": _json, ".json": _json, ".parquet": _parquet}


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Whatever goes wrong as a HealingError of one line; a library may have said it in several."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise HealingError(f"{what}: {said}") from error


def _usual(what: str, usual: Sequence[str], source: Source) -> tuple[str, ...]:
    there = source.names
    for columns in map(str.split, usual):
        if set(columns) <= set(there):
            return tuple(columns)
    said = f"no {what} column found in {source.where}, which has {', '.join(map(repr, there))}"
    raise HealingError(f"{said if there else said + 'none'}: name it ({what}_column)")


def _split(source: Source, texts: Sequence[str], label: str, train: Split | None = None) -> Split:
    """Texts and labels; none where all labels are hidden."""
    where, names = source.where, source.names
    for column in (*texts, label):
        choose(column, names, f"column of {where}")
        if names.count(column) > 1:
            raise HealingError(f"{where} has {names.count(column)} columns named {column!r}")
    with one_line(f"cannot read {where}"):
        *columns, labels = map(source.column, (*texts, label))
        rows = source.rows or range(1, len(labels) + 1)
        if not labels:
            raise ValueError("it has no rows")
        kinds = set(map(type, labels)) - {type(None)}
        if not any(kinds <= alike for alike in ({str}, {bool}, {int, float, Decimal})):
            held = " and ".join(sorted(kind.__name__ for kind in kinds))
            need = "need text, or numbers, or truth values alone"
            raise ValueError(f"column {label!r} holds {held}: {need}")
        if kinds & {float, Decimal}:
            labels = [value if value is None else float(value) for value in labels]
        missing = [row for row, v in zip(rows, labels, strict=True) if v in NO_LABEL or v != v]
        secret = train is not None and set(labels) == {-1} and -1 not in train.labels
        if secret or len(missing) == len(labels):
            return Split([], [])
        if missing:
            said = f"{len(missing)} of {len(labels)} labels in column {label!r} are missing"
            raise ValueError(f"{said} or infinite, the first in row {missing[0]}")
        size = sum(len(text) for values in columns for text in values if isinstance(text, str))
        if size > MOST_TEXT:
            raise ValueError(f"texts of {size:,} characters: keep fewer rows or shorter texts")
        " ".join(map(str, set(labels))).encode()  # fails for half a character, which JSON can hold
        pair, no_text = len(texts) == 2, MISSING if where.endswith(".csv") else ()
        for column, values in zip(texts, columns, strict=True):
            for row, value in zip(rows, values, strict=True):
                # Half of a pair may be blank (Quora has such questions); a whole text may not.
                if not isinstance(value, str) or value in no_text or not (pair or value.strip()):
                    raise ValueError(f"column {column!r} holds no text in row {row}: {value!r:.40}")
                value.encode()
    return Split(list(map(list, zip(*columns, strict=True))) if pair else columns[0], labels)


def _numbered(parts: list[Split], names: list[str] | None) -> tuple[list[Split], tuple[str, ...]]:
    """The parts with class ids for labels, and what the classes are called; or with floats."""
    train, kinds = parts[0].labels, [set(map(type, part.labels)) for part in parts]
    # 0.0 and 1.0 are classes where another part calls them 0 and 1.
    if kinds[0] == {float} and not ({int} in kinds and all(map(float.is_integer, train))):
        if not all(kind <= {int, float} for kind in kinds):
            raise ValueError("numbers in training only")
        return [Split(part.texts, list(map(float, part.labels))) for part in parts], ()

    def spelt(value: Any) -> str:
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)

    classes = names or list(map(spelt, sorted(set(train))))
    if not 1 < len(classes) <= MOST_CLASSES:
        raise ValueError(f"{len(classes):,} classes: need 2 to {MOST_CLASSES:,}")
    ids, numbered = {value: i for i, value in enumerate(classes)}, []
    for part in parts:
        labels = list(map(spelt, part.labels))
        if unseen := sorted(set(labels) - set(ids)):
            has = f"class {unseen[0]!r} has {labels.count(unseen[0])} of the scored examples"
            raise ValueError(f"{has} but none to train on: add some, or leave it out")
        numbered.append(Split(part.texts, [ids[value] for value in labels]))
    return numbered, tuple(classes)
