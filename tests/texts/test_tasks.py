"""Tasks: what the registry says, what a local file may look like, and what is refused and how."""

from __future__ import annotations

import csv
import os

import datasets
import pandas as pd
import pytest
from helpers import planted_texts, write_planted_task

from healing_utils import organism
from healing_utils.base.errors import HealingError
from healing_utils.texts.tasks import REGISTRY, Split, TaskData, load_task

NAMES = datasets.ClassLabel(names=["negative", "positive"])


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return str(path)


def refused(match: str, *arguments, **settings) -> str:
    with pytest.raises(HealingError, match=match) as caught:
        load_task(*map(str, arguments), **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(count: int, label=NAMES, secret: bool = False) -> datasets.Dataset:
    """Planted texts with the columns and features of SST-2 on the hub."""
    texts, labels = planted_texts(count, seed=count)
    text, number = datasets.Value("string"), datasets.Value("int32")
    features = datasets.Features({"idx": number, "sentence": text, "label": label})
    labels = [-1] * count if secret else labels
    rows = {"idx": list(range(count)), "sentence": texts, "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


# --- By name --------------------------------------------------------------------------------------


def test_the_registry_scores_what_has_public_labels():
    assert not set(REGISTRY) & set(organism.TASKS)
    scored = {name for name, task in REGISTRY.items() if task.scored == "test"}
    assert scored == {"imdb", "ag_news", "emotion", "dbpedia"}  # of the others they are secret
    other = {name: task.metric for name, task in REGISTRY.items() if task.metric != "f1"}
    assert other == {"cola": "matthews", "stsb": "spearman"}
    pairs = {name for name, task in REGISTRY.items() if len(task.text) == 2}
    assert pairs == {"mrpc", "rte", "qnli", "qqp", "mnli", "stsb"}


@pytest.fixture
def fake_hub(monkeypatch):
    """Data sets by (name, config); returns what was asked for."""
    glue = {"train": table(30), "validation": table(10), "test": table(12, secret=True)}
    known = {
        ("stanfordnlp/sst2", None): glue,
        ("nyu-mll/glue", "cola"): glue,
        ("someone/unlabelled", None): glue,
        ("someone/only-test", "small"): {"test": glue["test"]},
    }
    asked = []

    def load_dataset(name, config=None, revision=None, **_):
        asked.append((name, config, revision))
        if (name, config) not in known:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (ConnectionError)\nmore")
        return datasets.DatasetDict(known[name, config])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", ["sst2", "stanfordnlp/sst2", "cola", "nyu-mll/glue:cola"])
def test_a_registered_task_is_found_by_its_name_and_its_hub_name(name, fake_hub):
    data = load_task(name, revision="abc")
    assert fake_hub == [
        ("stanfordnlp/sst2", None, "abc") if "sst2" in name else ("nyu-mll/glue", "cola", "abc")
    ]
    assert (len(data.pool), len(data.test)) == (30, 10)  # never the secret test labels
    assert data.classes == ("negative", "positive")
    assert data.metric == ("matthews" if "cola" in name else "f1")
    assert (data.pool.texts, data.pool.labels) == planted_texts(30, seed=30)


def test_names_that_stand_for_nothing(fake_hub, tmp_path):
    refused("12 of 12 labels in column 'label' are missing", "someone/unlabelled")
    refused("has splits test: need train and test or validation", "someone/only-test:small")
    refused("from the hub: Couldn't reach 'someone/else'", "someone/else")
    refused("from the hub: Couldn't reach 'nyu-mll/glue'", "nyu-mll/glue")  # which of the seven?
    refused("unknown task.*'sst'.*Did you mean 'sst2'", "sst")
    refused("no such file: .*missing.csv", tmp_path / "missing.csv")
    (tmp_path / "notes.txt").write_text("text,label\na,0\n")
    refused(r"unknown file type.*'\.txt'; allowed: \.csv", tmp_path / "notes.txt")
    refused("holds no train.csv", tmp_path)


def test_the_organisms_tasks_come_with_their_own_splits():
    data = load_task("sentiment")
    splits = organism.sentence_task("sentiment")
    for split, part in (("train", data.pool), ("validation", data.validation), ("test", data.test)):
        assert (part.texts, part.labels) == splits[split]
    assert data.classes == organism.TASKS["sentiment"] and data.metric == "f1"
    refused("'spearman' does not fit .*classification", "sentiment", metric="spearman")
    refused("has no columns or revisions to name", "sentiment", text="text")


# --- Local files ----------------------------------------------------------------------------------

WRITE = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "json": lambda frame, path: frame.to_json(path, orient="records"),
    "parquet": lambda frame, path: frame.to_parquet(path),
}


@pytest.mark.parametrize("suffix", WRITE)
def test_one_file_is_split_the_same_way_always(tmp_path, suffix):
    texts, labels = planted_texts(50)
    path = tmp_path / f"my [best], b\u00fccher #1 * ?.{suffix}"  # no pattern, a name
    WRITE[suffix](pd.DataFrame({"id": range(50), "review": texts, "sentiment": labels}), path)
    data = load_task(str(path))
    assert data == load_task(str(path))
    assert (len(data.pool), len(data.test)) == (40, 10)
    planted = dict(zip(texts, labels, strict=True))
    assert sorted(data.pool.texts + data.test.texts) == sorted(texts)
    assert [planted[text] for text in data.test.texts] == data.test.labels
    assert data.classes == ("0", "1") and data.metric == "f1" and not data.regression
    path.write_bytes(path.read_bytes()[:-20])
    if suffix != "csv":
        refused(rf"cannot read .*\.{suffix}: ", path)


def test_a_folder_of_train_and_test_keeps_its_splits_and_names_its_classes(tmp_path):
    folder = write_planted_task(tmp_path / "task", train=20, test=8)
    data = load_task(str(folder))
    texts, labels = planted_texts(20)
    assert data.pool.texts == texts and data.test.texts == planted_texts(8, seed=1000)[0]
    assert data.classes == ("bad", "good")  # by the alphabet, whatever the file's order
    assert data.pool.labels == [1 - y for y in labels]  # there, 0 is good
    sized = load_task(str(folder), test_size=3)
    assert len(sized.test) == 3 and set(sized.test.texts) <= set(data.test.texts)
    assert sized.test == load_task(str(folder), test_size=3).test
    for name in ("validation", "valid", "val", "dev"):
        (folder / "test.csv").rename(folder / f"{name}.csv")
        assert load_task(str(folder)).test == data.test
        (folder / f"{name}.csv").rename(folder / "test.csv")
    write_csv(folder / "test.csv", ["text", "label"], [("w1 good", "good"), ("w2", "lukewarm")])
    refused("'lukewarm' is scored but never occurs in training", folder)
    write_csv(folder / "test.csv", ["texts", "label"], [("w1 good", "good")])
    refused("unknown column .*'text'; allowed: texts, label", folder)


def test_files_that_count_their_classes_differently_mean_the_same(tmp_path):
    table(30).to_parquet(tmp_path / "train.parquet")
    table(20).to_parquet(tmp_path / "test.parquet")
    data = load_task(str(tmp_path))
    turned = datasets.ClassLabel(names=["positive", "negative"])
    table(20, turned).to_parquet(tmp_path / "test.parquet")
    assert load_task(str(tmp_path)).test.labels == [1 - label for label in data.test.labels]


def test_columns_are_found_or_named(tmp_path):
    rows = [(f"a{i}", f"b{i}", f"c{i}", i % 2, i % 3) for i in range(12)]
    path = write_csv(tmp_path / "t.csv", ["premise", "hypothesis", "text", "label", "kind"], rows)
    first = load_task(path).pool.texts[0]
    assert first[0][0] == "a" and first[1] == "b" + first[0][1:]
    named = load_task(path, text="text", label="kind")
    assert named.pool.texts[0][0] == "c" and len(named.classes) == 3
    assert load_task(path, text=("text", "premise")).pool.texts[0][0][0] == "c"
    refused("'hypotesis'.*Did you mean 'hypothesis'", path, text=("premise", "hypotesis"))
    refused("column.*'lable'.*Did you mean 'label'", path, label="lable")
    refused("3 text columns named", path, text=("premise", "hypothesis", "text"))
    path = write_csv(tmp_path / "u.csv", ["utterance", "mood"], [("a", 0), ("b", 1)] * 4)
    refused("no text column found.*utterance, mood.*text_column", path)
    refused("no label column found.*utterance, mood.*label_column", path, text="utterance")


def test_numbers_with_a_fraction_are_regression(tmp_path):
    rows = [(f"text {i}", i / 4 - 1) for i in range(12)]  # -1.0 is a number like the others
    path = write_csv(tmp_path / "t.csv", ["text", "score"], rows)
    data = load_task(path)
    assert data.regression and data.num_labels == 1 and data.metric == "spearman"
    assert sorted(data.pool.labels + data.test.labels) == [i / 4 - 1 for i in range(12)]
    refused("'f1' does not fit.*regression", path, metric="f1")
    refused("unknown metric 'spearmen'.*'spearman'", path, metric="spearmen")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([-1, 1], ("-1", "1")),  # not a missing label: only where classes have names
        ([2, 10, 1], ("1", "2", "10")),
        (["yes", "no"], ("no", "yes")),
        ([True, False], ("False", "True")),
    ],
)
def test_labels_of_any_kind_become_class_ids(tmp_path, labels, classes):
    rows = [(f"text {i}", labels[i % len(labels)]) for i in range(30)]
    data = load_task(write_csv(tmp_path / "t.csv", ["text", "label"], rows))
    assert data.classes == classes
    for text, label in zip(data.pool.texts, data.pool.labels, strict=True):
        assert classes[label] == str(labels[int(text.split()[1]) % len(labels)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", 0), ("  ", 1), ("c", 0), ("d", 1), ("e", 1)], "column 'text' holds no text in row"),
        ([(i, i % 2) for i in range(10)], "column 'text' holds no text in row"),
        # In a CSV file these words stand for missing values: refused rather than guessed.
        ([(f"t{i}", ("for", "NA")[i % 2]) for i in range(10)], "labels in column 'label'"),
        ([(("null", "a")[i % 2], i % 2) for i in range(10)], "column 'text' holds no text in row"),
        ([("a", 0.5), ("b", 1.5), ("c", ""), ("d", 1), ("e", 0)], "labels in column 'label'"),
        ([(f"t{i}", 3) for i in range(10)], "only one class"),
        ([("a", 0)], "1 rows: too few"),
        ([], "0 rows: too few"),
    ],
)
def test_unusable_rows_are_refused(tmp_path, rows, message):
    refused(message, write_csv(tmp_path / "t.csv", ["text", "label"], rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "cannot read"),
        ("empty.jsonl", b"", "cannot read"),
        ("empty.parquet", b"", "cannot read"),
        ("latin1.csv", "text,label\ncafé,0\nthé,1\n".encode("latin-1") * 3, "cannot read"),
        ("half.jsonl", b'{"text": "a", "label": 0}\n{"text": "b", "lab', "cannot read"),
        ("binary.csv", bytes(range(256)) * 4, "cannot read"),
        ("bom.csv", b"\xef\xbb\xbftext,label\r\na,0\r\n", "1 rows: too few"),  # the column is found
        ("lists.jsonl", b'{"text": "a", "label": [0, 1]}\n' * 8, "holds no single label a text"),
    ],
)
def test_files_that_cannot_be_used_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert name in refused(message, tmp_path / name)


@pytest.mark.parametrize("rows", [[("a", 0.5), ("b", 1.5)], [("a", "x"), ("b", "y")]])
def test_a_scored_file_without_rows_is_refused(tmp_path, rows):
    write_csv(tmp_path / "train.csv", ["text", "label"], rows)
    write_csv(tmp_path / "test.csv", ["text", "label"], [])
    refused("has no rows to train on or to score", tmp_path)


def test_a_file_that_changes_is_read_again_even_if_its_time_does_not(tmp_path):
    def read(word: str) -> TaskData:
        rows = [(f"{word} {i}", i % 2) for i in range(10)]
        path = write_csv(tmp_path / "t.csv", ["text", "label"], rows)
        os.utime(path, (0, 0))
        return load_task(path)

    assert {t.split()[0] for word in ("old", "new") for t in read(word).pool.texts} == {
        "old",
        "new",
    }


# --- Drawing training examples --------------------------------------------------------------------


def task_of(count: int, validation: int | None = None) -> TaskData:
    pool = Split([f"t{i}" for i in range(count)], [i % 2 for i in range(count)])
    given = Split([f"v{i}" for i in range(validation)], [0] * validation) if validation else None
    return TaskData("planted", pool, pool, ("a", "b"), "f1", given)


def test_draws_are_seeded_disjoint_and_of_the_asked_size():
    data = task_of(100)
    train, validation = data.draw(0, 50, 20)
    assert (len(train), len(validation)) == (50, 20)
    assert len({*train.texts, *validation.texts}) == 70
    assert data.draw(0, 50, 20) == (train, validation) and data.draw(1, 50, 20)[0] != train
    assert all(int(t[1:]) % 2 == y for t, y in zip(train.texts, train.labels, strict=True))
    assert data.draw(0, 20, 20)[0].texts == train.texts[:20]  # fewer are some of the same
    everything, none = data.draw(0, None, 0)
    assert sorted(everything.texts) == sorted(data.pool.texts) and none is None
    for sizes in ((81, 20), (None, 100), (1, 200)):
        with pytest.raises(HealingError, match=f"train_size is {sizes[0]} but task 'planted' leav"):
            data.draw(0, *sizes)
    given = task_of(10, validation=6)
    train, validation = given.draw(3, None, 4)
    assert len(train) == 10 and validation.texts == ["v0", "v1", "v2", "v3"]
    assert len(given.draw(3, 5, 100)[1]) == 6


def test_a_splits_hash_is_of_its_content():
    one = Split(["a", "b"], [0, 1])
    assert one.sha() == Split(["a", "b"], [0, 1]).sha()
    others = [
        Split(["a", "b"], [1, 0]), Split(["b", "a"], [0, 1]), Split(["a"], [0]),
        Split(["a", "b"], [0.0, 1.0]), Split([["a", "b"]], [0]), Split(["é", "b"], [0, 1]),
    ]  # fmt: skip
    assert len({one.sha(), *(s.sha() for s in others)}) == 7
