"""Sentence tasks: where their texts and labels come from, and which split is scored.

A task is a registered name (`REGISTRY`), one of the organism's, any hub data set (``owner/name`` or
``owner/name:config``), or a local CSV, JSONL or Parquet file or a folder of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from healing_utils import organism
from healing_utils.base.errors import HealingError, choose

METRICS = ("f1", "accuracy", "matthews", "spearman")
SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
SCORED = ("test", "validation", "valid", "val", "dev")  # the first that is there is scored
# Column names in use on the hub, most specific first; a pair stands for two text columns.
TEXT_COLUMNS = (
    "sentence1 sentence2", "premise hypothesis", "question1 question2", "question sentence",
    "text", "sentence", "content", "review", "tweet", "comment", "title",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "score")


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

    def sha(self) -> str:
        """Hash of the content, which stands for it in a cell's key."""
        text = json.dumps([self.texts, self.labels], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class TaskData:
    """A loaded task. `pool` is all that may be trained on; `test` is only ever scored.

    `classes` are names in the order of the class ids, empty for regression.
    """

    name: str
    pool: Split
    test: Split
    classes: tuple[str, ...]
    metric: str
    validation: Split | None = None  # given by the source, else cut from the pool

    @property
    def regression(self) -> bool:
        return not self.classes

    @property
    def num_labels(self) -> int:
        return len(self.classes) or 1

    def draw(
        self, seed: int, train_size: int | None, validation_size: int
    ) -> tuple[Split, Split | None]:
        """Training and validation examples for one seed, sharing no example."""
        rows = list(range(len(self.pool)))
        random.Random(seed).shuffle(rows)
        if self.validation is not None:
            validation = self.validation.take(range(min(validation_size, len(self.validation))))
        else:
            validation = self.pool.take(rows[:validation_size])
            rows = rows[validation_size:]
        wanted = len(rows) if train_size is None else train_size
        if not 0 < wanted <= len(rows):
            left = f"{len(rows)} examples for training beside {validation_size} for validation"
            raise HealingError(f"train_size is {train_size} but task {self.name!r} leaves {left}")
        return self.pool.take(rows[:wanted]), validation if len(validation) else None


def load_task(
    name: str,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    metric: str | None = None,
    revision: str | None = None,
    test_size: int | None = None,
) -> TaskData:
    """Load a task by registered name, organism's name, hub name or local path.

    `text` and `label` name the columns where they cannot be found; two text columns make pairs.
    `test_size` scores only so many examples, drawn once with a fixed seed. Raises HealingError
    naming the columns, splits or names there are.
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


def _from_tables(
    name: str, text: str | Sequence[str] | None, label: str | None, revision: str | None
) -> TaskData:
    """A task whose texts and labels are columns of the hub's tables or of files."""
    tables, task = _open(name, revision)
    usual = [" ".join(task.text)] if task else TEXT_COLUMNS
    texts = (text,) if isinstance(text, str) else text or _usual("text", usual, tables[0], name)
    label = label or _usual("label", LABEL_COLUMNS, tables[0], name)[0]
    if len(texts) > 2:
        raise HealingError(f"{len(texts)} text columns named; one or two are possible")
    parts = [_split(table, texts, label, name) for table in tables]
    if len(parts) == 1:  # a fifth is scored, the same fifth always
        count = len(parts[0])
        if count < 2:
            raise HealingError(f"task {name!r} has {count} rows: too few to split")
        rows, held_out = np.random.default_rng(0).permutation(count), math.ceil(0.2 * count)
        parts = [parts[0].take(rows[held_out:]), parts[0].take(rows[:held_out])]
    if not all(map(len, parts)):
        raise HealingError(f"task {name!r} has no rows to train on or to score")
    classes: list[Any] = []
    if not pa.types.is_floating(tables[0].schema.field(label).type):
        classes = _class_names(tables[0], label) or sorted(set(parts[0].labels))
        if unseen := sorted(map(str, set(parts[1].labels) - set(classes))):
            said = f"label {unseen[0]!r} is scored but never occurs in training"
            raise HealingError(f"task {name!r}: {said}")
        if len(classes) < 2:
            raise HealingError(f"task {name!r} has only one class in column {label!r}")
    elif isinstance(parts[1].labels[0], str):
        raise HealingError(f"task {name!r}: column {label!r} holds numbers in training only")
    number = {value: i for i, value in enumerate(classes)}.__getitem__ if classes else float
    pool, test = (Split(part.texts, list(map(number, part.labels))) for part in parts)
    metric = task.metric if task else ("f1" if classes else "spearman")
    return TaskData(name, pool, test, tuple(map(str, classes)), metric)


def _open(name: str, revision: str | None) -> tuple[list[pa.Table], Task | None]:
    """Training table, scored table if there is one, and the registry entry if there is one."""
    named = [t for key, t in REGISTRY.items() if name in (key, t.hub, f"{t.hub}:{t.config}")]
    task = named[0] if len(named) == 1 else None  # GLUE's hub name alone stands for seven
    path = Path(name).expanduser()
    local = task is None and (path.exists() or path.suffix in SUFFIXES)
    if not (task or local or "/" in name):
        what = "task (or give a hub name with its owner, or a file)"
        choose(name, [*organism.TASKS, *REGISTRY], what)
    files = _files(path) if local else {}
    try:
        if local:
            splits = {split: _read(file) for split, file in files.items()}
        else:
            import datasets  # takes seconds, and only the hub needs it

            datasets.disable_progress_bars()
            hub, _, config = (f"{task.hub}:{task.config or ''}" if task else name).partition(":")
            found = datasets.load_dataset(hub, config or None, revision=revision)
            splits = {split: data.data.table for split, data in found.items()}
    except Exception as error:
        doing = f"cannot read {path}" if local else f"cannot load data set {name!r} from the hub"
        why = str(error) or type(error).__name__
        raise HealingError(f"{doing}: {why.splitlines()[0]}") from error
    wanted = (task.scored,) if task else SCORED
    scored = [splits[split] for split in wanted if split in splits]
    if "train" not in splits or (not scored and len(splits) > 1):
        need = f"need train and {' or '.join(wanted)}"
        raise HealingError(f"task {name!r} has splits {', '.join(splits)}: {need}")
    return [splits["train"], *scored[:1]], task


def _files(path: Path) -> dict[str, Path]:
    """A file, or the files in a folder that are named like splits, by split."""
    if path.is_dir():
        files = {f.stem: f for f in sorted(path.iterdir()) if f.suffix in SUFFIXES}
        if "train" not in files:
            raise HealingError(f"folder {path} holds no train.csv, train.jsonl or train.parquet")
        return {split: files[split] for split in ("train", *SCORED) if split in files}
    if not path.exists():
        raise HealingError(f"no such file: {path}")
    choose(path.suffix, SUFFIXES, f"file type of {path}")
    return {"train": path}


def _read(path: Path) -> pa.Table:
    """A file as it is now; handed over open, since libraries read patterns into a path."""
    with path.open("rb") as file:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(file)
        if path.suffix == ".csv":
            frame = pd.read_csv(file, low_memory=False)  # in one go: one type a column
            return pa.Table.from_pandas(frame, preserve_index=False)
        if file.peek(1)[:1] == b"[":  # a list of objects, not one a line
            return pa.Table.from_pylist(json.load(file))
        whole = pyarrow.json.ReadOptions(block_size=path.stat().st_size + 1)
        return pyarrow.json.read_json(file, whole)


def _usual(what: str, usual: Sequence[str], table: pa.Table, name: str) -> tuple[str, ...]:
    there = table.column_names
    for columns in map(str.split, usual):
        if set(columns) <= set(there):
            return tuple(columns)
    said = f"no {what} column found in {name!r}, which has {', '.join(there)}"
    raise HealingError(f"{said}: name it ({what}_column)")


def _class_names(table: pa.Table, column: str) -> list[str] | None:
    """What the hub's own files say that the numbers of a column stand for."""
    written = json.loads((table.schema.metadata or {}).get(b"huggingface", "{}"))
    return written.get("info", {}).get("features", {}).get(column, {}).get("names")


def _split(table: pa.Table, texts: Sequence[str], label: str, name: str) -> Split:
    """Texts and labels, these by the names that the table itself has for its numbers."""
    for column in (*texts, label):
        choose(column, table.column_names, f"column of {name!r}")
    if pa.types.is_nested(table.schema.field(label).type):
        raise HealingError(f"task {name!r}: column {label!r} holds no single label a text")
    labels, names = table[label].to_pylist(), _class_names(table, label)
    # Where classes have names, the hub writes -1 for a label that is kept secret.
    missing = sum(v is None or v != v or (bool(names) and v == -1) for v in labels)
    if missing:
        said = f"{missing} of {len(labels)} labels in column {label!r} are missing"
        raise HealingError(f"task {name!r}: {said}{' (None or -1)' if names else ''}")
    columns = [table[column].to_pylist() for column in texts]
    for column, values in zip(texts, columns, strict=True):
        for row, value in enumerate(values):
            # Half of a pair may be blank (Quora has such questions); a whole text may not.
            if not isinstance(value, str) or (len(texts) == 1 and not value.strip()):
                said = f"column {column!r} holds no text in row {row} ({value!r})"
                raise HealingError(f"task {name!r}: {said}")
    found = columns[0] if len(columns) == 1 else list(map(list, zip(*columns, strict=True)))
    return Split(found, [names[v] for v in labels] if names else labels)
