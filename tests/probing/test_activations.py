"""Activations: every word's row is that word's, in every family, however it is batched or stored.

The tokenizers are of the three kinds that encoders use, small enough for the models of `families`.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from families import FAMILIES, LAYERS, WIDTH, tiny_model
from helpers import processes, tiny_tokenizer

from healing_utils.base.errors import HealingError
from healing_utils.probing import activations
from healing_utils.probing.activations import (
    AGGREGATIONS,
    align,
    extract_activations,
    max_positions,
    sentence_activations,
    stored_activations,
)

SENTENCES = [
    ["the", "cats", "sat", "on", "unbelievable", "mats"],
    ["cat"],
    ["unbelievable", "things", "sat"],
    ["mats", "sat", "on", "the", "cat", "on", "the", "mats", "on", "cats", "on", "things"],
    ["things", "things"],
]
WORDS = sum(map(len, SENTENCES))


@functools.cache
def wordpiece() -> hf.PreTrainedTokenizerFast:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "on", "un"]
    pieces += ["##bel", "##iev", "##able", "mat", "thing", "a", "##a", "b", "##b", "c"]
    return hf.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


@functools.cache
def byte_level() -> hf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=36,  # so few that long words split
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(s) for s in SENTENCES] * 3 + ["a b c"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return hf.RobertaTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])


@functools.cache
def unigram() -> hf.PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eop>", "<eod>"]
    pieces = [(token, 0.0) for token in special] + [("▁", -6.0)]
    pieces += [(c, -7.0) for c in "thecasonubligvm"]
    whole = ("▁the", "▁cat", "▁sat", "▁on", "▁un", "believ", "able", "▁mat", "▁thing")
    pieces += [(piece, -4.0) for piece in whole]
    return hf.XLNetTokenizer(vocab=pieces)


# Tokenizer, what stands before a word inside a text, and the special tokens around a sentence.
KINDS = {
    "wordpiece": (wordpiece, "", [2], [3]),
    "byte-level": (byte_level, " ", [0], [2]),
    "unigram": (unigram, "", [], [4, 3]),
}
KIND = {"roberta": "byte-level", "mpnet": "byte-level", "modernbert": "byte-level"}
KIND["xlnet"] = "unigram"


def kind_of(family: str) -> str:
    return KIND.get(family, "wordpiece")


def tokenizer_of(family: str) -> hf.PreTrainedTokenizerFast:
    return KINDS[kind_of(family)][0]()


@torch.inference_mode()
def one_by_one(model, kind: str, sentences, aggregation: str) -> np.ndarray:
    """The same by hand: each word tokenised alone, each sentence run alone, without padding."""
    tokenizer, space, before, behind = KINDS[kind]
    columns = []
    for sentence in sentences:
        pieces = [tokenizer()(space + w, add_special_tokens=False)["input_ids"] for w in sentence]
        ids = before + sum(pieces, []) + behind
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        stream, place = torch.stack(states)[:, 0].numpy(), len(before)
        for piece in pieces:
            own = stream[:, place : place + len(piece)]
            pick = {"first": own[:, 0], "last": own[:, -1], "mean": own.mean(axis=1)}
            columns.append(pick[aggregation])
            place += len(piece)
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_what_each_sentence_alone_gives(family):
    model, tokenizer = tiny_model(family), tokenizer_of(family)
    pieces = align(tokenizer, SENTENCES)
    assert max(map(max, pieces.counts)) >= 3  # words do split
    assert len(set(pieces.windows.lengths)) > 2  # and sentences are padded
    got = {}
    for aggregation in AGGREGATIONS:
        got[aggregation] = extract_activations(
            model, tokenizer, SENTENCES, aggregation, max_tokens=60, device="cpu"
        )
        assert got[aggregation].shape == (LAYERS + 1, WORDS, WIDTH)
        assert got[aggregation].dtype == np.float32
        expected = one_by_one(model, kind_of(family), SENTENCES, aggregation)
        assert np.abs(got[aggregation] - expected).max() < 1e-5
    split = 4  # "unbelievable"
    assert all(
        np.abs(got[a][:, split] - got[b][:, split]).max() > 1e-3
        for a, b in (("first", "last"), ("first", "mean"), ("last", "mean"))
    )


def test_batches_change_nothing_and_the_same_call_gives_the_same_bits():
    model, tokenizer = tiny_model("xlnet"), unigram()
    call = functools.partial(extract_activations, model, tokenizer, SENTENCES * 5, "mean")
    state = torch.get_rng_state()
    one, again, other = call(max_tokens=50), call(max_tokens=50), call(max_tokens=1)
    assert np.array_equal(one, again) and np.abs(one - other).max() < 1e-5
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_divide_the_rows_at_the_least_cost():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, limit = rng.integers(0, 30, size=rng.integers(1, 9)), int(rng.integers(1, 90))
        batches = activations._batches(lengths, limit)
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))

        def cost(parts, lengths=lengths, limit=limit):
            padded = [len(part) * lengths[part].max() for part in parts]
            if any(p > limit and len(part) > 1 for p, part in zip(padded, parts, strict=True)):
                return np.inf
            return sum(padded) + len(parts) * limit / 16

        order, gaps = np.argsort(lengths, kind="stable"), range(1, len(lengths))
        every = (cuts for n in range(len(lengths)) for cuts in itertools.combinations(gaps, n))
        assert cost(batches) == min(cost(np.split(order, list(cuts))) for cuts in every)
    assert activations._batches(np.array([], dtype=int), 8) == []


@pytest.mark.parametrize("family", ["bert", "roberta", "xlnet", "distilbert", "modernbert"])
def test_a_classifier_speaks_through_its_encoder_and_keeps_its_mode(family):
    model, tokenizer = tiny_model(family, "classification"), tokenizer_of(family)
    expected = extract_activations(model.base_model, tokenizer, SENTENCES)
    model.train()
    model.base_model.get_input_embeddings().eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    assert any(modes) and not all(modes)
    got = extract_activations(model, tokenizer, SENTENCES)
    assert [module.training for module in model.modules()] == modes
    assert np.array_equal(got, expected)  # in training mode, dropout would have changed them


def test_chosen_layers_are_those_of_all():
    model, tokenizer = tiny_model("bert"), wordpiece()
    everything = extract_activations(model, tokenizer, SENTENCES)
    got = extract_activations(model, tokenizer, SENTENCES, layers=[3, 0])
    assert np.array_equal(got, everything[[3, 0]])


# -- words and subwords --------------------------------------------------------------------------


def test_byte_level_words_carry_their_space_although_the_tokenizer_would_not_put_it():
    tokenizer = byte_level()
    plain = tokenizer([["the", "cat"]], is_split_into_words=True)["input_ids"][0]
    running = tokenizer(" the cat")["input_ids"]
    assert plain != running  # transformers as it comes: words glued together
    assert align(tokenizer, [["the", "cat"]]).windows.ids == [running]
    assert tokenizer([["the", "cat"]], is_split_into_words=True)["input_ids"][0] == plain


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_word_without_any_subword_keeps_its_row(kind):
    tokenizer = KINDS[kind][0]()
    odd = "\u200d" if kind == "wordpiece" else ""
    sentences = [["cat", odd, "sat"], [odd], ["sat", odd]]
    got = align(tokenizer, sentences)
    assert got.unknown == 3 and got.words == 6
    assert np.concatenate(got.rows).tolist() == list(range(6))
    at = [ids[s] for ids, starts in zip(got.windows.ids, got.starts, strict=True) for s in starts]
    assert [at[1], at[3], at[5]] == [tokenizer.unk_token_id] * 3
    assert tokenizer.unk_token_id not in (at[0], at[2], at[4])
    family = {"wordpiece": "bert", "byte-level": "roberta", "unigram": "xlnet"}[kind]
    assert extract_activations(tiny_model(family), tokenizer, sentences).shape[1] == 6


@pytest.mark.parametrize("make", [wordpiece, byte_level])
def test_what_the_tokenizer_cuts_and_pads_to_is_not_heeded_and_stays(make):
    tokenizer = make()
    want = align(tokenizer, SENTENCES).windows.ids
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_id=1)
    limits = backend.truncation, backend.padding
    try:
        assert align(tokenizer, SENTENCES).windows.ids == want
        assert (backend.truncation, backend.padding) == limits
    finally:
        backend.no_truncation()
        backend.no_padding()


def test_words_that_look_like_special_tokens_or_hold_blanks_are_one_word():
    sentences = [["the", "[SEP]", "cat mat", "sat"], ["<s>", "a"]]
    got = align(wordpiece(), sentences)
    assert [c.tolist() for c in got.counts] == [[1, 1, 2, 1], [3, 1]]
    for kind in ("byte-level", "unigram"):
        got = align(KINDS[kind][0](), sentences)
        assert [len(c) for c in got.counts] == [4, 2]
        ids = got.windows.ids[0][got.starts[0][3] :]
        assert ids == align(KINDS[kind][0](), [["sat"]]).windows.ids[0][-len(ids) :]


def test_token_types_are_those_that_the_tokenizer_gives_its_model():
    names = ["input_ids", "token_type_ids", "attention_mask"]
    model = json.loads(unigram().backend_tokenizer.to_str())["model"]
    vocabulary = [tuple(pair) for pair in model["vocab"]]
    tokenizer = hf.XLNetTokenizer(vocab=vocabulary, model_input_names=names)
    expected = tokenizer(SENTENCES, is_split_into_words=True)
    got = align(tokenizer, SENTENCES).windows
    assert (got.ids, got.types) == (expected["input_ids"], expected["token_type_ids"])
    assert {types[-1] for types in got.types} == {2}  # XLNet's classification token has its own
    assert align(unigram(), SENTENCES).windows.types is None


def test_empty_sentences_have_no_rows():
    model, tokenizer = tiny_model("bert"), wordpiece()
    got = extract_activations(model, tokenizer, [[], *SENTENCES, []])
    assert np.array_equal(got, extract_activations(model, tokenizer, SENTENCES))


# -- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_windows_cover_overlap_and_give_each_word_its_best_context(seed):
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 6, size=int(rng.integers(8, 200)))
    budget = int(rng.integers(5, 40))
    ends = np.concatenate([[0], np.cumsum(count)])
    windows = activations._windows(ends, budget)
    assert windows[0][0] == 0 and windows[-1][1] == len(count)
    for (first, stop), (then, after) in zip(windows[:-1], windows[1:], strict=True):
        assert first < then <= stop < after
        # The next begins at the first word behind half a window, or has room for one word more.
        assert ends[then] - ends[first] < max(budget // 2, count.max()) + count.max()
    assert all(0 < ends[stop] - ends[first] <= budget for first, stop in windows)

    def context(word: int, window: tuple[int, int]) -> float:
        first, stop = window
        if not first <= word < stop:
            return -1
        left = ends[word] - ends[first] if first else np.inf
        right = ends[stop] - ends[word + 1] if stop < len(count) else np.inf
        return min(left, right)

    owned = activations._owned(ends, windows)
    assert sorted(np.concatenate(owned)) == list(range(len(count)))
    for window, words in zip(windows, owned, strict=True):
        for word in words:
            assert context(word, window) == max(context(word, w) for w in windows)


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "modernbert"])
def test_a_long_sentence_is_computed_in_windows_and_said(family):
    model, tokenizer = tiny_model(family), tokenizer_of(family)
    limit = max_positions(model, tokenizer)
    assert limit == (38 if family in ("roberta", "mpnet") else 40)
    long = [word for _ in range(9) for word in SENTENCES[0]]
    fits = SENTENCES[3]
    with pytest.warns(UserWarning, match=f"1 of 2 sentences .* {limit} tokens"):
        got = extract_activations(model, tokenizer, [long, fits], "mean")
    assert got.shape[1] == len(long) + len(fits)
    # Each window by hand, its words spliced together.
    count = np.array([len(c) for c in (tokenizer(" " + w).input_ids[1:-1] for w in long)])
    ends = np.concatenate([[0], np.cumsum(count)])
    windows = activations._windows(ends, limit - 2)
    assert len(windows) >= 3
    expected = np.full((LAYERS + 1, len(long), WIDTH), np.nan, dtype=np.float32)
    for (first, stop), own in zip(windows, activations._owned(ends, windows), strict=True):
        part = one_by_one(model, kind_of(family), [long[first:stop]], "mean")
        expected[:, own] = part[:, own - first]
    assert np.abs(got[:, : len(long)] - expected).max() < 1e-5
    alone = one_by_one(model, kind_of(family), [fits], "mean")
    assert np.abs(got[:, len(long) :] - alone).max() < 1e-5


def test_xlnet_reads_any_length_at_once():
    model, tokenizer = tiny_model("xlnet"), unigram()
    assert max_positions(model, tokenizer) is None
    long = [[word for _ in range(60) for word in SENTENCES[0]]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = extract_activations(model, tokenizer, long, "last")
    assert np.abs(got - one_by_one(model, "unigram", long, "last")).max() < 1e-4


def test_the_tokenizers_own_limit_counts_too():
    tokenizer = hf.BertTokenizer(vocab=wordpiece().get_vocab(), model_max_length=8)
    assert max_positions(tiny_model("bert"), tokenizer) == 8
    assert align(tokenizer, SENTENCES, 8).windows.lengths.max() == 8


# -- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused_in_one_line():
    model, tokenizer = tiny_model("bert"), wordpiece()

    def refused(match: str, sentences=SENTENCES, model=model, tokenizer=tokenizer, **settings):
        with pytest.raises(HealingError, match=match) as caught:
            extract_activations(model, tokenizer, sentences, **settings)
        assert "\n" not in str(caught.value)

    refused("unknown aggregation 'lats'.*Did you mean 'last'", aggregation="lats")
    refused(r"sentences\[1\], word 2 \('a+'...\) has 99 subwords; .* 38 at once", [
        ["cat"], ["the", "cat", "a" * 99]
    ])  # fmt: skip
    refused("lists of words, not text", ["the cat sat"])
    refused("lists of words, not text", "the cat sat")
    refused(r"sentences\[0\] holds 3", [["the", 3]])
    refused("every sentence is empty", [[], []])
    refused("every sentence is empty", [])
    refused(r"layer 4 is not there; allowed: 0 \(the embeddings\) to 3", layers=[4])
    refused("layer -1 is not there", layers=[-1])
    refused("holds 'top'", layers=["top"])
    refused("layers is empty", layers=[])
    refused("max_tokens is 0", max_tokens=0)
    refused("need a fast one", tokenizer=hf.CanineTokenizer())
    decoder = hf.T5Model(hf.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1))
    refused("an encoder with a decoder", model=decoder)


# -- sentences -----------------------------------------------------------------------------------

TEXTS = ["the cats sat on unbelievable mats", "cat", "things sat on the cat"]


@pytest.mark.parametrize("family", ["bert", "roberta", "xlnet"])
def test_a_sentence_is_its_classification_token_or_its_mean(family):
    model, tokenizer = tiny_model(family, "classification"), tokenizer_of(family)
    first = sentence_activations(model, tokenizer, TEXTS, device="cpu")
    mean = sentence_activations(model, tokenizer, TEXTS, "mean", max_tokens=9)
    assert first.shape == mean.shape == (LAYERS + 1, len(TEXTS), WIDTH)
    cls = {"bert": 2, "roberta": 0, "xlnet": 3}[family]
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        place = ids.index(cls)
        assert place == (len(ids) - 1 if family == "xlnet" else 0)
        with torch.inference_mode():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        stream = torch.stack(states)[:, 0].numpy()
        assert np.abs(first[:, i] - stream[:, place]).max() < 1e-5
        assert np.abs(mean[:, i] - stream.mean(axis=1)).max() < 1e-5


def test_pairs_of_texts_keep_their_token_types():
    model = tiny_model("bert")
    tokenizer = tiny_tokenizer()
    pairs = [("good w1 w2", "bad"), ("w3", "w4 w5 w6 w7")]
    got = sentence_activations(model, tokenizer, pairs, "mean")
    for i, pair in enumerate(pairs):
        batch = tokenizer(*pair, return_tensors="pt")
        assert batch["token_type_ids"].any()
        with torch.inference_mode():
            states = model(**batch, output_hidden_states=True).hidden_states
        assert np.abs(got[:, i] - torch.stack(states)[:, 0].mean(dim=1).numpy()).max() < 1e-5


def test_texts_that_are_cut_are_counted():
    model, tokenizer = tiny_model("bert"), wordpiece()
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to 40 tokens"):
        sentence_activations(model, tokenizer, ["cat " * 60, "cat"])
    with pytest.warns(UserWarning, match="2 of 2 texts were cut to 3 tokens"):
        got = sentence_activations(model, tokenizer, ["cat cats", "cat on"], max_length=3)
    alone = sentence_activations(model, tokenizer, ["cat"])
    assert np.abs(got - alone).max() < 1e-5
    with pytest.raises(HealingError, match="unknown pooling 'men'.*'mean'"):
        sentence_activations(model, tokenizer, ["cat"], "men")


def test_without_a_classification_token_there_is_no_first():
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=wordpiece().backend_tokenizer,
        unk_token="[UNK]", pad_token="[PAD]", cls_token="the",
    )  # fmt: skip
    with pytest.raises(HealingError, match="no classification token.*pooling='mean'"):
        sentence_activations(tiny_model("bert"), tokenizer, ["cat"])


# -- files ---------------------------------------------------------------------------------------

CORPUS = SENTENCES * 8


def store(path: Path, model=None, sentences=CORPUS, **changes) -> np.memmap:
    settings = {"identity": "bert, seed 0", "chunk_words": 30, "max_tokens": 40, **changes}
    return stored_activations(path, model or tiny_model("bert"), wordpiece(), sentences, **settings)


def killed_while_storing(path: str, moment: str, count: int) -> None:
    """Store in a process of its own, which dies at the `count`-th forward pass or record."""
    torch.set_num_threads(1)
    model, done = tiny_model("bert"), {"forward": 0, "record": 0}
    write = activations.records.write_atomically

    def step(kind: str) -> None:
        done[kind] += 1
        if kind == moment and done[kind] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def counting_write(*arguments) -> None:
        step("record")  # the chunk's data is written, that it is finished is not
        write(*arguments)

    activations.records.write_atomically = counting_write
    model.register_forward_pre_hook(lambda *_: step("forward"))
    store(Path(path), model)


def test_a_store_killed_again_and_again_equals_an_unbroken_one(tmp_path):
    whole = store(tmp_path / "whole.npy")
    path = tmp_path / "killed.npy"
    finished = []
    context = processes()
    for moment, count in (("forward", 1), ("forward", 6), ("record", 2), ("forward", 4)):
        process = context.Process(target=killed_while_storing, args=(str(path), moment, count))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL and not path.exists()
        progress = tmp_path / "killed.npy.json"
        finished.append(json.loads(progress.read_text())["finished"] if progress.exists() else 0)
    assert finished == sorted(finished) and finished[0] == 0 and 0 < finished[-1] < len(CORPUS)
    passes = []
    model = tiny_model("bert")
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    got = store(path, model)
    assert np.array_equal(got, whole)
    assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    done = len(passes)
    assert 0 < done
    assert np.array_equal(store(path, model), whole) and len(passes) == done  # nothing again
    store(tmp_path / "third.npy", model)
    assert len(passes) - done > done  # what the killed ones had done was not done again
    assert not list(tmp_path.glob("*.part"))


def test_two_processes_on_one_file_do_each_other_no_harm(tmp_path, monkeypatch):
    """Where claims fail: a second one begins, finishes and removes the file in the middle of the
    first one's writing."""
    whole = np.array(store(tmp_path / "whole.npy"))
    path, begun = tmp_path / "shared.npy", []
    states = activations._states

    def interrupted(*arguments):
        for batch in states(*arguments):
            yield batch
            if not begun:
                begun.append(True)
                assert np.array_equal(store(path), whole)
                for left in tmp_path.glob("shared.npy*"):
                    left.unlink()

    monkeypatch.setattr(activations, "_states", interrupted)
    assert np.array_equal(store(path), whole)
    # Begun anew where it finds the file gone before it has written anything itself.
    store(path)
    monkeypatch.setattr(activations._File, "finish", lambda self, finish=activations._File.finish: (
        path.unlink(missing_ok=True) if len(begun) == 1 else None, begun.append(True), finish(self)
    )[-1])  # fmt: skip
    assert np.array_equal(store(path), whole)


def test_a_stored_file_holds_what_extraction_gives_read_only(tmp_path, capsys):
    path = tmp_path / "deep" / "down" / "cats.npy"
    got = store(path)
    expected = extract_activations(tiny_model("bert"), wordpiece(), CORPUS)
    assert isinstance(got, np.memmap) and got.dtype == np.float16
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 2**-11 * np.abs(expected).max() + 1e-5
    with pytest.raises(ValueError, match="read-only"):
        got[0, 0, 0] = 1
    assert np.array_equal(np.load(path), got)
    assert capsys.readouterr().err == ""
    for aggregation in ("first", "mean"):
        other = store(tmp_path / f"{aggregation}.npy", aggregation=aggregation, layers=[2])
        expected = extract_activations(
            tiny_model("bert"), wordpiece(), CORPUS, aggregation, layers=[2]
        )
        assert np.abs(other - expected).max() < 2**-11 * np.abs(expected).max() + 1e-5


def test_a_file_of_something_else_is_begun_anew_and_that_is_said(tmp_path, capsys):
    path = tmp_path / "cats.npy"
    first = np.array(store(path))
    for change in (
        {"identity": "bert, seed 1", "model": tiny_model("bert", seed=1)},
        {"sentences": CORPUS[::-1], "identity": "bert, seed 0"},
        {"aggregation": "first"},
        {"layers": [1]},
    ):
        got = store(path, **change)
        assert got.shape != first.shape or not np.array_equal(got, first)
        assert "another model, other sentences or other settings; begun anew" in (
            capsys.readouterr().err
        )
    assert np.array_equal(store(path), first)


@pytest.mark.parametrize("harm", ["cut", "cut to nothing", "progress", "progress cut", "gone"])
def test_a_broken_file_is_begun_anew_and_that_is_said(tmp_path, capsys, harm):
    path = tmp_path / "cats.npy"
    first = np.array(store(path))
    progress = tmp_path / "cats.npy.json"
    if harm.startswith("cut"):
        os.truncate(path, path.stat().st_size // 2 if harm == "cut" else 0)
    elif harm == "gone":
        path.unlink()
    else:
        progress.write_text("[1, 2]" if harm == "progress" else progress.read_text()[:40])
    assert capsys.readouterr().err == ""
    assert np.array_equal(store(path), first)
    assert "begun anew" in capsys.readouterr().err


def test_values_beyond_float16_make_a_float32_file(tmp_path, capsys):
    model = tiny_model("bert")
    with torch.no_grad():  # only the last layer, and only some words
        model.encoder.layer[-1].output.LayerNorm.weight[3] = 60_000
    expected = extract_activations(model, wordpiece(), CORPUS)
    assert (np.abs(expected) > 65504).any()
    got = store(tmp_path / "large.npy", model)
    assert got.dtype == np.float32 and np.abs(got - expected).max() < 0.1
    assert "beyond float16's range; float32 instead; begun anew" in capsys.readouterr().err
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert store(tmp_path / "large.npy", model).dtype == np.float32 and not passes
    assert capsys.readouterr().err == ""


def test_long_sentences_and_odd_words_are_counted_beside_the_file(tmp_path):
    counts: dict[str, int] = {}
    odd = [*CORPUS, ["cat"] * 50, [], ["\u200d"], ["on"] * 99]
    with pytest.warns(UserWarning, match="2 of 44 sentences"):
        got = store(tmp_path / "odd.npy", sentences=odd, counts=counts)
    assert counts == {"windowed": 2, "unknown": 1}
    state = json.loads((tmp_path / "odd.npy.json").read_text())
    assert (state["windowed"], state["unknown"], state["finished"]) == (2, 1, 44)
    assert got.shape[1] == state["words"] == 8 * WORDS + 150
    with pytest.warns(UserWarning, match="2 of 44 sentences"):
        expected = extract_activations(tiny_model("bert"), wordpiece(), odd)
    assert np.abs(got - expected).max() < 2**-11 * np.abs(expected).max() + 1e-5


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(HealingError, match="cannot store .* GB .*No space left on device"):
        store(tmp_path / "cats.npy")
    assert not list(tmp_path.iterdir())


# -- the real thing ------------------------------------------------------------------------------


def test_the_real_minilm_words_stand_where_its_tokenizer_puts_them(monkeypatch):
    import huggingface_hub.constants

    from healing_utils.healing import models

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name = "sentence-transformers/all-MiniLM-L6-v2"
    try:
        tokenizer = models.load_tokenizer(name)
        model = models.load_classifier(name, 2, seed=0).eval()
    except HealingError as error:
        pytest.skip(f"{name} is not stored here (HF_HOME={os.environ.get('HF_HOME')}): {error}")
    sentences = [["Unquestionably", ",", "the", "heatwave's", "over", "."], ["Over", "\u200d"]]
    got = extract_activations(model, tokenizer, sentences, "last", device="cpu")
    assert got.shape == (7, 8, 384)
    encoded = tokenizer(sentences[0], is_split_into_words=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**encoded, output_hidden_states=True).hidden_states
    numbers = encoded.word_ids(0)
    last = [len(numbers) - 1 - numbers[::-1].index(word) for word in range(6)]
    assert last[0] > 1  # the first word splits
    expected = torch.stack(states)[:, 0, last].numpy()
    assert np.abs(got[:, :6] - expected).max() < 1e-5
