"""Activations: every word's row is that word's, in every family, however it is batched or kept."""

from __future__ import annotations

import errno
import itertools
import json
import os
import warnings

import numpy as np
import pytest
import torch
import transformers as hf
from families import (
    FAMILIES,
    KINDS,
    LAYERS,
    SENTENCES,
    WIDTH,
    byte_level,
    kind_of,
    tiny_model,
    tokenizer_of,
    unigram,
    wordpiece,
)
from helpers import tiny_tokenizer

from healing_utils.base.errors import HealingError
from healing_utils.probing import activations
from healing_utils.probing.activations import (
    AGGREGATIONS,
    align,
    compact_activations,
    cut_windows,
    extract_activations,
    max_positions,
    sentence_activations,
)

WORDS = sum(map(len, SENTENCES))
DECODER = hf.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1)


@torch.inference_mode()
def states(model, ids: list[int], **inputs) -> np.ndarray:
    """Of one sentence alone, (layers, tokens, hidden)."""
    output = model(torch.tensor([ids]), output_hidden_states=True, **inputs)
    return torch.stack(output.hidden_states)[:, 0].numpy()


def one_by_one(model, kind: str, sentences, aggregation: str) -> np.ndarray:
    """The same by hand: each word tokenised alone, each sentence run alone, without padding."""
    tokenizer, space, before, behind = KINDS[kind]
    columns = []
    for sentence in sentences:
        pieces = [tokenizer()(space + w, add_special_tokens=False)["input_ids"] for w in sentence]
        stream, place = states(model, before + sum(pieces, []) + behind), len(before)
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
    for how in AGGREGATIONS:
        got[how] = extract_activations(model, tokenizer, SENTENCES, how, max_tokens=60)
        assert got[how].shape == (LAYERS + 1, WORDS, WIDTH) and got[how].dtype == np.float32
        assert np.abs(got[how] - one_by_one(model, kind_of(family), SENTENCES, how)).max() < 1e-5
    for a, b in itertools.combinations(AGGREGATIONS, 2):
        assert np.abs(got[a][:, 4] - got[b][:, 4]).max() > 1e-3  # "unbelievable"


def test_batches_change_nothing_and_the_same_call_gives_the_same_bits():
    model, tokenizer = tiny_model("xlnet"), unigram()
    given, state = (model, tokenizer, SENTENCES * 5, "mean"), torch.get_rng_state()
    one, again, other = (extract_activations(*given, max_tokens=n) for n in (50, 50, 1))
    assert np.array_equal(one, again) and np.abs(one - other).max() < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    some = extract_activations(*given, max_tokens=50, layers=[3, 0], progress=True)
    assert np.array_equal(some, one[[3, 0]])


def test_a_classifier_speaks_through_its_encoder_and_keeps_its_mode():
    model, tokenizer = tiny_model("bert", "classification"), wordpiece()
    expected = extract_activations(model.base_model, tokenizer, SENTENCES)
    model.train()
    model.base_model.get_input_embeddings().eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    assert any(modes) and not all(modes)
    got = extract_activations(model, tokenizer, SENTENCES)
    assert [module.training for module in model.modules()] == modes
    assert np.array_equal(got, expected)  # in training mode, dropout would have changed them


def test_words_carry_their_space_and_what_the_tokenizer_cuts_and_pads_to_is_not_heeded():
    tokenizer = byte_level()
    plain = tokenizer([["the", "cat"]], is_split_into_words=True)["input_ids"][0]
    running = tokenizer(" the cat")["input_ids"]
    assert plain != running  # transformers as it comes: words glued together
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding(length=9, pad_id=1)
    assert align(tokenizer, [["the", "cat"]]).windows.ids == [running]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_word_without_any_subword_and_an_empty_sentence_move_no_rows(kind):
    tokenizer = KINDS[kind][0]()
    odd = "\u200d" if kind == "wordpiece" else ""
    got = align(tokenizer, [["cat", odd, "sat"], [], [odd], ["sat", odd]])
    assert got.unknown == 3 and got.words == 6
    # A word of which the tokenizer knows nothing, or not all, is unknown too; bytes it knows.
    met = align(tokenizer, [["cat", "語", "cat語at語"], ["sat"]])
    assert met.unknown == (0 if kind == "byte-level" else 2)
    assert np.concatenate(got.rows).tolist() == list(range(6))
    at = [ids[s] for ids, starts in zip(got.windows.ids, got.starts, strict=True) for s in starts]
    assert [at[1], at[3], at[5]] == [tokenizer.unk_token_id] * 3
    assert tokenizer.unk_token_id not in (at[0], at[2], at[4])


def test_words_that_look_like_special_tokens_or_hold_blanks_are_one_word():
    sentences = [["the", "[SEP]", "cat mat", "sat"], ["<s>", "a"]]
    got = align(wordpiece(), sentences)
    assert [c.tolist() for c in got.counts] == [[1, 1, 2, 1], [3, 1]]
    (splitting := wordpiece()).split_special_tokens = True  # which training heeds as well
    running = splitting(sentences[0], is_split_into_words=True)["input_ids"]
    assert align(splitting, sentences).windows.ids[0] == running != got.windows.ids[0]
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


def test_windows_overlap_and_give_each_word_its_best_context():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        count = rng.integers(1, 6, size=int(rng.integers(8, 200)))
        budget = int(rng.integers(5, 40))
        ends = np.concatenate([[0], np.cumsum(count)])
        windows = cut_windows(ends, budget)
        assert windows[0][0] == 0 and windows[-1][1] == len(count)
        for (first, stop, _), (then, after, _) in itertools.pairwise(windows):
            assert first < then <= stop < after
            # The next begins at the first word behind half a window, or has room for a word more.
            assert ends[then] - ends[first] < max(budget // 2, count.max()) + count.max()
        context = np.full((len(windows), len(count)), -1.0)
        for own, (first, stop, _) in zip(context, windows, strict=True):
            assert 0 < ends[stop] - ends[first] <= budget
            left = ends[first:stop] - ends[first] if first else np.inf
            right = ends[stop] - ends[first + 1 : stop + 1] if stop < len(count) else np.inf
            own[first:stop] = np.minimum(left, right)
        read = [words for *_, words in windows]
        assert sorted(np.concatenate(read)) == list(range(len(count)))
        for own, words in zip(context, read, strict=True):
            assert np.array_equal(own[words], context.max(axis=0)[words])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_long_sentence_is_computed_in_windows_and_said(family):
    model, tokenizer = tiny_model(family), tokenizer_of(family)
    limit = max_positions(model, tokenizer)
    assert limit == (38 if family == "roberta" else 40)
    long, fits = SENTENCES[0] * 9, SENTENCES[3]
    with pytest.warns(UserWarning, match=f"1 of 2 sentences .* {limit} tokens"):
        got = extract_activations(model, tokenizer, [long, fits], "mean")
    assert got.shape[1] == len(long) + len(fits)
    # Each window by hand, its words spliced together.
    count = [len(tokenizer(" " + word).input_ids[1:-1]) for word in long]
    windows = cut_windows(np.concatenate([[0], np.cumsum(count)]), limit - 2)
    assert len(windows) >= 3
    for first, stop, own in windows:
        part = one_by_one(model, kind_of(family), [long[first:stop]], "mean")
        assert np.abs(got[:, own] - part[:, own - first]).max() < 1e-5
    alone = one_by_one(model, kind_of(family), [fits], "mean")
    assert np.abs(got[:, len(long) :] - alone).max() < 1e-5


def test_positions_are_the_models_or_the_tokenizers_and_xlnet_reads_any_length_at_once():
    short = hf.BertTokenizer(vocab=wordpiece().get_vocab(), model_max_length=8)
    assert max_positions(tiny_model("bert"), short) == 8
    model, tokenizer = tiny_model("xlnet"), unigram()
    assert max_positions(model, tokenizer) == activations.UNLIMITED
    long = [SENTENCES[0] * 60]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = extract_activations(model, tokenizer, long, "last")
    assert np.abs(got - one_by_one(model, "unigram", long, "last")).max() < 1e-4


@pytest.mark.parametrize(
    "message, changes",
    [
        ("unknown aggregation 'lats'.*Did you mean 'last'", {"aggregation": "lats"}),
        (r"sentences\[1\], word 2 \('a+'...\) has 99 subwords; .* 38 at once",
         {"sentences": [["cat"], ["the", "cat", "a" * 99]]}),
        (r"must be lists of words: sentences\[0\] is 'the cat'", {"sentences": ["the cat"]}),
        (r"must be lists of words: sentences\[1\] is None", {"sentences": [["a"], None]}),
        (r"sentences\[0\] holds 3, which is no text", {"sentences": [["the", 3]]}),
        (r"sentences\[0\] holds 'a.*', which is no text", {"sentences": [["a\ud800"]]}),
        ("every sentence is empty", {"sentences": [[], []]}),
        (r"layers \[4\]: need some of 0 \(the embeddings\) to 3", {"layers": 4}),
        (r"layers \[1.0\]", {"layers": [1.0]}),
        (r"layers \[\]", {"layers": []}),
        ("max_tokens is 0", {"max_tokens": 0}),
        ("need a fast one", {"tokenizer": hf.CanineTokenizer()}),
        ("tokenizer is not the model's: token 99 of 60",
         {"tokenizer": hf.BertTokenizer(vocab={**wordpiece().get_vocab(), "dog": 99}),
          "sentences": [["dog"]]}),
        ("an encoder alone, got T5Model", {"model": hf.T5Model(DECODER)}),
        ("an encoder alone, got str", {"model": "organism"}),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(message, changes):
    given = {"tokenizer": wordpiece(), "sentences": SENTENCES, "model": tiny_model("bert")}
    with pytest.raises(HealingError, match=message) as caught:
        extract_activations(**{**given, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["bert", "xlnet"])
def test_a_sentence_is_its_classification_token_or_its_mean(family):
    model, tokenizer = tiny_model(family, "classification"), tokenizer_of(family)
    texts = ["the cats sat on unbelievable mats", "cat", "things sat on the cat"]
    first = sentence_activations(model, tokenizer, texts, device="cpu")
    mean = sentence_activations(model, tokenizer, texts, "mean", max_tokens=9)
    assert first.shape == mean.shape == (LAYERS + 1, len(texts), WIDTH)
    for i, text in enumerate(texts):
        stream = states(model, tokenizer(text)["input_ids"])
        place = -1 if family == "xlnet" else 0
        assert np.abs(first[:, i] - stream[:, place]).max() < 1e-5
        assert np.abs(mean[:, i] - stream.mean(axis=1)).max() < 1e-5


def test_pairs_of_texts_keep_their_token_types():
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    pairs = [("good w1 w2", "bad"), ("w3", "w4 w5 w6 w7")]
    got = sentence_activations(model, tokenizer, pairs, "mean")
    for i, pair in enumerate(pairs):
        batch = tokenizer(*pair)
        types = torch.tensor([batch["token_type_ids"]])
        assert types.any()
        stream = states(model, batch["input_ids"], token_type_ids=types)
        assert np.abs(got[:, i] - stream.mean(axis=1)).max() < 1e-5


def test_texts_that_are_cut_are_counted():
    model, tokenizer = tiny_model("bert"), wordpiece()
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to 40 tokens"):
        sentence_activations(model, tokenizer, ["cat " * 60, "cat"])
    with pytest.warns(UserWarning, match="2 of 2 texts were cut to 3 tokens"):
        got = sentence_activations(model, tokenizer, ["cat cats", "cat on"], max_length=3)
    assert np.abs(got - sentence_activations(model, tokenizer, ["cat"])).max() < 1e-5


BARE = hf.PreTrainedTokenizerFast(
    tokenizer_object=wordpiece().backend_tokenizer, unk_token="[UNK]", pad_token="[PAD]",
    cls_token="the",
)  # fmt: skip


@pytest.mark.parametrize(
    "message, changes",
    [
        ("unknown pooling 'men'.*'mean'", {"pooling": "men"}),
        ("no classification token.*pooling='mean'", {"tokenizer": BARE}),
        ("must be texts or pairs of texts: texts.1. is None", {"texts": ["cat", None]}),
        ("holds nan, which is no text", {"texts": [("cat", float("nan"))]}),
        ("at least one, and all of a kind", {"texts": []}),
        ("at least one, and all of a kind", {"texts": ["cat", ("cat", "mat")]}),
        ("max_length 0 leaves no place", {"max_length": 0}),
    ],
)
def test_texts_that_cannot_be_read_are_refused(message, changes):
    given = {"model": tiny_model("bert"), "tokenizer": wordpiece(), "texts": ["cat"]}
    with pytest.raises(HealingError, match=message):
        sentence_activations(**{**given, **changes})


def test_compact_activations_are_those_of_extraction_wherever_they_are_kept(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(activations.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(activations, "CHUNK", 30)  # so that there are several
    odd = [["cat"] * 50, [], ["\u200d"], ["on"] * 99]
    given = tiny_model("bert"), wordpiece(), [*SENTENCES * 8, *odd], "mean"
    with pytest.warns(UserWarning, match="2 of 44 sentences"):
        expected = extract_activations(*given)
        (kept, counts), (mapped, _) = (compact_activations(*given, memory=m) for m in (2**29, 0))
    assert isinstance(mapped, np.memmap) and not isinstance(kept, np.memmap)
    assert kept.dtype == mapped.dtype == np.float16 and np.array_equal(kept, mapped)
    assert np.abs(kept - expected).max() < 2**-11 * np.abs(expected).max() + 1e-5
    assert counts == {"windowed": 2, "unknown": 1}
    assert not list(tmp_path.iterdir()), "the file has no name that anyone would have to remove"
    assert capsys.readouterr().err == ""


def test_values_beyond_float16_make_a_float32_array(capsys):
    model = tiny_model("bert")
    with torch.no_grad():  # only the last layer, and only some words
        model.encoder.layer[-1].output.LayerNorm.weight[3] = 60_000
    expected = extract_activations(model, wordpiece(), SENTENCES)
    got, _ = compact_activations(model, wordpiece(), SENTENCES)
    assert (np.abs(got) > 65504).any()
    assert got.dtype == np.float32 and np.array_equal(got, expected)
    assert "beyond float16's range: begun anew in float32" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(activations.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(HealingError, match="cannot store .* GB .*No space left .*TMPDIR"):
        compact_activations(tiny_model("bert"), wordpiece(), SENTENCES, memory=0)
    assert not list(tmp_path.iterdir())
