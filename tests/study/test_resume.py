"""A study that is killed again and again ends with the records of one that was not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers import processes, save_tiny_bert, study_process, tiny_study, write_planted_task

from healing_utils.base.records import Store
from healing_utils.study.study import STAGES

KILLS = int(os.environ.get("HEALING_KILLS", "3"))
WHILE_WRITING = ("half", "renaming")


def contents(run: Path) -> dict[str, bytes]:
    """Every record's bytes, without what tells the time: `times`, and the checksum over it."""
    found = {}
    for path in sorted((run / "records").rglob("*.json")):
        lines, inside = [], False
        for line in path.read_bytes().splitlines(keepends=True):
            if line.startswith(b' "times": {'):
                inside = True
            if not inside and not line.startswith(b' "checksum": '):
                lines.append(line)
            if inside and line.startswith(b" }"):
                inside = False
        found[str(path.relative_to(run))] = b"".join(lines)
    return found


def moments(rng: random.Random, kills: int) -> list[tuple[str, int]]:
    """When to die, each time: at least a third of the times while a record is being written."""
    written = max(1, -(-kills // 3))
    kinds = [rng.choice(WHILE_WRITING) for _ in range(written)]
    others = (*WHILE_WRITING, "recorded", "batch", "batch")
    kinds += [rng.choice(others) for _ in range(kills - written)]
    rng.shuffle(kinds)
    return [(kind, rng.randint(1, 7 if kind == "batch" else 2)) for kind in kinds]


def test_a_study_killed_at_any_moment_ends_with_the_same_records(tmp_path):
    model = save_tiny_bert(tmp_path / "model")
    task = write_planted_task(tmp_path / "task")
    # Enough cells that each of the deaths comes before the end.
    changes = {"seeds": list(range(1 + KILLS // 4))}
    run = {name: tmp_path / name for name in ("unbroken", "killed")}
    parameters = {n: tiny_study(run[n], model, task, **changes) for n in run}
    seed = random.SystemRandom().randrange(10**6)
    drawn = moments(random.Random(seed), KILLS)
    print(f"seed {seed}: {drawn}")
    context = processes()

    def exit_code(name, moment=None):
        process = context.Process(target=study_process, args=(parameters[name], moment))
        process.start()
        process.join(300)
        return process.exitcode

    assert exit_code("unbroken") == 0
    whole = contents(run["unbroken"])
    temporary = 0
    for moment in drawn:
        assert exit_code("killed", moment) == -signal.SIGKILL, (seed, moment)
        so_far = contents(run["killed"])
        assert len(so_far) < len(whole), "it had ended before it was killed"
        assert all(whole[name] == content for name, content in so_far.items()), (seed, moment)
        left = len(list(run["killed"].rglob(".*.tmp")))
        assert left == temporary + (moment[0] in WHILE_WRITING)
        temporary = left
        assert list((run["killed"] / "claims").iterdir())  # of the dead, taken over at once
    assert exit_code("killed") == 0
    assert contents(run["killed"]) == whole, seed
    assert not list((run["killed"] / "claims").iterdir())
    assert not list(run["killed"].rglob("*.corrupt-*"))
    # The comparison saw results, and left out nothing but the times.
    store = Store(run["killed"])
    for stage in STAGES:
        for record in store.records(stage):
            compared = whole[f"records/{stage}/{record['key']}.json"]
            assert set(record.pop("times")) == {"seconds", "finished"}
            assert json.loads(compared.replace(b",\n}", b"\n}")) == record


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Killed, it cannot tell them: they look for it themselves, and leave whole records."""
    model = save_tiny_bert(tmp_path / "model")
    task = write_planted_task(tmp_path / "task")
    # Many steps a cell, so that the worker has work to leave.
    parameters = tiny_study(
        tmp_path / "run", model, task, workers=2, seeds=list(range(6)), epochs=60.0, batch_size=4
    )
    context, store = processes(), Store(tmp_path / "run")
    process = context.Process(target=study_process, args=(parameters,))
    process.start()

    def claims() -> dict[int, Path]:
        found = {}
        for path in (tmp_path / "run" / "claims").glob("*.json"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                found[int(json.loads(path.read_text())["owner"].split(":")[1])] = path
        return found

    def wait(until) -> None:
        end = time.monotonic() + 120
        while not until():
            assert time.monotonic() < end
            time.sleep(0.02)

    wait(lambda: set(claims()) - {process.pid})
    (worker,) = set(claims()) - {process.pid}
    process.kill()
    process.join()
    wait(lambda: not alive(worker))
    assert worker not in claims()  # it gave its claim back
    assert not list((tmp_path / "run").rglob("*.corrupt-*"))
    assert len(list(store.records("baseline"))) < 6, "it had ended before it was killed"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
