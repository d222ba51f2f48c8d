"""The study's real model and data, where this machine has them stored; nothing is downloaded."""

from __future__ import annotations

import pytest
import torch

from healing_utils.base.errors import HealingError
from healing_utils.healing import models, training
from healing_utils.healing.corruption import corrupt
from healing_utils.texts import tasks

MODEL, DATA = "sentence-transformers/all-MiniLM-L6-v2", "stanfordnlp/sst2"


@pytest.fixture(scope="module", autouse=True)
def stored():
    """Ask the local cache only, whatever the environment says."""
    import datasets
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        try:
            tasks.load_task(DATA)
            models.load_classifier(MODEL, 2, seed=0)
        except HealingError as error:
            pytest.skip(f"{DATA} or {MODEL} is not stored here: {error}")
        yield


def test_sst2_has_the_published_sizes_and_the_real_model_learns_something_of_it():
    sst2 = tasks.load_task(DATA)
    # Wang et al. 2019, table 1: 67k training phrases, 872 for development.
    assert (len(sst2.pool), len(sst2.test)) == (67349, 872)
    assert sst2.classes == ("negative", "positive") and sst2.metric == "f1"
    assert set(sst2.pool.labels) == {0, 1} and sum(sst2.test.labels) == 444
    assert tasks.load_task("sst2").test == sst2.test
    train, _ = sst2.draw(0, 256, 0)
    examples = training.encode(models.load_tokenizer(MODEL), train.texts, train.labels)
    model = models.load_classifier(MODEL, 2, seed=0)
    assert model.config.num_hidden_layers == 6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    before = training.evaluate(model, examples, device="cpu")["loss"]
    done = training.fine_tune(
        model, examples, epochs=1, learning_rate=2e-4, device="cpu", progress=False
    )
    assert done.steps == 8
    assert training.evaluate(model, examples, device="cpu")["loss"] < before - 0.02
    report = corrupt(model, side="bottom", level="1/6")
    assert set(report.tensors.layer) == {0}
