"""Words to subwords: which tokens of which window of a sentence are whose."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from healing_utils.base.errors import HealingError
from healing_utils.healing.training import Encoded, position_limit

UNLIMITED = 2**31 - 1  # tokens: transformers' own sign for "no limit" overflows the tokenizers'
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # tokenizers cannot encode what holds one


@dataclass(frozen=True)
class Aligned:
    """Sentences as the model reads them, and where their words are."""

    windows: Encoded  # with special tokens, one row a sentence, or several for a long one
    before: np.ndarray  # of every window: the words before its sentence,
    rows: list[np.ndarray]  # which words of the corpus are read from it,
    starts: list[np.ndarray]  # where their subwords begin, unpadded,
    counts: list[np.ndarray]  # and how many they are
    words: int
    windowed: int = 0  # sentences in several windows
    unknown: int = 0  # words that the tokenizer knows nothing of, or not all


def max_positions(model: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens, special ones included, that both read at once; None for any number."""
    limits = [position_limit(model), getattr(tokenizer, "model_max_length", None)]
    return min((n for n in limits if n and n < UNLIMITED), default=None)


def align(tokenizer: Any, sentences: Sequence[Sequence[str]], limit: int | None = None) -> Aligned:
    """Tokenise sentences that are already split into words, each word as inside a running text:
    byte-level BPE (RoBERTa, ModernBERT) sees a space before it. A sentence longer than `limit`, the
    model's positions, is read in overlapping windows; a word without any subword is the unknown
    token. Raises HealingError for a tokenizer without word numbers, for input that is not lists of
    words, and for a word longer than a window."""
    if not getattr(tokenizer, "is_fast", False) or tokenizer.unk_token is None:
        raise HealingError(
            f"tokenizer {type(tokenizer).__name__} does not say which word a subword belongs to; "
            "need a fast one (transformers.PreTrainedTokenizerFast) with an unknown token"
        )
    sentences = lists_of_text(sentences, "sentences", "lists of words")
    if not any(map(len, sentences)):
        raise HealingError("there are no words to extract: every sentence is empty")
    backend = tokenizer.backend_tokenizer
    splitter = backend.pre_tokenizer
    read = functools.partial(tokenizer, is_split_into_words=True, verbose=False)
    try:
        if splitter is not None:
            backend.pre_tokenizer = _spaced(splitter)
        encodings = read(sentences, add_special_tokens=False).encodings
        around = read([tokenizer.unk_token]).encodings[0]  # one word and the special tokens
    finally:
        if splitter is not None:
            backend.pre_tokenizer = splitter
    inside = [i for i, word in enumerate(around.word_ids) if word is not None]
    prefix, stop = inside[0], inside[-1] + 1  # all of XLNet's special tokens are behind
    budget = (limit or UNLIMITED) - prefix - len(around.ids[stop:])
    found, words, windowed, unknown = [], 0, 0, 0
    for number, (sentence, encoding) in enumerate(zip(sentences, encodings, strict=True)):
        if not sentence:
            continue
        tokens, numbers = (np.array(a, dtype=np.int64) for a in (encoding.ids, encoding.word_ids))
        count = np.bincount(numbers, minlength=len(sentence))  # subwords a word
        missing = np.flatnonzero(count == 0)
        places = np.searchsorted(numbers, missing)
        unknown += len(missing) + len(set(numbers[tokens == tokenizer.unk_token_id]))
        tokens = np.insert(tokens, places, tokenizer.unk_token_id).tolist()
        count[missing] = 1
        if count.max() > budget:
            word = int(count.argmax())
            raise HealingError(
                f"sentences[{number}], word {word} ({sentence[word][:20]!r}...) has {count[word]} "
                f"subwords; the model reads {budget} at once and a word is never cut"
            )
        ends = np.concatenate([[0], np.cumsum(count)])
        windows = cut_windows(ends, budget)
        windowed += len(windows) > 1
        for first, last, own in windows:
            if not len(own):
                continue
            content = tokens[ends[first] : ends[last]]
            ids = [*around.ids[:prefix], *content, *around.ids[stop:]]
            types = [around.type_ids[prefix]] * len(content)
            types = [*around.type_ids[:prefix], *types, *around.type_ids[stop:]]
            starts = prefix + ends[own] - ends[first]
            found.append((ids, types, words, words + own, starts, count[own]))
        words += len(sentence)
    if windowed:
        said = f"{windowed} of {len(sentences)} sentences are longer than the model's {limit} "
        warnings.warn(f"{said}tokens: computed in overlapping windows", stacklevel=3)
    ids, types, before, rows, starts, counts = map(list, zip(*found, strict=True))
    use_types = "token_type_ids" in tokenizer.model_input_names and any(map(any, types))
    pad = (tokenizer.pad_token_id or 0, tokenizer.pad_token_type_id or 0, tokenizer.padding_side)
    labels = np.zeros(len(ids), dtype=np.int64)  # not used: what is encoded here has no label
    encoded = Encoded(ids, types if use_types else None, labels, pad)
    return Aligned(encoded, np.array(before), rows, starts, counts, words, windowed, unknown)


def lists_of_text(values: Any, what: str, need: str) -> list[list[str]]:
    """`values`, of which HealingError says what is not as they must be."""
    found = []
    for number, value in enumerate(values if isinstance(values, Iterable) else [values]):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise HealingError(f"{what} must be {need}: {what}[{number}] is {value!r:.40}")
        found.append(list(value))
        for word in found[-1]:
            if not isinstance(word, str) or HALF_A_CHARACTER.search(word):
                raise HealingError(f"{what}[{number}] holds {word!r:.40}, which is no text")
    return found


def _spaced(splitter: Any) -> Any:
    """One that sees a space before every word where the vocabulary marks its beginning by one."""
    # Its state is JSON; these are ByteLevel's and Metaspace's settings.
    state = re.sub(rb'("add_prefix_space":)false', rb"\1true", splitter.__getstate__())
    spaced = copy.deepcopy(splitter)
    spaced.__setstate__(re.sub(rb'("prepend_scheme":)"\w+"', rb'\1"always"', state))
    return spaced


def cut_windows(ends: np.ndarray, budget: int) -> list[tuple[int, int, np.ndarray]]:
    """Windows of at most `budget` subwords over a sentence: (first word, word after the last, the
    words read from it). `ends`: subwords up to each word, (words + 1,).

    Each begins half a window behind the one before. A word is read where it has most context, the
    shorter of its two sides; one that reaches the sentence's own edge is not short.
    """
    words, first, stop, places = len(ends) - 1, 0, 0, []
    best, owner = np.full(words, -1.0), np.zeros(words, dtype=np.int64)
    while stop < words:
        stop = int(np.searchsorted(ends, ends[first] + budget, side="right")) - 1
        if stop < words:
            half, new = np.searchsorted(ends, [ends[first] + budget // 2, ends[stop + 1] - budget])
        elif first:
            first = int(np.searchsorted(ends, ends[-1] - budget))
        left = ends[first:stop] - ends[first] if first else np.inf
        right = ends[stop] - ends[first + 1 : stop + 1] if stop < words else np.inf
        context, own = np.minimum(left, right), owner[first:stop]
        own[context > best[first:stop]] = len(places)
        best[first:stop] = np.maximum(context, best[first:stop])
        places.append((first, stop))
        if stop < words:  # with room for one word more
            first = min(max(int(half), int(new), first + 1), stop)
    return [(*place, np.flatnonzero(owner == number)) for number, place in enumerate(places)]
