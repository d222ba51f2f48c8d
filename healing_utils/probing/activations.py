"""What every layer of an encoder says about every word, or about every sentence.

Words are aligned to subwords by the tokenizer's own word numbers. Each sentence runs once, beside
others of its length; one longer than the model's positions runs in overlapping windows, so no word
is ever cut off. What is larger than memory is written to a file, chunk by chunk, and goes on where
it was after a kill.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from healing_utils.base import records
from healing_utils.base.errors import HealingError, choose
from healing_utils.base.progress import Progress
from healing_utils.healing.shortcuts import keep_freed_memory
from healing_utils.healing.training import Encoded, collate, encode, pick_device, position_limit

AGGREGATIONS = ("first", "last", "mean")
POOLINGS = ("first", "mean")
UNLIMITED = 2**31 - 1  # tokens: transformers' own sign for "no limit" overflows the tokenizers'
TOKENS_CPU, TOKENS_GPU = 1024, 8192  # in a batch: what stays in caches, what keeps a GPU busy
NUMERICS = 2  # raised when what is computed here changes, so that stored files are made anew


# -- words to subwords ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Aligned:
    """Sentences as the model reads them, and where their words are.

    `windows`: token ids with the tokenizer's special tokens, one row a sentence, or several for a
    sentence longer than the model's positions. For every window: `rows`, which words of the corpus
    are read from it, counted through all sentences; `starts`, the position of each word's first
    subword in the unpadded window; `counts`, its number of subwords. `words` counts all words,
    `windowed` the sentences that needed several windows, `unknown` the words for which the
    tokenizer has no subword at all: they get its unknown token and keep their row.
    """

    windows: Encoded
    rows: list[np.ndarray]
    starts: list[np.ndarray]
    counts: list[np.ndarray]
    words: int
    windowed: int
    unknown: int


def max_positions(model: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens, special ones included, that the model reads at once; None for any number.

    The smaller of what the model's configuration and its tokenizer state.
    """
    limits = [position_limit(model), tokenizer.model_max_length]
    return min((n for n in limits if n and n < UNLIMITED), default=None)


def align(tokenizer: Any, sentences: Sequence[Sequence[str]], limit: int | None = None) -> Aligned:
    """Tokenise sentences that are already split into words.

    Every word is tokenised as it would be inside a running text: byte-level BPE (RoBERTa, GPT-2,
    ModernBERT) sees a space before each word, the first one too. Raises HealingError for a
    tokenizer without word numbers, for input that is not lists of words, and for a single word
    with more subwords than `limit`, the model's positions, has room for.
    """
    _check_sentences(sentences)
    with _backend(tokenizer) as backend:
        special = _special_tokens(tokenizer, backend)
        encodings = backend.encode_batch(
            [list(s) for s in sentences], is_pretokenized=True, add_special_tokens=False
        )
    prefix, prefix_types, content_type, suffix, suffix_types = special
    budget = (limit or UNLIMITED) - len(prefix) - len(suffix)
    if budget < 1:
        raise HealingError(
            f"the model reads {limit} tokens at once, of which {len(prefix) + len(suffix)} are "
            "special tokens: no room for a word"
        )
    ids: list[list[int]] = []
    types: list[list[int]] = []
    rows, starts, counts = [], [], []
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
        parts = _windows(ends, budget)
        windowed += len(parts) > 1
        for (first, stop), own in zip(parts, _owned(ends, parts), strict=True):
            content = tokens[ends[first] : ends[stop]]
            ids.append([*prefix, *content, *suffix])
            types.append([*prefix_types, *[content_type] * len(content), *suffix_types])
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
    return Aligned(encoded, rows, starts, counts, words, windowed, unknown)


def _check_sentences(sentences: Sequence[Sequence[str]]) -> None:
    if isinstance(sentences, str) or any(isinstance(s, str) for s in sentences):
        raise HealingError("sentences must be lists of words, not text: split them into words")
    for number, sentence in enumerate(sentences):
        for word in sentence:
            if not isinstance(word, str):
                raise HealingError(f"sentences[{number}] holds {word!r}, which is not a word")


def _with_space(node: Any) -> Any:
    """A pre-tokenizer's description, such that it puts a space before every word where the
    vocabulary marks a word's beginning by one."""
    if isinstance(node, list):
        return [_with_space(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {name: _with_space(value) for name, value in node.items()}
    if node.get("type") == "ByteLevel":
        node["add_prefix_space"] = True
    elif node.get("type") == "Metaspace":
        node["prepend_scheme"] = "always"
    return node


@contextlib.contextmanager
def _backend(tokenizer: Any) -> Iterator[Any]:
    """The tokenizer's Rust half, which inside the block never cuts, never pads, and puts a space
    before every word where the vocabulary marks a word's beginning by one."""
    from tokenizers import Tokenizer

    if not getattr(tokenizer, "is_fast", False):
        raise HealingError(
            f"tokenizer {type(tokenizer).__name__} does not say which word a subword belongs to; "
            "need a fast one (transformers.PreTrainedTokenizerFast)"
        )
    backend = tokenizer.backend_tokenizer
    splitter = backend.pre_tokenizer
    before = json.loads(splitter.__getstate__()) if splitter is not None else None
    if _with_space(before) != before:  # a copy: a vocabulary of 50,000 takes a tenth of a second
        parts = json.loads(backend.to_str())
        parts["pre_tokenizer"] = _with_space(parts["pre_tokenizer"])
        backend = Tokenizer.from_str(json.dumps(parts))
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
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


def _windows(ends: np.ndarray, budget: int) -> list[tuple[int, int]]:
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


def _owned(ends: np.ndarray, windows: list[tuple[int, int]]) -> list[np.ndarray]:
    """For each window the words read from it: those that have no more context in another one.

    A word's context is the shorter of its two sides, in subwords; a side that reaches the
    sentence's own edge is not short.
    """
    words = len(ends) - 1
    best, owner = np.full(words, -1.0), np.zeros(words, dtype=np.int64)
    for number, (first, stop) in enumerate(windows):
        left = np.full(stop - first, np.inf) if first == 0 else ends[first:stop] - ends[first]
        right = np.full(stop - first, np.inf) if stop == words else ends[stop] - ends[first:stop]
        if stop < words:
            right = right - np.diff(ends[first : stop + 1])  # without the word itself
        context = np.minimum(left, right)
        more = context > best[first:stop]
        best[first:stop][more] = context[more]
        owner[first:stop][more] = number
    return [np.flatnonzero(owner == number) for number in range(len(windows))]


# -- forward passes ------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(model: nn.Module, device: str | torch.device | None) -> Iterator[nn.Module]:
    """The encoder without its head, in evaluation mode inside the block, each module as it was
    behind it."""
    base = getattr(model, "base_model", model)
    if getattr(base.config, "is_encoder_decoder", False):
        raise HealingError(f"{type(base).__name__} is an encoder with a decoder: need an encoder")
    device = pick_device(device)
    base.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        yield base
    finally:
        for module, mode in modes.items():
            module.training = mode


def _pick_layers(base: nn.Module, layers: Sequence[int] | None) -> list[int]:
    """Indices into the hidden states, embeddings being 0."""
    there = base.config.num_hidden_layers + 1
    chosen = list(range(there)) if layers is None else list(layers)
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise HealingError(f"layers holds {layer!r}; need whole numbers")
        if not 0 <= layer < there:
            raise HealingError(
                f"layer {layer} is not there; allowed: 0 (the embeddings) to {there - 1}"
            )
    if not chosen:
        raise HealingError("layers is empty: need at least one")
    return chosen


def _at_once(base: nn.Module, max_tokens: int | None) -> int:
    """The tokens of a batch: as asked for, else what suits the device that the encoder is on."""
    if max_tokens is not None:
        return max_tokens
    return TOKENS_CPU if base.device.type == "cpu" else TOKENS_GPU


def _batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
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
    batches, stop = [], len(order)
    while stop:
        batches.append(order[begin[stop] : stop])
        stop = begin[stop]
    return batches[::-1]


def _states(
    base: nn.Module, aligned: Aligned, layers: list[int], max_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batch by batch: which words, (n,), and the mean of each one's subwords in every layer,
    float32 (layers, n, hidden)."""
    device = next(base.parameters()).device
    left = aligned.windows.pad[2] == "left"
    lengths = aligned.windows.lengths
    for batch in _batches(lengths, max_tokens):
        batch = batch[[len(aligned.rows[i]) > 0 for i in batch]]
        if not len(batch):
            continue
        longest = int(lengths[batch].max())
        # Where each word begins once the batch is padded and laid out flat: (n,).
        starts = np.concatenate(
            [
                aligned.starts[i] + row * longest + (longest - lengths[i] if left else 0)
                for row, i in enumerate(batch)
            ]
        )
        counts = np.concatenate([aligned.counts[i] for i in batch])
        offsets = np.cumsum(counts) - counts
        tokens = np.repeat(starts - offsets, counts) + np.arange(counts.sum())
        index, bags = (torch.from_numpy(a).to(device) for a in (tokens, offsets))
        with torch.inference_mode():
            output = base(**collate(aligned.windows, batch, device), output_hidden_states=True)
            hidden = output.hidden_states
            values = torch.empty(len(layers), len(offsets), hidden[0].shape[2], device=device)
            for layer, own in zip(layers, values, strict=True):
                states = hidden[layer].float().flatten(0, 1)
                if len(tokens) == len(offsets):  # a subword a word: no mean to take
                    torch.index_select(states, 0, index, out=own)
                else:
                    own.copy_(F.embedding_bag(index, states, bags, mode="mean"))
        yield np.concatenate([aligned.rows[i] for i in batch]), values.cpu().numpy()


def _aggregated(aligned: Aligned, aggregation: str) -> Aligned:
    """The same words, with only the subwords that the aggregation reads."""
    if aggregation == "mean":
        return aligned
    starts = aligned.starts
    if aggregation == "last":
        starts = [s + c - 1 for s, c in zip(starts, aligned.counts, strict=True)]
    ones = [np.ones_like(c) for c in aligned.counts]
    return Aligned(
        aligned.windows, aligned.rows, starts, ones, aligned.words, aligned.windowed,
        aligned.unknown,
    )  # fmt: skip


def _collect(
    base: nn.Module, aligned: Aligned, layers: list[int], max_tokens: int, progress: bool
) -> np.ndarray:
    """All words' states in memory, float32 (layers, words, hidden)."""
    result: np.ndarray | None = None
    with _bar(aligned.words, "activations", progress) as bar:
        for rows, values in _states(base, aligned, layers, max_tokens):
            if result is None:
                result = np.empty((len(layers), aligned.words, values.shape[2]), dtype=np.float32)
            # torch's assignment uses all threads.
            torch.from_numpy(result)[:, torch.from_numpy(rows)] = torch.from_numpy(values)
            bar.update(len(rows))
    return result


@contextlib.contextmanager
def _bar(words: int, label: str, shown: bool) -> Iterator[Any]:
    if shown:
        with Progress(words, label, unit="word") as bar:
            yield bar
    else:
        yield _NoBar()


class _NoBar:
    def update(self, n: int = 1) -> None:
        pass


def _say_windows(windowed: int, sentences: int, limit: int | None) -> None:
    if windowed:
        warnings.warn(
            f"{windowed} of {sentences} sentences are longer than the model's {limit} tokens: "
            "computed in overlapping windows",
            stacklevel=3,
        )


def extract_activations(
    model: nn.Module,
    tokenizer: Any,
    sentences: Sequence[Sequence[str]],
    aggregation: str = "last",
    *,
    max_tokens: int | None = None,
    device: str | torch.device | None = None,
    layers: Sequence[int] | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Hidden states of pre-tokenised sentences, float32 (layers, words, hidden).

    Layer 0 is the embeddings; words of all sentences follow one another. `aggregation` takes a
    word's ``first`` or ``last`` subword or their ``mean`` (Durrani, Sajjad and Dalvi 2021 take the
    last). `model` is any encoder, with or without a head. Batches hold at most `max_tokens` tokens
    (without it 1,024 on a CPU, 8,192 on a GPU), padding included, of sentences of alike length;
    beside the result only one batch is in memory.

    Nothing is cut: a sentence longer than the model's positions is computed in windows that overlap
    by half, each word taken from the one where it has most context, and a warning says how many
    sentences that were. A word without any subword (a control character, say) gets the unknown
    token. Raises HealingError for an unknown aggregation or layer, for input that is not lists of
    words, and for a word longer than a window, naming sentence and word.
    """
    choose(aggregation, AGGREGATIONS, "aggregation")
    with _reading(model, device) as base:
        chosen = _pick_layers(base, layers)
        limit = max_positions(base, tokenizer)
        aligned = _aggregated(align(tokenizer, sentences, limit), aggregation)
        _say_windows(aligned.windowed, len(sentences), limit)
        return _collect(base, aligned, chosen, _at_once(base, max_tokens), progress)


def sentence_activations(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    pooling: str = "first",
    *,
    max_length: int | None = None,
    max_tokens: int | None = None,
    device: str | torch.device | None = None,
    layers: Sequence[int] | None = None,
    progress: bool = False,
) -> np.ndarray:
    """One vector a text, or pair of texts, in every layer: float32 (layers, texts, hidden).

    ``first`` takes the classification token, wherever the tokenizer puts it (XLNet's comes last);
    ``mean`` averages over all tokens but padding, the special ones included, as sentence encoders
    do. Texts longer than `max_length` tokens, by default the model's positions, are cut, and a
    warning says how many. Raises HealingError for an unknown pooling and where ``first`` finds no
    classification token.
    """
    choose(pooling, POOLINGS, "pooling")
    with _reading(model, device) as base:
        chosen = _pick_layers(base, layers)
        limit = min(max_positions(base, tokenizer) or UNLIMITED, max_length or UNLIMITED)
        encoded = encode(tokenizer, texts, [0] * len(texts), limit)
        if encoded.truncated:
            warnings.warn(
                f"{encoded.truncated} of {len(texts)} texts were cut to {limit} tokens",
                stacklevel=2,
            )
        lengths = encoded.lengths
        starts, counts = np.zeros_like(lengths), lengths
        if pooling == "first":
            starts, counts = _classification_token(tokenizer, lengths), np.ones_like(lengths)
        one = [np.array([i]) for i in range(len(texts))]
        aligned = Aligned(
            encoded, one, list(starts[:, None]), list(counts[:, None]), len(texts), 0, 0
        )
        return _collect(base, aligned, chosen, _at_once(base, max_tokens), progress)


def _classification_token(tokenizer: Any, lengths: np.ndarray) -> np.ndarray:
    """Where the classification token stands in texts of such lengths, (texts,)."""
    with _backend(tokenizer) as backend:
        before, _, _, behind, _ = _special_tokens(tokenizer, backend)
    if tokenizer.cls_token_id in before:
        return np.full_like(lengths, before.index(tokenizer.cls_token_id))
    if tokenizer.cls_token_id in behind:
        return lengths - len(behind) + behind.index(tokenizer.cls_token_id)
    raise HealingError(
        f"tokenizer {type(tokenizer).__name__} puts no classification token around a text; "
        "use pooling='mean'"
    )


# -- larger than memory --------------------------------------------------------------------------


class _TooLarge(Exception):
    """A value that float16 cannot hold."""


def stored_activations(
    path: str | Path,
    model: nn.Module,
    tokenizer: Any,
    sentences: Sequence[Sequence[str]],
    aggregation: str = "last",
    *,
    identity: str,
    max_tokens: int | None = None,
    chunk_words: int = 20_000,
    device: str | torch.device | None = None,
    layers: Sequence[int] | None = None,
    progress: bool = False,
    counts: dict[str, int] | None = None,
) -> np.memmap:
    """As `extract_activations`, in a file: a read-only memory map (layers, words, hidden).

    The file is a NumPy array (``.npy``) of float16, whose error is at most 1/2048 of a value's size
    above 6e-5. Where a value is beyond its range (65,504), the whole file is begun anew in float32,
    which is said: nothing is clipped.

    Whole sentences of about `chunk_words` words are computed, written and flushed together; then
    ``PATH.json``, written atomically, counts them as finished. After a kill the same call goes on
    there, and the finished file equals an unbroken one to the bit. It stands under ``PATH.part``
    until it is finished. `identity` is what determines the weights and the tokenizer (see
    `models.identity`): a file made for another one, for other sentences or settings,
    or one that was cut off, is begun anew, which is said. The claim of the caller's cell keeps
    others off the path; where claims fail (locks that are none), two processes write the same
    values into the same places, and either may finish, and remove the file, before the other.
    """
    choose(aggregation, AGGREGATIONS, "aggregation")
    _check_sentences(sentences)
    path = Path(path)
    with _reading(model, device) as base:
        chosen = _pick_layers(base, layers)
        limit = max_positions(base, tokenizer)
        key = {
            "identity": identity, "sentences": _sha(sentences), "aggregation": aggregation,
            "layers": chosen, "limit": limit, "max_tokens": _at_once(base, max_tokens),
            "chunk_words": chunk_words, "numerics": NUMERICS,
        }  # fmt: skip
        file = _File(path, records.digest(key), len(sentences), sum(map(len, sentences)))
        while True:
            try:
                file.open()
                _fill(file, base, tokenizer, sentences, aggregation, key, progress)
                array = file.finish()
                break
            except _TooLarge as error:
                file.restart(f"{error}; float32 instead", dtype="float32")
            except FileNotFoundError:
                file.restart("another process removed it", dtype=file.state["dtype"])
    _say_windows(file.state["windowed"], len(sentences), limit)
    if counts is not None:
        counts |= {name: file.state[name] for name in ("windowed", "unknown")}
    return array


def _fill(
    file: _File,
    base: nn.Module,
    tokenizer: Any,
    sentences: Sequence[Sequence[str]],
    aggregation: str,
    key: dict[str, Any],
    progress: bool,
) -> None:
    """Compute and write what the file does not hold yet."""
    lengths = np.array([len(s) for s in sentences])
    before = np.concatenate([[0], np.cumsum(lengths)])  # words before each sentence
    # A sentence belongs to the chunk in which it begins: cut the same way on every call.
    chunk = before[:-1] // max(1, key["chunk_words"])
    bounds = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(sentences)]
    with _bar(int(before[-1]), f"activations to {file.path.name}", progress) as bar:
        bar.update(int(before[file.state["finished"]]))
        for first, stop in zip(bounds[:-1], bounds[1:], strict=True):
            if stop <= file.state["finished"]:
                continue
            if lengths[first:stop].any():
                aligned = align(tokenizer, sentences[first:stop], key["limit"])
                file.state["windowed"] += aligned.windowed
                file.state["unknown"] += aligned.unknown
                aligned = _aggregated(aligned, aggregation)
                for rows, values in _states(base, aligned, key["layers"], key["max_tokens"]):
                    file.write(before[first] + rows, values)
                    bar.update(len(rows))
            file.finished(stop)


def _sha(sentences: Sequence[Sequence[str]]) -> str:
    hashed = hashlib.sha256()
    for sentence in sentences:
        hashed.update((records.canonical(list(sentence)) + "\n").encode())
    return hashed.hexdigest()


class _File:
    """The array under ``PATH.part`` and its progress in ``PATH.json``, until it becomes PATH.

    `state`: key, sentences, finished (sentences), words, windowed, unknown, dtype, shape.
    """

    def __init__(self, path: Path, key: str, sentences: int, words: int):
        if not words:
            raise HealingError("there are no words to extract: every sentence is empty")
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.json = path.with_name(path.name + ".json")
        self.empty = {
            "key": key, "sentences": sentences, "finished": 0, "words": words, "windowed": 0,
            "unknown": 0, "dtype": "float16", "shape": None,
        }  # fmt: skip
        self.state: dict[str, Any] = dict(self.empty)
        self.array: np.memmap | None = None

    def open(self) -> None:
        """Go on where a former call was, as far as what it left is whole and of the same key."""
        if self.state["dtype"] != "float16" or not self.json.exists():
            return
        try:
            state = json.loads(self.json.read_text(encoding="utf-8"))
            if set(state) != set(self.empty):
                raise ValueError("its progress file is not one of ours")
            if state["key"] != self.empty["key"]:
                raise ValueError("it holds another model, other sentences or other settings")
            if state["finished"] or state["shape"]:
                whole = self.part if self.part.exists() else self.path
                if whole is self.path and state["finished"] < state["sentences"]:
                    raise ValueError("its unfinished part is gone")
                array = np.load(whole, mmap_mode="r")  # raises for a file that was cut off
                if list(array.shape) != state["shape"] or array.dtype != state["dtype"]:
                    raise ValueError("it has another shape than its progress file says")
        except (ValueError, OSError, EOFError, TypeError) as error:
            cause = (str(error) or type(error).__name__).splitlines()[0]
            self.restart(cause)
        else:
            self.state = state

    def restart(self, cause: str, dtype: str = "float16") -> None:
        print(f"activations {self.path}: {cause}; begun anew", file=sys.stderr)
        self.array = None
        self.part.unlink(missing_ok=True)
        self.json.unlink(missing_ok=True)
        self.state = {**self.empty, "dtype": dtype}

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Put `values`, float32 (layers, n, hidden), into `rows` (n,) of the words."""
        dtype = np.dtype(self.state["dtype"])
        if dtype == np.float16:
            size = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values))
            if size.max() > np.finfo(np.float16).max:
                raise _TooLarge(f"a value of size {size.max():.0f} is beyond float16's range")
        if self.array is None:
            shape = (values.shape[0], self.state["words"], values.shape[2])
            self.array = self._create(dtype, shape) if not self.state["shape"] else self._reopen()
        self.array[:, rows] = values

    def _create(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            array = self._beside_another(dtype, shape)
            if array is None:
                array = np.lib.format.open_memmap(self.part, mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):
                # A full disk is an error here; later, in the map, it would kill the process.
                with open(self.part, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, self.part.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # cannot reserve: go on
                self.part.unlink(missing_ok=True)
                size = int(np.prod(shape)) * dtype.itemsize / 1e9
                raise HealingError(
                    f"cannot store {size:.2f} GB of activations at {self.part}: "
                    f"{error.strerror or error}"
                ) from error
        self.state["shape"] = list(shape)
        return array

    def _beside_another(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap | None:
        """The part that another process may be writing: to truncate it would zero what it wrote.

        Every row is written again before this one counts as finished, so what is there of old does
        no harm.
        """
        try:
            array = np.lib.format.open_memmap(self.part, mode="r+")
        except (OSError, ValueError):  # none, or cut off
            return None
        return array if array.shape == shape and array.dtype == dtype else None

    def _reopen(self) -> np.memmap:
        return np.lib.format.open_memmap(self.part, mode="r+")

    def finished(self, sentences: int) -> None:
        """Count the first so many sentences as done, once their data is on the disk."""
        if self.array is not None:
            self.array.flush()
        self.state["finished"] = sentences
        records.write_atomically(self.json, json.dumps(self.state, indent=1) + "\n")

    def finish(self) -> np.memmap:
        """Give the file its name; the map that readers get."""
        with contextlib.suppress(FileNotFoundError):  # it was named before, or by another process
            os.replace(self.part, self.path)
        try:
            return np.load(self.path, mmap_mode="r")
        except FileNotFoundError:  # another process is done with it; what is mapped stays
            if self.array is None:
                raise
            self.array.flags.writeable = False
            return self.array
