"""How far a run is, as its folder says."""

from __future__ import annotations

import json
import os
import time

import pytest

from healing_utils.base.errors import HealingError
from healing_utils.run import status


def planned(run):
    """A run with four planned cells: one done, one claimed now, one claimed long ago, one open."""
    for folder in ("plans", "records/recovery", "claims", "notebooks"):
        (run / folder).mkdir(parents=True)
    cells = [{"key": key, "name": f"cell {key}"} for key in "abcd"]
    (run / "plans" / "recovery.json").write_text(json.dumps({"stage": "recovery", "cells": cells}))
    (run / "plans" / "baseline.json").write_text(json.dumps({"stage": "baseline", "cells": []}))
    (run / "records" / "recovery" / "a.json").write_text("{}")
    for key, age in (("b", 42), ("c", 4000)):
        path = run / "claims" / f"{key}.json"
        path.write_text(json.dumps({"owner": f"host{key}:12:0", "since": time.time() - age}))
        os.utime(path, (time.time() - age, time.time() - age))
    (run / "parameters.json").write_text("{}")


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
