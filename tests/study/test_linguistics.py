"""The stages `probing` and `neurons`, end to end on tiny models and a corpus with a planted tag."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers as hf
from families import tiny_config
from helpers import CUES, FILLERS, save_tiny_bert, tiny_study, write_planted_task
from test_activations import tokenizer_of

from healing_utils import load_results, load_task
from healing_utils.analysis import results, statistics
from healing_utils.base.errors import HealingError
from healing_utils.healing import models
from healing_utils.run import executors
from healing_utils.study import linguistics
from healing_utils.study.study import PROBING_STAGES, Study


def write_corpus(path: Path, count: int, seed: int = 0) -> Path:
    """Words and tags: CUE for a cue word, FILLER for any other; the second column is chance."""
    rng = random.Random(seed)
    blocks = []
    for _ in range(count):
        words = rng.choices([*FILLERS, *CUES * 8], k=rng.randint(3, 8))
        lines = (f"{w}\t{'CUE' if w in CUES else 'FILLER'}\t{rng.choice('ab')}" for w in words)
        blocks.append("\n".join(lines))
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def parameters(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("linguistics")
    corpus = write_corpus(folder / "cues-train.tsv", 60)
    write_corpus(folder / "cues-test.tsv", 20, seed=1)
    return tiny_study(
        folder / "run", save_tiny_bert(folder / "model"), write_planted_task(folder / "task"),
        corpus=str(corpus), column=["1", "2"], probe_levels=["1/3"], probe_train=50,
        probe_test=None, aggregation="first",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(parameters) -> Study:
    study = Study(parameters)
    for stage in ("baseline", "recovery", *PROBING_STAGES):
        study.run(stage)
    return study


def test_every_state_column_and_seed_is_probed_once(finished):
    table = load_results(finished.run_folder, "probing")
    cells = table.drop_duplicates("key")
    states = cells.groupby(["state", "side"]).size()
    # Two seeds and two columns of each; broken and healed at 1/3 from below and from above.
    assert states.to_dict() == {
        ("broken", "bottom"): 4, ("broken", "top"): 4, ("healed", "bottom"): 4,
        ("healed", "top"): 4, ("intact", "none"): 4, ("pretrained", "none"): 4,
        ("untrained", "none"): 4,
    }  # fmt: skip
    assert (table.groupby("key").layer.apply(list).map(tuple) == (0, 1, 2, 3)).all()
    assert set(table.corpus) == {"cues"} and set(table.column) == {"1", "2"}
    healed = table.state.isin(["broken", "healed"])
    assert table[healed].cka.between(-0.01, 1.01).all() and table[~healed].cka.isna().all()
    assert (table[healed & (table.side == "top")].layers == (2,)).all()


def test_models_of_tasks_that_no_task_stage_planned_are_trained_and_scored(
    parameters, tmp_path, monkeypatch
):
    other = write_planted_task(tmp_path / "other", seed=3)
    study = Study({**parameters, "run": str(tmp_path / "run"), "probe_tasks": [str(other)]})
    asked = []
    helping = executors.helping
    monkeypatch.setattr(
        executors,
        "helping",
        lambda jobs, count: asked.append((jobs[0][1], count)) or helping(jobs, 0),
    )
    linguistics.score_networks(Study({**study.parameters, "workers": 2}))
    cells = study.plan("networks")
    # Two seeds: intact of both tasks, and broken and healed by side of the study's own.
    assert len(cells) == 2 * (2 + 4) and asked == [(["networks"], 1)]
    assert all(study.store.read(cell.stage, cell.key) for cell in cells)
    assert not (study.run_folder / "plans").exists()  # they are no stage's plan


def test_probes_find_the_planted_tag_and_only_it(finished):
    table = load_results(finished.run_folder, "probing")
    pretrained = table[table.state == "pretrained"]
    cue = pretrained[(pretrained.column == "1") & (pretrained.layer == 0)]
    assert (cue.accuracy > 0.9).all() and (cue.majority < 0.7).all()
    chance = pretrained[pretrained.column == "2"]
    # Three standard errors of a share near one half over some 120 words.
    assert (chance.accuracy - chance.majority).max() < 0.14


def test_what_is_not_corrupted_below_a_corrupted_layer_stays_the_same(finished):
    """Broken at the top: every state before the corrupted layer is the intact model's."""
    table = load_results(finished.run_folder, "probing").set_index(
        ["state", "side", "seed", "column", "layer"]
    )
    for seed in (0, 1):
        for column in ("1", "2"):
            for layer in (0, 1, 2):
                broken = table.loc[("broken", "top", seed, column, layer)]
                intact = table.loc[("intact", "none", seed, column, layer)]
                assert broken.accuracy == intact.accuracy
                assert broken.cka == pytest.approx(1, abs=1e-6)
            assert table.loc[("broken", "top", seed, column, 3)].cka < 1 - 1e-6


def test_neurons_are_found_before_and_after(finished):
    table = load_results(finished.run_folder, "neurons")
    assert set(table.state) == {"pretrained", "intact"} and len(table) == 8
    assert (table.neurons == 4 * 32).all() and (table.share == table.k / 128).all()
    assert (table.dev_minimal >= table.dev_full - table.delta - 1e-9).all()
    layers = results.load_neurons(finished.run_folder, "by_layer")
    assert layers.groupby("key")["count"].sum().to_dict() == table.set_index("key").k.to_dict()
    curve = results.load_neurons(finished.run_folder, "curve")
    full = curve[curve.k == 128].groupby("key").accuracy.unique()
    assert all(len(values) == 1 for values in full)  # all neurons are all neurons, however ranked
    strongest = results.load_neurons(finished.run_folder, "strongest")
    assert strongest.groupby("key").size().eq(linguistics.SHOWN).all()
    agreement = results.load_neurons(finished.run_folder, "agreement")
    assert agreement.groupby("key").size().eq(3).all() and agreement.spearman.abs().le(1).all()


def test_only_fine_tuned_models_are_ablated_and_whole_ones_score_as_recorded(finished):
    ablation = results.load_neurons(finished.run_folder, "ablation")
    assert set(ablation.state) == {"intact"} and set(ablation.metric) == {"f1"}
    assert set(ablation.which) == {"none", "top", "random", "bottom"}
    baseline = load_results(finished.run_folder, "baseline").set_index("seed").score
    whole = ablation[ablation.k == 0]
    assert len(whole) == 4
    for row in whole.itertuples():
        assert row.score == pytest.approx(baseline[row.seed], abs=1e-12)


def test_finished_cells_are_found_again_and_activations_are_gone(finished, parameters, monkeypatch):
    assert not list((finished.run_folder / "activations").glob("*.npy*"))
    for stage in PROBING_STAGES:
        monkeypatch.setitem(linguistics.COMPUTE, stage, lambda *_: pytest.fail("computed again"))
    again = Study(parameters)
    for stage in PROBING_STAGES:
        assert again.run(stage).equals(finished.table(stage))


def test_the_key_holds_what_the_result_depends_on(finished, parameters):
    def keys(**changes):
        return {cell.key for cell in Study({**parameters, **changes}).plan("probing")}

    before = keys()
    assert len(before) == 28
    assert not before & keys(aggregation="mean")
    assert not before & keys(probe_train=40)
    assert not before & keys(threads=2)
    assert before == keys(workers=2, neuron_delta=0.2, run=str(finished.run_folder / "other"))
    neurons = {cell.key for cell in finished.plan("neurons")}
    other = Study({**parameters, "neuron_delta": 0.2}).plan("neurons")
    assert not neurons & {cell.key for cell in other}


def test_what_is_shipped_names_no_folder_of_this_machine(finished):
    for path in (finished.run_folder / "records").glob("*/*.json"):
        if path.parent.name in PROBING_STAGES:
            record = json.loads(path.read_text())
            del record["cell"]["model"], record["cell"]["task"]  # the test's own folders
            assert str(finished.run_folder.parent) not in json.dumps(record)


def test_weights_that_were_not_kept_are_made_again(finished):
    cell = next(c for c in finished.plan("recovery") if finished.is_probed(c))
    path = finished.store.weights_path(cell.key)
    kept = finished.network(cell).state_dict()
    path.unlink()
    again = finished.network(cell).state_dict()
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert path.exists()
    path.write_bytes(path.read_bytes()[:100])
    assert all(torch.equal(kept[n], t) for n, t in finished.network(cell).state_dict().items())


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_sentences_are_probed_on_any_task(parameters, pooling):
    """The cue is a word of the sentence: its mean over words tells it already at the embeddings,
    the first token's state there does not, being the same for every sentence."""
    task = load_task(parameters["task"])
    model = models.load_classifier(parameters["model"], 2, 0)
    tokenizer = models.load_tokenizer(parameters["model"])
    table = linguistics.probe_task(model, tokenizer, task, pooling, device="cpu")
    assert list(table.layer) == [0, 1, 2, 3] and table.selectivity.isna().all()
    embeddings = table.iloc[0]
    if pooling == "first":
        assert embeddings.accuracy == embeddings.majority
    else:
        assert embeddings.accuracy > embeddings.majority + 0.2
    with pytest.raises(HealingError, match="regression"):
        linguistics.probe_task(model, tokenizer, replace(task, classes=()), pooling)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlnet"])
def test_every_architecture_of_paper_b_runs_end_to_end(family, tmp_path):
    config = tiny_config(family)
    tokenizer = tokenizer_of(family)
    for name, value in (("vocab_size", len(tokenizer)), ("pad_token_id", tokenizer.pad_token_id)):
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        hf.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    corpus = tmp_path / "words.tsv"
    rng = random.Random(0)
    lines = [
        "\n".join(f"{w}\t{'AT' if w in ('sat', 'cat', 'mats') else 'OTHER'}" for w in words)
        for words in (rng.choices(["the", "cat", "sat", "on", "mats"], k=6) for _ in range(40))
    ]
    corpus.write_text("\n\n".join(lines) + "\n")
    study = Study(
        tiny_study(
            tmp_path / "run", tmp_path / "model", write_planted_task(tmp_path / "task"),
            seeds=[0], corpus=str(corpus), column=None, probe_train=None, probe_test=None,
            probe_levels=[],
        )
    )  # fmt: skip
    table = study.run("probing")
    assert set(table.state) == {"pretrained", "untrained", "intact"}
    best = table[table.state == "pretrained"].accuracy.max()
    assert best == 1  # the tag is a word's own
    assert len(study.run("neurons")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": ["1", "2", "last"], "corpus": ["a", "b"]}, "need one column for each"),
        ({"column": "9"}, "column"),
        ({"corpus": "nowhere.conllu"}, "no such file"),
        ({"probe_levels": ["1/2"]}, "probe_levels has '1/2', which is not in levels: 1/3, 1"),
        ({"word_column": 1, "column": 1}, "holds the words"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_anything_is_computed(
    parameters, changes, message, tmp_path
):
    with pytest.raises(HealingError, match=message):
        Study({**parameters, "run": str(tmp_path), **changes}).plan("probing")


def test_what_reading_met_is_recorded_and_said(parameters, tmp_path):
    """A label that training lacks, an empty sentence, line endings of two kinds, and a sentence
    longer than the model's positions."""
    corpus = tmp_path / "odd-train.tsv"
    write_corpus(corpus, 30)
    corpus.write_bytes(corpus.read_bytes().replace(b"\n", b"\r\n", 40) + b"\n\n\n\nx\tFILLER\ta\n")
    long = "\n".join(f"{FILLERS[0]}\tNEW\ta" for _ in range(2000))
    (tmp_path / "odd-test.tsv").write_text(f"{long}\n\n{FILLERS[1]}\tFILLER\ta\n")
    changes = dict(corpus=str(corpus), column=1, seeds=[0], probe_train=None, probe_levels=[])
    study = Study({**parameters, "run": str(tmp_path / "run"), **changes})
    table = study.run("probing")
    assert (table.accuracy <= 1 / 2001 + 1e-9).all()  # what training lacks counts as errors
    (line,) = linguistics.reading_notes(study)
    assert "2,001 test words" in line and "empty sentences left out" in line
    assert "2,000 test words with labels unseen in training count as errors" in line
    assert "1 sentences were read in several windows" in line


def test_what_is_planned_is_expected(finished, tmp_path):
    """Without the plan, a level that is missing altogether would not be missed."""
    run = tmp_path / "run"
    shutil.copytree(finished.run_folder, run, ignore=shutil.ignore_patterns("weights"))
    grid = results.planned_grid(run, "recovery")
    assert grid == {
        "levels": [1 / 3, 1.0], "seeds": [0, 1], "sides": ["bottom", "top"],
        "tasks": [finished.parameters["task"][0]],
    }  # fmt: skip
    for cell in finished.plan("recovery"):
        if cell.level == 1 / 3 and cell.kind == "reinit":
            (run / "records" / "recovery" / f"{cell.key}.json").unlink()
    cells = pd.concat([load_results(run, stage) for stage in ("baseline", "recovery")])
    table = statistics.claims(cells, grid=grid).set_index("claim")
    assert (table.verdict == "undecided").all() and "missing" in table.reason["A1"]
    assert "missing" not in statistics.claims(cells).set_index("claim").reason["A1"]
    probed = results.planned_grid(run, "probing")
    assert probed["corpora"] == [("cues", "1"), ("cues", "2")] and probed["levels"] == [1 / 3]
    assert probed["healed_tasks"] == probed["tasks"] == grid["tasks"]
    shutil.rmtree(run / "plans")
    assert results.planned_grid(run, "recovery") is None


def test_the_strongest_neurons_are_those_of_one_model_and_column(finished):
    table = results.load_neurons(finished.run_folder, "strongest")
    with pytest.raises(HealingError, match="one column at a time"):
        linguistics.strongest_neurons(table)
    found = linguistics.strongest_neurons(table[table.column == "1"], 2)
    assert len(set(found)) == 2 and set(found) <= set(zip(table.layer, table.neuron, strict=True))


def test_corpora_and_columns_pair_up():
    pairs = linguistics.sources
    assert pairs({"corpus": ["a"], "column": ["x", "y"]}) == [("a", "x"), ("a", "y")]
    assert pairs({"corpus": ["a", "b"], "column": ["x"]}) == [("a", "x"), ("b", "x")]
    assert pairs({"corpus": ["a", "b"], "column": ["x", "y"]}) == [("a", "x"), ("b", "y")]
    assert pairs({"corpus": ["a"], "column": None}) == [("a", None)]
