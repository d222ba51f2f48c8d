"""Loading classifiers, and what identifies a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import FAMILIES, tiny_model
from helpers import save_tiny_bert
from safetensors.torch import load_file, save_file
from test_encoders import layer_parameters

from healing_utils.base.errors import HealingError
from healing_utils.healing import models
from healing_utils.healing.corruption import corrupt


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
    models.forget()


def test_the_organism_is_a_folder_and_other_names_are_themselves(monkeypatch, saved):
    monkeypatch.setattr(models.organism, "folder", lambda: saved)
    assert models.model_folder("organism") == models.model_folder(str(saved)) == saved


def test_the_body_is_the_checkpoints_and_the_head_the_seeds(saved):
    stored = load_file(saved / "model.safetensors")
    one, again, other = (models.load_classifier(str(saved), 3, seed) for seed in (0, 0, 1))
    body = one.bert.state_dict()
    assert all(torch.equal(body[name], tensor) for name, tensor in stored.items())
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.classifier.weight.shape == (3, 32)


def test_scratch_shares_nothing_with_the_checkpoint_and_the_callers_numbers_stay(saved):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = models.load_classifier(str(saved), 2, 0)
    scratch, again = (models.load_classifier(str(saved), 2, 0, scratch=True) for _ in range(2))
    for (name, a), b, c in zip(
        one.named_parameters(), scratch.parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(b, c), name
        # Biases start at 0 and LayerNorm at 1 in every BERT.
        assert a.ndim == 1 or not torch.equal(a, b), name
    assert torch.equal(torch.get_rng_state(), before)
    config = models.load_classifier(str(saved), 1, 0, regression=True).config
    assert config.num_labels == 1 and config.problem_type == "regression"
    with pytest.raises(HealingError, match="unknown head 'means'.*Did you mean 'mean'"):
        models.load_classifier(str(saved), 2, 0, head="means")


@pytest.mark.parametrize("scratch", [False, True])
def test_a_checkpoint_in_half_precision_is_trained_in_float32(copied, scratch):
    weights = copied / "model.safetensors"
    save_file({n: t.half() for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    model = models.load_classifier(str(copied), 2, 0, scratch=scratch)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


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
    models.forget()
    assert models.identity(str(copied)) == before


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "spiece.model"]
)
def test_identity_changes_with_what_determines_results(saved, copied, name):
    before, file = models.identity(str(saved)), copied / name
    content = file.read_bytes() if file.exists() else b"one"
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert models.identity(str(copied)) != before


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A hub cache with one model in it, ``owner/name``; a function moves its branch `main`."""
    from huggingface_hub import constants

    place = tmp_path / "hub" / "models--owner--name"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def move(commit: str, source) -> None:
        shutil.copytree(source, place / "snapshots" / commit, dirs_exist_ok=True)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(commit)
        models.forget()

    move("a" * 40, saved)
    return move


def test_a_hub_models_identity_is_its_content_and_a_process_loads_what_it_has_hashed(
    saved, hub, tmp_path, monkeypatch
):
    def table():
        return models.load_classifier("owner/name", 2, 0).get_input_embeddings().weight

    before, first = models.identity("owner/name"), table()
    assert before == models.identity(str(saved))
    hub("b" * 40, saved)  # another commit, the same files
    assert models.identity("owner/name") == before
    with monkeypatch.context() as patch:
        patch.setattr(models, "forget", lambda: None)
        hub("c" * 40, save_tiny_bert(tmp_path / "other", seed=1))
    assert models.identity("owner/name") == before and torch.equal(table(), first)
    models.forget()
    assert models.identity("owner/name") != before and not torch.equal(table(), first)


def test_weights_in_parts_are_hashed_and_loaded_whole(saved, tmp_path):
    whole = models.load_classifier(str(saved), 2, 0)
    whole.bert.save_pretrained(tmp_path, max_shard_size="20KB")
    for file in saved.glob("token*"):
        shutil.copy(file, tmp_path)
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    sharded = models.load_classifier(str(tmp_path), 2, 0)
    for a, b in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b)
    before = models.identity(str(tmp_path))
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    models.forget()
    assert models.identity(str(tmp_path)) != before


def rewrite(folder, change) -> None:
    """Put the tensors of a checkpoint through `change`, a function of the dictionary."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


LACKING = {
    "a layer": (
        lambda t: [t.pop(n) for n in list(t) if "layer.1." in n],
        "encoder.layer.1.*is missing.* and 13 more",
    ),
    "one tensor": (
        lambda t: t.pop("encoder.layer.2.attention.self.query.weight"),
        "encoder.layer.2.attention.self.query.weight is missing",
    ),
    "another shape": (
        lambda t: t.update({"encoder.layer.0.output.dense.weight": torch.zeros(32, 40)}),
        r"encoder.layer.0.output.dense.weight is \(32, 40\) and not \(32, 48\)",
    ),
    "a cut vocabulary": (
        lambda t: t.update({"embeddings.word_embeddings.weight": torch.zeros(20, 32)}),
        r"embeddings.word_embeddings.weight is \(20, 32\)",
    ),
    "another prefix": (
        lambda t: [t.update({f"other.{n}": t.pop(n)}) for n in list(t)],
        "is missing",
    ),
    "layers too many": (
        lambda t: t.update({"encoder.layer.3.output.dense.bias": torch.zeros(32)}),
        "holds encoder.layer.3.output.dense.bias, for which its configuration has no layer",
    ),
}


@pytest.mark.parametrize("what", sorted(LACKING))
def test_an_encoder_that_is_not_whole_is_refused_by_name(copied, what):
    change, message = LACKING[what]
    rewrite(copied, change)
    with pytest.raises(HealingError, match=message) as caught:
        models.load_classifier(str(copied), 2, 0)
    assert "\n" not in str(caught.value)


def test_what_stands_beside_the_encoder_is_passed_over_and_named(copied):
    table = "encoder.layer.0.attention.self.rotary.inv_freq"  # a buffer that old files hold
    new = {"cls.predictions.bias": torch.zeros(3), table: torch.zeros(4)}
    rewrite(copied, lambda t: t.update({**new, "embeddings.position_ids": torch.arange(40)}))
    models.load_classifier(str(copied), 2, 0)
    passed = models.loaded(str(copied))["passed_over"]
    assert [name.removeprefix("bert.") for name in passed] == sorted(new)


def test_a_pooler_that_is_missing_is_drawn_from_the_seed_and_named(copied):
    rewrite(copied, lambda t: [t.pop(n) for n in list(t) if n.startswith("pooler")])
    one, again, other = (models.load_classifier(str(copied), 2, seed) for seed in (0, 0, 1))
    weights = [m.bert.pooler.dense.weight for m in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    drawn = models.loaded(str(copied))["drawn"]
    assert drawn == ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_head_is_always_drawn_afresh(family, tmp_path):
    """RoBERTa's `classifier.dense` fits whatever the classes; a head of as many classes fits too.
    Both are drawn as if the checkpoint had none."""
    encoder = tiny_model(family)
    encoder.save_pretrained(tmp_path / "bare")
    tuned = models.load_classifier(str(tmp_path / "bare"), 2, 7)
    tuned.save_pretrained(tmp_path / "tuned")
    bare, redrawn = (models.load_classifier(str(tmp_path / n), 2, 0) for n in ("bare", "tuned"))
    for (name, a), b in zip(bare.named_parameters(), redrawn.parameters(), strict=True):
        assert torch.equal(a, b), name
    own = dict(tuned.named_parameters())
    changed = {n for n, p in redrawn.named_parameters() if not torch.equal(p, own[n])}
    assert changed and not any(n.startswith(f"{tuned.base_model_prefix}.") for n in changed)


@pytest.mark.parametrize("family", ["bert", "distilbert", "xlnet", "mpnet"])
def test_a_mean_pooled_head_reads_every_real_token_and_no_other(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    model = models.load_classifier(str(tmp_path), 3, 0, head="mean").eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    last = []
    hook = model.encoder.register_forward_hook(lambda _, __, out: last.append(out[0]))
    out = model(input_ids=ids, attention_mask=mask)
    hook.remove()
    (states,) = last
    wanted = torch.stack([states[0].mean(0), states[1, :3].mean(0)])
    assert torch.allclose(out.logits, model.classifier(wanted), atol=1e-6)
    whole = model(input_ids=ids[:1]).logits  # without a mask every token is real
    assert torch.allclose(whole, out.logits[:1], atol=1e-5)
    (gradient,) = torch.autograd.grad(out.logits.sum(), states)
    assert gradient[mask.bool()].ne(0).any(-1).all() and not gradient[1, 3].any()
    assert not any("pooler" in name for name, _ in model.named_parameters())
    with pytest.raises(HealingError, match="has no pooler"):
        corrupt(model, part="pooler")
    own = models.load_classifier(str(tmp_path), 3, 0)  # damage is the same under either head
    for damaged in (own, model):
        corrupt(damaged, side="top", level="1/3", kind="init", seed=5)
    theirs = layer_parameters(own)
    assert all(torch.equal(theirs[name], p) for name, p in layer_parameters(model).items())
    again, other = (models.load_classifier(str(tmp_path), 3, s, head="mean") for s in (0, 1))
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
