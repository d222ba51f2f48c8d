"""Sentence tasks: where their texts and labels come from, and which split is scored.

A task is a registered name (`REGISTRY`), one of the organism's, any hub data set (``owner/name`` or
``owner/name:config``), or a local CSV, JSONL or Parquet file or a folder of them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
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
    label: str = "label"
    config: str | None = None
    metric: str = "f1"
    train: str = "train"
    scored: str = "test"


def _glue(config: str, *text: str, metric: str = "f1", scored: str = "validation") -> Task:
    return Task("nyu-mll/glue", text, config=config, metric=metric, scored=scored)


REGISTRY: dict[str, Task] = {
    # Paper A's six (Han, Zhang and Simion 2024), scored by macro-F1.
    "sst2": Task("stanfordnlp/sst2", ("sentence",), scored="validation"),  # test labels are hidden
    "imdb": Task("stanfordnlp/imdb", ("text",)),
    "ag_news": Task("fancyzhx/ag_news", ("text",)),
    "emotion": Task("dair-ai/emotion", ("text",), config="split"),
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

    def take(self, rows: Sequence[int]) -> Split:
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
    if name in organism.TASKS:
        if metric == "spearman":
            raise HealingError(
                f"metric 'spearman' does not fit task {name!r}: it is classification"
            )
        if text or label or revision:
            raise HealingError(f"task {name!r} has no columns or revisions to name")
        splits = organism.sentence_task(name)
        data = TaskData(
            name, Split(*splits["train"]), Split(*splits["test"]), tuple(organism.TASKS[name]),
            metric or "f1", Split(*splits["validation"]),
        )  # fmt: skip
    else:
        data = _load_columns(name, text, label, metric, revision)
    if test_size is not None and test_size < len(data.test):
        rows = sorted(random.Random(0).sample(range(len(data.test)), test_size))
        data = TaskData(
            data.name, data.pool, data.test.take(rows), data.classes, data.metric, data.validation
        )
    return data


def _load_columns(
    name: str,
    text: str | Sequence[str] | None,
    label: str | None,
    metric: str | None,
    revision: str | None,
) -> TaskData:
    train, test, task = _open(name, revision)
    columns = train.column_names
    text_columns = _text_columns(text or (task.text if task else None), columns, name)
    label_column = _label_column(label or (task.label if task else None), columns, name)
    feature = train.features[label_column]
    kind = getattr(feature, "dtype", "list")
    if kind in ("list", "dict"):
        raise HealingError(f"task {name!r}: column {label_column!r} holds no single label a text")
    names = getattr(feature, "names", None)
    pool, pool_labels = _texts(train, text_columns, name), list(train[label_column])
    scored, scored_labels = _texts(test, text_columns, name), list(test[label_column])
    for where, values in (("training", pool_labels), ("scored", scored_labels)):
        # Where classes have names, the hub writes -1 for a label that is kept secret.
        missing = sum(v is None or v != v or (bool(names) and v == -1) for v in values)
        if missing:
            raise HealingError(
                f"task {name!r}: {missing} of {len(values)} {where} labels in column "
                f"{label_column!r} are missing" + (" (None or -1)" if names else "")
            )
    if kind.startswith("float"):
        labels = [float(v) for v in pool_labels], [float(v) for v in scored_labels]
        classes: tuple[str, ...] = ()
    else:
        order = list(range(len(names))) if names else sorted(set(pool_labels))
        index = {value: i for i, value in enumerate(order)}
        unseen = sorted({str(v) for v in scored_labels if v not in index})
        if unseen:
            raise HealingError(
                f"task {name!r}: label {unseen[0]!r} is scored but never occurs in training"
            )
        labels = [index[v] for v in pool_labels], [index[v] for v in scored_labels]
        classes = tuple(names or map(str, order))
        if len(classes) < 2:
            raise HealingError(f"task {name!r} has only one class in column {label_column!r}")
    default = task.metric if task else ("f1" if classes else "spearman")
    chosen = metric or default
    if (chosen == "spearman") != (not classes):
        kind = "classification" if classes else "regression"
        raise HealingError(f"metric {chosen!r} does not fit task {name!r}, which is {kind}")
    return TaskData(name, Split(pool, labels[0]), Split(scored, labels[1]), classes, chosen)


def _open(name: str, revision: str | None) -> tuple[Any, Any, Task | None]:
    """Training and scored tables of a task, and its registry entry if it has one."""
    import datasets

    datasets.disable_progress_bars()
    task = REGISTRY.get(name) or next(
        (t for t in REGISTRY.values() if f"{t.hub}:{t.config}" == name), None
    )
    if task is None and "/" in name:
        whole = [t for t in REGISTRY.values() if t.hub == name]
        task = whole[0] if len(whole) == 1 else None
    path = Path(name).expanduser()
    if task is None and (path.exists() or path.suffix in SUFFIXES):
        splits = _open_files(path)
    elif task is None and "/" not in name:
        known = [*organism.TASKS, *REGISTRY]
        choose(name, known, "task (or give a hub name with its owner, or a file)")
        raise AssertionError  # choose raises: the name is not known
    else:
        hub, config = (task.hub, task.config) if task else (name.split(":")[0], None)
        if task is None and ":" in name:
            config = name.split(":", 1)[1]
        try:
            splits = datasets.load_dataset(hub, config, revision=revision)
        except Exception as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise HealingError(f"cannot load data set {name!r} from the hub: {cause}") from error
    train = task.train if task else "train"
    scored = [task.scored] if task else ["test", "validation", "dev"]
    found = next((s for s in scored if s in splits), None)
    if train not in splits or (found is None and set(splits) != {train}):
        raise HealingError(
            f"task {name!r} has splits {', '.join(splits)}: need {train} and {' or '.join(scored)}"
        )
    if found is None:  # one file: a fifth of it is scored, the same fifth always
        if len(splits[train]) < 2:
            raise HealingError(f"task {name!r} has {len(splits[train])} rows: too few to split")
        halves = splits[train].train_test_split(test_size=0.2, seed=0)
        return halves["train"], halves["test"], None
    return splits[train], splits[found], task


def _open_files(path: Path) -> Any:
    """Splits of a file, or of the files named train, validation, dev and test in a folder."""
    import datasets

    if path.is_dir():
        files = {f.stem: f for f in sorted(path.iterdir()) if f.suffix in SUFFIXES}
        files = {s: f for s, f in files.items() if s in ("train", "validation", "dev", "test")}
        if "train" not in files:
            raise HealingError(f"folder {path} holds no train.csv, train.jsonl or train.parquet")
    elif not path.exists():
        raise HealingError(f"no such file: {path}")
    else:
        if path.suffix not in SUFFIXES:
            choose(path.suffix, SUFFIXES, f"file type of {path}")
        files = {"train": path}
    kinds = {SUFFIXES[f.suffix] for f in files.values()}
    if len(kinds) > 1:
        raise HealingError(f"files in {path} are of different types: {', '.join(sorted(kinds))}")
    try:
        return datasets.load_dataset(kinds.pop(), data_files={s: str(f) for s, f in files.items()})
    except Exception as error:
        cause = (str(error.__cause__ or error) or "it holds no rows").splitlines()[0]
        raise HealingError(f"cannot read {path}: {cause}") from error


def _text_columns(
    wanted: str | Sequence[str] | None, columns: Sequence[str], name: str
) -> tuple[str, ...]:
    if wanted:
        chosen = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        if len(chosen) > 2:
            raise HealingError(f"{len(chosen)} text columns named; one or two are possible")
        return tuple(choose(c, columns, f"text column of {name!r}") for c in chosen)
    for candidate in TEXT_COLUMNS:
        if set(candidate) <= set(columns):
            return candidate
    raise HealingError(
        f"no text column found in {name!r}, which has {', '.join(columns)}: name it (text_column)"
    )


def _label_column(wanted: str | None, columns: Sequence[str], name: str) -> str:
    if wanted:
        return choose(wanted, columns, f"label column of {name!r}")
    for candidate in LABEL_COLUMNS:
        if candidate in columns:
            return candidate
    raise HealingError(
        f"no label column found in {name!r}, which has {', '.join(columns)}: name it (label_column)"
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
