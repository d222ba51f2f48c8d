"""Sentence tasks: where their texts and labels come from, and which split is scored.

A task is a registered name (`REGISTRY`), one of the organism's, any hub data set (``owner/name`` or
``owner/name:config``), or a local CSV, JSONL or Parquet file or a folder of them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from healing_utils import organism
from healing_utils.base.errors import HealingError, choose

METRICS = ("f1", "accuracy", "matthews", "spearman")
SUFFIXES = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Column names in use on the hub, most specific first; a pair stands for two text columns.
TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text",), ("sentence",), ("content",), ("review",), ("tweet",),
    ("comment",), ("title",),
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "score")


@dataclass(frozen=True)
class Task:
    """A data set on the hub, and the split of it that is scored.

    `scored` is the test split, or the validation split where the test labels are not public.
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
    labels: list[float]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> Split:
        rows = list(rows)
        return Split([self.texts[i] for i in rows], [self.labels[i] for i in rows])

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
        """Training and validation examples for one seed, sharing no example.

        The draw depends on the seed, so that an interval over seeds holds the choice of training
        examples too. Validation is for learning curves; nothing is chosen on it.
        """
        rows = list(range(len(self.pool)))
        random.Random(seed).shuffle(rows)
        if self.validation is not None:
            validation = self.validation.take(range(min(validation_size, len(self.validation))))
        else:
            validation = self.pool.take(rows[:validation_size])
            rows = rows[validation_size:]
        wanted = len(rows) if train_size is None else train_size
        if not 0 < wanted <= len(rows):
            raise HealingError(
                f"train_size is {train_size} but task {self.name!r} leaves {len(rows)} examples "
                f"for training beside {validation_size} for validation"
            )
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
    train, test, task = _open(name, revision)
    usual = [task.text] if task else TEXT_COLUMNS
    texts = _columns("text", (text,) if isinstance(text, str) else text, usual, train, name)
    if len(texts) > 2:
        raise HealingError(f"{len(texts)} text columns named; one or two are possible")
    usual = [(column,) for column in LABEL_COLUMNS]
    (label,) = _columns("label", (label,) if label else None, usual, train, name)
    kind = getattr(train.features[label], "dtype", "list")
    if kind in ("list", "dict"):
        raise HealingError(f"task {name!r}: column {label!r} holds no single label a text")
    # Where classes have names, the hub writes -1 for a label that is kept secret.
    names = getattr(train.features[label], "names", None)
    labels = [list(table[label]) for table in (train, test)]
    for where, values in zip(("training", "scored"), labels, strict=True):
        missing = sum(v is None or v != v or (bool(names) and v == -1) for v in values)
        if missing:
            raise HealingError(
                f"task {name!r}: {missing} of {len(values)} {where} labels in column {label!r} are "
                "missing" + (" (None or -1)" if names else "")
            )
    if kind.startswith("float"):
        ids = [[float(v) for v in values] for values in labels]
        classes: tuple[str, ...] = ()
    else:
        order = list(range(len(names))) if names else sorted(set(labels[0]))
        index = {value: i for i, value in enumerate(order)}
        unseen = sorted({str(v) for v in labels[1] if v not in index})
        if unseen:
            raise HealingError(
                f"task {name!r}: label {unseen[0]!r} is scored but never occurs in training"
            )
        ids = [[index[v] for v in values] for values in labels]
        classes = tuple(names or map(str, order))
        if len(classes) < 2:
            raise HealingError(f"task {name!r} has only one class in column {label!r}")
    pool, scored = (
        Split(_texts(table, texts, name), found)
        for table, found in zip((train, test), ids, strict=True)
    )
    default = task.metric if task else ("f1" if classes else "spearman")
    return TaskData(name, pool, scored, classes, default)


def _open(name: str, revision: str | None) -> tuple[Any, Any, Task | None]:
    """Training and scored tables of a task, and its registry entry if it has one."""
    named = [
        task
        for key, task in REGISTRY.items()
        if name in (key, task.hub, f"{task.hub}:{task.config}")
    ]
    task = named[0] if len(named) == 1 else None  # GLUE's hub name alone stands for seven
    path = Path(name).expanduser()
    if task is None and (path.exists() or path.suffix in SUFFIXES):
        files = _files(path)
        kinds = {SUFFIXES[file.suffix] for file in files.values()}
        if len(kinds) > 1:
            kinds = ", ".join(sorted(kinds))
            raise HealingError(f"files in {path} are of different types: {kinds}")
        data_files = {split: str(file) for split, file in files.items()}
        splits = _load(f"cannot read {path}", kinds.pop(), data_files=data_files)
    else:
        if task is None and "/" not in name:
            known = [*organism.TASKS, *REGISTRY]
            choose(name, known, "task (or give a hub name with its owner, or a file)")
        hub, _, config = (f"{task.hub}:{task.config or ''}" if task else name).partition(":")
        doing = f"cannot load data set {name!r} from the hub"
        splits = _load(doing, hub, config or None, revision=revision)
    scored = [task.scored] if task else ["test", "validation", "dev"]
    found = next((s for s in scored if s in splits), None)
    if "train" not in splits or (found is None and set(splits) != {"train"}):
        raise HealingError(
            f"task {name!r} has splits {', '.join(splits)}: need train and {' or '.join(scored)}"
        )
    if found is None:  # one file: a fifth of it is scored, the same fifth always
        if len(splits["train"]) < 2:
            raise HealingError(f"task {name!r} has {len(splits['train'])} rows: too few to split")
        splits, found = splits["train"].train_test_split(test_size=0.2, seed=0), "test"
    return splits["train"], splits[found], task


def _load(doing: str, *arguments: Any, **settings: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*arguments, **settings)
    except Exception as error:
        wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = (error.__cause__ if wrapped else None) or error
        empty = "it holds no rows" if isinstance(cause, StopIteration) else type(cause).__name__
        why = str(cause) or empty
        raise HealingError(f"{doing}: {why.splitlines()[0]}") from error


def _files(path: Path) -> dict[str, Path]:
    """A file, or the files named train, validation, dev and test in a folder, by split."""
    if path.is_dir():
        files = {f.stem: f for f in sorted(path.iterdir()) if f.suffix in SUFFIXES}
        if "train" not in files:
            raise HealingError(f"folder {path} holds no train.csv, train.jsonl or train.parquet")
        return {s: f for s, f in files.items() if s in ("train", "validation", "dev", "test")}
    if not path.exists():
        raise HealingError(f"no such file: {path}")
    choose(path.suffix, SUFFIXES, f"file type of {path}")
    return {"train": path}


def _columns(
    what: str, wanted: Sequence[str] | None, usual: Sequence[tuple[str, ...]], table: Any, name: str
) -> tuple[str, ...]:
    """The columns that are wanted, or the first usual ones that are there."""
    if wanted:
        return tuple(choose(c, table.column_names, f"{what} column of {name!r}") for c in wanted)
    for columns in usual:
        if set(columns) <= set(table.column_names):
            return columns
    raise HealingError(
        f"no {what} column found in {name!r}, which has {', '.join(table.column_names)}: name it "
        f"({what}_column)"
    )


def _texts(table: Any, columns: tuple[str, ...], name: str) -> list[Any]:
    values = [list(table[column]) for column in columns]
    for column, texts in zip(columns, values, strict=True):
        for row, value in enumerate(texts):
            # Half of a pair may be blank (Quora has such questions); a whole text may not.
            if not isinstance(value, str) or (len(columns) == 1 and not value.strip()):
                raise HealingError(
                    f"task {name!r}: column {column!r} holds no text in row {row} ({value!r})"
                )
    return values[0] if len(values) == 1 else [list(pair) for pair in zip(*values, strict=True)]
