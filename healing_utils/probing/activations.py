"""What every layer of an encoder says about every word, or about every sentence.

Each sentence runs once, beside others of its length.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.progress import Progress
from healing_utils.healing.shortcuts import keep_freed_memory
from healing_utils.healing.training import collate, encode, pick_device
from healing_utils.probing.alignment import (
    UNLIMITED,
    Aligned,
    align,
    classification_token,
    max_positions,
)

AGGREGATIONS = ("first", "last", "mean")
POOLINGS = ("first", "mean")
TOKENS_CPU, TOKENS_GPU = 1024, 8192  # in a batch: what stays in caches, what keeps a GPU busy
CHUNK = 20_000  # words of `compact_activations` that are sorted by length together


def extract_activations(
    model: nn.Module, tokenizer: Any, sentences: Sequence[Sequence[str]], aggregation: str = "last",
    *, max_tokens: int | None = None, device: str | torch.device | None = None,
    layers: Sequence[int] | None = None, progress: bool = False,
) -> np.ndarray:  # fmt: skip
    """Hidden states of pre-tokenised sentences, float32 (layers, words, hidden).

    Layer 0 is the embeddings; words of all sentences follow one another. `aggregation` takes a
    word's ``first`` or ``last`` subword or their ``mean`` (Durrani, Sajjad and Dalvi 2021 take the
    last). `model` is any encoder, with or without a head. Batches hold at most `max_tokens` tokens
    (without it 1,024 on a CPU, 8,192 on a GPU), padding included.

    Nothing is cut: a sentence longer than the model's positions is computed in windows that overlap
    by half, each word taken from the one where it has most context, and a warning says how many
    sentences that were. Raises HealingError for an unknown aggregation or layer, for input that is
    not lists of words, and for a word longer than a window, naming sentence and word.
    """
    choose(aggregation, AGGREGATIONS, "aggregation")
    with _reading(model, device) as base:
        chosen = _pick_layers(base, layers)
        aligned = _align(base, tokenizer, sentences)
        array = np.empty((len(chosen), aligned.words, base.config.hidden_size), dtype=np.float32)
        _fill(array, base, aligned, aggregation, chosen, max_tokens, progress=progress)
        return array


def compact_activations(
    model: nn.Module, tokenizer: Any, sentences: Sequence[Sequence[str]], aggregation: str = "last",
    *, memory: int = 2**29, device: str | torch.device | None = None,
) -> tuple[np.ndarray, dict[str, int]]:  # fmt: skip
    """As `extract_activations`, in float16, and how many sentences were `windowed` and how many
    words `unknown` to the tokenizer.

    Half precision errs by at most 1/2048 of a value's size above 6e-5. Where a value is beyond its
    range (65,504) the whole array is made anew in float32, which is said: nothing is clipped. An
    array of more than `memory` bytes is a map of an unnamed file in the folder for temporary files
    (``TMPDIR``), gone with the array or the process. Raises HealingError where it has no room.
    """
    choose(aggregation, AGGREGATIONS, "aggregation")
    with _reading(model, device) as base:
        layers = _pick_layers(base, None)
        aligned = _align(base, tokenizer, sentences)
        shape = (len(layers), aligned.words, base.config.hidden_size)
        array = _room(shape, np.float16, memory)
        if not _fill(array, base, aligned, aggregation, layers, chunk=CHUNK):
            print("activations beyond float16's range: begun anew in float32", file=sys.stderr)
            array = _room(shape, np.float32, memory)
            _fill(array, base, aligned, aggregation, layers, chunk=CHUNK)
        return array, {"windowed": aligned.windowed, "unknown": aligned.unknown}


def sentence_activations(
    model: nn.Module, tokenizer: Any, texts: Sequence[str] | Sequence[tuple[str, str]],
    pooling: str = "first", *, max_length: int | None = None, max_tokens: int | None = None,
    device: str | torch.device | None = None,
) -> np.ndarray:  # fmt: skip
    """One vector a text, or pair of texts, in every layer: float32 (layers, texts, hidden).

    ``first`` takes the classification token, wherever the tokenizer puts it (XLNet's comes last);
    ``mean`` averages over all tokens but padding, the special ones included, as sentence encoders
    do. Texts longer than `max_length` tokens, by default the model's positions, are cut, and a
    warning says how many. Raises HealingError for an unknown pooling and where ``first`` finds no
    classification token.
    """
    choose(pooling, POOLINGS, "pooling")
    with _reading(model, device) as base:
        layers = _pick_layers(base, None)
        limit = min(max_positions(base, tokenizer) or UNLIMITED, max_length or UNLIMITED)
        encoded = encode(tokenizer, texts, [0] * len(texts), limit)
        if encoded.truncated:
            said = f"{encoded.truncated} of {len(texts)} texts were cut to {limit} tokens"
            warnings.warn(said, stacklevel=2)
        counts = encoded.lengths
        starts = np.zeros_like(counts)
        if pooling == "first":
            starts, counts = classification_token(tokenizer, counts), np.ones_like(counts)
        one = np.arange(len(texts))  # a text is read as a single word
        places = (list(each[:, None]) for each in (one, starts, counts))
        aligned = Aligned(encoded, one, *places, len(one))
        array = np.empty((len(layers), len(one), base.config.hidden_size), dtype=np.float32)
        _fill(array, base, aligned, "mean", layers, max_tokens)
        return array


@contextlib.contextmanager
def _reading(model: nn.Module, device: str | torch.device | None) -> Iterator[nn.Module]:
    """The encoder without its head, inside the block in evaluation mode."""
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
    there = range(base.config.num_hidden_layers + 1)
    chosen = list(there) if layers is None else list(layers)
    if not chosen or any(layer not in there for layer in chosen):
        raise HealingError(f"layers {chosen}: need some of 0 (the embeddings) to {there[-1]}")
    return chosen


def _align(base: nn.Module, tokenizer: Any, sentences: Sequence[Sequence[str]]) -> Aligned:
    limit = max_positions(base, tokenizer)
    aligned = align(tokenizer, sentences, limit)
    if aligned.windowed:
        said = f"{aligned.windowed} of {len(sentences)} sentences are longer than the model's "
        warnings.warn(f"{said}{limit} tokens: computed in overlapping windows", stacklevel=3)
    return aligned


def _room(shape: tuple[int, ...], dtype: type, memory: int) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size <= memory:
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


def _fill(
    array: np.ndarray, base: nn.Module, aligned: Aligned, aggregation: str, layers: list[int],
    max_tokens: int | None = None, chunk: int = UNLIMITED, progress: bool = False,
) -> bool:  # fmt: skip
    """Write all words' states into `array` (layers, words, hidden); False, and no further, where
    a value is beyond the range of its float16.

    Sentences that begin in the same `chunk` words are put into batches together.
    """
    if max_tokens is None:
        max_tokens = TOKENS_CPU if base.device.type == "cpu" else TOKENS_GPU
    bar = Progress(aligned.words, "activations", unit="word") if progress else None
    lengths, chunks = aligned.windows.lengths, aligned.before // chunk
    out = torch.from_numpy(array)
    with bar or contextlib.nullcontext():
        for number in np.unique(chunks):
            windows = np.flatnonzero(chunks == number)
            for batch in batches(lengths[windows], max_tokens):
                batch = [i for i in windows[batch] if len(aligned.rows[i])]
                if not batch:
                    continue
                values = _states(base, aligned, batch, aggregation, layers).cpu()
                if out.dtype == torch.float16:
                    beyond = values.abs() > torch.finfo(out.dtype).max
                    if (beyond & values.isfinite()).any():
                        return False
                rows = np.concatenate([aligned.rows[i] for i in batch])
                out[:, torch.from_numpy(rows)] = values.to(out.dtype)
                if bar:
                    bar.update(len(rows))
    return True


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


def _states(
    base: nn.Module, aligned: Aligned, batch: list[int], aggregation: str, layers: list[int]
) -> torch.Tensor:
    """The batch's words in every layer, each the mean of its subwords that the aggregation reads,
    float32 (layers, words, hidden)."""
    lengths = [len(aligned.windows.ids[i]) for i in batch]
    longest, left = max(lengths), aligned.windows.pad[2] == "left"
    # Where each word begins once the batch is padded and laid out flat: (words,).
    starts = np.concatenate(
        [
            aligned.starts[i] + row * longest + (longest - lengths[row] if left else 0)
            for row, i in enumerate(batch)
        ]
    )
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
        hidden = output.hidden_states
        values = torch.empty(len(layers), len(offsets), hidden[0].shape[2], device=base.device)
        for layer, own in zip(layers, values, strict=True):
            states = hidden[layer].float().flatten(0, 1)
            if len(tokens) == len(offsets):  # a subword a word: no mean to take
                torch.index_select(states, 0, index, out=own)
            else:
                own.copy_(F.embedding_bag(index, states, bags, mode="mean"))
    return values
