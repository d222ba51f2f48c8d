"""How far a run is, as its folder says."""

import json
import os
import time

import pytest

from healing_utils.base.errors import HealingError
from healing_utils.run import status


def planned(run):
    """A run with four planned cells: one done, one claimed now, one claimed long ago, one open."""
    cells = [{"key": key, "name": f"cell {key}"} for key in "abcd"]
    files = {
        "plans/recovery.json": {"stage": "recovery", "cells": cells}, "parameters.json": {},
        "plans/baseline.json": {"cells": []}, "records/recovery/a.json": {},
        "plans/scans.json": {"cells": [{"key": "a", "name": "cell a", "stage": "recovery"}]},
        "claims/b.json": {"owner": "hostb:12:0", "since": time.time() - 42},
        "claims/c.json": {"owner": "hostc:12:0", "since": time.time() - 4000},
    }  # fmt: skip
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(content))
    os.utime(run / "claims" / "c.json", (time.time() - 4000,) * 2)


def test_status_shows_what_is_done_running_and_missing(tmp_path):
    assert "no stage has started" in status.describe(tmp_path)
    planned(tmp_path)
    assert [name for name, *_ in status.progress(tmp_path)] == ["baseline", "recovery", "scans"]
    text = status.describe(tmp_path)
    assert text.startswith(f"Run {tmp_path}\n") and "recovery     1 of 4 cells done" in text
    assert "scans" not in text and "all          1 of 4" in text  # a cell counts once
    assert "running  cell b (by hostb:12 for 42 s)" in text
    assert "cell c (by hostc:12 for 1 h 06 min, silent for 1 h 06 min: that run is gone)" in text
    assert "missing  cell d" in text and "notebooks done: none" in text


DEEP = "[" * 10**5
PLANS = ["", "null", "[]", DEEP, '{"cells": 5}', '{"cells": [5]}', '{"cells": [{"name": "a"}]}',
         '{"cells": [{"key": "../../victim", "name": "a"}]}', '{"cells": [{"key": {}}]}',
         '{"cells": [{"key": "a", "stage": "../a"}]}']  # fmt: skip
CLAIMS = ["", "null", "[]", DEEP, '{"owner": 5, "since": 1}', '{"owner": "a:1:2"}',
          '{"owner": "a:1:2", "since": NaN}', '{"owner": "a:1:2", "since": -1e999}']  # fmt: skip


@pytest.mark.parametrize(
    ("name", "texts", "said"),
    [("plans/probing", PLANS, "probing      its plan cannot be read"),
     ("claims/d", CLAIMS, "cell d (claimed, by whom cannot be read)")],
)  # fmt: skip
def test_files_that_are_none_of_ours_are_named(tmp_path, name, texts, said):
    planned(tmp_path)
    for text in texts:
        (tmp_path / f"{name}.json").write_text(text)
        shown = status.describe(tmp_path)
        assert said in shown and "recovery     1 of 4 cells done" in shown, text


def test_the_newest_run_is_the_one_written_to_last(tmp_path, monkeypatch):
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path))
    with pytest.raises(HealingError, match="no runs"):
        status.find_run()
    for name, age in (("quick", 10), ("minilm", 1000)):
        planned(tmp_path / name)
        for path in (tmp_path / name, *(tmp_path / name).rglob("*")):
            os.utime(path, (time.time() - age,) * 2)
    assert status.find_run().name == "quick"
    (tmp_path / "minilm" / "records" / "recovery" / "d.json").write_text("{}")
    assert status.find_run().name == "minilm"
    assert status.find_run("quick") == tmp_path / "quick"
    (tmp_path / "mine" / "plans").mkdir(parents=True)  # a study's own, by a library's user
    os.utime(tmp_path / "mine", (time.time() + 1,) * 2)  # the disk's clock may tick slowly
    assert status.find_run("mine") == status.find_run() == tmp_path / "mine"
    with pytest.raises(HealingError, match="Did you mean 'minilm'"):
        status.find_run("minilmm")
