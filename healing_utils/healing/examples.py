"""Tokenised examples, and the batches that they are cut into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from healing_utils.base.errors import HealingError
from healing_utils.healing.models import load_tokenizer

BUCKET = 50  # batches sorted by length together; larger pads less and shuffles less
NOTED = 200  # texts that `reading_note` looks at
UNKNOWN = 0.2  # share of the pieces from which on it speaks; below these letters a piece, too
CASED, UNCASED = 2.2, 0.8


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, unpadded."""

    ids: list[list[int]]  # token ids, a list an example
    types: list[list[int]] | None  # token type ids, None where they are all zero
    labels: np.ndarray  # int64 class ids or float32 targets, (examples,)
    pad: tuple[int, int, str]  # id, type, side
    truncated: int = 0  # how many examples were cut to the maximum length

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def highest(self) -> tuple[int, int]:
        """The highest token id and token type."""
        first, second = map(chain.from_iterable, (self.ids, self.types or []))
        return max(first, default=0), max(second, default=0)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens an example, (examples,)."""
        return np.fromiter(map(len, self.ids), dtype=np.int64, count=len(self.ids))

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def encode(
    tokenizer: Any, texts: Sequence[str] | Sequence[tuple[str, str]], labels: Sequence[float],
    max_length: int = 128, regression: bool = False,
) -> Encoded:  # fmt: skip
    """Tokenise sentences, or pairs of sentences, without padding; long ones are cut and counted."""
    if len(texts) != len(labels) or not len(texts):
        raise HealingError(f"got {len(texts)} texts and {len(labels)} labels: need as many")
    if tokenizer.pad_token_id is None:
        raise HealingError(f"tokenizer of {tokenizer.name_or_path!r} has no padding token")
    columns = [texts] if isinstance(texts[0], str) else zip(*texts, strict=True)
    limit = min(max_length, tokenizer.model_max_length or max_length)
    columns = list(map(list, columns))
    if limit <= (special := tokenizer.num_special_tokens_to_add(len(columns) > 1)):
        raise HealingError(f"max_length {limit} leaves no place beside {special} special tokens")
    full = tokenizer(*columns, truncation=True, max_length=limit)
    if full.encodings is not None:
        truncated = sum(bool(encoding.overflowing) for encoding in full.encodings)
    else:  # tokenizers in Python do not say
        whole = tokenizer(*columns, verbose=False)["input_ids"]
        truncated = sum(len(ids) > limit for ids in whole)
    types = full.get("token_type_ids")
    if types is not None and not any(map(any, types)):
        types = None  # all zero is every model's default
    labels = np.asarray(labels)
    if labels.dtype.kind not in ("biuf" if regression else "biu"):
        need = "numbers" if regression else "whole numbers, the classes' ids"
        raise HealingError(f"labels are of type {labels.dtype}: need {need}")
    labels = labels.astype(np.float32 if regression else np.int64)
    pad = (tokenizer.pad_token_id, tokenizer.pad_token_type_id, tokenizer.padding_side)
    return Encoded(full["input_ids"], types, labels, pad, truncated)


def as_encoded(
    data: Any, model: nn.Module, tokenizer: Any, max_length: int, labelled: bool = False
) -> Encoded:
    """Of what `encode` made or columns `text` and `label`. Raises HealingError where the model
    cannot read an example: it is longer than its positions, has a token or a token type beyond its
    tables or, where it is `labelled`, a class beyond its head."""
    if not isinstance(data, Encoded):
        try:
            texts, labels = list(data["text"]), list(data["label"])
        except (KeyError, TypeError, IndexError) as error:
            kind = type(data).__name__
            raise HealingError(f"{kind} has no columns 'text' and 'label'") from error
        if tokenizer is None:
            tokenizer = load_tokenizer(model.name_or_path)
        data = encode(tokenizer, texts, labels, max_length, model.config.num_labels == 1)
    kind, config, (token, token_type) = type(model).__name__, model.config, data.highest
    limit, longest = position_limit(model), int(data.lengths.max())
    types = getattr(config, "type_vocab_size", 0) or 0  # without any, they are passed over
    wrong = {
        f"an example has {longest} tokens, but {kind} reads {limit} at most: lower max_length to "
        f"at most {limit}": limit is not None and longest > limit,
        f"an example has the token {token}, but {kind} has embeddings for {config.vocab_size}: the "
        "tokenizer is another model's": token >= config.vocab_size,
        f"an example has the token type {token_type}, but {kind} knows {types}: it cannot tell the "
        "two texts of a pair apart": 0 < types <= token_type,
    }
    if labelled and data.labels.dtype.kind == "i":
        for label in (int(data.labels.min()), int(data.labels.max())):
            said = f"label {label} is none of {kind}'s {config.num_labels} classes"
            wrong[said] = not 0 <= label < config.num_labels
    if said := [message for message, holds in wrong.items() if holds]:
        raise HealingError(said[0])
    return data


def reading_note(tokenizer: Any, texts: Sequence[str] | Sequence[tuple[str, str]]) -> str:
    """What to say where a tokenizer's vocabulary is not made for `texts`, else nothing: of the
    first of them, in how many pieces it reads how many words, and the share that it does not know.
    Letters without a case (Chinese) may be pieces of their own."""
    some = [t for text in texts[:NOTED] for t in ([text] if isinstance(text, str) else text)]
    ids = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = sum(map(len, ids))
    unknown = sum(row.count(tokenizer.unk_token_id) for row in ids) / pieces if pieces else 1.0
    letters = "".join("".join(some).split())
    cased = sum(letter.lower() != letter.upper() for letter in letters) > len(letters) / 2
    if unknown < UNKNOWN and len(letters) >= pieces * (CASED if cased else UNCASED):
        return ""
    words = sum(len(text.split()) for text in some)
    return (
        f"{pieces:,} pieces for {words:,} words, {unknown:.0%} of them unknown: its vocabulary is "
        "not made for these texts"
    )


def position_limit(model: nn.Module) -> int | None:
    """The most tokens, special ones included, for which the model has positions; None for any
    number. RoBERTa and MPNet count theirs from behind the padding id, which costs them two."""
    base = getattr(model, "base_model", model)
    positions = getattr(base.config, "max_position_embeddings", None) or -1
    if positions < 0:  # XLNet's are relative
        return None
    tables = (m for n, m in base.named_modules() if n.endswith("position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)
    return positions if padding is None else positions - padding - 1


def collate(data: Encoded, rows: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
    """Pad `rows` to their longest: tensors of shape (rows, longest)."""
    pad_id, pad_type, side = data.pad
    ids = [data.ids[i] for i in rows]
    longest = max(map(len, ids))

    def table(lists: list[list[int]], fill: int) -> torch.Tensor:
        out = np.full((len(lists), longest), fill, dtype=np.int64)
        for row, values in zip(out, lists, strict=True):
            start = longest - len(values) if side == "left" else 0
            row[start : start + len(values)] = values
        return torch.from_numpy(out).to(device, non_blocking=True)

    batch = {"input_ids": table(ids, pad_id)}
    if min(map(len, ids)) < longest:  # without padding no mask: the attention kernel is faster
        batch["attention_mask"] = table([[1] * len(x) for x in ids], 0)
    if data.types is not None:
        batch["token_type_ids"] = table([data.types[i] for i in rows], pad_type)
    return batch


def batches_of(lengths: np.ndarray, epochs: float, batch_size: int, seed: int) -> list[np.ndarray]:
    """The example indices of every step: shuffled, but within a bucket of batches lengths are
    alike."""
    steps = max(1, round(epochs * math.ceil(len(lengths) / batch_size)))
    rng, found = np.random.default_rng(seed), []
    while len(found) < steps:
        order, batches = rng.permutation(len(lengths)), []
        for start in range(0, len(order), batch_size * BUCKET):
            bucket = order[start : start + batch_size * BUCKET]
            bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
            batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        found += [batches[i] for i in rng.permutation(len(batches))]
    return found[:steps]
