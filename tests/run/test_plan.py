"""What a study takes: counts against cases by hand and its own records; time within reason."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import random_examples, save_tiny_bert, tiny_study, write_planted_task
from test_linguistics import write_corpus

from healing_utils import cli
from healing_utils.healing.models import load_classifier
from healing_utils.healing.training import fine_tune
from healing_utils.probing.probes import CORRELATED
from healing_utils.run import plan, runner
from healing_utils.study import study
from healing_utils.study.study import Study

# Of `save_tiny_bert`'s layers: four products of 32 x 32, two of 32 x 48, two norms, all biases.
LAYER = 4 * (32 * 32 + 32) + (32 * 48 + 48) + (48 * 32 + 32) + 4 * 32
FACTOR = 3.0  # generous: these cells take a tenth of a second, profiles' from one second up
SCANS = {
    "recipes": {"recipe": ["drop", "distillation"], "levels": "1/3", "seeds": 0, "broken": False},
    "price": {"state": ["intact", "scratch"], "train_size": 16, "epochs": 1.3, "seeds": 0},
    "shown": {"state": "broken", "kind": "zero", "sides": "bottom", "levels": "1/3", "seeds": 0},
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    corpus = write_corpus(folder / "cues-train.tsv", 30)
    write_corpus(folder / "cues-test.tsv", 10, seed=1)
    return tiny_study(
        folder / "run", save_tiny_bert(folder / "model"), write_planted_task(folder / "task"),
        seeds=[0], scans=SCANS, corpus=str(corpus), column=["1"], probe_levels=["1/3"],
        probe_train=25, probe_test=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def before(parameters):
    """The plan of a study of which nothing is done."""
    return plan.make(Study(parameters))


@pytest.fixture(scope="module")
def finished(parameters, before):
    """The study, run to its end after it was planned; its seconds are the processor's, as in the
    plan, since other things that the machine does are not tested."""
    planned = Study(parameters)
    plan.keep(before, planned.run_folder)
    clock = SimpleNamespace(**vars(time) | {"perf_counter": time.process_time})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "time", clock)
        for name in plan.STAGES:
            planned.run(name, plan=name != "networks")
    return planned


def stage(found, name):
    return next(s for s in found.stages if s.name == name)


def work(found, name):
    """Cells of a stage with their work, by the cell's name."""
    return {cell.name.split(" ", 1)[1]: work for cell, work, _ in stage(found, name).left}


# --- Counts ---------------------------------------------------------------------------------------


def test_operations_of_a_forward_pass_are_counted_by_hand(parameters):
    shape = plan.Counts(Study(parameters)).shape(parameters["model"])
    assert (shape.layers, shape.hidden, shape.weights) == (3, 32, 3 * LAYER)
    # Two texts, of 3 and 5 tokens; padding the first to 5 is not counted.
    assert shape.forward(np.array([3, 5])) == 2 * 3 * LAYER * 8 + 4 * 32 * 3 * (9 + 25)
    assert shape.forward(np.array([3, 5]), layers=2) == 2 * 2 * LAYER * 8 + 4 * 32 * 2 * (9 + 25)
    model = load_classifier(parameters["model"], 2, 0)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("epochs", [1, 2, 0.4, 1.3])
def test_trained_tokens_are_those_of_the_loop(parameters, epochs):
    examples = random_examples(21, ids=(5, 40))
    model = load_classifier(parameters["model"], 2, 0)
    done = fine_tune(model, examples, epochs=epochs, batch_size=4, seed=3, device="cpu")
    lengths, steps = plan.trained_lengths(examples.lengths, epochs, 4, 3)
    assert (lengths.sum(), steps) == (done.tokens, done.steps)
    if epochs == 2:
        assert lengths.sum() == 2 * examples.tokens


def test_cells_of_every_stage_and_no_cell_twice(before):
    counts = {s.name: s.planned for s in before.stages}
    assert counts == {
        "baseline": 1,
        "corruption": 6,  # two sides of reinit and of init at 1/3; all layers; an untrained one
        "harms": 1,  # the zeros
        "recovery": 6,  # as corrupted, and from scratch
        "scans": 6,  # two recipes on two sides, two prices
        "networks": 0,  # all in the stages above
        "probing": 7,  # pre-trained, untrained, intact, broken and healed on two sides
        "neurons": 2,  # pre-trained, intact
    }
    keys = [cell.key for s in before.stages for cell, *_ in s.left]
    assert len(keys) == len(set(keys)) == sum(counts.values())
    assert all(s.done == 0 for s in before.stages)


def test_tokens_and_operations_of_cells_are_counted_by_hand(parameters, before):
    planned = Study(parameters)
    examples = planned.examples(planned.plan("baseline")[0])
    train, validation, test = (
        getattr(examples, part).lengths for part in ("train", "validation", "test")
    )

    def forward(lengths, layers=3):
        squares = int((lengths**2).sum())
        return 2 * layers * LAYER * int(lengths.sum()) + 4 * 32 * layers * squares

    (intact,) = work(before, "baseline").values()
    assert intact.trained == train.sum() and intact.steps == 4
    assert intact.read == test.sum() + 3 * validation.sum()  # at the start, and twice
    assert intact.training == 3 * forward(train)
    assert intact.forward == forward(test) + 3 * forward(validation)
    for broken in work(before, "corruption").values():
        assert (broken.trained, broken.training, broken.kept) == (0, 0, 0)
        # Scored, and compared with the intact model: all of the 24 are among the first 200.
        assert (broken.read, broken.compared) == (2 * test.sum(), test.sum())
        assert broken.forward == 2 * forward(test)
    drop = next(w for name, w in work(before, "scans").items() if "drop" in name)
    assert drop.training == 3 * forward(train, layers=2)


def test_trained_tokens_are_those_of_the_records(before, finished):
    seen = 0
    for name in ("baseline", "recovery", "scans"):
        for cell, counted, _ in stage(before, name).left:
            result = finished.store.read(cell.stage, cell.key)["result"]
            tokens = result["train_tokens"] + result.get("warm_up_tokens", 0)
            assert counted.trained == tokens, cell.name
            seen += 1
    assert seen == 13


def test_words_and_bytes_are_those_of_the_run(before, finished):
    for name in ("probing", "neurons"):
        for cell, counted, _ in stage(before, name).left:
            read = finished.store.read(cell.stage, cell.key)["result"]["read"]
            words = read["train_words"] + read["test_words"]
            if cell.state in ("pretrained", "untrained"):
                # Each word is one token here, and 30 to 35 sentences have two more.
                assert counted.read == words + 2 * (25 + 10)
            assert counted.probed == (4 * read["train_words"] if name == "probing" else 0)
    kept = sum(path.stat().st_size for path in finished.run_folder.glob("weights/*.safetensors"))
    assert before.disk[1] == pytest.approx(kept, rel=0.1)  # the files have headers
    records = sum(path.stat().st_size for path in finished.run_folder.glob("records/*/*.json"))
    assert records / 5 < before.disk[0] < 5 * records


def test_the_fits_of_a_neuron_cell():
    # 16 neurons, 10 words: the search, on 8 of them, tries all, 0, 1 and then 2, its end; then all,
    # those 2, and the curve of 1, 4 and 16, the first two thrice.
    ranked, searched, whole = 16, [1, 2], [16, 2, 1, 1, 1, 4, 4, 4, 16]
    first = plan.RANKING  # times as many passes
    assert plan.neuron_fits(16, 10) == (
        round(8 * (first + len(searched)) + 10 * len(whole)),
        round(8 * (first * ranked + sum(searched)) + 10 * sum(whole)),
        round(first * ranked**2 + sum(k**2 for k in searched + whole)),
    )
    # A fit beyond what the solver correlates adds no more than one at that size.
    more, most = (plan.neuron_fits(n * CORRELATED, 10)[2] for n in (64, 128))
    assert most - more <= 10 * CORRELATED**2


# --- What is done ---------------------------------------------------------------------------------


def test_a_finished_run_has_nothing_left(parameters, finished, capsys):
    after = plan.make(Study(parameters))
    assert [s.planned for s in after.stages] == [s.done for s in after.stages]
    assert after.seconds == 0 and after.disk == (0, 0, 0) and after.notes == []
    kept = (finished.run_folder / runner.ESTIMATE).read_bytes()
    assert plan.keep(after, finished.run_folder) is None
    assert (finished.run_folder / runner.ESTIMATE).read_bytes() == kept  # what it is compared with


def test_shards_plan_every_cell_once(parameters, before, tmp_path, monkeypatch):
    new = Study(parameters | {"run": str(tmp_path)})
    keys = []
    for share in ("1/2", "2/2"):
        monkeypatch.setenv("HEALING_SHARD", share)
        found = [(planned, left) for _, planned, left in plan.unfinished(new)]
        assert all(planned == len(left) for planned, left in found)
        keys.append({cell.key for _, left in found for cell in left})
    whole = {cell.key for s in before.stages for cell, *_ in s.left}
    assert keys[0] and keys[1] and keys[0].isdisjoint(keys[1]) and keys[0] | keys[1] == whole


def test_a_partly_finished_run_has_the_rest(parameters, finished, tmp_path):
    other = Study(parameters | {"run": str(tmp_path)})
    for name in ("baseline", "corruption"):
        for cell in finished.plan(name)[:3]:
            record = finished.store.read(cell.stage, cell.key)
            other.store.write(cell.stage, cell.key, record)
    left = {name: (planned, len(cells)) for name, planned, cells in plan.unfinished(other)}
    assert (
        left["baseline"] == (1, 0) and left["corruption"] == (6, 3) and left["recovery"] == (6, 6)
    )


# --- Time -----------------------------------------------------------------------------------------


def test_of_short_calls_the_shortest_counts_and_long_ones_are_made_once(monkeypatch):
    now = [0.0]
    for name in ("process_time", "perf_counter"):
        monkeypatch.setattr(plan.time, name, lambda: now[0])
    given = SimpleNamespace(device=SimpleNamespace(type="cpu"), parameters={"threads": 1})
    clock = plan.Clock(given)

    def timed(*seconds):
        """What the clock says of calls that would take so long, and how many it made."""
        calls = iter(seconds)

        def work():
            now[0] += next(calls)
            return now[0]

        took, wall, _ = clock(work)
        return round(took, 6), round(wall, 6), len(seconds) - len(list(calls))

    assert timed(0.8, 0.1, 0.2, 9) == (0.1, 0.1, 3)  # the first was interrupted
    assert timed(2.0, 0.1, 0.2, 9) == (2.0, 2.0, 1)


@pytest.mark.parametrize(("left", "at_once"), [(0, 1), (1, 1), (2, 2), (5, 4), (20, 4)])
def test_workers_share_a_stage_as_far_as_its_cells_and_the_cores_go(monkeypatch, left, at_once):
    monkeypatch.setattr(plan, "cores", lambda: 8)
    assert plan.processes({"workers": 6, "threads": 2}, left) == at_once


def test_the_estimate_of_a_real_run_is_within_reason(before, finished):
    assert all(seconds > 0 for s in before.stages for *_, seconds in s.left)
    lines = plan.compare(finished.run_folder)
    assert lines[0] == "Time of the cells, summed over processes, estimated and measured:"
    assert [line.split()[0] for line in lines[1:]] == [
        *sorted(s.name for s in before.stages if s.left), "all",
    ]  # fmt: skip
    total = lines[-1]
    assert " 29 of 29 cells" in total
    ratio = float(total.split()[-2])
    assert 1 / FACTOR < ratio < FACTOR, lines


def test_a_run_ends_with_the_comparison(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HEALING_PROGRESS")
    (tmp_path / runner.ESTIMATE).write_bytes((finished.run_folder / runner.ESTIMATE).read_bytes())
    (tmp_path / "records").symlink_to(finished.run_folder / "records")
    monkeypatch.setattr(runner, "sequence", lambda *_: [])
    runner.run("quick", tmp_path, write_page=lambda target: target)
    said = capsys.readouterr().err
    assert "estimated and measured" in said and "29 of 29 cells" in said


def test_without_an_estimate_there_is_nothing_to_compare(tmp_path):
    assert plan.compare(tmp_path) == []
    for damaged in (
        "{",
        '{"stages": []}',
        '{"stages": {"a": {}}}',
        '{"stages": {"a": {"cells": {"k": 1}}}}',
    ):
        (tmp_path / runner.ESTIMATE).write_text(damaged)
        (line,) = plan.compare(tmp_path)
        assert "cannot be read" in line


# --- The command ----------------------------------------------------------------------------------


def test_the_command_prints_the_plan_and_keeps_the_estimate(parameters, tmp_path, capsys):
    profile = tmp_path / "mine.yaml"
    none = {"scans": {}, "init_levels": [], "probe_levels": [], "healed_tasks": []}
    small = {**parameters, **none, "levels": ["1"]}
    profile.write_text(yaml.safe_dump({k: v for k, v in small.items() if k != "run"}))
    out = tmp_path / "run"
    assert cli.main(["plan", str(profile), "--out", str(out), "-p", "seeds", "[0,1]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Plan of profile mine in {out}"
    rows = {line.split()[0]: line.split()[1:4] for line in lines[2:10]}
    assert rows["baseline"] == ["2", "0", "2"] and rows["corruption"] == ["4", "0", "4"]
    assert lines[-1] == f"estimate kept in {out / runner.ESTIMATE}"
    stages = json.loads((out / runner.ESTIMATE).read_text())["stages"]
    assert {name: len(stage["cells"]) for name, stage in stages.items()} == {
        "baseline": 2, "corruption": 4, "recovery": 4, "probing": 6, "neurons": 4,
    }  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == [runner.ESTIMATE]  # nothing was run


@pytest.mark.parametrize(
    ("line", "said"),
    [("plan quikc", "'quick'"), ("plan quick -p epoch 3", "'epochs'")],
)
def test_a_mistyped_name_is_one_line(tmp_path, capsys, line, said):
    assert cli.main([*line.split(), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("healing: unknown") and said in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_the_folder_of_another_study_is_refused(tmp_path, capsys):
    (tmp_path / "parameters.json").write_text(json.dumps({"seeds": [7]}))
    assert cli.main(["plan", "quick", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "holds a run with other parameters" in error and "seeds [7] there" in error
