"""The training loop: it learns what is planted, and its shortcuts change nothing."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, byte_level, tiny_config, tiny_model, wordpiece
from helpers import examples, planted_texts, random_examples, save_tiny_bert, tiny_tokenizer
from scipy.stats import spearmanr
from sklearn import metrics
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, CanineTokenizer

from healing_utils.base.errors import HealingError
from healing_utils.healing import shortcuts, training
from healing_utils.healing.examples import reading_note
from healing_utils.healing.training import Diverged, Encoded, encode, evaluate, fine_tune, predict

QUIET = {"device": "cpu", "progress": False}


def classifier(family: str = "bert", dropout: float = 0.0, seed: int = 0, **settings: object):
    """A tiny classifier of a family with all its dropouts at one rate."""
    config = tiny_config(family)
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, dropout)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config).eval()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_the_losses_are_those_of_a_plain_loop():
    """Dropout off: torch's own AdamW, clipping and cross-entropy, the whole table of embeddings,
    one step after the other on the same batches."""
    data = random_examples(96, classes=3, seed=3)
    model = classifier(num_labels=3)
    plain = copy.deepcopy(model).train()
    rate, warm, steps = 1e-2, 0.1, 24
    slow = "bert.pooler.dense.weight"
    done = fine_tune(
        model, data, epochs=8, batch_size=32, learning_rate=rate, warmup=warm, seed=5,
        rates={slow: 0.25}, **QUIET,
    )  # fmt: skip
    groups = [{"params": [p], "weight_decay": 0.01 * (p.ndim > 1 and not name.endswith("bias"))}
              | {"factor": 0.25 if name == slow else 1.0}
              for name, p in plain.named_parameters()]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=False, foreach=False)
    losses = []
    for step, rows in enumerate(training.batches_of(data.lengths, 8, 32, seed=5)):
        rising, falling = (step + 1) / (warm * steps + 1), (steps - step) / (steps * (1 - warm))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"] * (rising if step < warm * steps else falling)
        batch = training.collate(data, rows, torch.device("cpu"))
        labels = torch.from_numpy(data.labels[rows])
        loss = torch.nn.functional.cross_entropy(plain(**batch).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert done.shortcut == "first token" and len(losses) == steps
    # 1e-7 on one machine; a rate wrong by a thousandth or no decay is above the bound.
    assert np.abs(np.subtract(done.losses, losses)).max() < 1e-4
    assert np.ptp(losses) > 0.1  # they move by far more than that
    assert largest_difference(weights(model), weights(plain)) < 1e-3


def test_a_planted_word_is_learnt_from_texts_by_a_model_loaded_from_disk(tmp_path):
    folder = save_tiny_bert(tmp_path / "model", layers=2)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, hidden_dropout_prob=0.0
    )
    data, unseen = (
        dict(zip(("text", "label"), planted_texts(count, classes=3, seed=seed), strict=True))
        for count, seed in ((120, 1), (60, 2))
    )
    before = evaluate(model, unseen, device="cpu")  # the tokenizer is found beside the model
    how = {"epochs": 12, "batch_size": 8, "learning_rate": 5e-3, "evaluations": 3, **QUIET}
    done = fine_tune(model, data, unseen, **how)
    after = evaluate(model, unseen, device="cpu")
    assert before["accuracy"] < 0.7 and after["accuracy"] == after["f1"] == 1
    assert done.steps == len(done.losses) == 12 * 15
    assert done.losses[0] > 0.5 > 0.1 > done.losses[-1]
    assert [row["step"] for row in done.curve] == [0, 20, 80, 180]
    assert done.curve[0] == {"step": 0, **before} and done.curve[-1] == {"step": 180, **after}
    assert done.tokens == 12 * encode(tiny_tokenizer(), data["text"], data["label"]).tokens
    assert not model.training and done.precision == "float32"


def test_regression_learns_a_planted_number():
    model, rng = classifier(num_labels=1), np.random.default_rng(0)
    strength = rng.permutation(np.linspace(-1, 1, VOCABULARY - 5)).astype(np.float32)
    ids = rng.integers(5, VOCABULARY, size=200)
    rows = [[2, int(i), 3] for i in ids]
    examples = Encoded(rows, None, strength[ids - 5], (0, 0, "right"))
    fine_tune(model, examples, epochs=12, batch_size=8, learning_rate=3e-3, **QUIET)
    scores = evaluate(model, examples, device="cpu")
    assert set(scores) == {"spearman", "loss"} and scores["spearman"] > 0.95
    logits = predict(model, examples, device="cpu")
    assert scores["loss"] == pytest.approx(np.square(logits[:, 0] - examples.labels).mean(), 1e-5)


def cut_and_whole(monkeypatch, start, data, **settings):
    """Trained with the rows of `data` alone, and with the whole table; then what was done."""
    cut, whole = copy.deepcopy(start), copy.deepcopy(start)
    how = {"batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.5, **settings, **QUIET}
    done = fine_tune(cut, data, **how)
    nothing = contextlib.nullcontext({"decay": 1.0})
    monkeypatch.setattr(shortcuts, "cut_embeddings", lambda *_: nothing)
    fine_tune(whole, data, **how)
    return cut, whole, done


def tables(*networks):
    return [m.get_input_embeddings().weight.detach() for m in networks]


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "xlnet", "modernbert"])
def test_cut_embeddings_train_as_the_whole_table_does(family, monkeypatch):
    """Used rows and all other weights agree to float32 rounding: the clipped norm sums the same
    squares in another order, so a step differs by about 1e-7 of itself, and AdamW's division by
    its second moment lets that grow over the steps, to less than 1e-5 here. Unused rows only
    decay: once, in double precision, instead of at every step."""
    data, start = random_examples(ids=(10, 30)), classifier(family)  # 20 of 60 ids occur
    cut, whole, _ = cut_and_whole(monkeypatch, start, data, epochs=3)
    assert largest_difference(weights(cut), weights(whole)) < 1e-5
    used = sorted({i for row in data.ids for i in row})
    unused = [i for i in range(VOCABULARY) if i not in used and i != data.pad[0]]
    table, got, want = tables(start, cut, whole)
    assert (got[unused] - want[unused]).abs().max() < 1e-6
    # 9 steps of a decay of 0.5 at rates up to 1e-3: the rows shrank by some thousandths.
    assert 0.995 < (got[unused] / table[unused]).nanmean().item() < 0.999
    assert (got[used] - table[used]).abs().max() > 1e-4


def test_rows_that_are_away_do_not_decay_in_steps_that_were_skipped(monkeypatch):
    """float16 overflows at the first, too large loss scales: the optimizer skips those steps."""
    data, start, scaler = random_examples(ids=(10, 30)), classifier(), torch.amp.GradScaler
    large = {"init_scale": 2.0**28}
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **large, **k))
    cut, whole, done = cut_and_whole(monkeypatch, start, data, epochs=4, precision="float16")
    assert 0 < done.skipped_steps < done.steps
    unused = [i for i in range(1, VOCABULARY) if not 10 <= i < 30]
    got, want, old = (table[unused] for table in tables(cut, whole, start))
    assert (got - want).abs().max() < 1e-6 < (got - old).abs().max()


def test_cut_embeddings_are_the_same_function_and_come_back_after_an_error():
    model, data = classifier("roberta"), random_examples(ids=(10, 30), pad=(1, 0, "right"))
    full, before = model.get_input_embeddings(), weights(model)
    want = predict(model, data, device="cpu")
    with pytest.raises(KeyboardInterrupt), shortcuts.cut_embeddings(model, [1, *range(10, 30)]):
        inside = model.get_input_embeddings()
        assert inside.weight.shape[0] == 21  # the ids 10 to 29, and padding
        # RoBERTa counts positions from the full vocabulary's padding id: they must not move.
        assert np.array_equal(predict(model, data, device="cpu"), want)
        with pytest.raises((IndexError, RuntimeError)):
            predict(model, random_examples(ids=(40, 50)), device="cpu")
        raise KeyboardInterrupt
    assert model.get_input_embeddings() is full
    assert identical(weights(model), before)


def test_tied_and_frozen_embeddings_are_left_alone_and_validation_keeps_its_rows():
    tied, frozen = BertForMaskedLM(tiny_config("bert")), classifier()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    for model in (tied, frozen):
        full = model.get_input_embeddings()
        with shortcuts.cut_embeddings(model, [1, 2]):
            assert model.get_input_embeddings() is full
    before = frozen.get_input_embeddings().weight.clone()
    other = random_examples(ids=(40, 50))
    for model in (frozen, classifier()):
        fine_tune(model, random_examples(ids=(10, 30)), other, epochs=1, **QUIET)
    assert torch.equal(frozen.get_input_embeddings().weight, before)


@pytest.mark.parametrize("max_tokens", [16, 40])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(max_tokens, monkeypatch):
    seen: list[list[torch.Tensor]] = []

    def keep(_, parameters):
        seen.append([p.grad.clone() for p in parameters if p.grad is not None])
        return torch.ones(())

    monkeypatch.setattr(shortcuts.LowWeights, "norm", keep)
    calls = out_of_memory_above(monkeypatch, 8192)
    for budget in (8192, max_tokens):
        fine_tune(
            classifier(), random_examples(count=16), epochs=1, batch_size=16, max_tokens=budget,
            **QUIET,
        )  # fmt: skip
    assert calls[0] == sum(calls[1:]) == 16 and max(calls[1:]) <= max_tokens // 3
    for a, b in zip(*seen, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    assert sum(g.abs().sum() for g in seen[0]) > 0.1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_padding_does_not_change_logits(family):
    """One by one, without padding, a text has the logits that it has in a padded batch. XLNet,
    whose head reads the last token, is padded on the left, as its tokenizer does."""
    model, data = classifier(family), examples(family, 10)
    assert len(set(data.lengths)) > 3
    batched = predict(model, data, device="cpu")
    for i in range(len(data)):
        row = Encoded([data.ids[i]], None, data.labels[[i]], data.pad)
        alone = predict(model, row, device="cpu")
        # Rounding only: other shapes take other paths through the matrix product.
        assert np.allclose(alone[0], batched[i], atol=2e-6), family
    assert batched.std(axis=0).min() > 1e-4  # there is something to tell apart
    if family == "xlnet":  # so the check can fail
        right = random_examples(count=10, pad=(5, 0, "right"))
        wrong = predict(model, right, device="cpu")
        assert not np.allclose(wrong, batched, atol=1e-4)


def out_of_memory_above(monkeypatch, tokens: int, error=torch.OutOfMemoryError):
    """Fail where a batch of more than `tokens` tokens is computed, as a full device does: after the
    forward pass, whose dropout has drawn its random numbers. Gives the sizes of all parts."""
    calls, original = [], training._loss

    def loss(logits, labels):
        calls.append(len(labels))
        if calls[-1] * 12 > tokens:
            raise error("planted: out of memory")
        return original(logits, labels)

    monkeypatch.setattr(training, "_loss", loss)
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_out_of_memory_goes_on_as_if_begun_with_smaller_parts(dropout, monkeypatch):
    # All texts have 12 tokens, so a batch of 16 has 192 and 50 tokens are 4 texts.
    data = random_examples(count=48, lengths=(12, 13))
    start = classifier(dropout=dropout)
    settings = dict(epochs=2, batch_size=16, learning_rate=1e-3, seed=5, **QUIET)
    small, halved = copy.deepcopy(start), copy.deepcopy(start)
    fine_tune(small, data, max_tokens=50, **settings)
    calls = out_of_memory_above(monkeypatch, 50)
    done = fine_tune(halved, data, max_tokens=200, **settings)
    assert calls[:6] == [16, 8, 4, 4, 4, 4]
    assert done.max_tokens == 50 and done.steps == len(done.losses) == 6
    assert identical(weights(small), weights(halved))


def test_out_of_memory_of_a_single_text_and_other_failures_are_not_swallowed(monkeypatch):
    data = random_examples(count=8, lengths=(12, 13))
    for error, last in ((torch.OutOfMemoryError, 1), (RuntimeError, 8)):
        with monkeypatch.context() as patch:
            calls = out_of_memory_above(patch, 0, error)
            with pytest.raises(error, match="planted"):
                fine_tune(classifier(), data, max_tokens=100, **QUIET)
            assert calls[-1] == last
    with pytest.raises(RuntimeError, match="can't allocate memory"):  # what a CPU's allocator says
        torch.empty(2**55, dtype=torch.uint8)


def test_the_same_seed_is_the_same_to_the_last_bit_scored_or_not_and_the_callers_stay(monkeypatch):
    def forbidden(*_):
        raise AssertionError("another device was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", forbidden)
    data, start = random_examples(), classifier(dropout=0.1)
    trained = []
    for seed, validation in ((3, None), (3, data), (4, None)):
        # The caller's numbers play no part.
        torch.default_generator.manual_seed(seed * 17 + len(trained))
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        model = copy.deepcopy(start)
        settings = dict(epochs=2, batch_size=8, evaluations=5, seed=seed, **QUIET)
        done = fine_tune(model, data, validation, **settings)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]
        trained.append((weights(model), done.losses))
    assert identical(trained[0][0], trained[1][0]) and trained[0][1] == trained[1][1]
    assert not identical(trained[0][0], trained[2][0])


def test_an_epoch_holds_every_example_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(3, 100, size=1003)
    batches = training.batches_of(lengths, 2, 16, seed=1)
    epochs = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(1003))
        assert len(epoch) == math.ceil(1003 / 16)
        padded = sum(len(b) * lengths[b].max() for b in epoch)
        assert padded < 1.06 * lengths.sum()  # unsorted batches of 16 pad to about 1.8
    assert not all(np.array_equal(a, b) for a, b in zip(*epochs, strict=True))
    for fraction, steps in ((0.5, 32), (1.4, 88), (1e-9, 1)):
        assert len(training.batches_of(lengths, fraction, 16, seed=1)) == steps
    # Batches come in no order of length, or the model would see all short texts first.
    longest = [lengths[b].max() for b in epochs[0]]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.5


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_trains_and_decays_what_it_should(family):
    start, data = tiny_model(family, "classification"), examples(family, 16)
    settings = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, **QUIET}
    plain, decayed = copy.deepcopy(start), copy.deepcopy(start)
    fine_tune(plain, data, weight_decay=0.0, **settings)
    fine_tune(decayed, data, weight_decay=0.5, **settings)
    before, own, after = weights(start), weights(plain), weights(decayed)
    still = {name for name in before if torch.equal(before[name], own[name])}
    for name in before:  # one step, whose decay does not hang on the gradient
        spared = "bias" in name.rsplit(".")[-1] or "norm" in name.lower() or name in still
        assert torch.equal(own[name], after[name]) == spared, name
    # XLNet's mask embedding is for its two-stream pre-training, and without token types it does not
    # ask for segments: none of these has a gradient.
    # The key's bias adds the same to all logits of a query: for one token it is left out.
    keys = ("2.attention.self.key.bias", "2.attention.k_lin.bias", "2.attention.attn.k.bias")
    xlnets = ("mask_emb", "seg_embed", "r_s_bias") if family == "xlnet" else ()
    assert all(name.endswith((*keys, *xlnets)) for name in still)
    assert all(torch.isfinite(value).all() for value in after.values())


@pytest.mark.parametrize("after", [0, 6])
def test_the_first_loss_that_is_not_finite_is_named(after, monkeypatch):
    original, calls = training._loss, []

    def loss(logits, labels):
        calls.append(0)
        return original(logits, labels) * (float("nan") if len(calls) > after else 1)

    monkeypatch.setattr(training, "_loss", loss)
    message = rf"loss is nan at step {after + 1} of 24 .*learning rate 0\.25"
    with pytest.raises(Diverged, match=message) as caught:
        fine_tune(
            classifier(), random_examples(), epochs=8, batch_size=8, learning_rate=0.25, **QUIET
        )
    assert len(caught.value.training.losses) == after


def test_a_model_loaded_in_halves_is_trained_in_float32():
    half, data = classifier().to(torch.bfloat16), random_examples()
    whole = copy.deepcopy(half).float()
    for model in (half, whole):
        fine_tune(model, data, epochs=1, learning_rate=1e-5, **QUIET)  # too small for bfloat16
    assert half.dtype == torch.float32 and identical(weights(half), weights(whole))


def row(token: int = 5, kind: int = 0, label: int = 0) -> Encoded:
    labels = np.array([0, label])
    return Encoded([[2, 3], [2, token]], [[0, 0], [0, kind]], labels, (0, 0, "right"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs is 0: must be above 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup": 2}, "warmup is 2: must be a fraction"),
        ({"precision": "bf16"}, "unknown precision 'bf16'.*Did you mean 'bfloat16'"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"train": ["good", "bad"]}, "list has no columns 'text' and 'label'"),
        (
            {"train": random_examples(lengths=(41, 42))},
            "41 tokens, but .* reads 40 at most: lower max_length",
        ),
        ({"train": row(VOCABULARY)}, "the token 60, but .* has embeddings for 60: the tok"),
        ({"validation": row(kind=1)}, "token type 1, but .* knows 1: it cannot tell the two"),
        ({"train": row(label=2)}, "label 2 is none of Bert.*'s 2 classes"),
        ({"validation": row(label=-1)}, "label -1 is none of Bert"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(given, message):
    model = classifier(type_vocab_size=1)
    with pytest.raises(HealingError, match=message):
        fine_tune(model, **{"train": random_examples(), **QUIET, **given})
    if "train" in given:
        with pytest.raises(HealingError, match=message):
            evaluate(model, given["train"])


def test_what_cannot_be_encoded_is_refused():
    tokenizer = tiny_tokenizer()
    for texts, labels, length, message in (
        (["good", "bad"], [1], 9, "2 texts and 1 labels"),
        ([], [], 9, "0 texts and 0 labels"),
        (["good"], [1], 2, "max_length 2 leaves no place beside 2 special tokens"),
        (["good"], [0.9], 9, "labels are of type float64: need whole numbers"),
        (["good"], ["1"], 9, "labels are of type <U1: need whole numbers"),
    ):
        with pytest.raises(HealingError, match=message):
            encode(tokenizer, texts, labels, length)
    tokenizer.pad_token = None
    with pytest.raises(HealingError, match="no padding token"):
        encode(tokenizer, ["good"], [1])


def test_a_vocabulary_that_is_not_made_for_the_texts_is_said():
    tokenizer, texts = tiny_tokenizer(), planted_texts(300)[0]
    assert reading_note(tokenizer, texts) == reading_note(tokenizer, [texts[:2]]) == ""
    note = reading_note(tokenizer, ["an unknown word", "another good one"])
    assert note.startswith("6 pieces for 6 words, 83% of them unknown: its vocabulary is not made")
    letters = wordpiece()  # of words that it has not, letters
    assert reading_note(letters, ["the cat sat on the mat"]) == ""
    assert reading_note(letters, ["aabab babba", "abba"]).startswith("14 pieces for 3 words, 0%")
    assert reading_note(byte_level(), ["今天天气"]).startswith("0 pieces for 1 words, 100%")


def test_auto_takes_bfloat16_only_where_the_gpu_computes_it(monkeypatch):
    pick, cpu, cuda = training.pick_precision, torch.device("cpu"), torch.device("cuda")
    for capability, precision in (((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert pick("auto", cuda) == precision
    assert pick("auto", cpu) == pick("float32", cuda) == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.pick_device(None) == cpu
    with pytest.raises(HealingError, match="'cuda'.*no GPU"):
        training.pick_device("cuda")


def test_cut_texts_are_counted_exactly_and_token_types_kept_where_there_are_any():
    tokenizer = tiny_tokenizer()
    # With [CLS] and [SEP], six words are exactly eight tokens.
    texts = [" ".join(["w1"] * n) for n in (1, 5, 6, 7, 8, 30)]
    data = encode(tokenizer, texts, [0] * 6, max_length=8)
    assert data.truncated == 3 and data.lengths.tolist() == [3, 7, 8, 8, 8, 8]
    assert all(row[0] == 2 and row[-1] == 3 for row in data.ids) and data.types is None
    pairs = [("w1 w2", "w3"), ("w1 w2 w3", "w4 w5"), ("w1 w2 w3", "w4 w5 w6")]
    data = encode(tokenizer, pairs, [0] * 3, max_length=8)  # three special tokens
    assert data.truncated == 1 and data.lengths.tolist() == [6, 8, 8]
    assert data.types[:2] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]
    batch = training.collate(data, np.array([0, 1]), torch.device("cpu"))
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 8]
    assert "attention_mask" not in training.collate(data, np.array([0]), torch.device("cpu"))
    slow = CanineTokenizer()  # in Python: a letter is a token
    assert encode(slow, ["abcd", "ab", "a" * 9], [0] * 3, max_length=6).truncated == 1
    assert encode(slow, [("ab", "a"), ("ab", "ab")], [0] * 2, max_length=6).truncated == 1
    tokenizer.model_max_length = 5  # what the model can take comes first
    assert encode(tokenizer, texts, [0] * 6, max_length=8).lengths.max() == 5


def test_scores_are_those_of_scikit_learn_and_scipy_and_chance_is_the_majority_label():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(80, 4)).astype(np.float32), rng.integers(4, size=80)
    answers = logits.argmax(1)
    assert training.score(logits, labels) == {
        "f1": metrics.f1_score(labels, answers, average="macro"),
        "accuracy": (labels == answers).mean(),
        "matthews": metrics.matthews_corrcoef(labels, answers),
    }
    targets = rng.normal(size=80).astype(np.float32)
    wanted = pytest.approx(spearmanr(logits[:, 0], targets).statistic)
    assert training.score(logits[:, :1], targets) == {"spearman": wanted}
    labels = np.array([0] * 6 + [1] * 3 + [2])
    chance = {"accuracy": 0.6, "matthews": 0, "f1": pytest.approx(0.75 / 3)}
    assert training.majority_scores(labels) == chance
    assert training.majority_scores(labels.astype(np.float32)) == {"spearman": 0.0}


def test_a_model_that_gives_no_numbers_is_scored_and_says_so():
    model, constant, data = classifier(), classifier(num_labels=1), random_examples()
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    torch.nn.init.zeros_(constant.classifier.weight)
    numbers = Encoded(data.ids, None, data.labels.astype(np.float32), data.pad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate(model, data, device="cpu")
        assert evaluate(constant, numbers, device="cpu")["spearman"] == 0
    assert scores["not_finite"] == 1
    assert scores["accuracy"] == (data.labels == 0).mean()  # NaN is never the answer
