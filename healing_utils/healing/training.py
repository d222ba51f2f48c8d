"""Fine-tuning and scoring an encoder: one legible loop.

What makes it faster than a general trainer, none of it changing the gradients:

- batches are cut from length-sorted buckets, so almost nothing is padding;
- the last layer is computed for the first token alone where the head reads no other, dropout's
  random numbers are drawn faster, and the word-embedding table holds only the rows that the task's
  ids use (`shortcuts`);
- AdamW and gradient clipping run fused, over all parameters in one call;
- weights lie in memory of their own, a CPU's memory is kept from step to step, and bfloat16 weights
  are cast once a step (`shortcuts`);
- mixed precision where the device computes it natively.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.progress import Progress
from healing_utils.healing.shortcuts import (
    LowWeights,
    cut_embeddings,
    first_token_layers,
    keep_freed_memory,
    own_memory,
    quick_dropout,
)

BUCKET = 50  # batches sorted by length together; larger pads less and shuffles less
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, unpadded.

    `ids`: one list of token ids an example; `types`: token type ids, or None where they are all
    zero; `labels`: int64 class ids or float32 targets, (examples,); `pad`: (id, type, side);
    `truncated`: how many examples were cut to the maximum length.
    """

    ids: list[list[int]]
    types: list[list[int]] | None
    labels: np.ndarray
    pad: tuple[int, int, str]
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens an example, (examples,)."""
        return np.fromiter(map(len, self.ids), dtype=np.int64, count=len(self.ids))

    @property
    def tokens(self) -> int:
        """Non-padding tokens in all examples."""
        return int(self.lengths.sum())


def encode(
    tokenizer: Any,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    labels: Sequence[float],
    max_length: int = 128,
    regression: bool = False,
) -> Encoded:
    """Tokenise sentences, or pairs of sentences, without padding; long ones are cut and counted.

    Raises HealingError when texts and labels differ in number or there are none.
    """
    if len(texts) != len(labels) or not len(texts):
        raise HealingError(
            f"got {len(texts)} texts and {len(labels)} labels: need as many, above 0"
        )
    pairs = not isinstance(texts[0], str)
    first = [t[0] for t in texts] if pairs else list(texts)
    second = [t[1] for t in texts] if pairs else None
    limit = min(max_length, tokenizer.model_max_length or max_length)
    full = tokenizer(first, second, truncation=True, max_length=limit)
    truncated = sum(bool(encoding.overflowing) for encoding in full.encodings or [])
    types = full.get("token_type_ids")
    if types is not None and not any(map(any, types)):
        types = None  # all zero is every model's default
    dtype = np.float32 if regression else np.int64
    if tokenizer.pad_token_id is None:
        raise HealingError(f"tokenizer of {tokenizer.name_or_path!r} has no padding token")
    pad = (tokenizer.pad_token_id, tokenizer.pad_token_type_id, tokenizer.padding_side)
    return Encoded(full["input_ids"], types, np.asarray(labels, dtype=dtype), pad, truncated)


def _encoded(data: Any, model: nn.Module, tokenizer: Any, max_length: int) -> Encoded:
    """Accept what `encode` made, an object with `texts` and `labels`, or `text`/`label` columns.

    Raises HealingError where an example is longer than what the model reads.
    """
    if not isinstance(data, Encoded):
        texts, labels = _texts_and_labels(data)
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        data = encode(tokenizer, texts, labels, max_length, _is_regression(model))
    limit, longest = position_limit(model), int(data.lengths.max())
    if limit is not None and longest > limit:
        raise HealingError(
            f"an example has {longest} tokens, but {type(model).__name__} reads {limit} at most: "
            f"lower max_length to at most {limit}"
        )
    return data


def _texts_and_labels(data: Any) -> tuple[Sequence[Any], Sequence[float]]:
    texts, labels = getattr(data, "texts", None), getattr(data, "labels", None)
    if texts is not None and labels is not None:
        return texts, labels
    try:
        return list(data["text"]), list(data["label"])
    except (KeyError, TypeError, IndexError) as error:
        raise HealingError(
            f"cannot train on {type(data).__name__}: need texts and labels, or columns "
            "'text' and 'label', or what healing_utils.healing.training.encode returns"
        ) from error


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


def _is_regression(model: nn.Module) -> bool:
    return model.config.num_labels == 1


def collate(data: Encoded, rows: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
    """Pad `rows` to their longest: tensors of shape (rows, longest)."""
    pad_id, pad_type, side = data.pad
    ids = [data.ids[i] for i in rows]
    longest = max(map(len, ids))

    def table(lists: list[list[int]], fill: int) -> torch.Tensor:
        out = np.full((len(lists), longest), fill, dtype=np.int64)
        for row, values in zip(out, lists, strict=True):
            if side == "left":
                row[longest - len(values) :] = values
            else:
                row[: len(values)] = values
        return torch.from_numpy(out).to(device, non_blocking=True)

    batch = {"input_ids": table(ids, pad_id)}
    if min(map(len, ids)) < longest:  # without padding no mask: the attention kernel is faster
        batch["attention_mask"] = table([[1] * len(x) for x in ids], 0)
    if data.types is not None:
        batch["token_type_ids"] = table([data.types[i] for i in rows], pad_type)
    return batch


def _epoch(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffled batches of example indices; within a bucket of batches, lengths are alike."""
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * BUCKET):
        bucket = order[start : start + batch_size * BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batches_of(lengths: np.ndarray, epochs: float, batch_size: int, seed: int) -> list[np.ndarray]:
    """The example indices of every step of a training, given the tokens of every example."""
    steps = max(1, round(epochs * math.ceil(len(lengths) / batch_size)))
    rng, batches = np.random.default_rng(seed), []
    while len(batches) < steps:
        batches += _epoch(lengths, batch_size, rng)
    return batches[:steps]


def moments(steps: int, evaluations: int) -> list[int]:
    """The steps after which a learning curve has a point, at most `evaluations`, the last step
    among them. Their distances grow, from one moment to the next by as much: most healing is done
    early, and a time to heal is known as well as its moments lie close."""
    found = {round(steps * ((i + 1) / evaluations) ** 2) for i in range(evaluations)}
    return sorted(found - {0})


def _probe_rows(lengths: np.ndarray) -> np.ndarray:
    """A few short examples whose batch has padding where any batch has."""
    order = np.argsort(lengths, kind="stable")
    longer = int(np.searchsorted(lengths[order], lengths[order[0]], side="right"))
    return order[np.unique([0, len(order) // 2, min(longer, len(order) - 1)])]


def _by_budget(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Cut a batch into micro-batches of at most `max_tokens` tokens, padding included."""
    size = max(1, max_tokens // int(lengths[rows].max()))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, or the GPU where there is one, else the CPU. Raises HealingError for one that is
    unknown or not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise HealingError(f"unknown device {device!r}; such as cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HealingError(f"device is '{device}' but torch sees no GPU here")
    return device


def pick_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto``: bfloat16 where the GPU computes it natively, else float16, on CPU float32.

    A T4 emulates bfloat16, slowly, so support alone is not the question. On a CPU without matrix
    units for bfloat16 it is slower than float32.
    """
    choose(precision, PRECISIONS, "precision")
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "float32"
    native = torch.cuda.get_device_capability(device)[0] >= 8
    return "bfloat16" if native else "float16"


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's random numbers from `seed` inside; the caller's generators untouched outside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # Not torch.manual_seed: it seeds every GPU too.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """The states of the generators that a step on `device` may draw from."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _restore_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def _clip_divisor(parameters: list[nn.Parameter], low: LowWeights, max_norm: float) -> torch.Tensor:
    """What to divide the gradients by so that their norm is at most `max_norm`; at least 1."""
    others = [p.grad for p in parameters if p.grad is not None and p not in low.gradients]
    norm = nn.utils.get_total_norm(others, foreach=True)
    if low.gradients:
        norm = torch.hypot(norm, low.norm())
    return (norm / max_norm).clamp_(min=1.0)


def _parameter_groups(
    model: nn.Module, weight_decay: float, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """By decay and rate. Biases and normalisation weights do not decay (Devlin et al. 2019,
    appendix A.2)."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith("bias")
            groups.setdefault((decays, rates.get(name, 1.0)), []).append(parameter)
    return [
        {"params": found, "weight_decay": weight_decay if decays else 0.0, "factor": factor}
        for (decays, factor), found in groups.items()
        if found
    ]


@dataclass
class Training:
    """What `fine_tune` did.

    `losses`: mean training loss of every step; `curve`: rows of step and validation scores;
    `tokens`: non-padding tokens trained on; `seconds`: time in steps, scoring left out.
    """

    steps: int
    losses: list[float]
    curve: list[dict[str, float]]
    tokens: int
    seconds: float
    precision: str
    device: str
    threads: int
    max_tokens: int
    skipped_steps: int = 0
    shortcut: str = "nothing"  # which layers' arithmetic was shortened, see `shortcuts`
    settings: dict[str, Any] = field(default_factory=dict)


class Diverged(HealingError):
    """The loss is no longer finite. `training` is what was done until then."""

    def __init__(self, message: str, training: Training):
        super().__init__(message)
        self.training = training


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def fine_tune(
    model: nn.Module,
    train: Any,
    validation: Any = None,
    *,
    tokenizer: Any = None,
    epochs: float = 2,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    max_grad_norm: float = 1.0,
    max_length: int = 128,
    max_tokens: int = 8192,
    evaluations: int = 4,
    seed: int = 0,
    device: str | torch.device | None = None,
    precision: str = "auto",
    rates: Mapping[str, float] | None = None,
    objective: Callable[[dict[str, torch.Tensor], np.ndarray], torch.Tensor] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    progress: bool = True,
) -> Training:
    """Fine-tune every parameter of `model` that requires a gradient, in place.

    `train` and `validation` are what `encode` returns, or hold texts and labels. `epochs` may be a
    fraction; `warmup` is the fraction of steps with a rising learning rate, which then falls
    linearly to zero. A batch of more than `max_tokens` tokens is computed in parts, with the same
    gradient; out of memory, the parts are halved and the step is done again. `validation` is scored
    before the first step and at `evaluations` further `moments`; nothing is chosen on it. `rates`
    are factors of the learning rate by parameter name, 1 where there is none. `objective` replaces
    the task's loss: called with a batch and its rows of `train`, it gives the sum over the
    examples. The same seed on the same machine with the same number of threads gives the same
    weights, bit for bit, on a CPU.

    Raises HealingError on settings out of range, and Diverged when the loss is no longer finite.
    """
    for name, value, low in [
        ("epochs", epochs, 0), ("batch_size", batch_size, 0), ("learning_rate", learning_rate, 0),
        ("max_tokens", max_tokens, 0),
    ]:  # fmt: skip
        if not value > low:
            raise HealingError(f"{name} is {value}: must be above {low}")
    if not 0 <= warmup <= 1:
        raise HealingError(f"warmup is {warmup}: must be a fraction of the steps, from 0 to 1")
    train = _encoded(train, model, tokenizer, max_length)
    if validation is not None:
        validation = _encoded(validation, model, tokenizer, max_length)
    device = pick_device(device)
    precision = pick_precision(precision, device)
    model.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    regression = _is_regression(model)
    lengths = train.lengths
    batches = batches_of(lengths, epochs, batch_size, seed)
    steps = len(batches)
    evaluate_at = moments(steps, evaluations)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    autocast = torch.autocast(
        device.type, dtype=getattr(torch, precision), enabled=precision != "float32"
    )

    def rate(step: int) -> float:
        warm = warmup * steps
        if step < warm:
            return learning_rate * (step + 1) / (warm + 1)
        return learning_rate * max(0.0, (steps - step) / max(1.0, steps - warm))

    def forward_backward(rows: np.ndarray) -> torch.Tensor:
        """Gradient of the mean loss over `rows`; returns that loss, on the device."""
        total = torch.zeros((), device=device)
        for part in _by_budget(rows, lengths, max_tokens):
            batch = collate(train, part, device)
            with autocast:
                if objective is None:
                    labels = torch.from_numpy(train.labels[part]).to(device)
                    loss = _loss(model(**batch).logits.float(), labels, regression)
                else:
                    loss = objective(batch, part)
            loss = loss / len(rows)
            scaler.scale(loss).backward()
            low.collect()
            total += loss.detach()
        return total

    done = Training(
        steps, [], [], 0, 0.0, precision, str(device), torch.get_num_threads(), max_tokens
    )
    others = [validation] if validation is not None else []
    bar = Progress(steps, "fine-tuning", unit="step") if progress and on_step is None else None
    losses: list[torch.Tensor] = []
    with (
        bar or contextlib.nullcontext(),
        seeded(seed, device),
        quick_dropout(model),
        contextlib.ExitStack() as shortened,
    ):
        # An objective of its own may read any token of any layer, ids that are not in `train`, and
        # the weights themselves.
        cut = {"decay": 1.0}
        if objective is None:
            cut = shortened.enter_context(cut_embeddings(model, train, *others))
        parameters = [p for p in model.parameters() if p.requires_grad]
        if device.type == "cpu":
            own_memory(parameters)
        if objective is None:
            some = collate(train, _probe_rows(lengths), device)
            done.shortcut = shortened.enter_context(first_token_layers(model, some))
        table = model.get_input_embeddings().weight
        groups = _parameter_groups(model, weight_decay, rates or {})
        table_rate = next((g["factor"] for g in groups for p in g["params"] if p is table), 1.0)
        halved = torch.bfloat16 if precision == "bfloat16" and objective is None else None
        low = shortened.enter_context(LowWeights(model, halved, groups))
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
        if validation is not None:
            with low.away():
                done.curve.append({"step": 0, **evaluate(model, validation, device=device)})
        model.train()
        start = time.perf_counter()
        for step, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * group["factor"]
            random_state = _random_state(device)
            while True:
                try:
                    losses.append(forward_backward(rows))
                    break
                except RuntimeError as error:
                    if not _is_out_of_memory(error) or max_tokens <= int(lengths[rows].max()):
                        raise
                # Outside of the except block, whose error holds on to the memory.
                max_tokens //= 2  # same batch, same gradient, in smaller parts
                optimizer.zero_grad(set_to_none=True)
                low.clear()
                _restore_random_state(random_state, device)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            before = scaler.get_scale()
            if scaler.is_enabled():
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, max_grad_norm, foreach=True)
            else:  # the fused optimizer divides as it goes: one pass over the gradients less
                optimizer.grad_scale = _clip_divisor(parameters, low, max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            low.refresh()
            if scaler.get_scale() < before:  # float16 overflowed: the optimizer did not step
                done.skipped_steps += 1
            else:
                cut["decay"] *= 1 - rate(step) * table_rate * weight_decay
            optimizer.zero_grad(set_to_none=True)
            low.clear()
            done.tokens += int(lengths[rows].sum())
            if (step + 1) % 20 == 0 or step + 1 == steps:  # reading a loss waits for the device
                latest = losses[-1].item()
                if not math.isfinite(latest):
                    first = step
                    while first and not math.isfinite(losses[first - 1].item()):
                        first -= 1
                    done.steps = step + 1
                    done.losses = torch.stack(losses[:first]).tolist() if first else []
                    model.eval()
                    raise Diverged(
                        f"the loss is {losses[first].item()} at step {first + 1} of {steps} "
                        f"(learning rate {learning_rate}, precision {precision}): "
                        "the model cannot be trained so",
                        done,
                    )
                if on_step:
                    on_step(step + 1, steps, latest)
                if bar:
                    bar.update(step + 1 - bar.done, note=f"loss {latest:.3f}")
            if validation is not None and step + 1 in evaluate_at:
                done.seconds += time.perf_counter() - start
                with low.away():
                    scores = evaluate(model, validation, device=device)
                done.curve.append({"step": step + 1, **scores})
                model.train()
                start = time.perf_counter()
        done.seconds += time.perf_counter() - start
    done.losses = torch.stack(losses).tolist()
    done.max_tokens = max_tokens
    model.eval()
    return done


def _loss(logits: torch.Tensor, labels: torch.Tensor, regression: bool) -> torch.Tensor:
    """Sum over the batch of cross-entropy, or of squared error for regression."""
    if regression:
        return F.mse_loss(logits.squeeze(-1), labels, reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum")


@torch.inference_mode()
def predict(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    max_length: int = 128,
    max_tokens: int = 8192,
    device: str | torch.device | None = None,
) -> np.ndarray:
    """Logits in float32, (examples, classes), in the order of `data`; computed sorted by length."""
    data = _encoded(data, model, tokenizer, max_length)
    device = pick_device(device)
    model.to(device).eval()
    lengths = data.lengths
    order = np.argsort(lengths, kind="stable")
    out: np.ndarray | None = None
    start = 0
    while start < len(order):
        # Sorted upwards: the last row of a batch is its longest.
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= max_tokens // 4:
            stop += 1
        rows = order[start:stop]
        logits = model(**collate(data, rows, device)).logits.float().cpu().numpy()
        if out is None:
            out = np.empty((len(order), logits.shape[1]), dtype=np.float32)
        out[rows] = logits
        start = stop
    return out


def evaluate(model: nn.Module, data: Any, **settings: Any) -> dict[str, float]:
    """Score `model` on `data`: ``f1`` (macro), ``accuracy``, ``matthews``, ``loss`` for
    classification; ``spearman``, ``loss`` for regression. Settings are those of `predict`.

    A model whose logits are not finite is scored on what argmax makes of them, and the share of
    such examples stands under ``not_finite``.
    """
    data = _encoded(data, model, settings.pop("tokenizer", None), settings.get("max_length", 128))
    return grade(predict(model, data, **settings), data.labels)


def grade(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What `evaluate` returns, of logits (examples, classes) and labels (examples,)."""
    finite = np.isfinite(logits).all(axis=1)
    scores = score(logits, labels)
    tensor = torch.from_numpy(np.nan_to_num(logits))
    regression = labels.dtype.kind == "f"
    scores["loss"] = _loss(tensor, torch.from_numpy(labels), regression).item() / len(labels)
    if not finite.all():
        scores["not_finite"] = float(1 - finite.mean())
    return scores


def answers(logits: np.ndarray) -> np.ndarray:
    """The class that `score` takes for the answer, (examples,), the lower one where two tie."""
    return np.nan_to_num(logits, nan=-np.inf).argmax(axis=1)


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of `logits` (examples, classes) against `labels` (examples,), each from scikit-learn
    or scipy. Macro-F1 averages over the classes that occur in the labels or the answers."""
    if labels.dtype.kind == "f":
        from scipy.stats import spearmanr

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant answers have no rank correlation: 0 here
            value = spearmanr(logits[:, 0], labels).statistic
        return {"spearman": 0.0 if math.isnan(value) else float(value)}
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    said = answers(logits)
    return {
        "f1": float(f1_score(labels, said, average="macro")),
        "accuracy": float(accuracy_score(labels, said)),
        "matthews": float(matthews_corrcoef(labels, said)),
    }


def majority_scores(labels: np.ndarray) -> dict[str, float]:
    """What answering the most frequent label of `labels` scores: the chance level."""
    if labels.dtype.kind == "f":
        return {"spearman": 0.0}
    classes = int(labels.max()) + 1
    logits = np.zeros((len(labels), classes), dtype=np.float32)
    logits[:, np.bincount(labels).argmax()] = 1
    return score(logits, labels)
