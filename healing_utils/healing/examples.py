"""Tokenised examples, and the batches that they are cut into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from healing_utils.base.errors import HealingError

BUCKET = 50  # batches sorted by length together; larger pads less and shuffles less


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
    full = tokenizer(*map(list, columns), truncation=True, max_length=limit)
    truncated = sum(bool(encoding.overflowing) for encoding in full.encodings or [])
    types = full.get("token_type_ids")
    if types is not None and not any(map(any, types)):
        types = None  # all zero is every model's default
    labels = np.asarray(labels, dtype=np.float32 if regression else np.int64)
    pad = (tokenizer.pad_token_id, tokenizer.pad_token_type_id, tokenizer.padding_side)
    return Encoded(full["input_ids"], types, labels, pad, truncated)


def as_encoded(data: Any, model: nn.Module, tokenizer: Any, max_length: int) -> Encoded:
    """Of what `encode` made or columns `text` and `label`; HealingError where an example is longer
    than what the model reads."""
    if not isinstance(data, Encoded):
        try:
            texts, labels = list(data["text"]), list(data["label"])
        except (KeyError, TypeError, IndexError) as error:
            kind = type(data).__name__
            raise HealingError(f"{kind} has no columns 'text' and 'label'") from error
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        data = encode(tokenizer, texts, labels, max_length, model.config.num_labels == 1)
    limit, longest = position_limit(model), int(data.lengths.max())
    if limit is not None and longest > limit:
        raise HealingError(
            f"an example has {longest} tokens, but {type(model).__name__} reads {limit} at most: "
            f"lower max_length to at most {limit}"
        )
    return data


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
