"""Extraction and layer probes beside NeuroX 1.0.9 and scikit-learn, on the same words and labels.

    make bench

The work: chunks of the first 400 training and 100 test sentences of CoNLL-2000 (from nltk),
MiniLM-L6, the last subword of a word, seven probes fitted and scored. Both sides run one after the
other with as many threads, and are timed after import, with the model in memory or its files in the
page cache. Also: the probes alone against scikit-learn's ``saga``, run until it reaches the same
objective. Writes ``probing.json`` and ``probing.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from healing_utils.base.errors import HealingError
from healing_utils.probing.neurons import TOLERANCE
from healing_utils.probing.probes import Probes, fit_probes

HERE = Path(__file__).parent
FILES = ("train", "test")

# What a user of NeuroX writes, with its defaults; run by the python of its own environment.
# Arguments: folder with {train,test}.{words,labels}, model, threads, l1 = l2.
NEUROX = """
import json, sys, time
import numpy as np
np.int = int  # NeuroX 1.0.9 uses the name that numpy 1.24 dropped
import torch
import neurox.data.extraction.transformers_extractor as extractor
import neurox.data.loader as loader
import neurox.interpretation.ablation as ablation
import neurox.interpretation.linear_probe as linear_probe
import neurox.interpretation.utils as utils

folder, model, threads, strength = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
extractor.get_model_and_tokenizer(model)  # imports what it needs
seconds, start = {}, time.perf_counter()


def lap(name):
    global start
    now = time.perf_counter()
    seconds[name], start = now - start, now


for part in ("train", "test"):
    extractor.extract_representations(
        model, f"{folder}/{part}.words", f"{folder}/{part}.json", aggregation="last"
    )
lap("extraction")
x, y, words, mappings = {}, {}, {}, None
for part in ("train", "test"):
    activations, layers = loader.load_activations(f"{folder}/{part}.json")
    tokens = loader.load_data(
        f"{folder}/{part}.words", f"{folder}/{part}.labels", activations, 512
    )
    x[part], y[part], found = utils.create_tensors(tokens, activations, "O", mappings=mappings)
    words[part] = [word for sentence in tokens["source"] for word in sentence]
    mappings = mappings or found
lap("loading")
label_ids, names = mappings[:2]
options = {"lambda_l1": float(strength), "lambda_l2": float(strength)}
answers = []
for layer in range(layers):
    train, test = (
        ablation.filter_activations_by_layers(x[part], [layer], layers)
        for part in ("train", "test")
    )
    probe = linear_probe.train_logistic_regression_probe(train, y["train"], **options)
    _, predictions = linear_probe.evaluate_probe(
        probe, test, y["test"], idx_to_class=names, return_predictions=True
    )
    answers.append([name for _, name, _ in predictions])
lap("probes")
probe = linear_probe.train_logistic_regression_probe(x["train"], y["train"], **options)
ranking, _ = linear_probe.get_neuron_ordering(probe, label_ids)
lap("ranking")
np.savez(
    f"{folder}/neurox.npz", train=x["train"], test=x["test"], ranking=np.array(ranking, dtype=int),
    answers=np.array(answers), words=np.array(words["train"]), layers=layers,
)
with open(f"{folder}/neurox_seconds.json", "w") as file:
    json.dump(seconds, file)
"""


def read_corpus(counts: tuple[int, int]) -> dict[str, tuple[list[list[str]], list[list[str]]]]:
    """Words and chunk labels of the first sentences of both files, by part."""
    from healing_utils.texts.corpora import nltk_reader

    conll2000, corpus = nltk_reader("conll2000"), {}
    for part, count in zip(FILES, counts, strict=True):
        sentences = conll2000.iob_sents(f"{part}.txt")[:count]
        corpus[part] = (
            [[word for word, _, _ in sentence] for sentence in sentences],
            [[chunk for _, _, chunk in sentence] for sentence in sentences],
        )
    return corpus


def flat(lists: list[list[str]]) -> np.ndarray:
    return np.array([value for values in lists for value in values])


def run_neurox(work: argparse.Namespace, corpus: dict, folder: Path) -> dict[str, Any]:
    """What NeuroX gives: seconds, activations (layers, words, hidden) by part, answers, ranking."""
    for part, (words, labels) in corpus.items():
        for name, lines in (("words", words), ("labels", labels)):
            text = "".join(" ".join(line) + "\n" for line in lines)
            (folder / f"{part}.{name}").write_text(text, encoding="utf-8")
    (folder / "run_neurox.py").write_text(NEUROX)
    command = [
        work.neurox, str(folder / "run_neurox.py"), str(folder), work.model, str(work.threads),
        str(work.neurox_strength),
    ]  # fmt: skip
    with open(folder / "neurox.log", "w") as log:
        # Its label ids, and by some tenths of a point its accuracies, follow a set's order.
        fixed = {"PYTHONHASHSEED": "0", **os.environ}
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=fixed)
    if done.returncode:
        raise SystemExit((folder / "neurox.log").read_text()[-3000:])
    found = dict(np.load(folder / "neurox.npz"))
    layers = int(found["layers"])
    for part in FILES:
        wide = found[part]  # (words, layers * hidden)
        found[part] = wide.reshape(len(wide), layers, -1).transpose(1, 0, 2)
    found["seconds"] = json.loads((folder / "neurox_seconds.json").read_text())
    return found


def run_ours(work: argparse.Namespace, corpus: dict) -> dict[str, Any]:
    """The same from this package: load the model, extract, fit, answer, and then rank."""
    from transformers import AutoModel, AutoTokenizer

    from healing_utils.probing.activations import extract_activations
    from healing_utils.probing.neurons import rank_neurons

    seconds, start = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[name], start = now - start, now

    # NeuroX's extraction loads the model as well, once a file.
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    model = AutoModel.from_pretrained(work.model, dtype=torch.float32).eval()
    lap("loading the model")
    x = {part: extract_activations(model, tokenizer, words) for part, (words, _) in corpus.items()}
    lap("extraction")
    names, y = np.unique(flat(corpus["train"][1]), return_inverse=True)
    probes = fit_probes(x["train"], y, len(names), work.l1, work.l2, tolerance=work.tolerance)
    answers = names[probes.predict(x["test"])]
    lap("probes")
    ranking = rank_neurons(x["train"], names[y], l1=work.l1, l2=work.l2)
    lap("ranking")
    hidden = x["train"].shape[2]
    return {
        **x, "seconds": seconds, "answers": answers, "probes": probes, "y": y, "names": names,
        "ranking": np.array([layer * hidden + neuron for layer, neuron in ranking]),
    }  # fmt: skip


def objective(weight, bias, z, y, l1, l2) -> float:
    """In float64: mean cross-entropy and the elastic net, of standardised activations z."""
    scores = torch.from_numpy(z).double() @ torch.from_numpy(weight).double().T
    loss = torch.nn.functional.cross_entropy(
        scores + torch.from_numpy(bias).double(), torch.from_numpy(y)
    )
    return float(loss + l1 * np.abs(weight).sum() + l2 / 2 * np.square(weight).sum())


def run_saga(work: argparse.Namespace, x: np.ndarray, y: np.ndarray, probes: Probes) -> list[dict]:
    """A layer at a time: scikit-learn's epochs doubled until it reaches our objective.

    The time is that of the last run alone.
    """
    import sklearn
    from sklearn.linear_model import LogisticRegression

    named = tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8)
    rows = []
    for layer in work.saga_layers if work.saga_layers is not None else range(len(x)):
        z = (x[layer] - probes.mean[layer]) / probes.scale[layer]
        goal = objective(probes.weight[layer], probes.bias[layer], z, y, work.l1, work.l2)
        epochs, spent = 4, 0.0
        while True:
            peer = LogisticRegression(
                solver="saga", C=1 / (len(y) * (work.l1 + work.l2)),
                l1_ratio=work.l1 / (work.l1 + work.l2), tol=1e-12, max_iter=epochs, random_state=0,
                **({"penalty": "elasticnet"} if named else {}),
            )  # fmt: skip
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it has not converged is the point
                peer.fit(z, y)
            seconds = time.perf_counter() - start
            reached = objective(peer.coef_, peer.intercept_, z, y, work.l1, work.l2)
            spent += seconds
            if reached <= goal or spent > work.saga_limit:
                break
            epochs *= 2
        rows.append(
            {
                "layer": layer, "seconds": seconds, "epochs": epochs, "objective": reached,
                "ours": goal, "reached": bool(reached <= goal),
            }
        )  # fmt: skip
        print(f"saga, layer {layer}: {seconds:.1f} s, {epochs} epochs, {reached:.5f} ({goal:.5f})")
    return rows


def measure(work: argparse.Namespace) -> dict[str, Any]:
    from scipy.stats import spearmanr

    from healing_utils.study.study import PACKAGES, version

    torch.set_num_threads(work.threads)
    corpus = read_corpus((work.train, work.test))
    truth = flat(corpus["test"][1])

    few = {part: (words[-5:], labels[-5:]) for part, (words, labels) in corpus.items()}
    run_ours(work, few)  # imports what it needs
    runs = []
    for _ in range(work.repeats):
        ours = run_ours(work, corpus)
        end = sum(s for name, s in ours["seconds"].items() if name != "ranking")
        runs.append((end, ours["seconds"]))
    ends = [end for end, _ in runs]
    # The parts of the run in the middle, so that they add up to what is reported.
    ours["seconds"] = sorted(runs, key=lambda run: run[0])[len(runs) // 2][1]
    print(f"ours: {ends} s, {ours['seconds']}", flush=True)

    from throughput import matrix_rate
    from transformers import AutoModel, AutoTokenizer

    from healing_utils.probing.activations import align

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokens = sum(align(tokenizer, words).windows.tokens for words, _ in corpus.values())
    body = sum(
        p.numel()
        for name, p in AutoModel.from_pretrained(work.model).named_parameters()
        if "encoder" in name and p.ndim > 1
    )
    layers, words, hidden = ours["train"].shape
    # Logits and the gradient of the weights: a product each, two operations a weight and word.
    sweep = 2 * 2 * layers * words * hidden * len(ours["names"])
    result = {
        "work": vars(work),
        "matrix_gflops": matrix_rate(),
        "tokens": tokens,
        "gflop": {
            "extraction": 2 * body * tokens / 1e9,
            "probes": sweep * float(np.mean(ours["probes"].iterations)) / 1e9,
        },
        "words": {part: int(ours[part].shape[1]) for part in FILES},
        "shape": list(ours["train"].shape),
        "classes": len(ours["names"]),
        "processor": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "ours": {
            "seconds": ours["seconds"],
            "end_to_end": ends,
            "accuracy": (ours["answers"] == truth).mean(axis=1).tolist(),
            "objective": ours["probes"].objective.tolist(),
            "gap": ours["probes"].gap.tolist(),
            "iterations": ours["probes"].iterations.tolist(),
        },
    }
    if work.neurox:
        with tempfile.TemporaryDirectory() as folder:
            peer = run_neurox(work, corpus, Path(folder))
        if peer["answers"].shape[1] != len(truth):
            raise SystemExit(f"NeuroX kept {peer['answers'].shape[1]} of {len(truth)} test words")
        seconds = {name: s for name, s in peer["seconds"].items() if name != "ranking"}
        for part in FILES:
            if ours[part].shape != peer[part].shape:
                raise SystemExit(
                    f"NeuroX's {part} activations are {peer[part].shape}, ours {ours[part].shape}"
                )
        differences = {part: float(np.abs(ours[part] - peer[part]).max()) for part in FILES}
        places = [np.argsort(side["ranking"], kind="stable") for side in (ours, peer)]
        top = len(places[0]) // 20
        shared = len({*ours["ranking"][:top].tolist()} & {*peer["ranking"][:top].tolist()})
        result["neurox"] = {
            "seconds": peer["seconds"],
            "end_to_end": sum(seconds.values()),
            "accuracy": (peer["answers"] == truth).mean(axis=1).tolist(),
            "activation_difference": differences,
            "activation_size": float(np.abs(ours["train"]).max()),
            "ranking_spearman": float(spearmanr(*places).statistic),
            "ranking_top": {"neurons": top, "shared": shared, "by_chance": top**2 / len(places[0])},
        }
        print(f"NeuroX: {peer['seconds']}", flush=True)
    if not work.no_saga:
        times = []
        for _ in range(work.repeats):
            start = time.perf_counter()
            fit_probes(
                ours["train"], ours["y"], len(ours["names"]), work.l1, work.l2,
                tolerance=work.tolerance,
            )  # fmt: skip
            times.append(time.perf_counter() - start)
        result["saga"] = {
            "ours_seconds": times,
            "layers": run_saga(work, ours["train"], ours["y"], ours["probes"]),
        }
    return result


def checks(result: dict[str, Any]) -> dict[str, bool]:
    """What is to hold, by name."""
    held, ours = {}, result["ours"]
    if "neurox" in result:
        peer = result["neurox"]
        gained = np.subtract(ours["accuracy"], peer["accuracy"])
        # float16 keeps 11 bits: half of the last one at the size of the largest activation.
        precision = peer["activation_size"] * 2**-11
        held |= {
            "activations equal NeuroX's to float16 precision": (
                max(peer["activation_difference"].values()) <= precision
            ),
            "no layer more than 0.5 points below NeuroX": bool(gained.min() >= -0.005),
            "mean accuracy at least NeuroX's": bool(gained.mean() >= 0),
            "at least 20 times as fast as NeuroX": (
                peer["end_to_end"] / float(np.median(ours["end_to_end"])) >= 20
            ),
        }
    if "saga" in result:
        rows = result["saga"]["layers"]
        share = len(rows) / result["shape"][0]
        seconds = float(np.median(result["saga"]["ours_seconds"])) * share
        held["the probes alone ahead of saga at the same objective"] = seconds < sum(
            row["seconds"] for row in rows
        )
    return held


def markdown(result: dict[str, Any]) -> str:
    work, ours = result["work"], result["ours"]
    layers, _, hidden = result["shape"]
    end = float(np.median(ours["end_to_end"]))
    lines = [
        f"{work['model']} on CoNLL-2000 chunks: {work['train']} and {work['test']} sentences "
        f"({result['words']['train']:,} and {result['words']['test']:,} words), {layers} layers of "
        f"{hidden} features, {result['classes']} classes, {result['tokens']:,} tokens, "
        f"{work['threads']} threads. Ours: "
        f"l1 {work['l1']:g}, l2 {work['l2']:g}, to a duality gap of {work['tolerance']:g} of the "
        f"objective ({min(ours['iterations'])} to {max(ours['iterations'])} iterations); median of "
        f"{len(ours['end_to_end'])} runs.",
        "",
    ]
    for name in ("extraction", "probes"):
        limit = result["gflop"][name] / result["matrix_gflops"]
        seconds = ours["seconds"][name]
        lines.append(
            f"- {name}: {seconds:.2f} s, of which the matrix products need {limit:.2f} s "
            f"({limit / seconds:.0%}) at this machine's {result['matrix_gflops']:.0f} GFLOP/s"
        )
    lines.append("")
    if "neurox" in result:
        peer, ratio = result["neurox"], result["neurox"]["end_to_end"] / end
        gained = np.subtract(ours["accuracy"], peer["accuracy"])
        reading = ours["seconds"]["loading the model"] + ours["seconds"]["extraction"]
        lines += [
            "| end to end | ours, s | NeuroX 1.0.9, s |",
            "|---|---:|---:|",
            f"| activations of all words, in memory | {reading:.2f} "
            f"| {peer['seconds']['extraction'] + peer['seconds']['loading']:.2f} |",
            f"| {layers} probes fitted and scored | {ours['seconds']['probes']:.2f} "
            f"| {peer['seconds']['probes']:.2f} |",
            f"| all | {end:.2f} | {peer['end_to_end']:.2f} |",
            "",
            f"Ours is {ratio:.1f} times as fast end to end. Activations differ by at most "
            f"{max(peer['activation_difference'].values(), default=float('nan')):.1e} (the largest "
            f"is {peer['activation_size']:.1f}).",
            "",
            "| layer | " + " | ".join(map(str, range(layers))) + " | mean |",
            "|---|" + "---:|" * (layers + 1),
        ]
        for name, values in (("ours", ours["accuracy"]), ("NeuroX", peer["accuracy"])):
            cells = " | ".join(f"{value:.3f}" for value in [*values, np.mean(values)])
            lines.append(f"| {name} | {cells} |")
        top = peer["ranking_top"]
        lines += [
            "",
            f"Accuracy, ours minus NeuroX's: {100 * gained.min():+.2f} points at the least, "
            f"{100 * gained.mean():+.2f} on average. Rankings of all {layers * hidden:,} neurons: "
            f"Spearman {peer['ranking_spearman']:.2f}; of the {top['neurons']} strongest "
            f"{top['shared']} are in both lists ({top['by_chance']:.0f} by chance). NeuroX's L1 "
            "is a subgradient step of Adam on features that are not standardised, so its weights "
            "follow a feature's scale and none is zero; ours are exactly zero for every class in "
            "some neurons, whose order says nothing. The ranking is not part of the time above: "
            f"ours takes {ours['seconds']['ranking']:.1f} s, to a gap of {TOLERANCE:g} of the "
            "objective, as the order still moves at larger ones; NeuroX's takes "
            f"{peer['seconds']['ranking']:.1f} s "
            "with its default settings.",
        ]
    if "saga" in result:
        rows = result["saga"]["layers"]
        seconds = float(np.median(result["saga"]["ours_seconds"]))
        theirs = sum(row["seconds"] for row in rows)
        reached = sum(row["reached"] for row in rows)
        lines += [
            "",
            f"Probes alone, {layers} layers: {seconds:.2f} s. scikit-learn's saga took "
            f"{theirs:.1f} s for {len(rows)} of them ({theirs / len(rows) * layers / seconds:.0f} "
            f"times as long a layer) and reached our objective in {reached}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurox", metavar="PYTHON", help="python of an environment with NeuroX")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--train", type=int, default=400, help="training sentences")
    parser.add_argument("--test", type=int, default=100, help="test sentences")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--l1", type=float, default=1e-3)
    parser.add_argument("--l2", type=float, default=1e-2)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative duality gap")
    parser.add_argument("--neurox-strength", type=float, default=1e-3, help="its l1 and l2")
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours; the median counts")
    parser.add_argument("--no-saga", action="store_true")
    parser.add_argument("--saga-layers", type=int, nargs="+", help="layers for saga; else all")
    parser.add_argument("--saga-limit", type=float, default=16, help="seconds a layer, then stop")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the two files")
    work = parser.parse_args()
    try:
        result = measure(work)
    except HealingError as error:  # the data are not there, say
        raise SystemExit(str(error)) from None
    result["work"] = {
        name: value for name, value in vars(work).items() if name not in ("neurox", "out")
    }
    (work.out / "probing.json").write_text(json.dumps(result, indent=1) + "\n")
    (work.out / "probing.md").write_text(markdown(result))
    print("\n" + markdown(result))
    held = checks(result)
    for name, holds in held.items():
        print("holds " if holds else "FAILS ", name)
    if not all(held.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
