"""How time and peak memory grow with cells, model size, sentence length and words.

    make growth

Every point is measured in a process of its own, whose peak memory is the system's count of its
resident pages. Models have random weights: neither time nor memory hangs on the values. Writes
``growth.json`` beside this file and ``figures/growth.png``, which ``make growth ARGS=--draw`` draws
again.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from shared import BATCH, HERE, THREADS, apart, machine, trainer

STEPS = 12
SMALL = {"layers": 6, "hidden": 384, "heads": 12}  # MiniLM-L6's shape
SHAPES = ((6, 128, 4), (6, 256, 8), (6, 384, 12), (6, 768, 12), (12, 768, 12), (24, 1024, 16))
POINTS: dict[str, list[dict[str, Any]]] = {
    "cells": [{"seeds": n} for n in (3, 31, 310)],
    "size": [{"layers": n, "hidden": d, "heads": h, "length": 16} for n, d, h in SHAPES],
    "length": [{**SMALL, "length": n} for n in (8, 16, 32, 64, 128, 256, 512)],
    "words": [{**SMALL, "words": n} for n in (2_000, 8_000, 32_000, 128_000)],
    "neurons": [{"layers": 13, "hidden": 768, "words": n} for n in (2_000, 20_000, 200_000)],
}
AXES = {  # what stands on it, by which name in a point, and what is measured
    "cells": ("finished cells", "cells", "plan and look up"),
    "size": ("million parameters", "parameters", "a training step\n32 × 16 tokens"),
    "length": ("tokens a sentence", "length", "a training step\n32 sentences"),
    "words": ("words", "words", "store and probe\n7 layers of 384"),
    "neurons": ("words", "words", "rank\n13 × 768 neurons"),
}


def bert(layers: int, hidden: int, heads: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    config = BertConfig(vocab_size=3000, num_attention_heads=heads, num_labels=2, **size)
    return BertForSequenceClassification(config)


def measure_training(length: int, peer: bool = False, **shape: int) -> dict[str, float]:
    """Seconds a step of `fine_tune` in float32, or of Trainer, with the optimizer's steps as the
    clock; the first two are left out."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from healing_utils.healing.training import Encoded, fine_tune

    model, rng, steps = bert(**shape), np.random.default_rng(0), []
    ids = rng.integers(5, 3000, (BATCH * STEPS, length)).tolist()
    data = Encoded(ids, None, rng.integers(0, 2, len(ids)), (0, 0, "right"))
    # Counted before a shortcut takes anything away.
    size = sum(p.numel() for p in model.base_model.encoder.parameters())
    register_optimizer_step_post_hook(lambda *_: steps.append(time.perf_counter()))
    if peer:
        trainer(model, data, num_train_epochs=1, use_cpu=True).train()
    else:
        fine_tune(model, data, epochs=1, progress=False, precision="float32", device="cpu")
    return {"parameters": size / 1e6, "seconds": float(np.median(np.diff(steps)[1:]))}


def measure_cells(seeds: int) -> dict[str, float]:
    """Plan the organism's study for so many seeds and look all its records up, whose contents are
    made up, of a usual size."""
    from healing_utils.run.profiles import settle
    from healing_utils.study.cells import STAGES
    from healing_utils.study.study import Study

    with tempfile.TemporaryDirectory() as run:
        given = settle("quick", run, {"scans": {}, "seeds": list(range(seeds))})
        study = Study(given)
        curve = [{"step": i, "f1": 0.5, "accuracy": 0.5, "loss": 0.7} for i in range(4)]
        record = {"losses": [0.6931471805599453] * 128, "curve": curve}
        for stage in STAGES:
            for cell in study.plan(stage):
                study.store.write(stage, cell.key, {**record, **cell.columns()})
        start = time.perf_counter()
        study = Study(given)
        cells = [cell for stage in STAGES for cell in study.plan(stage)]
        assert all(study.store.read(cell.stage, cell.key) for cell in cells)
        return {"cells": len(cells), "seconds": time.perf_counter() - start}


def measure_words(words: int, **shape: int) -> dict[str, float]:
    """Map the activations of sentences of 20 words to a file and probe every layer for a label that
    hangs on the word and its left neighbour."""
    import torch

    from healing_utils.healing import models
    from healing_utils.probing.activations import compact_activations
    from healing_utils.probing.probes import fit_probes

    tokenizer = models.load_tokenizer("organism")
    vocabulary = sorted(w for w in tokenizer.get_vocab() if w.isalpha())
    model = bert(**shape).base_model.eval()
    ids = np.random.default_rng(0).integers(0, len(vocabulary), (words // 20, 20))
    sentences = [[vocabulary[i] for i in row] for row in ids]
    labels = ((ids + np.roll(ids, 1, axis=1) // 400) % 19).ravel()
    start = time.perf_counter()
    x, _ = compact_activations(model, tokenizer, sentences, memory=0)
    probe = None
    for layer in x:
        own = torch.from_numpy(np.array(layer, dtype=np.float32))
        probe = fit_probes(own, labels, [(1e-3, 1e-2)], start=probe)
    return {"seconds": time.perf_counter() - start}


def measure_neurons(layers: int, hidden: int, words: int) -> dict[str, float]:
    """Rank all neurons of so many words, whose labels hang on 20 of them, from a file."""
    from healing_utils.probing.neurons import rank_neurons

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        shape, path = (layers, words, hidden), Path(folder) / "x.npy"
        x = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        for layer in x:
            layer[:] = rng.standard_normal(layer.shape, dtype=np.float32)
        logits = x[layers // 2, :, :20].astype(np.float32) @ rng.standard_normal((20, 17))
        labels = (2 * logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
        start = time.perf_counter()
        ranking = rank_neurons(x, labels, l1=1e-3, l2=1e-2)
        seconds = time.perf_counter() - start
    assert {(layers // 2, i) for i in range(20)} == set(ranking[:20])
    return {"seconds": seconds}


MEASURES = {
    "neurons": measure_neurons, "cells": measure_cells, "size": measure_training,
    "length": measure_training, "words": measure_words,
}  # fmt: skip
PEERS = ("size", "length")  # which are measured of Trainer too


def point(measure: str, given: str) -> dict[str, Any]:
    """One point, in a process that has done nothing else."""
    import torch

    torch.set_num_threads(THREADS)
    values = json.loads(given)
    found = MEASURES[measure](**values)
    values.pop("peer", None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {**values, **found, "gigabytes": peak}


def draw(result: dict[str, Any]) -> Any:
    """Time above, peak memory below, both axes logarithmic; a dotted line grows in proportion."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from healing_utils.report import plots

    plain = FuncFormatter(lambda v, _: f"{v / 1000:g}k" if v >= 1000 else f"{v:g}")
    theirs = {"color": "#D55E00", "label": "Trainer", "markersize": 3}
    with plots.style():
        figure = Figure(figsize=(plots.PAGE, 3.6), layout="constrained")
        axes = figure.subplots(2, len(AXES), sharex="col", sharey="row")
        for column, (what, (label, name, title)) in zip(axes.T, AXES.items(), strict=True):
            rows, peers = result["points"][what], result["peers"].get(what, [])
            x = [row[name] for row in rows]
            for ax, value in zip(column, ("seconds", "gigabytes"), strict=True):
                ax.plot(x, [row[value] for row in rows], "o-", color="#0072B2", label="ours")
                ax.plot(x[: len(peers)], [row[value] for row in peers], "s--", **theirs)
                ax.set(xscale="log", yscale="log")
                ax.xaxis.set_minor_formatter("")
                for axis in (ax.xaxis, ax.yaxis):
                    axis.set_major_formatter(plain)
            middle = len(x) // 2
            scaled = rows[middle]["seconds"] * np.array(x) / x[middle]
            column[0].plot(x, scaled, ":", color="#6B6B6B", label="in proportion", linewidth=1)
            column[0].set_title(title, fontsize=8, fontweight="normal")
            column[1].set_xlabel(label)
        axes[0, 0].set_ylabel("seconds")
        axes[1, 0].set_ylabel("peak memory, GB")
        axes[0, 1].legend(fontsize=7)
    return figure


def main() -> None:
    given, path = sys.argv[1:], HERE / "growth.json"
    if len(given) == 2:
        print(json.dumps(point(*given)))
        return
    if given != ["--draw"]:
        result: dict[str, Any] = {**machine(), "points": {}, "peers": {}}
        for what, points in POINTS.items():
            runs = {"points": {}, "peers": {"peer": True}} if what in PEERS else {"points": {}}
            for kind, more in runs.items():
                asked = [json.dumps(values | more) for values in points]
                result[kind][what] = [apart(__file__, what, values) for values in asked]
                print(kind, what, *result[kind][what], sep="\n", flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    figure = draw(json.loads(path.read_text()))
    figure.savefig(HERE.parents[1] / "figures" / "growth.png", dpi=200)


if __name__ == "__main__":
    main()
