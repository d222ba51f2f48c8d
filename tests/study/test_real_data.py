"""The study's real model and data, where this machine has them stored; nothing is downloaded."""

from __future__ import annotations

import datasets
import huggingface_hub.constants
import pytest
import torch

from healing_utils.base.errors import HealingError
from healing_utils.healing import models, training
from healing_utils.healing.corruption import corrupt
from healing_utils.texts import tasks

MODEL, DATA = "sentence-transformers/all-MiniLM-L6-v2", "stanfordnlp/sst2"


def test_sst2_has_the_published_sizes_and_the_real_model_learns_something_of_it(monkeypatch):
    for module in (huggingface_hub.constants, datasets.config):  # the local cache only
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    try:
        sst2, model = tasks.load_task(DATA), models.load_classifier(MODEL, 2, seed=0)
    except HealingError as error:
        pytest.skip(f"{DATA} or {MODEL} is not stored here: {error}")
    # Wang et al. 2019, table 1: 67k training phrases, 872 for development.
    assert (len(sst2.pool), len(sst2.test)) == (67349, 872)
    assert sst2.classes == ("negative", "positive") and sst2.metric == "f1"
    assert set(sst2.pool.labels) == {0, 1} and sum(sst2.test.labels) == 444
    train, _ = sst2.draw(0, 256, 0)
    examples = training.encode(models.load_tokenizer(MODEL), train.texts, train.labels)
    assert model.config.num_hidden_layers == 6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    before = training.evaluate(model, examples, device="cpu")["loss"]
    training.fine_tune(model, examples, epochs=1, learning_rate=2e-4, device="cpu", progress=False)
    assert training.evaluate(model, examples, device="cpu")["loss"] < before - 0.02
    report = corrupt(model, side="bottom", level="1/6")
    assert set(report.tensors.layer) == {0}
