"""Training throughput and scores of `fine_tune` beside transformers' Trainer, in one run.

    make bench                       # on MiniLM-L6 and SST-2
    make bench ARGS="--model organism --task sentiment --rate 5e-4"

The work: one epoch of 1,000 phrases in batches of 32, every setting on the same phrases, timed
after import and after a warm-up, one at a time; the fastest Trainer setting of each precision and
ours, several times in turn. Tokens are counted without padding. Then where ours spends its time,
and the scores of the same phrases, trained on for some epochs. Writes ``results.json`` and
``results.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from healing_utils import models, statistics
from healing_utils.study import PACKAGES, version
from healing_utils.tasks import TaskData, load_task
from healing_utils.training import Encoded, encode, evaluate, fine_tune

HERE = Path(__file__).parent
GROUPED = {"train_sampling_strategy": "group_by_length"}
PEERS = {
    "Trainer, run_glue.py's default: padding to 128": {"pad": 128},
    "Trainer, dynamic padding": {},
    "Trainer, dynamic padding, grouped by length": GROUPED,
    "Trainer, dynamic padding, bfloat16": {"bf16": True},
    "Trainer, dynamic padding, grouped by length, bfloat16": {**GROUPED, "bf16": True},
}
OURS = {
    "healing_utils.fine_tune": {"precision": "float32"},
    "healing_utils.fine_tune, bfloat16": {"precision": "bfloat16"},
}
# Operators by what they are for; the rest is Python, dispatch and whatever is short.
PARTS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "optimizer and clipping": ("_fused_adamw_", "linalg_vector_norm", "dot", "_foreach_norm"),
    "copies, casts, joins": ("copy_", "cat", "fill_", "zero_", "index_copy_"),
    "GELU, softmax, LayerNorm": (
        "gelu", "gelu_backward", "_softmax", "_softmax_backward_data", "native_layer_norm",
        "native_layer_norm_backward",
    ),
    "dropout and other arithmetic": (
        "random_", "ge", "mul", "mul_", "add", "add_", "addcmul", "sum", "masked_fill_", "div",
    ),
}  # fmt: skip
if not torch.cuda.is_available() and not torch.cpu.get_capabilities().get("avx512_bf16"):
    # Without bfloat16 instructions a CPU emulates it, far slower than any other setting here.
    PEERS = {name: setting for name, setting in PEERS.items() if "bf16" not in setting}
    del OURS["healing_utils.fine_tune, bfloat16"]


class Columns(torch.utils.data.Dataset):
    """Encoded examples as Trainer wants them: a dict an example."""

    def __init__(self, data: Encoded, pad: int | None):
        self.rows = []
        for ids, label in zip(data.ids, data.labels, strict=True):
            fill = 0 if pad is None else pad - len(ids)
            self.rows.append(
                {
                    "input_ids": ids + [data.pad[0]] * fill,
                    "attention_mask": [1] * len(ids) + [0] * fill,
                    "labels": int(label),
                }
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def with_trainer(
    work: argparse.Namespace, data: Encoded, setting: dict, seed: int, tokenizer
) -> tuple[torch.nn.Module, float]:
    """Fine-tune with Trainer; returns the model and the seconds of `train()`."""
    setting = dict(setting)
    pad = setting.pop("pad", None)
    model = models.load_classifier(work.model, work.classes, seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=work.epochs,
            per_device_train_batch_size=32,
            learning_rate=work.rate,
            weight_decay=0.01,
            warmup_steps=0.1,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **setting,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Columns(data, pad),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return model, seconds


def with_ours(
    work: argparse.Namespace, data: Encoded, setting: dict, seed: int, tokenizer
) -> tuple[torch.nn.Module, float]:
    model = models.load_classifier(work.model, work.classes, seed)
    start = time.perf_counter()
    fine_tune(
        model, data, epochs=work.epochs, learning_rate=work.rate, seed=seed, progress=False,
        **setting,
    )  # fmt: skip
    return model, time.perf_counter() - start


def where_the_time_goes(work: argparse.Namespace, data: Encoded, setting: dict, tokenizer) -> dict:
    """Shares of our time by part, from torch's profiler, which itself costs some per cent."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        _, seconds = with_ours(work, data, setting, 0, tokenizer)
    spent = {e.key: e.self_cpu_time_total / 1e6 for e in profiled.key_averages()}
    shares = {
        part: sum(spent.get(f"aten::{name}", 0.0) for name in names) / seconds
        for part, names in PARTS.items()
    }
    return {**shares, "Python, dispatch, the rest": 1 - sum(shares.values())}


def matrix_rate() -> float:
    """GFLOP/s of a 2048³ float32 product with the current threads, the best of ten."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def measure(work: argparse.Namespace) -> dict:
    torch.set_num_threads(work.threads)
    task: TaskData = load_task(work.task)
    work.classes = task.num_labels
    tokenizer = models.load_tokenizer(work.model)
    train, held_out = task.draw(0, work.examples, work.held_out)
    data = encode(tokenizer, train.texts, train.labels)
    # The scored split and held-out phrases: on 872 sentences alone, two models of equal quality
    # differ by a point.
    scored = encode(
        tokenizer, [*task.test.texts, *held_out.texts], [*task.test.labels, *held_out.labels]
    )
    warm = encode(tokenizer, train.texts[:64], train.labels[:64])

    rate = matrix_rate()
    body = sum(
        p.numel()
        for name, p in models.load_classifier(work.model, task.num_labels, 0).named_parameters()
        if "embeddings" not in name and p.ndim > 1
    )
    limit = rate * 1e9 / (6 * body)  # two operations a weight forward, four backward
    print(f"{rate:.0f} GFLOP/s, so at most {limit:.0f} tokens/s at {6 * body / 1e6:.0f} MFLOP each")

    settings = {**PEERS, **OURS}

    def train_with(name: str, examples: Encoded, seed: int) -> tuple[torch.nn.Module, float]:
        train = with_ours if name in OURS else with_trainer
        return train(work, examples, settings[name], seed, tokenizer)

    speeds: dict[str, list[float]] = {}
    for name in settings:
        train_with(name, warm, 0)
        _, seconds = train_with(name, data, 0)
        speeds[name] = [data.tokens * work.epochs / seconds]
        print(f"{speeds[name][0]:8.0f} tokens/s  {name}", flush=True)

    # The pair of each precision: the fastest Trainer setting and ours.
    pairs = {}
    for ours, setting in OURS.items():
        mixed = setting["precision"] == "bfloat16"
        peers = [name for name, given in PEERS.items() if given.get("bf16", False) == mixed]
        pairs[ours] = max(peers, key=lambda name: speeds[name][0])
    for seed in range(1, work.repeats):
        for name in [name for pair in pairs.items() for name in pair]:
            _, seconds = train_with(name, data, seed)
            speeds[name].append(data.tokens * work.epochs / seconds)
            print(f"{speeds[name][-1]:8.0f} tokens/s  {name}, again", flush=True)

    times = {name: where_the_time_goes(work, data, OURS[name], tokenizer) for name in OURS}

    # Ours, in each precision, against the fastest float32 setting of Trainer.
    peer = pairs[next(iter(OURS))]
    scores: dict[str, list[float]] = {name: [] for name in [peer, *OURS]}
    work.epochs, timed_epochs = work.score_epochs, work.epochs
    for seed in range(work.seeds):
        for name in scores:
            model, _ = train_with(name, data, seed)
            scores[name].append(evaluate(model, scored)["f1"])
        print(f"seed {seed}: F1", {n: round(v[-1], 4) for n, v in scores.items()}, flush=True)
    work.epochs = timed_epochs
    return {
        "work": vars(work),
        "tokens": data.tokens,
        "scored": len(scored),
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "versions": {name: version(name) for name in PACKAGES},
        "malloc": os.environ.get("GLIBC_TUNABLES", "as it is"),
        "matrix_gflops": rate,
        "limit_tokens_per_second": limit,
        "tokens_per_second": speeds,
        "where": times,
        "pairs": pairs,
        "scores": scores,
        "differences": {
            name: statistics.t_interval(np.subtract(scores[name], scores[peer]))._asdict()
            for name in OURS
        },
    }


def markdown(result: dict) -> str:
    speeds = {name: float(np.median(v)) for name, v in result["tokens_per_second"].items()}
    work, pairs = result["work"], result["pairs"]
    fastest = max(OURS, key=lambda name: speeds.get(name, 0))
    fastest_peer = max((name for name in speeds if name not in OURS), key=speeds.get)
    first = next(iter(pairs))
    lines = [
        f"{work['model']} on {work['task']}, {work['epochs']} epoch of {work['examples']:,} "
        f"phrases ({result['tokens']:,} tokens), batches of 32, float32 unless said, "
        f"{work['threads']} threads, malloc {result['malloc']}. Ours and the fastest peer of each "
        f"precision: medians of {work['repeats']} runs, taken in turn; the others: one run.",
        "",
        "| setting | tokens/s | of run_glue.py's | share of the float32 limit |",
        "|---|---:|---:|---:|",
    ]
    slowest = next(iter(speeds.values()))
    for name, speed in speeds.items():
        share = speed / result["limit_tokens_per_second"]
        lines.append(f"| {name} | {speed:,.0f} | {speed / slowest:.1f} × | {share:.0%} |")
    lines += [
        f"| limit: the matrix products alone at {result['matrix_gflops']:.0f} GFLOP/s "
        f"| {result['limit_tokens_per_second']:,.0f} | | 100% |",
        "",
        "Ours against the fastest Trainer setting: "
        + ", ".join(
            f"{speeds[ours] / speeds[peer]:.2f} times ({OURS[ours]['precision']})"
            for ours, peer in pairs.items()
        )
        + f"; the fastest of ours against the fastest of all of Trainer's "
        f"{speeds[fastest] / speeds[fastest_peer]:.2f} times. Macro-F1 after "
        f"{work['score_epochs']} epochs on the same phrases, over {result['scored']:,} sentences "
        f"and {work['seeds']} seeds, ours minus Trainer's ({pairs[first].split(', ', 1)[1]}), "
        "points with 95 % t-intervals: "
        + ", ".join(
            f"{OURS[name]['precision']} {100 * d['mean']:+.2f} "
            f"[{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
            for name, d in result["differences"].items()
        )
        + ".",
        "",
        "| where our time goes | " + " | ".join(OURS[name]["precision"] for name in pairs) + " |",
        "|---|" + "---:|" * len(pairs),
        *(
            f"| {part} | " + " | ".join(f"{result['where'][n][part]:.0%}" for n in pairs) + " |"
            for part in next(iter(result["where"].values()))
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of the fastest settings")
    parser.add_argument("--seeds", type=int, default=16, help="seeds for the scores")
    parser.add_argument("--score-epochs", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=2000, help="phrases scored beside the test")
    parser.add_argument("--threads", type=int, default=2)
    work = parser.parse_args()
    result = measure(work)
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "results.md").write_text(markdown(result))
    print("\n" + markdown(result))


if __name__ == "__main__":
    main()
