"""Loading classifiers, and what identifies them: the same result by every way in, or a refusal."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, OTHERS, tiny_model
from helpers import save_tiny_bert
from safetensors.torch import load_file, save_file
from test_encoders import layer_parameters

from healing_utils.base.errors import HealingError
from healing_utils.healing import models
from healing_utils.healing.corruption import corrupt

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture(autouse=True)
def forget():
    """The process remembers what it loaded; these tests change files behind its back."""
    models.forget()


def flip(file: Path) -> None:
    """One bit, in the last byte."""
    content = file.read_bytes() if file.exists() else b"one"
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_organism_is_a_folder_and_edited_weights_are_noticed(monkeypatch, saved, copied):
    monkeypatch.setattr(models.organism, "folder", lambda: copied)
    assert models.model_folder("organism") == copied
    assert models.model_folder(str(saved)) == saved
    sha = hashlib.sha256((copied / WEIGHTS).read_bytes()).hexdigest()
    (copied / "training.json").write_text(json.dumps({"sha256": sha}))
    models.forget()
    use("organism")
    flip(copied / WEIGHTS)
    models.forget()
    with pytest.raises(HealingError, match="'organism': its weights .* pre-training wrote"):
        models.load_classifier("organism", 2, 0)


def test_the_body_is_the_checkpoints_and_the_head_the_seeds(saved):
    stored = load_file(saved / WEIGHTS)
    one, again, other = (models.load_classifier(str(saved), 3, seed) for seed in (0, 0, 1))
    body = one.bert.state_dict()
    assert all(torch.equal(body[name], tensor) for name, tensor in stored.items())
    assert equal(one, again) and not torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.classifier.weight.shape == (3, 32)
    with pytest.raises(HealingError, match="unknown head 'means'.*Did you mean 'mean'"):
        models.load_classifier(str(saved), 2, 0, head="means")
    for seed in (-1, 2**64, 10**5000, "1" * 5000):
        with pytest.raises(HealingError, match="^seed is not a whole number from 0 to 2"):
            models.load_classifier(str(saved), 2, seed)


def test_scratch_shares_nothing_with_the_checkpoint_and_the_callers_numbers_stay(saved):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = models.load_classifier(str(saved), 2, 0)
    scratch, again = (models.load_classifier(str(saved), 2, 0, scratch=True) for _ in range(2))
    assert equal(scratch, again)
    for (name, a), b in zip(one.named_parameters(), scratch.parameters(), strict=True):
        # Biases start at 0 and LayerNorm at 1 in every BERT.
        assert a.ndim == 1 or not torch.equal(a, b), name
    assert torch.equal(torch.get_rng_state(), before)
    config = models.load_classifier(str(saved), 1, 0, regression=True).config
    assert config.num_labels == 1 and config.problem_type == "regression"


# -- what is not whole -----------------------------------------------------------------------------


def tensors(change):
    """Damage to a checkpoint's tensors, by a function of their dictionary."""

    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return damage


def settings(name: str, **given: object):
    """Damage to a JSON file of the folder; ``evil.py`` says that it was run."""

    def damage(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **given}))
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")

    return damage


def without(*patterns: str):
    return lambda folder: [f.unlink() for pattern in patterns for f in folder.glob(pattern)]


QUERY = "encoder.layer.2.attention.self.query.weight"
OUTPUT = "encoder.layer.0.output.dense.weight"
REFUSED = {
    "truncated weights": (lambda f: os.truncate(f / WEIGHTS, 500), ""),
    "no weights": (without(WEIGHTS), "no model.safetensors"),
    "pickled weights": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        r"pytorch_model.bin\) can hold code: convert them, by .*save_pretrained",
    ),
    "no configuration": (without("config.json"), ""),
    "broken configuration": (lambda f: (f / "config.json").write_text("{"), ""),
    "unknown kind": (lambda f: (f / "config.json").write_text('{"model_type": "nosuch"}'), ""),
    "no tokenizer": (without("token*"), "tokenizer.json, or .* is missing: save its tokenizer"),
    "a tokenizer's settings alone": (without("tokenizer.json"), "tokenizer.json, or .* is missing"),
    "another kind's vocabulary": (
        lambda f: [without("token*")(f), (f / "vocab.json").write_text("{}")],
        "tokenizer.json, or vocab.txt, is missing",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "code for a model": (
        settings("config.json", model_type="mine", auto_map={"AutoConfig": "evil.C"}),
        "no model's code is run",
    ),
    "code for a tokenizer": (
        settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "no model's code is run",
    ),
    "no tensors": (tensors(dict.clear), "is missing"),
    "no layer": (
        tensors(lambda t: [t.pop(n) for n in list(t) if "layer.1." in n]),
        "encoder.layer.1.*is missing.* and 13 more",
    ),
    "one tensor less": (tensors(lambda t: t.pop(QUERY)), f"{QUERY} is missing"),
    "another shape": (
        tensors(lambda t: t.update({OUTPUT: torch.zeros(32, 40)})),
        rf"{OUTPUT} is \(32, 40\) and not \(32, 48\)",
    ),
    "another prefix": (
        tensors(lambda t: [t.update({f"other.{n}": t.pop(n)}) for n in list(t)]), "is missing"
    ),
    "layers too many": (
        tensors(lambda t: t.update({"encoder.layer.3.output.dense.bias": torch.zeros(32)})),
        "holds encoder.layer.3.output.dense.bias, for which its configuration has no layer",
    ),
}  # fmt: skip


def use(model: str) -> torch.nn.Module:
    """All that a study does with a model before it trains it."""
    models.identity(model), models.load_config(model), models.load_tokenizer(model)
    return models.load_classifier(model, 2, 0)


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_a_model_that_is_not_whole_is_refused_in_one_line_by_name(copied, what):
    damage, message = REFUSED[what]
    damage(copied)
    with pytest.raises(HealingError, match=f"cannot load model '.*': .*{message}") as caught:
        use(str(copied))
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)
    assert not (copied / "ran").exists()


@pytest.mark.parametrize("name", ["./no/such", "a/b/c", "no such", "", "~/model"])
def test_a_folder_that_is_not_there_is_no_riddle_of_the_hubs(name):
    with pytest.raises(HealingError, match="there is no such folder, and it is no name of the hub"):
        use(name)


def test_loading_says_nothing_and_needs_no_home(saved, capfd, caplog):
    use(str(saved))
    seen = capfd.readouterr()
    assert seen.out == seen.err == "" and not caplog.records
    nowhere = {"HOME": "/dev/null", "HF_HOME": "/dev/null/hub"}  # nothing can be written there
    given = {"env": {"PYTHONPATH": os.pathsep.join(sys.path), **nowhere}, "capture_output": True}
    code = f"from healing_utils.healing import models; print(models.identity({str(saved)!r}))"
    code += f"; models.load_tokenizer({str(saved)!r}), models.load_classifier({str(saved)!r}, 2, 0)"
    ran = subprocess.run([sys.executable, "-c", code], check=True, text=True, **given)
    assert ran.stdout.strip() == models.identity(str(saved))


# -- the same model in other files -----------------------------------------------------------------


@pytest.mark.parametrize("scratch", [False, True])
def test_a_checkpoint_in_half_precision_is_trained_in_float32(copied, scratch):
    tensors(lambda t: t.update({n: x.half() for n, x in t.items()}))(copied)
    settings("config.json", dtype="float16")(copied)
    model = models.load_classifier(str(copied), 2, 0, scratch=scratch)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("named", ["model-{}.safetensors", "part{}.safetensors"])
def test_weights_in_parts_are_hashed_and_loaded_whole(saved, tmp_path, named):
    whole = models.load_classifier(str(saved), 2, 0)
    whole.bert.save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(saved / "tokenizer.json", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content, parts = index.read_text(), []
    for number, part in enumerate(sorted(tmp_path.glob("model-*.safetensors"))):
        parts.append(part.rename(tmp_path / named.format(number)))
        content = content.replace(part.name, parts[-1].name)
    index.write_text(content)
    assert len(parts) > 1 and equal(whole, use(str(tmp_path)))
    before = models.identity(str(tmp_path))
    flip(parts[1])
    models.forget()
    assert models.identity(str(tmp_path)) != before
    parts[1].unlink()
    with pytest.raises(HealingError, match="cannot load model"):
        use(str(tmp_path))


def test_identity_is_the_content_and_not_the_place(saved, copied):
    before = models.identity(str(saved))
    (copied / "README.md").write_text("words")
    assert models.identity(str(copied)) == before
    files = (WEIGHTS, "config.json", "tokenizer.json", "vocab.txt", "spiece.model", "bpe.codes")
    for name in files:
        flip(copied / name)
        models.forget()
        assert models.identity(str(copied)) != before, name
        before = models.identity(str(copied))


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A hub cache with one model in it, ``owner/name``; a function moves its branch `main`."""
    from huggingface_hub import constants

    place = tmp_path / "hub" / "models--owner--name"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (place / "refs").mkdir(parents=True)
    (place / "blobs").mkdir()

    def move(commit: str, source: Path) -> None:
        (place / "snapshots" / commit).mkdir(parents=True)
        for file in source.iterdir():
            content = file.read_bytes()
            name = hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()
            if file.name == WEIGHTS:
                name = hashlib.sha256(content).hexdigest()
            (place / "blobs" / name).write_bytes(content)
            (place / "snapshots" / commit / file.name).symlink_to(place / "blobs" / name)
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
    with pytest.raises(HealingError, match="there is no such folder, and of the hub's: "):
        use("owner/another")


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_bit_that_flips_in_the_hubs_cache_is_noticed(hub, name):
    use("owner/name")
    file = (models.model_folder("owner/name") / name).resolve()
    flip(file)
    models.forget()
    with pytest.raises(HealingError, match=f"cannot load model 'owner/name': {file} is damaged"):
        use("owner/name")


# -- heads -----------------------------------------------------------------------------------------


def test_what_stands_beside_the_encoder_is_passed_over_and_a_missing_pooler_drawn(copied):
    table = "encoder.layer.0.attention.self.rotary.inv_freq"  # a buffer that old files hold
    new = {"cls.predictions.bias": torch.zeros(3), table: torch.zeros(4)}
    tensors(lambda t: t.update({**new, "embeddings.position_ids": torch.arange(40)}))(copied)
    models.load_classifier(str(copied), 2, 0)
    passed = models.loaded(str(copied))["passed_over"]
    assert [name.removeprefix("bert.") for name in passed] == sorted(new)
    tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith("pooler")])(copied)
    models.forget()
    one, again, other = (models.load_classifier(str(copied), 2, seed) for seed in (0, 0, 1))
    weights = [m.bert.pooler.dense.weight for m in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    drawn = models.loaded(str(copied))["drawn"]
    assert drawn == ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_head_is_always_drawn_afresh(family, tmp_path):
    """RoBERTa's `classifier.dense` fits whatever the classes; a head of as many classes fits too.
    Both are drawn as if the checkpoint had none."""
    encoder = tiny_model(family)
    encoder.save_pretrained(tmp_path / "bare")
    tuned = models.load_classifier(str(tmp_path / "bare"), 2, 7)
    tuned.save_pretrained(tmp_path / "tuned")
    bare, redrawn = (models.load_classifier(str(tmp_path / n), 2, 0) for n in ("bare", "tuned"))
    assert equal(bare, redrawn)
    own = dict(tuned.named_parameters())
    changed = {n for n, p in redrawn.named_parameters() if not torch.equal(p, own[n])}
    assert changed and not any(n.startswith(f"{tuned.base_model_prefix}.") for n in changed)


@pytest.mark.parametrize("family", ["bert", "distilbert", "xlnet", "mpnet", "squeezebert"])
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
