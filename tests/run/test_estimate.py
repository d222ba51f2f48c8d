"""What a study takes: counts against its own records and by hand; time within reason."""

from __future__ import annotations

import json
import re
import time
from types import SimpleNamespace

import pytest
import yaml
from families import FAMILIES, tiny_config
from helpers import save_tiny_bert, tiny_study, write_corpus, write_planted_task
from transformers import AutoModel

from healing_utils import cli
from healing_utils.run import estimate
from healing_utils.run.profiles import Shard
from healing_utils.study import study as study_module
from healing_utils.study.study import Study

FACTOR = 2.0


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")


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
        before = estimate.make(study, Shard())
        estimate.keep(before, study.run_folder)
        study.compute(study.keep_plans(), "all stages", "in-process")
    return before, study


def told(table, study):
    return estimate.describe(table, study, "Plan").splitlines()


def test_every_cell_is_there_once_with_its_work(known):
    before, study = known
    # A cell that several stages plan counts where it comes first.
    assert before.groupby("stage").size().to_dict() == {
        "baseline": 1, "corruption": 2, "recovery": 2, "scans": 1, "probing": 5, "neurons": 2,
    }  # fmt: skip
    assert not before["done"].any() and (before["seconds"] > 0).all()
    for row in before.itertuples():
        result = study.store.read(row.cell.stage, row.cell.key)["result"]
        if "train_tokens" in result:  # by the mean length of a sample
            assert row.trained == pytest.approx(result["train_tokens"], rel=0.1), row.cell.name
        elif row.cell.corpus is None:
            assert row.trained == 0 < row.scored
    kept = sum(path.stat().st_size for path in study.run_folder.glob("weights/*.safetensors"))
    assert before["kept"].sum() == pytest.approx(kept, rel=0.1)  # the files have headers
    (intact,) = before[before["stage"] == "baseline"].itertuples()
    # Two a weight and token of the layers, and of the attention's products, forward and backward.
    layer = 4 * 32 * 32 + 2 * 32 * 48
    forward = 2 * 3 * layer * (intact.trained * 3 + intact.scored)
    assert forward < intact.operations < 1.4 * forward


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_every_family_are_counted(family):
    work = estimate.Work(SimpleNamespace(config=lambda model: tiny_config(family)))
    operations, parameters = work.model_size(family, 8)
    assert parameters == sum(
        p.numel() for p in AutoModel.from_config(tiny_config(family)).parameters()
    )
    assert operations > 3 * 2 * (4 * 16 * 16 + 2 * 16 * 24)


def test_the_estimate_is_within_a_factor_of_the_run(known):
    before, study = known
    measured = sum(
        study.store.read(row.cell.stage, row.cell.key)["times"]["seconds"]
        for row in before.itertuples()
    )
    assert 1 / FACTOR < before["seconds"].sum() / measured < FACTOR
    (line,) = estimate.compare(study.run_folder)
    assert re.fullmatch(r"Time of the cells, .*: \d+ s estimated, \d+ s measured", line)


def test_what_is_done_is_not_left_and_tells_how_long_the_rest_takes(known, monkeypatch):
    before, study = known
    kept = (study.run_folder / estimate.ESTIMATE).read_bytes()
    monkeypatch.setattr(estimate, "by_trial", lambda *_: pytest.fail("needs no trial"))
    after = estimate.make(study, Shard())
    assert after["done"].all() and len(after) == len(before)
    assert told(after, study)[-2].split()[:3] == ["all", "13", "0"]
    assert estimate.keep(after, study.run_folder) is None
    assert (study.run_folder / estimate.ESTIMATE).read_bytes() == kept  # what it is compared with
    more = estimate.make(Study({**study.parameters, "seeds": [0, 1]}), Shard())
    seconds = more.groupby("done")["seconds"].sum()
    # By records, seconds go with operations: a seed more of the same takes as long again.
    assert len(more) == 26 and 0.5 < seconds[True] / seconds[False] < 2


def test_shards_plan_every_cell_once_and_may_have_none(known):
    before, study = known
    shares = [estimate.make(study, Shard(i, 40)) for i in range(1, 41)]
    keys = [cell.key for share in shares for cell in share["cell"]]
    assert sorted(keys) == sorted(cell.key for cell in before["cell"])
    empty = next(share for share in shares if not len(share))
    assert told(empty, study)[-2].split()[:3] == ["all", "0", "0"]
    assert estimate.keep(empty, study.run_folder) is None


def test_without_an_estimate_there_is_nothing_to_compare(tmp_path):
    assert estimate.compare(tmp_path) == []
    for damaged in ("{", "[]", '{"a": 1}', '{"a": ["baseline", 1]}'):
        (tmp_path / estimate.ESTIMATE).write_text(damaged)
        assert estimate.compare(tmp_path) == []


def test_the_command_prints_the_plan_and_keeps_the_estimate(
    parameters, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(estimate, "by_trial", lambda *_: (1.0, 0.0))
    profile, out = tmp_path / "mine.yaml", tmp_path / "run"
    profile.write_text(yaml.safe_dump({k: v for k, v in parameters.items() if k != "run"}))
    assert cli.main(["plan", str(profile), "--out", str(out), "-p", "workers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Plan of profile mine in {out}"
    rows = {line.split()[0]: line.split()[1:3] for line in lines[2:9]}
    assert rows["corruption"] == ["2", "2"] and rows["all"] == ["13", "13"]
    assert lines[-1] == f"estimate kept in {out / estimate.ESTIMATE}"
    assert len(json.loads((out / estimate.ESTIMATE).read_text())) == 13
    assert [path.name for path in out.iterdir()] == [estimate.ESTIMATE]  # nothing was run
