"""Masked language modelling of the organism, resumable to the bit.

Every random number of a step comes from the pair (seed, step), and the order of the batches from
(seed, epoch). A run that is killed at any moment and started again therefore ends with the same
weights as one that was not, at the same number of threads.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import random
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from healing_utils.base.errors import HealingError
from healing_utils.base.progress import Progress
from healing_utils.base.records import write_atomically

from . import raw_text, tokenizer

SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256,
    "max_position_embeddings": 64,
    # BERT's 0.02 for 768 units, at this width: 0.02 * sqrt(768 / 64). With 0.02 a narrow network's
    # attention starts out writing next to nothing, and context is learnt many times more slowly.
    "initializer_range": 0.07,
}  # fmt: skip
RATE = {"peak": 2e-3, "warm_up": 0.06, "weight_decay": 0.01}  # of AdamW
MASKED = 0.3  # of a sentence's tokens; of these 80 % become [MASK], 10 % any piece, 10 % stay
IGNORED = -100  # cross-entropy's own mark for positions without a target


def batches(lengths: list[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of sentence numbers of one epoch: every batch of one length, so without padding."""
    shuffle = random.Random(f"order {seed} {epoch}").shuffle
    found = []
    length = lengths.__getitem__
    for _, group in groupby(sorted(range(len(lengths)), key=length), length):
        numbers = list(group)
        shuffle(numbers)
        found += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    shuffle(found)
    return found


def mask(ids: torch.Tensor, vocabulary_size: int, mask_id: int, generator: torch.Generator):
    """Masked copy of `ids` (sentences, tokens) and targets, IGNORED outside the masked positions.

    Every sentence gets the same number of masked positions; [CLS] and [SEP] are never masked.
    """
    sentences, tokens = ids.shape
    count = max(1, round(MASKED * (tokens - 2)))
    order = torch.rand(sentences, tokens - 2, generator=generator).argsort(dim=1)
    place = order[:, :count] + 1  # (sentences, count)
    truth = ids.gather(1, place)
    fate = torch.rand(sentences, count, generator=generator)
    other = torch.randint(5, vocabulary_size, (sentences, count), generator=generator)
    shown = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, other, truth))
    return ids.scatter(1, place, shown), torch.full_like(ids, IGNORED).scatter(1, place, truth)


def masked_loss(model, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats; the output layer runs at the masked positions only."""
    hidden = model.bert(input_ids=ids).last_hidden_state  # (sentences, tokens, hidden)
    chosen = targets != IGNORED
    return functional.cross_entropy(model.cls(hidden[chosen]), targets[chosen])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over a fraction of the steps, then linear decay to zero."""
    rise = max(1, round(RATE["warm_up"] * steps))
    return RATE["peak"] * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def pretrain(
    out: str | Path, steps: int = 8000, batch_size: int = 64, seed: int = 0, threads: int = 1, *,
    sentences: int = 100_000, checkpoint_every: int = 200,
) -> dict[str, Any]:  # fmt: skip
    """Train the organism from random values and save model and tokenizer in the folder `out`.

    `sentences` raw sentences are gone through again and again, masked anew each time. While it
    trains, `out/checkpoint.pt` holds what is needed to go on; calling again with the same arguments
    does so. Returns what `out/training.json` records. Raises HealingError when `out` holds a
    checkpoint of another plan."""
    from transformers import BertConfig, BertForMaskedLM

    Path(out).mkdir(parents=True, exist_ok=True)
    checkpoint = Path(out) / "checkpoint.pt"
    plan = {
        "steps": steps, "batch_size": batch_size, "seed": seed, "threads": threads,
        "sentences": sentences, **RATE, "masked": MASKED, "shape": SHAPE,
    }  # fmt: skip
    torch.set_num_threads(threads)
    words = tokenizer()
    encoded = words(list(raw_text(sentences, seed)))["input_ids"]
    lengths = list(map(len, encoded))
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(words), pad_token_id=words.pad_token_id, **SHAPE)
    model = BertForMaskedLM(config).eval()  # no dropout: the text is unlimited
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": RATE["weight_decay"]}, {"params": vectors}],
        lr=RATE["peak"], betas=(0.9, 0.98), weight_decay=0.0, fused=True,
    )  # fmt: skip
    start, recent = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if different := [name for name in plan if saved["plan"].get(name) != plan[name]]:
            raise HealingError(
                f"{checkpoint} belongs to a pre-training with another {' and '.join(different)}; "
                "finish that one, or choose another folder"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, recent = saved["step"], saved["recent"]

    per_epoch = len(batches(lengths, batch_size, seed, 0))
    epoch, order = -1, []
    with Progress(steps, "pre-training", unit="step") as bar:
        bar.update(start)
        for step in range(start, steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = batches(lengths, batch_size, seed, epoch)
            ids = torch.tensor([encoded[number] for number in order[step % per_epoch]])
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            shown, targets = mask(ids, len(words), words.mask_token_id, generator)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            loss = masked_loss(model, shown, targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recent = loss.item() if step == 0 else 0.99 * recent + 0.01 * loss.item()
            bar.update(1, note=f"loss {recent:.3f}")
            if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                content = io.BytesIO()
                states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({"plan": plan, **states, "step": step + 1, "recent": recent}, content)
                write_atomically(checkpoint, content.getvalue())

    # The checkpoint goes last: a run that is killed while it saves comes back here.
    model.save_pretrained(out)
    words.save_pretrained(out)
    weights = (Path(out) / "model.safetensors").read_bytes()
    record = {
        **plan, "loss": round(recent, 4), "parameters": model.num_parameters(),
        "python": platform.python_version(), "torch": torch.__version__.partition("+")[0],
        "sha256": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip
    write_atomically(Path(out) / "training.json", json.dumps(record, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    return record
