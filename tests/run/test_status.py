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
    assert [name for name, *_ in status.progress(tmp_path)] == ["baseline", "recovery"]
    text = status.describe(tmp_path)
    assert "recovery     1 of 4 cells done" in text
    assert "running  cell b (by hostb:12 for 42 s)" in text
    assert "cell c (by hostc:12 for 1 h 06 min, silent for 1 h 06 min: that run is gone)" in text
    assert "missing  cell d" in text and "notebooks done: none" in text
    # Files that are being written, or are none of ours.
    for name, content in (("probing", '{"stage": "pro'), ("neurons", "[]")):
        (tmp_path / "plans" / f"{name}.json").write_text(content)
    (tmp_path / "claims" / "d.json").write_text("")
    assert "cell d (claimed, by whom cannot be read)" in status.describe(tmp_path)


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
    with pytest.raises(HealingError, match="Did you mean 'minilm'"):
        status.find_run("minilmm")
