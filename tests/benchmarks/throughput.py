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
import os

import numpy as np
import shared
import torch
from shared import BATCH, MINILM, REPEATS, THREADS, seconds_of, table

from healing_utils.analysis import effects
from healing_utils.base.errors import HealingError
from healing_utils.healing import models, training
from healing_utils.healing.encoders import encoder_layers
from healing_utils.healing.training import Encoded
from healing_utils.texts.tasks import load_task

EXAMPLES, HELD_OUT, SCORE_EPOCHS = 1000, 2000, 2
PADDED = 128  # tokens, run_glue.py's default
DEVICE = training.pick_device()
GPU = DEVICE.type == "cuda"
# The lower precision, where the hardware has it: without bfloat16 instructions a CPU emulates it,
# far slower than any other setting here.
LOW = "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else None
LOW = training.pick_precision("auto", DEVICE) if GPU else LOW
LIMIT = LOW if GPU else "float32"  # the precision of the products that are the limit
GROUPED = {"train_sampling_strategy": "group_by_length"}
PEERS = {
    "Trainer, run_glue.py's default: padding to 128": {"pad": PADDED},
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


def train(
    work: argparse.Namespace, name: str, data: Encoded, seed: int, epochs: int = 1
) -> tuple[torch.nn.Module, float]:
    """Fine-tune in one of `PEERS` or `OURS`; the model and the seconds of the training alone."""
    model = models.load_classifier(work.model, work.classes, seed)
    if name in OURS:
        model.to(DEVICE)  # before the clock starts, as with Trainer
        how = {"epochs": epochs, "learning_rate": work.rate, "seed": seed, "progress": False}
        return model, seconds_of(lambda: training.fine_tune(model, data, **how, **OURS[name]))
    setting = dict(PEERS[name])
    # run_glue.py takes no more than the model can read.
    pad = min(setting.pop("pad", 0), training.position_limit(model) or PADDED)
    peer = shared.trainer(
        model, data, models.load_tokenizer(work.model), pad, num_train_epochs=epochs,
        learning_rate=work.rate, weight_decay=0.01, warmup_steps=0.1, seed=seed, use_cpu=not GPU,
        **setting,
    )  # fmt: skip
    return model, seconds_of(peer.train)


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


def measure(work: argparse.Namespace) -> dict:
    torch.set_num_threads(THREADS)
    task, tokenizer = load_task(work.task), models.load_tokenizer(work.model)
    work.classes = task.num_labels
    drawn, held_out = task.draw(0, EXAMPLES, HELD_OUT)
    data = training.encode(tokenizer, drawn.texts, drawn.labels)
    # The scored split and held-out phrases: on 872 sentences alone, two models of equal quality
    # differ by a point.
    texts, labels = [*task.test.texts, *held_out.texts], [*task.test.labels, *held_out.labels]
    scored = training.encode(tokenizer, texts, labels)
    warm = training.encode(tokenizer, drawn.texts[:64], drawn.labels[:64])

    rate = shared.matrix_rate(LIMIT)
    model = models.load_classifier(work.model, task.num_labels, 0)
    operations = 3 * forward_operations(model, data) / data.tokens  # backward takes two forward
    speeds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}

    def timed(name: str, seed: int) -> None:
        speeds.setdefault(name, []).append(data.tokens / train(work, name, data, seed)[1])
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
    for seed in range(1, REPEATS):
        for name in [name for pair in pairs.items() for name in pair]:
            timed(name, seed)
    times = {name: where_the_time_goes(work, name, data) for name in OURS}

    # Ours, in each precision, against the fastest float32 setting of Trainer.
    peer = pairs[next(iter(OURS))]
    scores: dict[str, list[float]] = {name: [] for name in [peer, *OURS]}
    for seed in range(work.seeds):
        for name in scores:
            model, _ = train(work, name, data, seed, SCORE_EPOCHS)
            scores[name].append(training.evaluate(model, scored)["f1"])
        print(f"seed {seed}: F1", {n: round(v[-1], 4) for n, v in scores.items()}, flush=True)
    differences = {name: np.subtract(scores[name], scores[peer]) for name in OURS}
    return {
        **shared.machine(), "work": vars(work), "tokens": data.tokens, "scored": len(scored),
        "malloc": os.environ.get("GLIBC_TUNABLES", "as it is"), "matrix_gflops": rate,
        "limit": rate * 1e9 / operations, "tokens_per_second": speeds, "peak_gigabytes": peaks,
        "where": times, "pairs": pairs, "scores": scores,
        "differences": {n: effects.t_interval(d)._asdict() for n, d in differences.items()},
    }  # fmt: skip


def paragraphs(result: dict) -> list[str]:
    """What the README quotes."""
    speeds = {name: float(np.median(v)) for name, v in result["tokens_per_second"].items()}
    work, pairs, limit = result["work"], result["pairs"], result["limit"]
    fastest, fastest_peer = (
        max((name for name in speeds if (name in OURS) == own), key=speeds.get)
        for own in (True, False)
    )
    slowest, peaks = next(iter(speeds.values())), result["peak_gigabytes"]
    precision = {name: OURS[name]["precision"] for name in pairs}
    head = ["setting", "tokens/s", "of run_glue.py's", "of Trainer's fastest"]
    head += [f"share of the {LIMIT} limit"] + ["peak memory, GB"] * GPU
    rows = [
        [
            name, f"{speed:,.0f}", f"{speed / slowest:.1f} ×",
            f"{speed / speeds[fastest_peer]:.2f} ×", f"{speed / limit:.0%}",
            *(f"{peaks[name]:.2f}" for _ in range(GPU)),
        ]
        for name, speed in speeds.items()
    ]  # fmt: skip
    last = f"limit: the matrix products alone at {result['matrix_gflops']:.0f} GFLOP/s"
    rows.append([last, f"{limit:,.0f}", "", "", "100%", *[""] * GPU])
    ratios = [f"{speeds[o] / speeds[p]:.2f} times ({precision[o]})" for o, p in pairs.items()]
    gains = [
        f"{precision[name]} {100 * d['mean']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
        for name, d in result["differences"].items()
    ]
    peer = pairs[next(iter(pairs))].split(", ", 1)[1]
    parts = [
        [part, *(f"{result['where'][name][part]:.0%}" for name in pairs)] for part in (*PARTS, REST)
    ]
    return [
        f"{work['model']} on {work['task']}, 1 epoch of {EXAMPLES:,} phrases "
        f"({result['tokens']:,} tokens), batches of {BATCH}, float32 unless said, {THREADS} "
        f"threads, malloc {result['malloc']}. Ours and the fastest peer of each precision: medians "
        f"of {REPEATS} runs, taken in turn; the others: one run.",
        table(head, rows),
        f"Ours against the fastest Trainer setting of the same precision: {', '.join(ratios)}; the "
        "fastest of ours against the fastest of all of Trainer's "
        f"{speeds[fastest] / speeds[fastest_peer]:.2f} times. Macro-F1 after {SCORE_EPOCHS} epochs "
        f"on the same phrases, over {result['scored']:,} sentences and {work['seeds']} seeds, ours "
        f"minus Trainer's ({peer}), points with 95 % t-intervals: {', '.join(gains)}.",
        table(["where our time goes", *precision.values()], parts),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MINILM)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--seeds", type=int, default=12, help="for the scores")
    parser.add_argument("--name", default="results", help="of the files that are written")
    work = parser.parse_args()
    try:
        result = measure(work)
    except HealingError as error:  # the model or the data are not there, say
        raise SystemExit(str(error)) from None
    shared.write(work.name, result, *paragraphs(result))


if __name__ == "__main__":
    main()
