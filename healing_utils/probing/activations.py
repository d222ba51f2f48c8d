"""What every layer of an encoder says about every word, or about every sentence."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.progress import Progress
from healing_utils.healing.shortcuts import keep_freed_memory
from healing_utils.healing.training import Encoded, collate, encode, pick_device, position_limit

AGGREGATIONS = ("first", "last", "mean")
POOLINGS = ("first", "mean")
TOKENS_CPU, TOKENS_GPU = 1024, 8192  # in a batch: what stays in caches, what keeps a GPU busy
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # tokenizers cannot encode what holds one
UNLIMITED = 2**31 - 1  # tokens: transformers' own sign for "no limit" overflows the tokenizers'
CHUNK = 20_000  # words of `compact_activations` that are sorted by length together


def extract_activations(
    model: nn.Module, tokenizer: Any, sentences: Sequence[Sequence[str]], aggregation: str = "last",
    *, max_tokens: int | None = None, device: str | torch.device | None = None,
    layers: Sequence[int] | None = None, progress: bool = False,
) -> np.ndarray:  # fmt: skip
    """Hidden states of pre-tokenised sentences, float32 (layers, words, hidden).

    Layer 0 is the embeddings; words of all sentences follow one another. `aggregation` takes a
    word's ``first`` or ``last`` subword (as Durrani, Sajjad and Dalvi 2021 do) or their ``mean``.
    Batches hold at most `max_tokens` tokens, padding included. A sentence longer than the model's
    positions is computed in windows that overlap by half, each word taken from where it has most
    context, and a warning says how many those were. Raises HealingError for an unknown aggregation
    or layer, for input that is not lists of words, and for a word longer than a window.
    """
    with _reading(model, device) as base:
        aligned = align(tokenizer, sentences, max_positions(base, tokenizer))
        return _states(base, aligned, aggregation, layers, max_tokens, progress)


def compact_activations(
    model: nn.Module, tokenizer: Any, sentences: Sequence[Sequence[str]], aggregation: str = "last",
    *, memory: int = 2**29, device: str | torch.device | None = None,
) -> tuple[np.ndarray, dict[str, int]]:  # fmt: skip
    """As `extract_activations`, in float16, and how many sentences were `windowed` and how many
    words `unknown` to the tokenizer, in part at least.

    Where a value is beyond float16's range (65,504) the whole array is made anew in float32, which
    is said. An array of more than `memory` bytes is a map of an unnamed file in the folder for
    temporary files (``TMPDIR``). Raises HealingError where that has no room.
    """
    with _reading(model, device) as base:
        aligned = align(tokenizer, sentences, max_positions(base, tokenizer))
        counts = {"windowed": aligned.windowed, "unknown": aligned.unknown}
        try:
            return _states(base, aligned, aggregation, memory=memory, dtype=np.float16), counts
        except OverflowError:
            print("activations beyond float16's range: begun anew in float32", file=sys.stderr)
        return _states(base, aligned, aggregation, memory=memory), counts


def sentence_activations(
    model: nn.Module, tokenizer: Any, texts: Sequence[str] | Sequence[tuple[str, str]],
    pooling: str = "first", *, max_length: int | None = None, max_tokens: int | None = None,
    device: str | torch.device | None = None,
) -> np.ndarray:  # fmt: skip
    """One vector a text, or pair of texts, in every layer: float32 (layers, texts, hidden).

    ``first`` takes the classification token, wherever the tokenizer puts it (XLNet's comes last);
    ``mean`` averages over all tokens but padding. Texts longer than `max_length` tokens, by default
    the model's positions, are cut, and a warning says how many. Raises HealingError for an unknown
    pooling, for what is neither texts nor pairs, and where there is no classification token.
    """
    choose(pooling, POOLINGS, "pooling")
    given = _lists_of_text(texts, "texts", "texts or pairs of texts", whole=True)
    if set(map(len, given)) not in ({1}, {2}):
        raise HealingError("need texts, or pairs of texts: at least one, and all of a kind")
    with _reading(model, device) as base:
        limit = max_positions(base, tokenizer)
        limit = limit if max_length is None else min(limit, max_length)
        encoded = encode(tokenizer, given, [0] * len(given), limit)
        if encoded.truncated:
            said = f"{encoded.truncated} of {len(given)} texts were cut to {limit} tokens"
            warnings.warn(said, stacklevel=2)
        counts, one = encoded.lengths, np.arange(len(given))  # a text is read as a single word
        starts = np.zeros_like(counts)
        if pooling == "first":
            special, own = tokenizer("")["input_ids"], tokenizer.cls_token_id
            if own not in special[:1] + special[-1:]:
                said = f"tokenizer {type(tokenizer).__name__} puts no classification token around"
                raise HealingError(f"{said} a text; use pooling='mean'")
            starts = starts if special[0] == own else counts - 1
            counts = np.ones_like(counts)
        places = (list(each[:, None]) for each in (one, starts, counts))
        aligned = Aligned(encoded, one, *places, len(one))
        return _states(base, aligned, "mean", max_tokens=max_tokens)


@contextmanager
def _reading(model: nn.Module, device: str | torch.device | None) -> Iterator[nn.Module]:
    """The encoder without its head, inside the block in evaluation mode."""
    base = getattr(model, "base_model", model)
    config = getattr(base, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise HealingError(f"need a model that is an encoder alone, got {type(base).__name__}")
    device = pick_device(device)
    base.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        yield base
    finally:
        for module in training:
            module.training = True


def _states(
    base: nn.Module, aligned: Aligned, aggregation: str, layers: Sequence[int] | None = None,
    max_tokens: int | None = None, progress: bool = False, memory: int | None = None,
    dtype: type = np.float32,
) -> np.ndarray:  # fmt: skip
    """All words' states, (layers, words, hidden): in memory, or where `memory` is given as
    `compact_activations` keeps them. Raises OverflowError where `dtype` cannot hold a value."""
    choose(aggregation, AGGREGATIONS, "aggregation")
    there = range(base.config.num_hidden_layers + 1)
    layers = list(there) if layers is None else np.ravel(layers).tolist()
    if not layers or any(type(layer) is not int or layer not in there for layer in layers):
        raise HealingError(f"layers {layers}: need some of 0 (the embeddings) to {there[-1]}")
    largest, known = aligned.windows.highest[0], base.get_input_embeddings().num_embeddings
    if largest >= known:
        raise HealingError(f"the tokenizer is not the model's: token {largest} of {known}")
    if max_tokens is None:
        max_tokens = TOKENS_CPU if base.device.type == "cpu" else TOKENS_GPU
    array = _room((len(layers), aligned.words, base.config.hidden_size), dtype, memory)
    out, lengths = torch.from_numpy(array), aligned.windows.lengths
    chunks = aligned.before // (UNLIMITED if memory is None else CHUNK)
    with Progress(aligned.words, "activations", "word") if progress else nullcontext() as bar:
        for number in np.unique(chunks):
            windows = np.flatnonzero(chunks == number)
            for batch in batches(lengths[windows], max_tokens):
                batch = windows[batch]
                values = _read(base, aligned, batch, aggregation, layers).cpu()
                if dtype is np.float16:
                    beyond = values.abs() > torch.finfo(out.dtype).max
                    if (beyond & values.isfinite()).any():
                        raise OverflowError
                rows = np.concatenate([aligned.rows[i] for i in batch])
                out[:, torch.from_numpy(rows)] = values.to(out.dtype)
                if bar:
                    bar.update(len(rows))
    return array


def _room(shape: tuple[int, ...], dtype: type, memory: int | None) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if memory is None or size <= memory:
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                # A full disk is an error here; later, in the map, it would kill the process.
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "w+", shape=shape)
    except OSError as error:
        raise HealingError(
            f"cannot store {size / 1e9:.2f} GB of activations in a temporary file: "
            f"{error.strerror or error}; the variable TMPDIR names another folder for it"
        ) from error


def batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Rows of alike length, at most `max_tokens` tokens a batch, padding included: the division in
    which batches and padding cost least, one batch as much as `max_tokens` / 16 tokens."""
    if max_tokens < 1:
        raise HealingError(f"max_tokens is {max_tokens}: need at least 1")
    order = np.argsort(lengths, kind="stable")
    longest = lengths[order]  # of the rows up to each
    cost = np.zeros(len(order) + 1)  # of the first rows, by how many
    begin = np.zeros(len(order) + 1, dtype=np.int64)  # of the last batch of the first rows
    for stop in range(1, len(order) + 1):
        fitting = max(1, max_tokens // max(1, longest[stop - 1]))
        begins = np.arange(max(0, stop - fitting), stop)
        costs = cost[begins] + (stop - begins) * longest[stop - 1] + max_tokens / 16
        best = costs.argmin()
        cost[stop], begin[stop] = costs[best], begins[best]
    found, stop = [], len(order)
    while stop:
        found.append(order[begin[stop] : stop])
        stop = begin[stop]
    return found[::-1]


def _read(
    base: nn.Module, aligned: Aligned, batch: np.ndarray, aggregation: str, layers: list[int]
) -> torch.Tensor:
    """The batch's words in every layer, float32 (layers, words, hidden)."""
    lengths = np.array([len(aligned.windows.ids[i]) for i in batch])
    # Where each window begins, and then each word, once the batch is padded and laid out flat.
    begins = np.arange(len(batch)) * lengths.max()
    if aligned.windows.pad[2] == "left":
        begins += lengths.max() - lengths
    starts = np.concatenate([b + aligned.starts[i] for b, i in zip(begins, batch, strict=True)])
    counts = np.concatenate([aligned.counts[i] for i in batch])
    if aggregation == "last":
        starts = starts + counts - 1
    if aggregation != "mean":
        counts = np.ones_like(counts)
    offsets = np.cumsum(counts) - counts
    tokens = np.repeat(starts - offsets, counts) + np.arange(counts.sum())
    index, bags = (torch.from_numpy(a).to(base.device) for a in (tokens, offsets))
    with torch.inference_mode():
        output = base(**collate(aligned.windows, batch, base.device), output_hidden_states=True)
        values = torch.empty(len(layers), len(offsets), base.config.hidden_size, device=base.device)
        for layer, own in zip(layers, values, strict=True):
            states = output.hidden_states[layer].float().flatten(0, 1)
            if len(tokens) == len(offsets):  # a subword a word: no mean to take
                torch.index_select(states, 0, index, out=own)
            else:
                own.copy_(F.embedding_bag(index, states, bags, mode="mean"))
    return values


# -- words to subwords: which tokens of which window of a sentence are whose -----------------------


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


def max_positions(model: nn.Module, tokenizer: Any) -> int:
    """The most tokens, special ones included, that both read at once."""
    limits = position_limit(model), getattr(tokenizer, "model_max_length", None)
    return min(limit or UNLIMITED for limit in (*limits, UNLIMITED))


def align(tokenizer: Any, sentences: Sequence[Sequence[str]], limit: int = UNLIMITED) -> Aligned:
    """Tokenise sentences that are already split into words, each word as inside a running text:
    byte-level BPE (RoBERTa, ModernBERT) sees a space before it. A sentence longer than `limit` is
    read in overlapping windows; a word without any subword is the unknown token."""
    if not getattr(tokenizer, "is_fast", False) or tokenizer.unk_token is None:
        raise HealingError(
            f"tokenizer {type(tokenizer).__name__} does not say which word a subword belongs to; "
            "need a fast one (transformers.PreTrainedTokenizerFast) with an unknown token"
        )
    sentences = _lists_of_text(sentences, "sentences", "lists of words")
    if not any(map(len, sentences)):
        raise HealingError("there are no words to extract: every sentence is empty")
    # A copy whose ByteLevel and Metaspace put the space before every word.
    state = re.sub('("add_prefix_space":)false', r"\1true", tokenizer.backend_tokenizer.to_str())
    backend = Tokenizer.from_str(re.sub(r'("prepend_scheme":)"\w+"', r'\1"always"', state))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch(sentences, is_pretokenized=True, add_special_tokens=False)
    around = backend.encode([tokenizer.unk_token], is_pretokenized=True)  # by the special tokens
    inside = [i for i, word in enumerate(around.word_ids) if word is not None]
    prefix, stop = inside[0], inside[-1] + 1  # all of XLNet's special tokens are behind
    budget = limit - prefix - len(around.ids[stop:])
    found, words, windowed, unknown = [], 0, 0, 0
    for number, (sentence, encoding) in enumerate(zip(sentences, encodings, strict=True)):
        if not sentence:
            continue
        tokens, numbers = (np.array(a, dtype=np.int64) for a in (encoding.ids, encoding.word_ids))
        count = np.bincount(numbers, minlength=len(sentence))  # subwords a word
        missing = np.flatnonzero(count == 0)
        unknown += len(missing) + len(set(numbers[tokens == tokenizer.unk_token_id]))
        tokens = np.insert(tokens, np.searchsorted(numbers, missing), tokenizer.unk_token_id)
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
            content = tokens[ends[first] : ends[last]].tolist()
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


def _lists_of_text(values: Any, what: str, need: str, whole: bool = False) -> list[list[str]]:
    """`values`, a string in its place as a list of one where `whole`."""
    found = []
    many = isinstance(values, Iterable) and not isinstance(values, str)
    for number, value in enumerate(values if many else [values]):
        value = [value] if whole and isinstance(value, str) else value
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise HealingError(f"{what} must be {need}: {what}[{number}] is {value!r:.40}")
        found.append(list(value))
        for word in found[-1]:
            if not isinstance(word, str) or HALF_A_CHARACTER.search(word):
                raise HealingError(f"{what}[{number}] holds {word!r:.40}, which is no text")
    return found


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
