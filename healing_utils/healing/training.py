"""Fine-tuning and scoring an encoder: one legible loop, fast by the `shortcuts`."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.progress import Progress
from healing_utils.healing import shortcuts
from healing_utils.healing.encoders import parse_seed
from healing_utils.healing.examples import Encoded as Encoded
from healing_utils.healing.examples import as_encoded, batches_of, collate
from healing_utils.healing.examples import encode as encode
from healing_utils.healing.examples import position_limit as position_limit
from healing_utils.healing.models import seeded

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, or the GPU where there is one, else the CPU."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise HealingError(f"unknown device {device!r}; such as cpu, cuda or cuda:1") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise HealingError(f"device is '{found}' but torch sees no GPU here")
    return found


def pick_precision(precision: str, device: torch.device) -> str:
    """Of ``auto``: on a GPU bfloat16 where it is native, else float16; on a CPU float32."""
    if choose(precision, PRECISIONS, "precision") != "auto":
        return precision
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"


@dataclass
class Training:
    """What `fine_tune` did."""

    steps: int
    losses: list[float]  # the mean training loss of every step
    curve: list[dict[str, float]]  # step and validation scores
    tokens: int  # trained on, padding left out
    precision: str
    max_tokens: int
    skipped_steps: int = 0
    shortcut: str = "nothing"  # see `shortcuts.first_token_layers`


class Diverged(HealingError):
    """The loss is no longer finite. `training` is what was done until then."""

    def __init__(self, message: str, training: Training):
        super().__init__(message)
        self.training = training


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


def _probe_rows(lengths: np.ndarray) -> np.ndarray:
    """A few short examples whose batch has padding where any batch has."""
    order = np.argsort(lengths, kind="stable")
    longer = int(np.searchsorted(lengths[order], lengths[order[0]], side="right"))
    return order[np.unique([0, len(order) // 2, min(longer, len(order) - 1)])]


def fine_tune(
    model: nn.Module, train: Any, validation: Any = None, *, tokenizer: Any = None,
    epochs: float = 2, batch_size: int = 32, learning_rate: float = 5e-5,
    weight_decay: float = 0.01, warmup: float = 0.1, max_grad_norm: float = 1.0,
    max_length: int = 128, max_tokens: int = 8192, evaluations: int = 4, seed: int = 0,
    device: str | torch.device | None = None, precision: str = "auto",
    rates: Mapping[str, float] | None = None,
    objective: Callable[[dict[str, torch.Tensor]], torch.Tensor] | None = None,
    on_step: Callable[[int, int, float], None] | None = None, progress: bool = True,
) -> Training:  # fmt: skip
    """Fine-tune every parameter of `model` that requires a gradient, in place, in float32.

    `train` and `validation` are what `encode` returns, or columns `text` and `label`; `epochs` may
    be a fraction. In the fraction `warmup` of the steps the learning rate rises, then it falls
    linearly to zero. A batch of more than `max_tokens` tokens is computed in parts, with the same
    gradient; out of memory, the parts are halved. `validation` is scored before the first step and
    `evaluations` times later; nothing is chosen on it. `rates` are factors of the learning rate by
    parameter name. `objective` replaces the task's loss: of a batch, the sum over its examples. On
    a CPU the same seed and number of threads give the same weights, bit for bit.

    Raises HealingError on settings out of range, and Diverged when the loss is no longer finite."""
    positive = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    for name, value in {**positive, "max_tokens": max_tokens}.items():
        if not value > 0:
            raise HealingError(f"{name} is {value}: must be above 0")
    if not 0 <= warmup <= 1:
        raise HealingError(f"warmup is {warmup}: must be a fraction of the steps, from 0 to 1")
    seed, own_loss = parse_seed(seed), objective is None
    train = as_encoded(train, model, tokenizer, max_length, labelled=own_loss)
    if validation is not None:
        validation = as_encoded(validation, model, tokenizer, max_length, labelled=True)
    device = pick_device(device)
    precision = pick_precision(precision, device)
    cuda = device.type == "cuda"
    model.to(device, torch.float32).zero_grad(set_to_none=True)  # small steps vanish in halves
    lengths = train.lengths
    batches = batches_of(lengths, epochs, batch_size, seed)
    steps = len(batches)
    # From one look to the next by as much longer: most healing is done early.
    looks = {round(steps * ((i + 1) / evaluations) ** 2) for i in range(evaluations)}
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    autocast = torch.autocast(
        device.type, dtype=getattr(torch, precision), enabled=precision != "float32"
    )
    done = Training(steps, [], [], 0, precision, max_tokens)
    losses: list[torch.Tensor] = []

    def rate(step: int) -> float:
        warm = warmup * steps
        if step < warm:
            return learning_rate * (step + 1) / (warm + 1)
        return learning_rate * max(0.0, (steps - step) / max(1.0, steps - warm))

    def forward_backward(rows: np.ndarray) -> torch.Tensor:
        """Gradient of the mean loss over `rows`; returns that loss, on the device."""
        total = torch.zeros((), device=device)
        size = max(1, done.max_tokens // int(lengths[rows].max()))  # padding included
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = collate(train, part, device)
            with autocast:
                if objective is None:
                    labels = torch.from_numpy(train.labels[part]).to(device)
                    loss = _loss(model(**batch).logits.float(), labels)
                else:
                    loss = objective(batch)
            loss = loss / len(rows)
            scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def add_point(step: int) -> None:
        if validation is not None:
            low.put(False)
            done.curve.append({"step": step, **evaluate(model, validation, device=device)})
            low.put(True)
            model.train()

    with contextlib.ExitStack() as within:
        if progress and on_step is None:
            bar = within.enter_context(Progress(steps, "fine-tuning", unit="step"))

            def on_step(step: int, _: int, loss: float) -> None:
                bar.update(step - bar.done, note=f"loss {loss:.3f}")

        within.enter_context(seeded(seed, device))
        within.enter_context(shortcuts.quick_dropout(model))
        cut, halved = {"decay": 1.0}, None
        # An objective of its own may read any token of any layer, ids that are not in `train`, and
        # the weights themselves.
        if objective is None:
            used = {train.pad[0]}.union(*train.ids, *(validation.ids if validation else ()))
            cut = within.enter_context(shortcuts.cut_embeddings(model, used))
            halved = torch.bfloat16 if precision == "bfloat16" else None
        parameters = [p for p in model.parameters() if p.requires_grad]
        if device.type == "cpu":
            shortcuts.keep_freed_memory()
            shortcuts.own_memory(parameters)
        if objective is None:
            some = collate(train, _probe_rows(lengths), device)
            done.shortcut = within.enter_context(shortcuts.first_token_layers(model, some))
        table = model.get_input_embeddings().weight
        groups = _parameter_groups(model, weight_decay, rates or {})
        table_rate = next((g["factor"] for g in groups for p in g["params"] if p is table), 1.0)
        low = within.enter_context(shortcuts.LowWeights(model, halved, groups))
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
        model.train()
        add_point(0)
        for step, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * group["factor"]
            states = torch.get_rng_state(), cuda and torch.cuda.get_rng_state(device)
            while True:
                try:
                    losses.append(forward_backward(rows))
                    break
                except RuntimeError as error:
                    memory = isinstance(error, torch.OutOfMemoryError)
                    memory = memory or "can't allocate memory" in str(error)  # on a CPU
                    if not memory or done.max_tokens <= int(lengths[rows].max()):
                        raise
                # Outside of the except block, whose error holds on to the memory.
                done.max_tokens //= 2  # same batch, same gradient, in smaller parts
                low.clear(optimizer)
                torch.set_rng_state(states[0])
                if cuda:
                    torch.cuda.set_rng_state(states[1], device)
                    torch.cuda.empty_cache()
            before = scaler.get_scale()
            if scaler.is_enabled():
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, max_grad_norm, foreach=True)
            else:  # the fused optimizer divides as it goes: one pass over the gradients less
                optimizer.grad_scale = (low.norm(parameters) / max_grad_norm).clamp_(min=1.0)
            scaler.step(optimizer)
            scaler.update()
            low.refresh()
            if scaler.get_scale() < before:  # float16 overflowed: the optimizer did not step
                done.skipped_steps += 1
            else:
                cut["decay"] *= 1 - rate(step) * table_rate * weight_decay
            low.clear(optimizer)
            done.tokens += int(lengths[rows].sum())
            if (step + 1) % 20 == 0 or step + 1 == steps:  # reading a loss waits for the device
                latest = losses[-1].item()
                if not math.isfinite(latest):
                    values = torch.stack(losses).tolist()
                    last = max((i for i, x in enumerate(values) if math.isfinite(x)), default=-1)
                    done.steps, done.losses = step + 1, values[: last + 1]
                    model.eval()
                    raise Diverged(
                        f"the loss is {values[last + 1]} at step {last + 2} of {steps} (learning "
                        f"rate {learning_rate}, precision {precision}): "
                        "the model cannot be trained so",
                        done,
                    )
                if on_step:
                    on_step(step + 1, steps, latest)
            if step + 1 in looks:
                add_point(step + 1)
    done.losses = torch.stack(losses).tolist()
    model.eval()
    return done


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the batch of cross-entropy, or of squared error where labels are numbers."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels, reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum")


@torch.inference_mode()
def predict(
    model: nn.Module, data: Any, *, tokenizer: Any = None, max_length: int = 128,
    max_tokens: int = 8192, device: str | torch.device | None = None,
) -> np.ndarray:  # fmt: skip
    """Logits in float32, (examples, classes), in the order of `data`; computed sorted by length."""
    data = as_encoded(data, model, tokenizer, max_length)
    device = pick_device(device)
    model.to(device).eval()
    lengths = data.lengths
    order = np.argsort(lengths, kind="stable")
    found, start = [], 0
    while start < len(order):
        # Sorted upwards: the last row of a batch is its longest.
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= max_tokens // 4:
            stop += 1
        logits = model(**collate(data, order[start:stop], device)).logits
        found.append(logits.float().cpu().numpy())
        start = stop
    return np.concatenate(found)[np.argsort(order)]


def evaluate(model: nn.Module, data: Any, **settings: Any) -> dict[str, float]:
    """Score `model` on `data`: ``f1`` (macro), ``accuracy``, ``matthews``, ``loss``; of numbers
    ``spearman``, ``loss``; ``not_finite`` is the share of examples whose logits are not, if any.
    Settings are those of `predict`."""
    length = settings.get("max_length", 128)
    data = as_encoded(data, model, settings.pop("tokenizer", None), length, labelled=True)
    return grade(predict(model, data, **settings), data.labels)


def grade(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What `evaluate` returns, of logits (examples, classes) and labels (examples,)."""
    scores, finite = score(logits, labels), np.isfinite(logits).all(axis=1)
    tensors = torch.from_numpy(np.nan_to_num(logits)), torch.from_numpy(labels)
    scores["loss"] = _loss(*tensors).item() / len(labels)
    if not finite.all():
        scores["not_finite"] = float(1 - finite.mean())
    return scores


def answers(logits: np.ndarray) -> np.ndarray:
    """The class that `score` takes for the answer, (examples,), the lower one where two tie."""
    return np.nan_to_num(logits, nan=-np.inf).argmax(axis=1)


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of `logits` (examples, classes) against `labels` (examples,). Macro-F1 averages over
    the classes that occur in the labels or the answers."""
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
    return score(np.tile(np.bincount(labels), (len(labels), 1)), labels)
