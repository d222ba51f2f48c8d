"""Training throughput and scores of `fine_tune` beside transformers' Trainer, in one run.

    make bench                       # on MiniLM-L6 and SST-2
    make bench ARGS="--model organism --task sentiment --rate 5e-4"
    make bench-gpu                   # BERT-Base and BERT-Large as well

The work: one epoch of 1,000 phrases in batches of 32, every setting on the same phrases, timed
after import and after a warm-up, one at a time; the fastest Trainer setting of each precision and
ours, several times in turn. Tokens are counted without padding. Then where ours spends its time,
and the scores of the same phrases, trained on for some epochs. On a GPU the lower precision is what
it computes natively, the limit is that precision's, and the table has each setting's peak memory.
Writes ``results.json`` and ``results.md`` beside this file, or by the name that it is given.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from healing_utils.analysis import effects
from healing_utils.base.errors import HealingError
from healing_utils.healing import models
from healing_utils.healing.encoders import encoder_layers
from healing_utils.healing.training import (
    Encoded,
    encode,
    evaluate,
    fine_tune,
    pick_device,
    pick_precision,
    position_limit,
)
from healing_utils.study.study import PACKAGES, version
from healing_utils.texts.tasks import load_task

HERE = Path(__file__).parent
DEVICE = pick_device()
GPU = DEVICE.type == "cuda"
# The lower precision, where the hardware has it: without bfloat16 instructions a CPU emulates it,
# far slower than any other setting here.
LOW = "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else None
LOW = pick_precision("auto", DEVICE) if GPU else LOW
LIMIT = LOW if GPU else "float32"  # the precision of the products that are the limit
GROUPED = {"train_sampling_strategy": "group_by_length"}
PEERS = {
    "Trainer, run_glue.py's default: padding to 128": {"pad": 128},
    "Trainer, dynamic padding": {},
    "Trainer, dynamic padding, grouped by length": GROUPED,
}
OURS = {"healing_utils.fine_tune": {"precision": "float32"}}
if LOW:
    MIXED = {"bf16" if LOW == "bfloat16" else "fp16": True}
    PEERS[f"Trainer, dynamic padding, {LOW}"] = MIXED
    PEERS[f"Trainer, dynamic padding, grouped by length, {LOW}"] = GROUPED | MIXED
    OURS[f"healing_utils.fine_tune, {LOW}"] = {"precision": LOW}
# Operators by what they are for; the rest is Python, dispatch and whatever is short.
PARTS = {
    "matrix products": "mm addmm bmm baddbmm",
    "optimizer and clipping": "_fused_adamw_ linalg_vector_norm dot _foreach_norm",
    "copies, casts, joins": "copy_ cat fill_ zero_ index_copy_",
    "GELU, softmax, LayerNorm": "gelu gelu_backward _softmax _softmax_backward_data "
    "native_layer_norm native_layer_norm_backward",
    "dropout and other arithmetic": "random_ ge mul mul_ add add_ addcmul sum masked_fill_ div "
    "native_dropout native_dropout_backward",
}
if GPU:
    kinds = ("flash", "efficient", "scaled_dot_product_cudnn")
    ways = [f"_{kind}_attention_{way}" for kind in kinds for way in ("forward", "backward")]
    PARTS["attention"] = " ".join(ways)
REST = "between kernels, the rest" if GPU else "Python, dispatch, the rest"


def forward_operations(model: torch.nn.Module, data: Encoded) -> int:
    """Of a forward pass, padding left out: two a weight of the layers and token; and for the
    attention of a text of n tokens 4 n² hidden a layer, the products of queries with keys and of
    weights with values."""
    layers = encoder_layers(model)
    weights = sum(p.numel() for layer in layers for p in layer.parameters())
    attention = 4 * model.config.hidden_size * len(layers) * int((data.lengths**2).sum())
    return 2 * weights * data.tokens + attention


class Columns(torch.utils.data.Dataset):
    """Encoded examples as Trainer wants them: a dict an example."""

    def __init__(self, data: Encoded, pad: int | None):
        self.rows = []
        for ids, label in zip(data.ids, data.labels, strict=True):
            fill = 0 if pad is None else pad - len(ids)
            mask, ids = [1] * len(ids) + [0] * fill, ids + [data.pad[0]] * fill
            self.rows.append({"input_ids": ids, "attention_mask": mask, "labels": int(label)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def seconds_of(work: Callable[[], object]) -> float:
    """With the GPU, where there is one, idle before and after."""
    finish = torch.cuda.synchronize if GPU else lambda: None
    finish()
    start = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - start


def train(
    work: argparse.Namespace, name: str, data: Encoded, seed: int
) -> tuple[torch.nn.Module, float]:
    """Fine-tune in one of `PEERS` or `OURS`; the model and the seconds of the training alone."""
    model = models.load_classifier(work.model, work.classes, seed)
    if name in OURS:
        model.to(DEVICE)  # before the clock starts, as with Trainer
        how = {"epochs": work.epochs, "learning_rate": work.rate, "seed": seed, "progress": False}
        return model, seconds_of(lambda: fine_tune(model, data, **how, **OURS[name]))
    setting = dict(PEERS[name])
    pad = setting.pop("pad", None)
    if pad is not None:  # run_glue.py takes no more than the model can read
        pad = min(pad, position_limit(model) or pad)
    tokenizer = models.load_tokenizer(work.model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=work.epochs, per_device_train_batch_size=32,
            learning_rate=work.rate, weight_decay=0.01, warmup_steps=0.1, seed=seed,
            use_cpu=not GPU, logging_strategy="no", save_strategy="no", report_to=[],
            disable_tqdm=True, **setting,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=Columns(data, pad), processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        return model, seconds_of(trainer.train)


def where_the_time_goes(work: argparse.Namespace, name: str, data: Encoded) -> dict:
    """Shares of our time by part, from torch's profiler, which itself costs some per cent."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * GPU
    with profile(activities=activities) as profiled:
        _, seconds = train(work, name, data, 0)
    spent = {
        e.key: (e.self_device_time_total if GPU else e.self_cpu_time_total) / 1e6
        for e in profiled.key_averages()
    }
    shares = {
        part: sum(spent.get(f"aten::{operator}", 0.0) for operator in names.split()) / seconds
        for part, names in PARTS.items()
    }
    return {**shares, REST: 1 - sum(shares.values())}


def matrix_rate(precision: str = "float32") -> float:
    """GFLOP/s of one large product, 2048³ on a CPU with the current threads and 8192³ on a GPU, the
    best of ten."""
    size = 8192 if GPU else 2048
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=getattr(torch, precision))
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(10)) / 1e9


def measure(work: argparse.Namespace) -> dict:
    torch.set_num_threads(work.threads)
    task, tokenizer = load_task(work.task), models.load_tokenizer(work.model)
    work.classes = task.num_labels
    drawn, held_out = task.draw(0, work.examples, work.held_out)
    data = encode(tokenizer, drawn.texts, drawn.labels)
    # The scored split and held-out phrases: on 872 sentences alone, two models of equal quality
    # differ by a point.
    texts, labels = [*task.test.texts, *held_out.texts], [*task.test.labels, *held_out.labels]
    scored = encode(tokenizer, texts, labels)
    warm = encode(tokenizer, drawn.texts[:64], drawn.labels[:64])

    rate = matrix_rate(LIMIT)
    model = models.load_classifier(work.model, task.num_labels, 0)
    operations = 3 * forward_operations(model, data) / data.tokens  # backward takes two forward
    limit = rate * 1e9 / operations
    print(f"{rate:.0f} GFLOP/s, so at most {limit:.0f} tokens/s at {operations / 1e6:.0f} MFLOP")

    speeds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}

    def timed(name: str, seed: int) -> None:
        _, seconds = train(work, name, data, seed)
        speeds.setdefault(name, []).append(data.tokens * work.epochs / seconds)
        print(f"{speeds[name][-1]:8.0f} tokens/s  {name}", flush=True)

    for name in (*PEERS, *OURS):
        train(work, name, warm, 0)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        timed(name, 0)
        if GPU:
            peaks[name] = torch.cuda.max_memory_allocated() / 1e9
    # The pair of each precision: the fastest Trainer setting and ours.
    pairs = {}
    for ours, setting in OURS.items():
        mixed = setting["precision"] == LOW
        peers = [n for n, given in PEERS.items() if ("bf16" in given or "fp16" in given) == mixed]
        pairs[ours] = max(peers, key=lambda name: speeds[name][0])
    for seed in range(1, work.repeats):
        for name in [name for pair in pairs.items() for name in pair]:
            timed(name, seed)
    times = {name: where_the_time_goes(work, name, data) for name in OURS}

    # Ours, in each precision, against the fastest float32 setting of Trainer.
    peer = pairs[next(iter(OURS))]
    scores: dict[str, list[float]] = {name: [] for name in [peer, *OURS]}
    work.epochs, timed_epochs = work.score_epochs, work.epochs
    for seed in range(work.seeds):
        for name in scores:
            scores[name].append(evaluate(train(work, name, data, seed)[0], scored)["f1"])
        print(f"seed {seed}: F1", {n: round(v[-1], 4) for n, v in scores.items()}, flush=True)
    work.epochs = timed_epochs
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    differences = {name: np.subtract(scores[name], scores[peer]) for name in OURS}
    return {
        "work": vars(work), "tokens": data.tokens, "scored": len(scored),
        "processor": torch.cuda.get_device_name() if GPU else cpu,
        "versions": {name: version(name) for name in PACKAGES},
        "malloc": os.environ.get("GLIBC_TUNABLES", "as it is"), "limit_precision": LIMIT,
        "matrix_gflops": rate, "limit_tokens_per_second": limit, "tokens_per_second": speeds,
        "peak_gigabytes": peaks, "where": times, "pairs": pairs, "scores": scores,
        "differences": {n: effects.t_interval(d)._asdict() for n, d in differences.items()},
    }  # fmt: skip


def markdown(result: dict) -> str:
    speeds = {name: float(np.median(v)) for name, v in result["tokens_per_second"].items()}
    work, pairs, limit = result["work"], result["pairs"], result["limit_precision"]
    fastest = max(OURS, key=lambda name: speeds.get(name, 0))
    fastest_peer = max((name for name in speeds if name not in OURS), key=speeds.get)
    slowest, peaks = next(iter(speeds.values())), result["peak_gigabytes"]
    precision = {name: OURS[name]["precision"] for name in pairs}
    lines = [
        f"{work['model']} on {work['task']}, {work['epochs']} epoch of {work['examples']:,} "
        f"phrases ({result['tokens']:,} tokens), batches of 32, float32 unless said, "
        f"{work['threads']} threads, malloc {result['malloc']}. Ours and the fastest peer of each "
        f"precision: medians of {work['repeats']} runs, taken in turn; the others: one run.",
        "",
        f"| setting | tokens/s | of run_glue.py's | of Trainer's fastest | share of the {limit} "
        "limit |" + " peak memory, GB |" * bool(peaks),
        "|---|---:|---:|---:|---:|" + "---:|" * bool(peaks),
    ]
    for name, speed in speeds.items():
        share = speed / result["limit_tokens_per_second"]
        peak = f" {peaks[name]:.2f} |" if peaks else ""
        lines.append(
            f"| {name} | {speed:,.0f} | {speed / slowest:.1f} × "
            f"| {speed / speeds[fastest_peer]:.2f} × | {share:.0%} |{peak}"
        )
    ratios = [f"{speeds[o] / speeds[p]:.2f} times ({precision[o]})" for o, p in pairs.items()]
    gains = [
        f"{precision[name]} {100 * d['mean']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
        for name, d in result["differences"].items()
    ]
    peer = pairs[next(iter(pairs))].split(", ", 1)[1]
    lines += [
        f"| limit: the matrix products alone at {result['matrix_gflops']:.0f} GFLOP/s "
        f"| {result['limit_tokens_per_second']:,.0f} | | | 100% |" + " |" * bool(peaks),
        "",
        f"Ours against the fastest Trainer setting: {', '.join(ratios)}; the fastest of ours "
        "against the fastest of all of Trainer's "
        f"{speeds[fastest] / speeds[fastest_peer]:.2f} times. Macro-F1 after "
        f"{work['score_epochs']} epochs on the same phrases, over {result['scored']:,} sentences "
        f"and {work['seeds']} seeds, ours minus Trainer's ({peer}), "
        f"points with 95 % t-intervals: {', '.join(gains)}.",
        "",
        "| where our time goes | " + " | ".join(precision.values()) + " |",
        "|---|" + "---:|" * len(pairs),
    ]
    for part in next(iter(result["where"].values())):
        shares = " | ".join(f"{result['where'][name][part]:.0%}" for name in pairs)
        lines.append(f"| {part} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    for name, default, what in (
        ("examples", 1000, "phrases trained on"), ("epochs", 1, "timed"),
        ("repeats", 5, "timed runs of the fastest settings"), ("seeds", 12, "for the scores"),
        ("score-epochs", 2, "before scoring"), ("held-out", 2000, "phrases scored beside the test"),
        ("threads", 2, "of a CPU"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--name", default="results", help="of the files that are written")
    work = parser.parse_args()
    try:
        result = measure(work)
    except HealingError as error:  # the model or the data are not there, say
        raise SystemExit(str(error)) from None
    (HERE / f"{work.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / f"{work.name}.md").write_text(markdown(result))
    print("\n" + markdown(result))


if __name__ == "__main__":
    main()
