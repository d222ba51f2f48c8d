"""The stages `probing` and `neurons`, end to end on tiny models and a corpus with a planted tag."""

from __future__ import annotations

import itertools
import json
import random
import shutil

import pandas as pd
import pytest
import torch
import transformers as hf
from families import tiny_config, tokenizer_of
from helpers import FILLERS, tiny_study, write_corpus, write_planted_task

from healing_utils import load_results, load_task, probe_layers, sentence_activations
from healing_utils.analysis import results
from healing_utils.analysis.claims import decide
from healing_utils.analysis.ledger import Tables
from healing_utils.base.errors import HealingError
from healing_utils.healing import models
from healing_utils.study import linguistics
from healing_utils.study.cells import PROBING_STAGES, STAGES
from healing_utils.study.study import Study


@pytest.fixture(scope="module")
def parameters(given, tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("linguistics")
    corpus = write_corpus(folder / "cues-train.tsv", 50)
    write_corpus(folder / "cues-test.tsv", 30, seed=1)
    return {
        **given, "run": str(folder / "run"), "scans": {}, "seeds": [0], "corpus": str(corpus),
        "column": ["1", "2"], "probe_train": 45, "probe_test": None, "aggregation": "first",
    }  # fmt: skip


@pytest.fixture(scope="module")
def probed(finished, parameters) -> Study:
    others = shutil.ignore_patterns("parameters.json")  # it has other seeds
    shutil.copytree(finished.study.run_folder, parameters["run"], ignore=others)
    study = Study(parameters)
    for stage in (*STAGES, *PROBING_STAGES):
        study.run(stage)
    return study


@pytest.fixture(scope="module")
def table(probed) -> pd.DataFrame:
    return load_results(probed.run_folder, "probing")


def test_every_state_and_column_is_probed_once(table):
    states = table.drop_duplicates("key").groupby(["state", "side"]).size()
    sided = {(state, side) for state in ("broken", "healed") for side in ("bottom", "top")}
    plain = {(state, "none") for state in ("intact", "pretrained", "untrained")}
    assert set(states.index) == sided | plain and (states == 2).all()
    assert (table.groupby("key").layer.apply(list).map(tuple) == (0, 1, 2, 3)).all()
    assert set(table.corpus) == {"cues"} and set(table.column) == {"1", "2"}
    healed = table.state.isin(["broken", "healed"])
    assert table[healed].cka.between(-0.01, 1.01).all() and table[~healed].cka.isna().all()
    assert (table[healed & (table.side == "top")].layers == (2,)).all()
    # Broken at the top: every state before the corrupted layer is the intact model's.
    by = table.set_index(["state", "side", "column", "layer"])
    for column, layer in itertools.product(("1", "2"), (0, 1, 2)):
        broken = by.loc[("broken", "top", column, layer)]
        assert broken.accuracy == by.loc[("intact", "none", column, layer)].accuracy
        assert broken.cka == pytest.approx(1, abs=1e-6)
        assert by.loc[("broken", "top", column, 3)].cka < 1 - 1e-6


def test_probes_find_the_planted_tag_and_only_it(table):
    pretrained = table[table.state == "pretrained"]
    cue = pretrained[(pretrained.column == "1") & (pretrained.layer == 0)]
    assert (cue.accuracy > 0.9).all() and (cue.majority < 0.7).all()
    chance = pretrained[pretrained.column == "2"]
    # Three standard errors of a share near one half over some 160 words.
    assert (chance.accuracy - chance.majority).max() < 0.12


def test_models_of_tasks_that_no_task_stage_planned_are_trained_and_scored(
    parameters, tmp_path, monkeypatch
):
    other = write_planted_task(tmp_path / "other", seed=3)
    study = Study({**parameters, "run": str(tmp_path / "run"), "probe_tasks": [str(other)]})
    seen = []
    monkeypatch.setattr(Study, "record", lambda self, cell, _: seen.append(cell))
    study.compute(study.plan("networks"), "networks")
    # Intact of both tasks, and broken and healed by side of the study's own.
    assert len(seen) == 2 + 4 and {c.key for c in seen} == {c.key for c in study.plan("networks")}
    assert not (study.run_folder / "plans").exists()  # they are no stage's plan


def test_a_run_that_was_stopped_before_a_trained_model_was_probed_has_its_claims(probed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(probed.run_folder, run, ignore=shutil.ignore_patterns("weights"))
    for cell in probed.plan("probing"):
        if cell.network:
            (run / "records" / "probing" / f"{cell.key}.json").unlink()
    table = decide(Tables(run))[0].drop_duplicates("claim").set_index("claim")
    assert table.verdict[["H", "M1", "B3"]].eq("not tested").all()


def test_neurons_are_found_before_and_after(probed):
    table = load_results(probed.run_folder, "neurons")
    assert set(table.state) == {"pretrained", "intact"} and len(table) == 4
    assert (table.neurons == 4 * 32).all() and (table.share == table.k / 128).all()
    assert (table.dev_minimal >= table.dev_full - table.delta - 1e-9).all()
    layers = results.load_neurons(probed.run_folder, "by_layer")
    assert layers.groupby("key")["count"].sum().to_dict() == table.set_index("key").k.to_dict()
    curve = results.load_neurons(probed.run_folder, "curve")
    full = curve[curve.k == 128].groupby("key").accuracy.unique()
    assert all(len(values) == 1 for values in full)  # all neurons are all neurons, however ranked
    agreement = results.load_neurons(probed.run_folder, "agreement")
    assert agreement.groupby("key").size().eq(3).all()
    # Only fine-tuned models are ablated, and whole ones score as recorded.
    ablation = results.load_neurons(probed.run_folder, "ablation")
    assert set(ablation.state) == {"intact"} and set(ablation.metric) == {"f1"}
    assert set(ablation.which) == {"none", "top", "random", "bottom"}
    (score,) = load_results(probed.run_folder, "baseline").score
    whole = ablation[ablation.k == 0]
    assert len(whole) == 2 and whole.score.to_list() == pytest.approx([score] * 2, abs=1e-12)


def test_finished_cells_are_found_again_and_nothing_else_is_left(probed, parameters, monkeypatch):
    assert not list((probed.run_folder / "activations").glob("*"))
    for stage in PROBING_STAGES:
        monkeypatch.setitem(linguistics.COMPUTE, stage, lambda *_: pytest.fail("computed again"))
        assert Study(parameters).run(stage).equals(probed.table(stage))
        for record in probed.store.records(stage):  # what is shipped names no folder of a machine
            del record["cell"]["model"], record["cell"]["task"]  # the test's own folders
            assert str(probed.run_folder.parent.parent) not in json.dumps(record)


def test_the_key_holds_what_the_result_depends_on(probed, parameters, tmp_path):
    def keys(stage="probing", **changes):
        return {cell.key for cell in Study({**parameters, **changes}).plan(stage)}

    before = keys()
    assert len(before) == 14
    for changes in ({"aggregation": "mean"}, {"probe_train": 40}, {"seeds": [1]}):
        assert not before & keys(**changes), changes
    assert before == keys(workers=2, neuron_delta=0.2, run=str(tmp_path))
    assert not keys("neurons") & keys("neurons", neuron_delta=0.2)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_sentences_are_probed_on_any_task(given, pooling):
    """The cue is a word of the sentence: its mean over words tells it already at the embeddings,
    the first token's state there does not, being the same for every sentence."""
    task = load_task(given["task"])
    model = models.load_classifier(given["model"], 2, 0)
    tokenizer = models.load_tokenizer(given["model"])
    states = [
        value
        for split in (task.pool, task.test)
        for value in (sentence_activations(model, tokenizer, split.texts, pooling), split.labels)
    ]
    table = probe_layers(*states, device="cpu")
    assert list(table.layer) == [0, 1, 2, 3] and table.selectivity.isna().all()
    embeddings = table.iloc[0]
    if pooling == "first":
        assert embeddings.accuracy == embeddings.majority
    else:
        assert embeddings.accuracy > embeddings.majority + 0.2


@pytest.mark.parametrize("family", ["roberta", "xlnet"])
def test_every_architecture_of_paper_b_runs_end_to_end(family, folder, tmp_path):
    config, tokenizer = tiny_config(family), tokenizer_of(family)
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.num_hidden_layers = 2
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        hf.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rng, corpus = random.Random(0), tmp_path / "words.tsv"
    # One label in ten is wrong: what a tiny model separates wholly takes the solver long.
    tags = {
        word: (9, 1) if "at" in word else (1, 9) for word in ("the", "cat", "sat", "on", "mats")
    }
    lines = [
        "\n".join(f"{w}\t{rng.choices(('AT', 'OTHER'), tags[w])[0]}" for w in words)
        for words in (rng.choices(list(tags), k=6) for _ in range(30))
    ]
    corpus.write_text("\n\n".join(lines) + "\n")
    changes = {"seeds": [0], "corpus": str(corpus), "column": None, "probe_levels": []}
    study = Study(tiny_study(tmp_path / "run", tmp_path / "model", folder / "task", **changes))
    table = study.run("probing")
    assert set(table.state) == {"pretrained", "untrained", "intact"}
    assert table[table.state == "pretrained"].accuracy.max() > 0.8
    assert len(study.run("neurons")) == 2


def test_corpora_and_columns_pair_up_or_are_refused(tiny):
    a, b, x, y = "abxy"
    for corpus, column, pairs in (
        ([a], [x, y], [(a, x), (a, y)]), ([a, b], [x], [(a, x), (b, x)]),
        ([a, b], [x, y], [(a, x), (b, y)]), ([a], None, [(a, None)]),
    ):  # fmt: skip
        assert tiny(corpus=corpus, column=column).sources() == pairs
    with pytest.raises(HealingError, match="need one column for each"):
        tiny(corpus=[a, b], column=["1", "2", "last"]).plan("probing")
    with pytest.raises(HealingError, match="no such file"):
        tiny(corpus="nowhere.conllu").plan("probing")


def test_what_reading_met_is_recorded_and_said(parameters, tmp_path):
    """A label that training lacks, an empty sentence, line endings of two kinds, and a sentence
    longer than the model's positions."""
    corpus = write_corpus(tmp_path / "odd-train.tsv", 30)
    corpus.write_bytes(corpus.read_bytes().replace(b"\n", b"\r\n", 40) + b"\n\n\n\nx\tFILLER\ta\n")
    long = "\n".join(f"{FILLERS[0]}\tNEW\ta" for _ in range(500))
    (tmp_path / "odd-test.tsv").write_text(f"{long}\n\n{FILLERS[1]}\tFILLER\ta\n")
    changes = dict(corpus=str(corpus), column=1, probe_train=None, probe_levels=[])
    study = Study({**parameters, "run": str(tmp_path / "run"), **changes})
    table = study.run("probing")
    assert (table.accuracy <= 1 / 501 + 1e-9).all()  # what training lacks counts as errors
    (line,) = linguistics.reading_notes(study)
    assert "501 test words" in line and "empty sentences left out" in line
    assert "500 test words with labels unseen in training count as errors" in line
    assert "1 sentences were read in several windows" in line


def test_a_model_that_two_scans_name_is_probed_once(probed):
    scans = {"a": {"state": "intact", "train_size": [16], "probed": True}}
    scans["b"] = {"state": "intact", "train_size": [16, 24], "probed": True}
    planned = Study({**probed.parameters, "scans": scans}).plan("probing")
    assert len({cell.key for cell in planned}) == len(planned)
    sizes = [dict(c.network.settings).get("train_size") for c in planned if c.scan in ("a", "b")]
    assert set(sizes) == {16, 24}


def test_what_is_planned_is_expected(probed, tmp_path):
    """Without the plan, a level that is missing altogether would not be missed."""
    run = tmp_path / "run"
    shutil.copytree(probed.run_folder, run, ignore=shutil.ignore_patterns("weights"))
    gone = [c for c in probed.plan("recovery") if c.level == 1 / 3 and c.kind == "reinit"]
    for cell in gone:
        (run / "records" / "recovery" / f"{cell.key}.json").unlink()
    assert results.missing_cells(run, "recovery") == [cell.name for cell in gone]
    assert results.missing_cells(run, "probing") == []
    table = decide(Tables(run))[0].drop_duplicates("claim").set_index("claim")
    assert f"{len(gone)} planned cells missing" in table.reason["H"]
    shutil.rmtree(run / "plans")
    assert results.missing_cells(run, "recovery") == []
