"""Words to subwords: which tokens of which window of a sentence are whose.

Words are aligned by the tokenizer's own word numbers. A sentence longer than the model's positions
is read in overlapping windows, so no word is ever cut off.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from healing_utils.base.errors import HealingError
from healing_utils.healing.training import Encoded, position_limit

UNLIMITED = 2**31 - 1  # tokens: transformers' own sign for "no limit" overflows the tokenizers'


@dataclass(frozen=True)
class Aligned:
    """Sentences as the model reads them, and where their words are.

    `windows`: token ids with special tokens, one row a sentence, or several for a long one. For
    every window: `before`, the words before its sentence; `rows`, which words of the corpus are
    read from it; `starts` and `counts`, where their subwords begin, unpadded, and how many they
    are. `windowed` counts sentences in several windows, `unknown` words without any subword, which
    get the tokenizer's unknown token.
    """

    windows: Encoded
    before: np.ndarray
    rows: list[np.ndarray]
    starts: list[np.ndarray]
    counts: list[np.ndarray]
    words: int
    windowed: int = 0
    unknown: int = 0


def max_positions(model: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens, special ones included, that both read at once; None for any number."""
    limits = [position_limit(model), tokenizer.model_max_length]
    return min((n for n in limits if n and n < UNLIMITED), default=None)


def align(tokenizer: Any, sentences: Sequence[Sequence[str]], limit: int | None = None) -> Aligned:
    """Tokenise sentences that are already split into words, each word as inside a running text:
    byte-level BPE (RoBERTa, ModernBERT) sees a space before it, before the first one too.

    Raises HealingError for a tokenizer without word numbers, for input that is not lists of words,
    and for a word with more subwords than `limit`, the model's positions, has room for.
    """
    for number, sentence in enumerate(sentences):
        if isinstance(sentence, str):
            raise HealingError("sentences must be lists of words, not text: split them into words")
        for word in sentence:
            if not isinstance(word, str):
                raise HealingError(f"sentences[{number}] holds {word!r}, which is not a word")
    with _unlimited(tokenizer) as backend:
        special = _special_tokens(tokenizer, backend)
        encodings = backend.encode_batch(
            [list(s) for s in sentences], is_pretokenized=True, add_special_tokens=False
        )
    prefix, prefix_types, content_type, suffix, suffix_types = special
    budget = (limit or UNLIMITED) - len(prefix) - len(suffix)
    ids: list[list[int]] = []
    types: list[list[int]] = []
    before, rows, starts, counts = [], [], [], []
    words = windowed = unknown = 0
    for number, (sentence, encoding) in enumerate(zip(sentences, encodings, strict=True)):
        if not len(sentence):
            continue
        tokens, count, missing = _subwords(tokenizer, encoding, len(sentence))
        unknown += missing
        if count.max() > budget:
            word = int(count.argmax())
            raise HealingError(
                f"sentences[{number}], word {word} ({sentence[word][:20]!r}...) has {count[word]} "
                f"subwords; the model reads {budget} at once and a word is never cut"
            )
        ends = np.concatenate([[0], np.cumsum(count)])
        windows = cut_windows(ends, budget)
        windowed += len(windows) > 1
        for (first, stop), own in zip(windows, owned_words(ends, windows), strict=True):
            content = tokens[ends[first] : ends[stop]]
            ids.append([*prefix, *content, *suffix])
            types.append([*prefix_types, *[content_type] * len(content), *suffix_types])
            before.append(words)
            rows.append(words + own)
            starts.append(len(prefix) + ends[own] - ends[first])
            counts.append(count[own])
        words += len(sentence)
    if not words:
        raise HealingError("there are no words to extract: every sentence is empty")
    use_types = "token_type_ids" in tokenizer.model_input_names and any(map(any, types))
    pad = (tokenizer.pad_token_id or 0, tokenizer.pad_token_type_id or 0, tokenizer.padding_side)
    labels = np.zeros(len(ids), dtype=np.int64)  # not used: what is encoded here has no label
    encoded = Encoded(ids, types if use_types else None, labels, pad)
    return Aligned(encoded, np.array(before), rows, starts, counts, words, windowed, unknown)


def classification_token(tokenizer: Any, lengths: np.ndarray) -> np.ndarray:
    """Where the classification token stands in texts of such lengths, (texts,)."""
    with _unlimited(tokenizer) as backend:
        before, _, _, behind, _ = _special_tokens(tokenizer, backend)
    if tokenizer.cls_token_id in before:
        return np.full_like(lengths, before.index(tokenizer.cls_token_id))
    if tokenizer.cls_token_id in behind:
        return lengths - len(behind) + behind.index(tokenizer.cls_token_id)
    raise HealingError(
        f"tokenizer {type(tokenizer).__name__} puts no classification token around a text; "
        "use pooling='mean'"
    )


@contextlib.contextmanager
def _unlimited(tokenizer: Any) -> Iterator[Any]:
    """The tokenizer's Rust half, which inside the block never cuts, never pads, and sees a space
    before every word where its vocabulary marks a word's beginning by one."""
    if not getattr(tokenizer, "is_fast", False):
        raise HealingError(
            f"tokenizer {type(tokenizer).__name__} does not say which word a subword belongs to; "
            "need a fast one (transformers.PreTrainedTokenizerFast)"
        )
    backend = tokenizer.backend_tokenizer
    truncation, padding, splitter = backend.truncation, backend.padding, backend.pre_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if splitter is not None:  # its state is JSON; these are ByteLevel's and Metaspace's settings
        state = re.sub(rb'("add_prefix_space":)false', rb"\1true", splitter.__getstate__())
        state = re.sub(rb'("prepend_scheme":)"\w+"', rb'\1"always"', state)
        spaced = copy.deepcopy(splitter)
        spaced.__setstate__(state)
        backend.pre_tokenizer = spaced
    try:
        yield backend
    finally:
        if splitter is not None:
            backend.pre_tokenizer = splitter
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _special_tokens(
    tokenizer: Any, backend: Any
) -> tuple[list[int], list[int], int, list[int], list[int]]:
    """What the tokenizer puts around one sentence: ids and token types before it, the sentence's
    own token type, ids and token types behind it (all of XLNet's are behind)."""
    if tokenizer.unk_token is None:
        raise HealingError(f"tokenizer {type(tokenizer).__name__} has no unknown token")
    example = backend.encode([tokenizer.unk_token], is_pretokenized=True)
    inside = [i for i, word in enumerate(example.word_ids) if word is not None]
    first, stop = inside[0], inside[-1] + 1
    ids, types = example.ids, example.type_ids
    return ids[:first], types[:first], types[first], ids[stop:], types[stop:]


def _subwords(tokenizer: Any, encoding: Any, words: int) -> tuple[list[int], np.ndarray, int]:
    """Token ids of a sentence, subwords of each word (words,), and words that had none."""
    tokens = encoding.ids
    numbers = np.asarray(encoding.word_ids, dtype=np.int64)
    count = np.bincount(numbers, minlength=words)
    missing = np.flatnonzero(count == 0)
    if len(missing):
        places = np.searchsorted(numbers, missing)
        tokens = np.insert(tokens, places, tokenizer.unk_token_id).astype(int).tolist()
        count[missing] = 1
    return tokens, count, len(missing)


def cut_windows(ends: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Windows of at most `budget` subwords over a sentence, as (first word, word after the last).

    They are cut between words; each begins half a window behind the one before, and the last
    reaches back as far as it has room. `ends`: subwords up to each word, (words + 1,).
    """
    words = len(ends) - 1
    windows, first = [], 0
    while True:
        stop = int(np.searchsorted(ends, ends[first] + budget, side="right")) - 1
        if stop == words:
            first = int(np.searchsorted(ends, ends[-1] - budget)) if first else 0
            return [*windows, (first, words)]
        windows.append((first, stop))
        half, new = np.searchsorted(ends, [ends[first] + budget // 2, ends[stop + 1] - budget])
        first = min(max(int(half), int(new), first + 1), stop)  # with room for one word more


def owned_words(ends: np.ndarray, windows: list[tuple[int, int]]) -> list[np.ndarray]:
    """For each window the words read from it: those that have no more context in another one.

    A word's context is the shorter of its two sides, in subwords; a side that reaches the
    sentence's own edge is not short.
    """
    words = len(ends) - 1
    best, owner = np.full(words, -1.0), np.zeros(words, dtype=np.int64)
    for number, (first, stop) in enumerate(windows):
        left, right = np.full((2, stop - first), np.inf)
        if first > 0:
            left = ends[first:stop] - ends[first]
        if stop < words:
            right = ends[stop] - ends[first + 1 : stop + 1]  # without the word itself
        context = np.minimum(left, right)
        more = context > best[first:stop]
        best[first:stop][more] = context[more]
        owner[first:stop][more] = number
    return [np.flatnonzero(owner == number) for number in range(len(windows))]
