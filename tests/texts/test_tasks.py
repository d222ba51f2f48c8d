"""Tasks: what the registry says, what a local file may look like, and what is refused and how."""

from __future__ import annotations

import csv
import json

import datasets
import pandas as pd
import pytest
from helpers import planted_texts, write_planted_task

from healing_utils import organism
from healing_utils.base.errors import HealingError
from healing_utils.texts.tasks import REGISTRY, Split, TaskData, load_task


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` prepares from a test's files goes away with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


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


# --- The registry ---------------------------------------------------------------------------------


def test_the_registry_scores_what_has_public_labels():
    assert not set(REGISTRY) & set(organism.TASKS)
    scored = {name: task.scored for name, task in REGISTRY.items()}
    public = ("imdb", "ag_news", "emotion", "dbpedia")
    secret = ("sst2", "cola", "mrpc", "rte", "qnli", "qqp", "stsb")  # the test split's labels are
    assert scored == {
        **dict.fromkeys(public, "test"), **dict.fromkeys(secret, "validation"),
        "mnli": "validation_matched", "twitter_financial": "validation",  # has no test split
    }  # fmt: skip
    other = {name: task.metric for name, task in REGISTRY.items() if task.metric != "f1"}
    assert other == {"cola": "matthews", "stsb": "spearman"}
    pairs = {name for name, task in REGISTRY.items() if len(task.text) == 2}
    assert pairs == {"mrpc", "rte", "qnli", "qqp", "mnli", "stsb"}


@pytest.fixture
def fake_hub(monkeypatch):
    """Data sets by (name, config), with the columns and features of the real ones."""
    label = datasets.ClassLabel(names=["negative", "positive"])
    text, number = datasets.Value("string"), datasets.Value("int32")
    features = datasets.Features({"idx": number, "sentence": text, "label": label})

    def split(count, secret=False):
        texts, labels = planted_texts(count, seed=count)
        labels = [-1] * count if secret else labels
        rows = {"idx": list(range(count)), "sentence": texts, "label": labels}
        return datasets.Dataset.from_dict(rows, features=features)

    glue = {"train": split(30), "validation": split(10), "test": split(12, secret=True)}
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
    assert data.pool.texts == planted_texts(30, seed=30)[0]


def test_secret_labels_and_missing_splits_are_refused(fake_hub):
    refused("12 of 12 scored labels in column 'label' are missing", "someone/unlabelled")
    refused("has splits test: need train and test or validation", "someone/only-test:small")
    refused("from the hub: Couldn't reach 'someone/else'", "someone/else")
    refused("from the hub: Couldn't reach 'nyu-mll/glue'", "nyu-mll/glue")  # which of the seven?


def test_names_that_stand_for_nothing(tmp_path, offline):
    refused("cannot load data set 'someone/nothing'", "someone/nothing")
    refused("unknown task.*'sst'.*Did you mean 'sst2'", "sst")
    refused("no such file: .*missing.csv", tmp_path / "missing.csv")
    (tmp_path / "notes.txt").write_text("text,label\na,0\n")
    refused(r"unknown file type.*'\.txt'; allowed: \.csv", tmp_path / "notes.txt")
    refused("holds no train.csv", tmp_path)
    folder = write_planted_task(tmp_path / "task")
    (folder / "test.csv").rename(folder / "test.jsonl")
    refused("different types: csv, json", folder)


def test_the_organisms_tasks_come_with_their_own_splits(monkeypatch):
    name = sorted(organism.TASKS)[0]
    texts = {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}
    monkeypatch.setattr(
        organism, "sentence_task", lambda _: {s: (t, [0] * len(t)) for s, t in texts.items()}
    )
    data = load_task(name)
    assert (data.pool.texts, data.validation.texts, data.test.texts) == (["a", "b"], ["c"], ["d"])
    assert data.classes == tuple(organism.TASKS[name]) and data.metric == "f1"
    refused("'spearman' does not fit .*classification", name, metric="spearman")
    refused("has no columns or revisions to name", name, text="text")


# --- Local files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_one_file_is_split_the_same_way_always(tmp_path, suffix):
    texts, labels = planted_texts(50)
    frame = pd.DataFrame({"id": range(50), "review": texts, "sentiment": labels})
    path = tmp_path / f"mine.{suffix}"
    {
        "csv": lambda: frame.to_csv(path, index=False),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "parquet": lambda: frame.to_parquet(path),
    }[suffix]()
    data, again = load_task(str(path)), load_task(str(path))
    assert data == again
    assert (len(data.pool), len(data.test)) == (40, 10)
    assert sorted(data.pool.texts + data.test.texts) == sorted(texts)
    by_text = dict(zip(texts, labels, strict=True))
    assert all(by_text[t] == y for t, y in zip(data.test.texts, data.test.labels, strict=True))
    assert data.classes == ("0", "1") and data.metric == "f1" and not data.regression
    if suffix == "parquet":
        path.write_bytes(path.read_bytes()[:-20])
        refused(r"cannot read .*mine\.parquet: ", path)


def test_a_folder_of_train_and_test_keeps_its_splits_and_names_its_classes(tmp_path):
    folder = write_planted_task(tmp_path / "task", train=20, test=8)
    data = load_task(str(folder))
    assert data.pool.texts == planted_texts(20)[0]
    assert data.test.texts == planted_texts(8, seed=1000)[0]
    assert data.classes == ("bad", "good")  # by the alphabet, whatever the file's order
    planted = planted_texts(20)[1]  # there, 0 is good
    assert data.pool.labels == [1 - y for y in planted]
    sized = load_task(str(folder), test_size=3)
    assert len(sized.test) == 3 and set(sized.test.texts) <= set(data.test.texts)
    assert sized.test == load_task(str(folder), test_size=3).test
    write_csv(folder / "test.csv", ["text", "label"], [("w1 good", "good"), ("w2", "lukewarm")])
    refused("'lukewarm' is scored but never occurs in training", folder)


def test_columns_are_found_or_named(tmp_path):
    rows = [(f"a{i}", f"b{i}", f"c{i}", i % 2, i % 3) for i in range(12)]
    path = write_csv(tmp_path / "t.csv", ["premise", "hypothesis", "text", "label", "kind"], rows)
    pairs = load_task(path)
    first = pairs.pool.texts[0]
    assert first[0][0] == "a" and first[1] == "b" + first[0][1:]
    named = load_task(path, text="text", label="kind")
    assert named.pool.texts[0][0] == "c" and len(named.classes) == 3
    assert load_task(path, text=("text", "premise")).pool.texts[0][0][0] == "c"
    refused("'hypotesis'.*Did you mean 'hypothesis'", path, text=("premise", "hypotesis"))
    refused("label column.*'lable'.*Did you mean 'label'", path, label="lable")
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
        ([("a", 0), ("", 1), ("c", 0), ("d", 1), ("e", 1)], "column 'text' holds no text in row"),
        ([("a", 0), ("  ", 1), ("c", 0), ("d", 1), ("e", 1)], "column 'text' holds no text in row"),
        ([(i, i % 2) for i in range(10)], "column 'text' holds no text in row"),
        # In a CSV file these words stand for missing values: refused rather than guessed.
        ([(f"t{i}", ("for", "NA")[i % 2]) for i in range(10)], "labels in column 'label'"),
        ([(("null", "a")[i % 2], i % 2) for i in range(10)], "column 'text' holds no text in row"),
        ([("a", 0.5), ("b", 1.5), ("c", ""), ("d", 1), ("e", 0)], "labels in column 'label'"),
        ([(f"t{i}", 3) for i in range(10)], "only one class"),
        ([("a", 0)], "1 rows: too few"),
        ([], "0 rows: too few|cannot read"),
    ],
)
def test_unusable_rows_are_refused(tmp_path, rows, message):
    refused(message, write_csv(tmp_path / "t.csv", ["text", "label"], rows))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", b""),
        ("empty.jsonl", b""),
        ("empty.parquet", b""),
        ("latin1.csv", "text,label\ncafé,0\nthé,1\n".encode("latin-1") * 3),
        ("half.jsonl", b'{"text": "a", "label": 0}\n{"text": "b", "lab'),
        ("binary.csv", bytes(range(256)) * 4),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in refused("cannot read|column", tmp_path / name)


def test_several_labels_a_text_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{i}", "label": [0, 1]}) for i in range(8)))
    refused("'label' holds no single label a text", path)


def test_line_endings_and_a_byte_order_mark_do_not_matter(tmp_path):
    texts, labels = planted_texts(10)
    lines = ["text,label"] + [f'"{t}",{y}' for t, y in zip(texts, labels, strict=True)]
    plain = "\n".join(lines) + "\n"
    contents = {
        "plain": plain.encode(),
        "mixed": "".join(line + ("\r\n", "\n")[i % 2] for i, line in enumerate(lines)).encode(),
        "windows": plain.replace("\n", "\r\n").encode(),
        "bom": b"\xef\xbb\xbf" + plain.encode(),
        "no-newline-at-the-end": plain.rstrip().encode(),
    }
    loaded = []
    for name, content in contents.items():
        (tmp_path / f"{name}.csv").write_bytes(content)
        data = load_task(str(tmp_path / f"{name}.csv"))
        loaded.append((data.pool, data.test, data.classes))
    assert all(one == loaded[0] for one in loaded)
    assert sorted(loaded[0][0].texts + loaded[0][1].texts) == sorted(texts)


def test_a_file_that_changes_is_read_again(tmp_path):
    def write(word):
        rows = [(f"{word} {i}", i % 2) for i in range(10)]
        return write_csv(tmp_path / "t.csv", ["text", "label"], rows)

    before = load_task(write("old"))
    after = load_task(write("new"))
    assert {t.split()[0] for t in after.pool.texts} == {"new"}
    assert before.pool.sha() != after.pool.sha()


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
    assert data.draw(0, 50, 20) == (train, validation)
    assert data.draw(1, 50, 20)[0] != train
    assert all(int(t[1:]) % 2 == y for t, y in zip(train.texts, train.labels, strict=True))
    assert data.draw(0, 20, 20)[0].texts == train.texts[:20]  # fewer are some of the same
    everything, none = data.draw(0, None, 0)
    assert sorted(everything.texts) == sorted(data.pool.texts) and none is None


def test_validation_examples_of_the_source_are_used_where_there_are_some():
    data = task_of(10, validation=6)
    train, validation = data.draw(3, None, 4)
    assert len(train) == 10 and validation.texts == ["v0", "v1", "v2", "v3"]
    assert len(data.draw(3, 5, 100)[1]) == 6


@pytest.mark.parametrize(("train", "validation"), [(81, 20), (None, 100), (1, 200)])
def test_more_examples_than_there_are_is_an_error(train, validation):
    with pytest.raises(HealingError, match=f"train_size is {train} but task 'planted' leaves"):
        task_of(100).draw(0, train, validation)


def test_a_splits_hash_is_of_its_content():
    one = Split(["a", "b"], [0, 1])
    assert one.sha() == Split(["a", "b"], [0, 1]).sha()
    others = [
        Split(["a", "b"], [1, 0]), Split(["b", "a"], [0, 1]), Split(["a"], [0]),
        Split(["a", "b"], [0.0, 1.0]), Split([["a", "b"]], [0]), Split(["é", "b"], [0, 1]),
    ]  # fmt: skip
    assert len({one.sha(), *(s.sha() for s in others)}) == 7
