"""Loading classifiers, and what identifies a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import save_tiny_bert
from safetensors.torch import load_file, save_file

from healing_utils import models
from healing_utils.errors import HealingError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def forget():
    """The process remembers what it loaded; these tests change files behind its back."""
    for function in (models.identity, models.load_config, models.load_tokenizer):
        function.cache_clear()


def test_the_organism_is_a_folder_and_other_names_are_themselves(monkeypatch, tmp_path):
    monkeypatch.setattr(models.organism, "folder", lambda: tmp_path)
    assert models.resolve("organism") == str(tmp_path)
    assert models.resolve("bert-base-uncased") == "bert-base-uncased"


def test_the_body_is_the_checkpoints_and_the_head_the_seeds(saved):
    stored = load_file(saved / "model.safetensors")
    one, again, other = (models.load_classifier(str(saved), 3, seed) for seed in (0, 0, 1))
    body = one.bert.state_dict()
    assert all(torch.equal(body[name], tensor) for name, tensor in stored.items())
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.classifier.weight.shape == (3, 32)


def test_scratch_shares_nothing_with_the_checkpoint(saved):
    one = models.load_classifier(str(saved), 2, 0)
    scratch, again = (models.load_classifier(str(saved), 2, 0, scratch=True) for _ in range(2))
    for (name, a), b, c in zip(
        one.named_parameters(), scratch.parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(b, c), name
        # Biases start at 0 and LayerNorm at 1 in every BERT.
        assert a.ndim == 1 or not torch.equal(a, b), name


@pytest.mark.parametrize("scratch", [False, True])
def test_the_callers_random_numbers_are_untouched(saved, scratch):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models.load_classifier(str(saved), 2, 1, scratch=scratch)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scratch", [False, True])
def test_a_checkpoint_in_half_precision_is_trained_in_float32(copied, scratch):
    weights = copied / "model.safetensors"
    save_file({n: t.half() for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    model = models.load_classifier(str(copied), 2, 0, scratch=scratch)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_checkpoint_with_a_head_of_another_size_keeps_its_body(saved, tmp_path):
    five = models.load_classifier(str(saved), 5, 0)
    five.save_pretrained(tmp_path)
    two = models.load_classifier(str(tmp_path), 2, 0)
    assert two.classifier.weight.shape == (2, 32)
    assert torch.equal(two.get_input_embeddings().weight, five.get_input_embeddings().weight)


def test_regression_has_one_output(saved):
    model = models.load_classifier(str(saved), 1, 0, regression=True)
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])


DAMAGE = {
    "truncated weights": truncate,
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "pickled weights": lambda folder: (folder / "model.safetensors").rename(
        folder / "pytorch_model.bin"
    ),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "broken configuration": lambda folder: (folder / "config.json").write_text("{"),
    "unknown kind": lambda folder: (folder / "config.json").write_text('{"model_type": "nosuch"}'),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_model_that_cannot_be_loaded_is_one_line_with_its_name(copied, damage):
    DAMAGE[damage](copied)
    with pytest.raises(HealingError, match="cannot load model") as caught:
        models.load_classifier(str(copied), 2, 0)
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


def test_loading_says_nothing(saved, capfd, caplog):
    models.load_classifier(str(saved), 2, 0)
    models.load_tokenizer(str(saved))
    seen = capfd.readouterr()
    assert seen.out == seen.err == "" and not caplog.records


def test_identity_is_the_content_and_not_the_place(saved, copied, tmp_path):
    before = models.identity(str(saved))
    assert models.identity(str(copied)) == before
    (copied / "README.md").write_text("words")
    models.identity.cache_clear()
    assert models.identity(str(copied)) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_identity_changes_with_what_determines_results(saved, copied, name):
    before = models.identity(str(saved))
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert models.identity(str(copied)) != before


@pytest.mark.parametrize("name", ["vocab.txt", "vocab.json", "merges.txt", "spiece.model"])
def test_identity_changes_with_any_vocabulary(saved, copied, name):
    before = models.identity(str(saved))
    (copied / name).write_text("one\ntwo")
    assert models.identity(str(copied)) != before


def test_identity_of_a_hub_model_is_its_commit(monkeypatch):
    config = type("Config", (), {"_commit_hash": "abc123"})()
    monkeypatch.setattr(models, "load_config", lambda *_: config)
    assert models.identity("owner/name") == "owner/name@abc123"
    assert models.identity("owner/name", "main") == "owner/name@abc123"
