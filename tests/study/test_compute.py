"""The states of a model, against the same by hand, and what their records hold."""

from __future__ import annotations

import csv
import json
import platform

import numpy as np
import pytest
import torch
from helpers import CUES
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from healing_utils.healing import floors, models
from healing_utils.healing.corruption import corrupt
from healing_utils.healing.encoders import encoder_layers
from healing_utils.healing.similarity import passing_stream
from healing_utils.healing.training import Diverged, Training, encode, evaluate, fine_tune
from healing_utils.study import compute, planning
from healing_utils.study.cells import RECIPE, STAGES


def result(study, cell):
    return study.store.read(cell.stage, cell.key)["result"]


def computed(study, cell):
    return compute.COMPUTE[cell.state](study, cell)


def scanned(study, scan, stage="scans"):
    return [cell for cell in study.plan(stage) if cell.scan == scan]


def by_hand(study, seed: int):
    """The saved fine-tuned model and the scored examples, read without the study's help."""
    (cell,) = [c for c in study.plan("baseline") if c.seed == seed]
    model = AutoModelForSequenceClassification.from_pretrained(cell.model, num_labels=2)
    model.load_state_dict(load_file(study.store.weights_path(cell.key)))
    with open(f"{cell.task}/test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = [sorted(CUES[:2]).index(row["label"]) for row in rows]
    texts = [row["text"] for row in rows]
    return model, encode(AutoTokenizer.from_pretrained(cell.model), texts, labels, 16)


def test_records_hold_what_determines_and_what_describes_them(finished):
    study = finished.study
    for stage in STAGES:
        for cell in study.plan(stage):
            record = study.store.read(stage, cell.key)
            assert set(record) == {
                "cell", "determinants", "result", "made", "times", "stage", "key",
            }  # fmt: skip
            assert record["determinants"] == json.loads(cell.determinants)
            assert record["made"]["versions"]["torch"] in torch.__version__
            assert record["made"]["processor"].startswith(platform.machine())
            assert record["times"]["seconds"] > 0
            found = record["result"]
            assert len(found["right"]) == found["test_size"] == 24
            right = found["right"].count("1") / found["test_size"]
            assert right == pytest.approx(found["scores"]["accuracy"])
            if stage == "corruption":
                assert set(map(len, found["similarity"].values())) == {4}
                assert set(found["similarity"]) == {"cosine", "cka", "stream"}
            else:
                assert [row["step"] for row in found["curve"]] == [0, 1, 4]
                assert len(found["losses"]) == found["steps"] == 4
            if stage == "baseline":
                assert len(found["stream"]) == 4 and found["passed_over"] == found["drawn"] == []
                for name in ("tfidf", "static"):  # one word of the text is its label
                    assert found["floors"][name]["scores"]["f1"] > 0.9
                    assert found["floors"][name]["weight"] in floors.GRID
            text = json.dumps(record)
            assert not any(word in text for word in (*CUES, "w1 ")), "texts of a data set"


@pytest.mark.parametrize("seed", [0, 1])
def test_broken_is_the_fine_tuned_model_corrupted_and_not_trained_again(finished, seed):
    study = finished.study
    model, test = by_hand(study, seed)
    intact = finished.tables["baseline"].query("seed == @seed").iloc[0]
    assert evaluate(model, test, device="cpu")["f1"] == intact["score"]
    for cell in study.plan("corruption"):
        if cell.seed != seed or cell.state != "broken":
            continue
        broken, _ = by_hand(study, seed)
        report = corrupt(broken, kind=cell.kind, seed=seed, layers=list(cell.layers))
        found = result(study, cell)
        assert evaluate(broken, test, device="cpu") == found["scores"]
        assert found["changed"]["tensors"] == len(report.tensors)
        cosine = found["similarity"]["cosine"]
        first = cell.layers[0]  # hidden states below the first corrupted layer are untouched
        assert np.allclose(cosine[: first + 1], 1) and cosine[first + 1] < 1 - 1e-5


def test_an_untrained_network_is_scored_and_compared_as_it_begins(finished):
    study = finished.study
    cell = next(c for c in study.plan("corruption") if c.state == "untrained")
    network = models.load_classifier(cell.model, 2, cell.seed, scratch=True)
    found = result(study, cell)
    assert evaluate(network, by_hand(study, cell.seed)[1], device="cpu") == found["scores"]
    stream = found["similarity"]["stream"]
    assert stream == passing_stream(network, study.sample(cell))
    assert stream[0] == pytest.approx(1) and "changed" not in found


@pytest.mark.parametrize("state", ["healed", "scratch"])
def test_healed_is_the_pretrained_model_corrupted_then_trained_and_scratch_a_random_one(
    finished, state
):
    study = finished.study
    cell = next(c for c in study.plan("recovery") if c.state == state)
    model = models.load_classifier(cell.model, 2, cell.seed, scratch=state == "scratch")
    if state == "healed":
        corrupt(model, kind=cell.kind, seed=cell.seed, layers=list(cell.layers))
    train, validation, test = study.examples(cell)
    recipe = {n: study.settings(cell)[n] for n in RECIPE if n != "max_length"}
    recipe |= {"seed": cell.seed, "device": "cpu", "progress": False}
    done, found = fine_tune(model, train, validation, **recipe), result(study, cell)
    assert found["losses"] == [round(loss, 5) for loss in done.losses]
    assert evaluate(model, test, device="cpu") == found["scores"]


def test_a_mean_pooled_head_is_trained_broken_healed_and_kept(tiny):
    changes = {"levels": "1/3", "sides": "bottom", "scratch": False, "seeds": 0}
    study = tiny(head="mean", epochs=10.0, learning_rate=5e-3, **changes)
    baseline, broken, recovery = (study.run(stage) for stage in STAGES)
    assert baseline["score"].min() > 0.9 and set(recovery["head"]) == {"mean"}
    assert broken["score"].min() < baseline["score"].min()
    (cell,) = study.plan("baseline")
    record = study.store.read("baseline", cell.key)
    assert record["determinants"]["head"] == "mean"
    assert record["result"]["shortcut"] == "all tokens"
    kept = compute.network(study, cell)  # from its file
    assert evaluate(kept, study.examples(cell)[2], device="cpu") == record["result"]["scores"]


@pytest.mark.parametrize("kept", [compute.KEPT_STATES, 0])
def test_broken_is_the_same_whatever_was_broken_before(finished, tiny, monkeypatch, kept):
    """The intact model is shared from cell to cell: nothing of one may reach the next."""
    monkeypatch.setattr(compute, "KEPT_STATES", kept)
    study = tiny(run=finished.study.run_folder)
    cells = study.plan("corruption")[1::3]  # of both seeds, an untrained one among them
    cells = [cell for pair in zip(cells, reversed(cells), strict=True) for cell in pair]
    for cell in cells:  # both seeds in turn, then one after the other
        assert computed(study, cell) == result(study, cell)
        assert len(study.intact_models) == 1
    # Healing has that room to itself.
    healed, seen = study.plan("recovery")[0], []
    study.on_step = lambda *_: seen.append(len(study.intact_models))
    computed(study, healed)
    assert seen and not any(seen)


def test_broken_does_not_need_the_saved_weights(copied, capsys):
    cell = copied.plan("corruption")[0]
    intact = planning.intact_of(copied, cell)
    weights = copied.store.weights_path(intact.key)
    saved = weights.read_bytes()
    flipped = bytearray(saved)
    flipped[len(saved) // 2] ^= 1  # one bit of a value
    of_another = next(p for p in weights.parent.iterdir() if p != weights).read_bytes()
    for damage in (None, saved[: len(saved) // 2], flipped, of_another):
        weights.unlink() if damage is None else weights.write_bytes(damage)
        copied.intact_models.clear()
        assert computed(copied, cell) == result(copied, cell)
        assert weights.read_bytes() == saved
        said = capsys.readouterr().err
        assert (f"weights {weights} are unusable" in said) == (damage is not None)
    healed = next(c for c in copied.plan("recovery") if planning.keeps_weights(copied, c))
    kept = compute.network(copied, healed).state_dict()
    copied.store.weights_path(healed.key).unlink()
    again = compute.network(copied, healed).state_dict()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


# -- scans -----------------------------------------------------------------------------------------


def test_a_healed_cell_does_what_its_recipe_says(finished):
    study = finished.study
    cells = {c.recipe: c for c in scanned(study, "recipes")}
    assert len(encoder_layers(compute.network(study, cells["drop"]))) == 2
    found = result(study, cells["distillation"])
    assert found["warm_up_tokens"] > 0
    plain = next(c for c in study.plan("baseline") if c.seed == 0)
    spent = result(study, plain)["train_tokens"]
    # Batches are whole: the two parts may differ from the whole by one batch of 8 short sentences.
    assert abs(found["train_tokens"] + found["warm_up_tokens"] - spent) <= 8 * 16


def test_a_deployed_model_is_broken_from_its_fine_tuned_weights(finished, monkeypatch):
    study, seen = finished.study, {}

    def spy(model, *args, **kwargs):
        seen.update({k: v.clone() for k, v in model.state_dict().items()})
        raise Diverged("the loss is nan", Training(1, [], [], 9, "float32", 8192))

    monkeypatch.setattr(compute.training, "fine_tune", spy)
    found = computed(study, *scanned(study, "deployed"))
    (broken,) = scanned(study, "deployed", "harms")
    expected = compute.network(study, broken).state_dict()
    assert all(torch.equal(seen[name], value) for name, value in expected.items())
    # A loss that is no longer finite is a result.
    assert found["diverged"] == "the loss is nan" and "f1" in found["scores"]
    assert found["steps"] == 1 and found["curve"] == []
    far = finished.tables["scans"].query("scan == 'far'")
    assert len(far) == 1 and far["diverged"].str.contains("loss is").all()
    assert far["score"].notna().all()


def test_the_intact_models_of_a_probed_scan_are_kept_and_probed(tiny):
    scans = {
        "longer": {"state": ["intact", "scratch"], "epochs": 2, "seeds": 0, "probed": True},
        "shorter": {"state": "intact", "epochs": 0.5, "seeds": 0},
    }
    study = tiny(scans=scans, seeds=0, probe_levels=[])
    study.run("scans")
    cells = {c.scan: c for c in study.plan("scans") if c.state == "intact"}
    kept = {name: study.store.weights_path(c.key).exists() for name, c in cells.items()}
    assert kept == {"longer": True, "shorter": False}
    probing = study.plan("probing")
    assert [c.network.key for c in probing if c.scan == "longer"] == [cells["longer"].key]
    assert {c.columns()["scan"] for c in probing} == {"main", "longer"}
    assert "longer" not in {c.scan for c in study.plan("neurons")}


def test_a_model_that_cannot_be_loaded_costs_no_weights(copied, monkeypatch):
    cell = copied.plan("baseline")[0]
    weights = copied.store.weights_path(cell.key)
    saved = weights.read_bytes()

    def unreachable(*_):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(compute, "_load", unreachable)
    with pytest.raises(OSError, match="cannot be reached"):
        compute.network(copied, cell)
    assert weights.read_bytes() == saved
