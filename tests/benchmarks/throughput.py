"""Training throughput and scores of `fine_tune` beside transformers' Trainer, in one run.

    make bench                       # on MiniLM-L6 and SST-2
    make bench ARGS="--model organism --task sentiment --rate 5e-4"

The work: one epoch of 1,000 phrases in batches of 32, every setting on the same phrases, timed
after import and after a warm-up, one at a time. Tokens are counted without padding. Writes
``results.json`` and ``results.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
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
PEERS = {
    "Trainer, run_glue.py's default: padding to 128": {"pad": 128},
    "Trainer, dynamic padding": {},
    "Trainer, dynamic padding, bfloat16": {"bf16": True},
    "Trainer, dynamic padding, grouped by length": {"train_sampling_strategy": "group_by_length"},
}
OURS = "healing_utils.fine_tune"
if not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
    # Without bfloat16 instructions a CPU emulates it, far slower than any other setting here.
    del PEERS["Trainer, dynamic padding, bfloat16"]


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


def with_ours(work: argparse.Namespace, data: Encoded, seed: int) -> tuple[torch.nn.Module, float]:
    model = models.load_classifier(work.model, work.classes, seed)
    start = time.perf_counter()
    fine_tune(model, data, epochs=work.epochs, learning_rate=work.rate, seed=seed, progress=False)
    return model, time.perf_counter() - start


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
    train, _ = task.draw(0, work.examples, 0)
    data = encode(tokenizer, train.texts, train.labels)
    test = encode(tokenizer, task.test.texts, task.test.labels)
    tokens = data.tokens * work.epochs
    warm = encode(tokenizer, train.texts[:64], train.labels[:64])

    rate = matrix_rate()
    body = sum(
        p.numel()
        for name, p in models.load_classifier(work.model, task.num_labels, 0).named_parameters()
        if "embeddings" not in name and p.ndim > 1
    )
    limit = rate * 1e9 / (6 * body)  # two operations a weight forward, four backward
    print(f"{rate:.0f} GFLOP/s, so at most {limit:.0f} tokens/s at {6 * body / 1e6:.0f} MFLOP each")

    speeds: dict[str, list[float]] = {}
    for name, setting in [*PEERS.items(), (OURS, None)]:
        if setting is None:
            with_ours(work, warm, 0)
            _, seconds = with_ours(work, data, 0)
        else:
            with_trainer(work, warm, setting, 0, tokenizer)
            _, seconds = with_trainer(work, data, setting, 0, tokenizer)
        speeds[name] = [tokens / seconds]
        print(f"{speeds[name][0]:8.0f} tokens/s  {name}", flush=True)
    fastest_peer = max(PEERS, key=lambda name: speeds[name][0])

    # Scores of the fastest peer and ours, turn by turn; their times count for the speed as well.
    scores: dict[str, list[float]] = {"peer": [], "ours": []}
    for seed in range(work.seeds):
        model, seconds = with_trainer(work, data, PEERS[fastest_peer], seed, tokenizer)
        speeds[fastest_peer].append(tokens / seconds)
        scores["peer"].append(evaluate(model, test)["f1"])
        model, seconds = with_ours(work, data, seed)
        speeds[OURS].append(tokens / seconds)
        scores["ours"].append(evaluate(model, test)["f1"])
        print(
            f"seed {seed}: peer {speeds[fastest_peer][-1]:.0f} tokens/s, "
            f"F1 {scores['peer'][-1]:.4f}; ours {speeds[OURS][-1]:.0f}, {scores['ours'][-1]:.4f}",
            flush=True,
        )
    difference = statistics.t_interval(np.subtract(scores["ours"], scores["peer"]))
    return {
        "work": vars(work),
        "tokens": data.tokens,
        "processor": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "matrix_gflops": rate,
        "limit_tokens_per_second": limit,
        "tokens_per_second": speeds,
        "fastest_peer": fastest_peer,
        "scores": scores,
        "difference": difference._asdict(),
    }


def markdown(result: dict) -> str:
    speeds = {name: float(np.median(v)) for name, v in result["tokens_per_second"].items()}
    ours, peer = speeds[OURS], speeds[result["fastest_peer"]]
    work, d = result["work"], result["difference"]
    lines = [
        f"{work['model']} on {work['task']}, {work['epochs']} epoch of {work['examples']:,} "
        f"phrases ({result['tokens']:,} tokens), batches of 32, float32 unless said, "
        f"{work['threads']} threads. Ours and the fastest peer: medians of {work['seeds'] + 1} "
        "runs, taken in turn; the others: one run.",
        "",
        "| setting | tokens/s | ours is faster by | share of the limit |",
        "|---|---:|---:|---:|",
    ]
    for name, speed in speeds.items():
        share = speed / result["limit_tokens_per_second"]
        lines.append(f"| {name} | {speed:,.0f} | {ours / speed:.2f} × | {share:.0%} |")
    lines += [
        f"| limit: the matrix products alone at {result['matrix_gflops']:.0f} GFLOP/s "
        f"| {result['limit_tokens_per_second']:,.0f} | | 100% |",
        "",
        f"Against the fastest Trainer setting ours is {ours / peer:.2f} times as fast. Macro-F1 "
        f"afterwards, ours minus that Trainer's, over {d['n']} seeds: "
        f"{100 * d['mean']:+.2f} points, 95 % t-interval {100 * d['low']:+.2f} to "
        f"{100 * d['high']:+.2f}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=6, help="seeds for the scores")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    work = parser.parse_args()
    result = measure(work)
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "results.md").write_text(markdown(result))
    print("\n" + markdown(result))


if __name__ == "__main__":
    main()
