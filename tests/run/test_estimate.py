"""What a study takes: counts against its own records and by hand; time within reason."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import yaml
from families import FAMILIES, tiny_config, tiny_model
from helpers import save_tiny_bert, tiny_study, write_corpus, write_planted_task

from healing_utils import cli
from healing_utils.base.records import write_atomically
from healing_utils.run import estimate
from healing_utils.study import study as study_module
from healing_utils.study.study import Study

FACTOR = 2.0


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimate")
    corpus = write_corpus(folder / "cues-train.tsv", 30)
    write_corpus(folder / "cues-test.tsv", 10, seed=1)
    return tiny_study(
        folder / "run", save_tiny_bert(folder / "model"), write_planted_task(folder / "task", 400),
        seeds=[0], levels=["1/3"], init_levels=[], sides="bottom", train_size=300, epochs=5.0,
        scans={"price": {"state": "intact", "train_size": None, "epochs": 3.0}},
        corpus=str(corpus), column=["1"], probe_levels=["1/3"], probe_train=25, probe_test=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def known(parameters):
    """The plan of a study of which nothing is done, and the study run to its end after that. Its
    seconds are the processor's: other things that the machine does are not tested."""
    study = Study(parameters)
    clock = SimpleNamespace(**vars(time) | {"perf_counter": time.process_time})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEALING_PROGRESS", "quiet")
        for module in (estimate, study_module):
            patch.setattr(module, "time", clock)
        before = estimate.make(study)
        seconds = {row.cell.key: row.seconds for row in before.itertuples()}
        study.store.begin()
        write_atomically(study.run_folder / estimate.ESTIMATE, json.dumps(seconds))
        study.compute(study.keep_plans(), "all stages", "in-process")
    return before, study


def test_every_cell_is_there_once_with_its_work_and_its_time_within_a_factor(known):
    before, study = known
    # A cell that several stages plan counts where it comes first.
    assert before.groupby("stage").size().to_dict() == {
        "baseline": 1, "corruption": 2, "recovery": 2, "scans": 1, "probing": 5, "neurons": 2,
    }  # fmt: skip
    assert not before["done"].any() and (before["seconds"] > 0).all()
    measured = 0.0
    for row in before.itertuples():
        record = study.store.read(row.cell.stage, row.cell.key)
        result, measured = record["result"], measured + record["times"]["seconds"]
        if "train_tokens" in result:  # by the mean length of a sample
            assert row.trained == pytest.approx(result["train_tokens"], rel=0.1), row.cell.name
        elif row.cell.corpus is None:
            assert row.trained == 0 < row.scored
    there = sum(path.stat().st_size for path in study.run_folder.glob("weights/*.safetensors"))
    assert before["weights"].sum() == pytest.approx(there, rel=0.1)  # the files have headers
    (intact,) = before[before["stage"] == "baseline"].itertuples()
    # Two a weight and token of the layers, forward and twice as many backward.
    layer = 4 * 32 * 32 + 2 * 32 * 48
    forward = 2 * 3 * layer * (intact.trained * 3 + intact.scored)
    assert forward < intact.operations < 1.4 * forward
    assert 1 / FACTOR < before["seconds"].sum() / measured < FACTOR
    line = estimate.compare(study, list(before["cell"]))
    assert re.fullmatch(r"Time of the cells, .*: \d+ s estimated, \d+ s measured", line)


def test_what_is_done_is_not_left_and_tells_how_long_the_rest_takes(known, monkeypatch):
    before, study = known
    monkeypatch.setattr(estimate, "by_trial", lambda *_: pytest.fail("needs no trial"))
    after = estimate.make(study)
    assert after["done"].all() and len(after) == len(before)
    more = estimate.make(Study({**study.parameters, "seeds": [0, 1]}))
    seconds = more.groupby("done")["seconds"].sum()
    # By records, seconds go with operations: a seed more of the same takes as long again.
    assert len(more) == 26 and 0.5 < seconds[True] / seconds[False] < 2


def test_weights_of_every_family_are_counted():
    class Study:
        @staticmethod
        def config(family):
            config = tiny_config(family)
            config.auto_map = {"AutoModel": "theirs.Model"}  # code that is never asked about
            return config

    for family in FAMILIES:
        counted = estimate.empty_model(Study, family).num_parameters()
        assert counted == tiny_model(family).num_parameters(), family


def test_without_an_estimate_there_is_nothing_to_compare(known, tmp_path):
    cell, path = known[0]["cell"][0], tmp_path / estimate.ESTIMATE
    values = [f'{{"{cell.key}": {value}}}' for value in ('"1"', "[1.0]", "NaN", "-1.0", "1e999")]
    for damaged in ("{", "[]", "null", "[" * 10**5, *values, None):
        path.unlink() if damaged is None else path.write_text(damaged)
        assert estimate.compare(SimpleNamespace(run_folder=tmp_path), [cell]) == ""


def test_the_command_prints_the_plan_and_keeps_the_estimate(
    parameters, known, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(estimate, "by_trial", lambda *_: (1.0, 0.0))
    profile, out = tmp_path / "mine.yaml", tmp_path / "run"
    profile.write_text(yaml.safe_dump({k: v for k, v in parameters.items() if k != "run"}))
    assert cli.main(["plan", str(profile), "--out", str(out), "-p", "workers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Plan of profile {profile} in {out}"
    rows = {line.split()[0]: line.split()[1:3] for line in lines[2:9]}
    assert rows["corruption"] == ["2", "2"] and rows["all"] == ["13", "13"]
    assert lines[-1] == f"estimate kept in {out / estimate.ESTIMATE}"
    assert len(json.loads((out / estimate.ESTIMATE).read_text())) == 13
    assert [path.name for path in out.iterdir()] == [estimate.ESTIMATE]  # nothing was run
    there = known[1].run_folder
    monkeypatch.setattr("healing_utils.study.study.reading_note", lambda *_: "5 pieces")
    kept = (there / estimate.ESTIMATE).read_bytes()
    for shard, cells in ((), "13"), (("--shard", "1/1000"), "0"):
        assert cli.main(["plan", str(profile), "--out", str(there), *shard]) == 0
        _, note, *_, whole, _, last = capsys.readouterr().out.splitlines()
        assert re.fullmatch("model .* reads task .* in 5 pieces", note)
        assert whole.split()[:3] == ["all", cells, "0"] and last == "everything is done"
    assert (there / estimate.ESTIMATE).read_bytes() == kept  # what it is compared with
