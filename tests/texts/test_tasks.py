"""Tasks: what the registry says, what a local file may look like, and what is refused and how."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import socket
import time
import tracemalloc

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import planted_texts, write_planted_task
from huggingface_hub import constants

from healing_utils import organism
from healing_utils.base import hub
from healing_utils.base.errors import HealingError
from healing_utils.texts import tasks
from healing_utils.texts.tasks import Split, TaskData, load_task

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


@pytest.fixture
def fake_hub(monkeypatch):
    """Data sets by (name, config); returns what was asked for."""
    glue = {"train": table(30), "validation": table(10), "test": table(12, secret=True)}
    known = {
        ("stanfordnlp/sst2", None): glue,
        ("nyu-mll/glue", "cola"): glue,
        ("someone/hidden", None): glue,
        ("someone/unlabelled", None): {"train": glue["train"], "test": glue["test"]},
        ("someone/only-test", "small"): {"test": glue["test"]},
    }
    asked = []

    def load_dataset(name, config=None, revision=None, **_):
        asked.append((name, config, revision))
        if (name, config) not in known:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (ConnectionError)\nmore")
        return datasets.DatasetDict(known[name, config])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(tasks, "reach_hub", lambda *_: None)
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


def test_where_all_test_labels_are_hidden_the_validation_split_is_scored(fake_hub):
    data = load_task("someone/hidden")
    assert (len(data.pool), len(data.test), data.validation) == (30, 10, None)
    assert data.unused == ("someone/hidden, test",)
    refused("30 labelled rows to train on, 0 to score .*: name a folder with train.csv and a "
            "test.csv or validation.csv", "someone/unlabelled")  # fmt: skip


def test_without_a_network_a_name_that_is_no_folder_is_refused_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setattr(hub, "getproxies", lambda: {"no": "localhost"})
    start = time.monotonic()
    refused("no such folder is here: 127.0.0.1 cannot be reached .*refused", "reviews/train")
    assert time.monotonic() - start < 5
    (tmp_path / "datasets--reviews--train").mkdir()  # of what is in the cache nothing is asked
    hub.reach_hub("datasets", "reviews/train")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        hub.reach_hub("models", "owner/name")


def test_names_that_stand_for_nothing(fake_hub, tmp_path):
    refused("has splits test: need train and test or validation", "someone/only-test:small")
    refused("no such folder is here: Couldn't reach 'someone/else' .* more", "someone/else")
    refused("unknown task.*'nyu-mll/glue'; allowed: cola, mrpc, rte", "nyu-mll/glue")
    refused("unknown task.*'sst'.*Did you mean 'sst2'", "sst")
    for missing in ("missing.csv", "missing folder", "x" * 5000, "a\0b.csv"):
        refused("no such file", tmp_path / missing)
    os.mkfifo(tmp_path / "pipe.csv")  # which would be waited for
    refused("no such file, or not a regular one: .*pipe.csv", tmp_path / "pipe.csv")
    (tmp_path / "notes.txt").write_text("text,label\na,0\n")
    refused(r"unknown file type.*'\.txt'; allowed: \.csv", tmp_path / "notes.txt")
    refused("folder .* holds pipe.csv: need one train.csv", tmp_path)


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
    assert (data.validation, data.unused) == (None, ())
    for name in ("validation", "valid", "val", "dev"):
        (folder / "test.csv").rename(folder / f"{name}.csv")
        assert load_task(str(folder)).test == data.test
        (folder / f"{name}.csv").rename(folder / "test.csv")
    write_csv(folder / "test.csv", ["text", "label"], [("w1", "good"), ("w2", "lukewarm")])
    refused("class 'lukewarm' has 1 of the scored examples but none to train on", folder)
    write_csv(folder / "test.csv", ["texts", "label"], [("w1", "good")])
    refused("unknown column of .*test.csv 'text'; allowed: texts, label", folder)


def test_every_table_of_a_folder_is_taken_or_named_as_unused(tmp_path):
    folder = write_planted_task(tmp_path / "task", train=20, test=8)
    rows = [(f"v{i}", "bad" if i < 15 else "good") for i in range(30)]
    write_csv(folder / "valid.csv", ["text", "label"], rows)
    write_csv(folder / "dev.csv", ["text", "label"], rows)
    write_csv(folder / "more.csv", ["note"], [("x",)])
    data = load_task(str(folder))
    assert len(data.pool) == 20 and sorted(data.validation.texts) == sorted(t for t, _ in rows)
    assert set(data.draw(0, None, 10)[1].labels) == {0, 1}  # though the file is sorted
    assert [path.rsplit("/")[-1] for path in data.unused] == ["more.csv", "dev.csv"]
    write_csv(folder / "test.csv", ["text", "label"], [("hidden", ""), ("too", "")])
    assert sorted(load_task(str(folder)).test.texts) == sorted(data.validation.texts)
    write_csv(folder / "test.csv", ["text", "label"], [])  # cut by a full disk, say
    refused("test.csv: it has no rows", folder)
    (folder / "train.jsonl").write_text("{}")
    refused("holds .*train.csv, train.jsonl, valid.csv: need one train.csv", folder)


def test_files_that_count_their_classes_differently_mean_the_same(tmp_path):
    table(30).to_parquet(tmp_path / "train.parquet")
    table(20).to_parquet(tmp_path / "test.parquet")
    data = load_task(str(tmp_path))
    turned = datasets.ClassLabel(names=["positive", "negative"])
    table(20, turned).to_parquet(tmp_path / "test.parquet")
    assert load_task(str(tmp_path)).test.labels == [1 - label for label in data.test.labels]
    for other in (datasets.ClassLabel(names=["bad", "good"]), datasets.Value("int64")):
        table(20, other).to_parquet(tmp_path / "test.parquet")
        refused("class '(bad|0)' has .* none to train on", tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "classes"),
    [
        ("-1 1", "1", "-1 1"),  # not a missing label: only where classes have names
        ("2 10 1", "10", "1 2 10"),
        ("yes no", "no", "no yes"),
        ("0 1", "0.0 1.0", "0 1"),
        ("0.0 1.0", "0 1", "0 1"),
        ("0 1 other", "0 1", "0 1 other"),
        ("NA None null", "null NA", "NA None null"),
        ("True False", "True", "False True"),
        ("0.5 1.0", "0 1", ""),
    ],
)
def test_labels_mean_the_same_in_every_file(tmp_path, train, test, classes):
    for name, labels in (("train", train), ("test", test)):
        rows = [(f"t{i}", label) for i, label in enumerate(labels.split())]
        write_csv(tmp_path / f"{name}.csv", ["text", "label"], rows)
    data = load_task(str(tmp_path))
    assert data.classes == tuple(classes.split())
    for labels, part in ((train, data.pool), (test, data.test)):
        if classes:
            found = [data.classes[i] for i in part.labels]
            assert found == [label.removesuffix(".0") for label in labels.split()]
        else:
            assert part.labels == list(map(float, labels.split()))


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["no", "yes"] * 6).dictionary_encode(),
        pa.array(["no", "yes"] * 6, pa.large_string()),
        pa.array([False, True] * 6),
        pa.array([3, 5] * 6, pa.uint8()),
    ],
    ids=lambda array: str(array.type),
)
def test_parquet_columns_of_any_type_hold_labels(tmp_path, array):
    texts = pa.array([f"{value}" for value in array.to_pylist()], pa.large_string())
    pq.write_table(pa.table({"text": texts, "label": array}), tmp_path / "t.parquet")
    data = load_task(str(tmp_path / "t.parquet"))
    assert [data.classes[label] for label in data.pool.labels] == data.pool.texts


@pytest.mark.parametrize("stored", [True, False])  # as a column of categories, or of strings
def test_a_small_parquet_file_that_is_huge_in_memory_is_refused_in_time(tmp_path, stored):
    text = pa.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), ["x" * 100_000])
    columns = pa.table({"text": text, "label": np.arange(100_000) % 2})  # 10 GB
    pq.write_table(columns, tmp_path / "t.parquet", store_schema=stored)
    tracemalloc.start()
    refused("cannot read .*t.parquet: texts of 10,000,000,000 characters: keep fewer rows",
            tmp_path / "t.parquet")  # fmt: skip
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert pa.total_allocated_bytes() < 100 << 20


def test_a_parquet_file_is_not_unpacked_beyond_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "MOST_TEXT", 1 << 20)
    texts = [f"{number} " + "x" * 1000 for number in range(2000)]  # all different: 2 MB
    columns = pa.table({"text": texts, "label": np.arange(2000) % 2})
    pq.write_table(columns, tmp_path / "t.parquet", use_dictionary=False, compression="zstd")
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_: pytest.fail("it was unpacked"))
    refused("cannot read .*t.parquet: column 'text' is over 1 MiB", tmp_path / "t.parquet")


def test_columns_may_be_called_anything_but_the_same(tmp_path):
    rows = [(f"a{i}", f"b{i}", i % 2, "c") for i in range(10)]
    path = write_csv(tmp_path / "t.csv", ["No", "1", "1234567", "tweet #"], rows)
    data = load_task(path, text=("No", "1"), label="1234567")
    assert data.pool.texts[0][1] == data.pool.texts[0][0].replace("a", "b")
    assert set(load_task(path, text="tweet #", label="1234567").pool.texts) == {"c"}
    path = write_csv(tmp_path / "twice.csv", ["text", "text", "label", "x"], rows)
    refused("twice.csv has 2 columns named 'text'", path)


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
    refused("no text column found.*'utterance', 'mood'.*text_column", path)
    refused("no label column found.*'utterance', 'mood'.*label_column", path, text="utterance")


def test_numbers_with_a_fraction_are_regression(tmp_path):
    rows = [(f"text {i}", i / 4 - 1) for i in range(12)]  # -1.0 is a number like the others
    path = write_csv(tmp_path / "t.csv", ["text", "score"], rows)
    data = load_task(path)
    assert data.regression and data.num_labels == 1 and data.metric == "spearman"
    assert sorted(data.pool.labels + data.test.labels) == [i / 4 - 1 for i in range(12)]
    refused("'f1' does not fit.*regression", path, metric="f1")
    refused("unknown metric 'spearmen'.*'spearman'", path, metric="spearmen")


def test_cells_keep_what_csv_files_are_written_for(tmp_path):
    texts = ["two\nlines", "a, b", 'say "so"', "10,000", "x" * 200_000, "caf\u00e9", '5" long']
    path = write_csv(
        tmp_path / "t.csv", ["text", "label"], [(t, i % 2) for i, t in enumerate(texts)]
    )
    once = load_task(path)
    assert sorted(once.pool.texts + once.test.texts) == sorted(texts)
    for change in (lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\r\n", b"\n")):
        (tmp_path / "t.csv").write_bytes(change((tmp_path / "t.csv").read_bytes()))
        assert load_task(path) == once


def rows(text: str) -> bytes:
    return b"text,label\n" + text.encode("latin-1")


def named(*labels: int) -> bytes:
    """A Parquet file as the hub writes it, with names for two classes."""
    names = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})}
    pq.write_table(pa.table({"text": ["x"] * len(labels), "label": labels})
                   .replace_schema_metadata(names), file := io.BytesIO())  # fmt: skip
    return file.getvalue()


OBJECT = b'{"text": "a", "label": 0}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # Rows as a table shows them, with the header and blank ones.
        ("t.csv", rows("a,0\n  ,1\nc,0\n"), "column 'text' holds no text in row 3"),
        ("t.csv", rows("a,0\nb,1\n\nnull,0\n"), "column 'text' holds no text in row 5: 'null'"),
        ("t.csv", rows("1,0\n2,1\n3,0\n"), "column 'text' holds no text in row 2"),
        ("t.csv", rows("a,0\nb,1\nc,NA\n"), "1 of 3 labels in column 'label' .* first in row 4"),
        ("t.csv", rows("a,yes\nb,no\nc, \n"), "1 of 3 labels .* the first in row 4"),
        ("t.csv", rows("a,0.5\nb,inf\nc,1e999\n"), "2 of 3 labels .* infinite, the first in row 3"),
        ("t.csv", rows("a,\nb,\n"), r"0 labelled rows to train on, 0 .*'label'\): name a folder"),
        ("t.csv", rows("a,0\n"), "0 labelled rows to train on, 1 to score"),
        ("t.csv", rows("a,3\nb,3\n"), "column 'label' of task .*: 1 classes: need 2 to 10,000"),
        ("t.csv", rows("rare,odd\n" + "t,a\nt,b\n" * 150), "class 'odd' has 1 of the scored"),
        ("t.csv", rows("a,b,0\nc,d,1\n"), "row 2 has 3 cells, the header 2"),  # none is an index
        ("t.csv", rows("a,0\n\nb\n"), "row 4 has 1 cells"),
        ("t.csv", rows('a,0\nb,"1\nc,0\n'), "line 4: unexpected end of data"),
        ("t.csv", rows('a,0\n"he \\"said\\"",1\n'), "line 3: ',' expected after"),
        ("t.csv", rows("caf\xe9,0\n"), "cannot read .*'utf-8' codec"),
        ("wide.csv", "text,label\na,0\n".encode("utf-16"), "cannot read .*'utf-8' codec"),
        ("packed.csv", gzip.compress(rows("a,0\n"), mtime=0), "cannot read .*'utf-8' codec"),
        ("packed.csv.gz", gzip.compress(rows("a,0\n"), mtime=0), "unknown file type .*'.gz'"),
        ("t.tsv", b"text\tlabel\na\t0\n", "unknown file type .*'.tsv'"),
        ("empty.csv", b"", "no text column found in .*, which has none"),
        ("empty.jsonl", b"", "no text column found in .*, which has none"),
        ("empty.parquet", b"", "cannot read"),
        ("latin1.jsonl", OBJECT + b'{"text": "\xe9"}', "cannot read .*'utf-8' codec"),
        ("wide.jsonl", OBJECT.decode().encode("utf-16-le"), "line 1 is not text in UTF-8"),
        ("half.jsonl", OBJECT + b'{"text": "b", "lab', "cannot read .*: line 2 column"),
        ("mixed.jsonl", OBJECT + b'{"text": "b", "label": "x"}', "'label' holds int and str: need"),
        ("lists.jsonl", b'{"text": "a", "label": [0, 1]}\n' * 8, "column 'label' holds list: need"),
        ("mixture.json", b"[" + OBJECT + b", 3]", "it holds other things than objects"),
        ("twice.jsonl", b'{"text": "a", "text": "b", "label": 0}', "two values of one name"),
        ("surrogate.json", b'[{"text": "\\ud800", "label": 0}]', "surrogates not allowed"),
        ("2 of a, b.parquet", named(0, 1, 2), "label 2 of column 'label' is none of its 2 classes"),
        ("two.parquet", named(2, 2, 2), "label 2 of column 'label' is none of its 2 classes"),
        ("hidden.parquet", named(0, 1, -1), "1 of 3 labels .* the first in row 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert name in refused(message, tmp_path / name)


def test_a_file_that_changes_is_read_again_even_if_its_time_does_not(tmp_path):
    for word in ("old", "new"):
        rows = [(f"{word} {i}", i % 2) for i in range(10)]
        path = write_csv(tmp_path / "t.csv", ["text", "label"], rows)
        os.utime(path, (0, 0))
        assert {text.split()[0] for text in load_task(path).pool.texts} == {word}


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
    # What does not fit beside the training examples is given up, but for a tenth of the pool.
    for sizes, there in {(81, 20): (81, 19), (None, 100): (80, 20), (None, 99): (1, 99),
                         (90, 500): (90, 10), (95, 5): (95, 5)}.items():  # fmt: skip
        train, validation = data.draw(0, *sizes)
        assert (len(train), len(validation)) == there == data.sizes(*sizes)
        assert len({*train.texts, *validation.texts}) == sum(there)
    for sizes, most in {(91, 20): 90, (96, 5): 95, (0, 20): 90, (101, 0): 100}.items():
        match = f"train_size is {sizes[0]} but task 'planted' has 100 .* 1 to {most} beside val"
        with pytest.raises(HealingError, match=match):
            data.draw(0, *sizes)
    assert [len(part) for part in task_of(4).draw(0, None, 500)] == [3, 1]
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
