"""A study that is killed again and again ends with the records of one that was not."""

from __future__ import annotations

import os
import random
import signal

from helpers import contents, processes, study_process

from healing_utils.study.cells import STAGES
from healing_utils.study.study import Study

KILLS = int(os.environ.get("HEALING_KILLS", "4"))
WHILE_WRITING = ("half", "renaming")
MOMENTS = (*WHILE_WRITING, "recorded", "step")


def moments(rng: random.Random) -> list[tuple[str, int]]:
    """When to die, each time: at every moment at least once, where there are enough of them."""
    kinds = [*rng.sample(MOMENTS, len(MOMENTS)), *rng.choices(MOMENTS, k=KILLS)][:KILLS]
    return [(kind, rng.randint(1, 7 if kind == "step" else 2)) for kind in kinds]


def test_a_study_killed_at_any_moment_ends_with_the_same_records(finished, tiny, tmp_path):
    # Enough cells that each of the deaths comes before the end.
    study = tiny(run=tmp_path / "run", seeds=list(range(1 + KILLS // 4)))
    unbroken = finished.study if KILLS < 8 else Study({**study.parameters, "run": str(tmp_path)})
    for stage in STAGES:
        unbroken.run(stage)
    planned = {cell.key for stage in STAGES for cell in study.plan(stage)}
    whole = {n: r for n, r in contents(unbroken.run_folder).items() if r["key"] in planned}
    seed = random.SystemRandom().randrange(10**6)
    drawn = moments(random.Random(seed))
    print(f"seed {seed}: {drawn}")
    run, context = study.run_folder, processes()

    def exit_code(moment=None):
        process = context.Process(target=study_process, args=(study.parameters, moment))
        process.start()
        process.join(300)
        return process.exitcode

    for moment in drawn:
        assert exit_code(moment) == -signal.SIGKILL, (seed, moment)
        so_far = contents(run)
        assert len(so_far) < len(whole), "it had ended before it was killed"
        assert all(whole[name] == record for name, record in so_far.items()), (seed, moment)
        # What those before it left is swept.
        assert len(list(run.rglob(".*.tmp"))) == (moment[0] in WHILE_WRITING)
        assert list((run / "claims").iterdir())  # of the dead, taken over at once
    assert exit_code() == 0
    assert contents(run) == whole, seed
    assert not list((run / "claims").iterdir()) and not list(run.rglob("*.corrupt-*"))


def test_two_processes_share_the_work_and_compute_each_cell_once(finished, tiny, tmp_path):
    study = tiny(run=tmp_path / "run")
    context, logs = processes(), [str(tmp_path / f"log-{i}") for i in range(2)]
    both = [
        context.Process(target=study_process, args=(study.parameters, None, log)) for log in logs
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0]
    shares = [open(log).read().split() for log in logs]
    cells = [cell.key for stage in STAGES for cell in study.plan(stage)]
    assert sorted(shares[0] + shares[1]) == sorted(cells)
    assert shares[0] and shares[1], "one did everything: the test saw nothing"
    ours = contents(finished.study.run_folder)
    assert all(ours[name] == record for name, record in contents(study.run_folder).items())
    assert not list((study.run_folder / "claims").iterdir())
