"""Extraction and layer probes beside NeuroX 1.0.9 and scikit-learn, on the same words and labels.

    make bench

The work: chunks of the first 400 training and 100 test sentences of CoNLL-2000 (from nltk),
MiniLM-L6, the last subword of a word, seven probes fitted and scored. Both sides run one after the
other with as many threads, and are timed after import, with the model in memory or its files in the
page cache. Also: the probes alone against scikit-learn's ``saga``, run until it reaches the same
objective. Writes ``probing.json`` and ``probing.md`` beside this file.
"""

import argparse
import itertools
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
laps = [("", time.perf_counter())]
x, y, words, mappings, answers = {}, {}, {}, None, []
for part in ("train", "test"):
    extractor.extract_representations(
        model, f"{folder}/{part}.words", f"{folder}/{part}.json", aggregation="last"
    )
laps.append(("extraction", time.perf_counter()))
for part in ("train", "test"):
    activations, layers = loader.load_activations(f"{folder}/{part}.json")
    tokens = loader.load_data(
        f"{folder}/{part}.words", f"{folder}/{part}.labels", activations, 512
    )
    x[part], y[part], found = utils.create_tensors(tokens, activations, "O", mappings=mappings)
    words[part] = [word for sentence in tokens["source"] for word in sentence]
    mappings = mappings or found
laps.append(("loading", time.perf_counter()))
label_ids, names = mappings[:2]
options = {"lambda_l1": float(strength), "lambda_l2": float(strength)}
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
laps.append(("probes", time.perf_counter()))
probe = linear_probe.train_logistic_regression_probe(x["train"], y["train"], **options)
ranking, _ = linear_probe.get_neuron_ordering(probe, label_ids)
laps.append(("ranking", time.perf_counter()))
seconds = {name: end - start for (_, start), (name, end) in zip(laps, laps[1:])}
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
        corpus[part] = tuple([[word[i] for word in s] for s in sentences] for i in (0, 2))
    return corpus


def flat(lists: list[list[str]]) -> np.ndarray:
    return np.array([value for values in lists for value in values])


def run_neurox(work: argparse.Namespace, corpus: dict, folder: Path) -> dict[str, Any]:
    """What NeuroX gives: seconds, activations (layers, words, hidden) by part, answers, ranking."""
    for part, columns in corpus.items():
        for name, lines in zip(("words", "labels"), columns, strict=True):
            text = "".join(" ".join(line) + "\n" for line in lines)
            (folder / f"{part}.{name}").write_text(text, encoding="utf-8")
    script, log = folder / "run_neurox.py", folder / "neurox.log"
    script.write_text(NEUROX)
    command = [work.neurox, script, folder, work.model, work.threads, work.neurox_strength]
    # Its label ids, and by some tenths of a point its accuracies, follow a set's order.
    fixed = {"PYTHONHASHSEED": "0", **os.environ}
    with open(log, "w") as said:
        done = subprocess.run(list(map(str, command)), stdout=said, stderr=said, env=fixed)
    if done.returncode:
        raise SystemExit(log.read_text()[-3000:])
    found = dict(np.load(folder / "neurox.npz"))
    for part in FILES:
        wide = found[part]  # (words, layers * hidden)
        found[part] = wide.reshape(len(wide), int(found["layers"]), -1).transpose(1, 0, 2)
    found["seconds"] = json.loads((folder / "neurox_seconds.json").read_text())
    return found


def float32(x: np.ndarray) -> torch.Tensor:
    """A copy, which a probe may standardise in place."""
    return torch.from_numpy(np.array(x, dtype=np.float32))


def fit_layers(work: argparse.Namespace, x: np.ndarray, y: np.ndarray) -> list[Probes]:
    """A probe a layer, each from the solution of the one before."""
    found: list[Probes] = []
    for layer in x:
        start = found[-1] if found else None
        penalties = [(work.l1, work.l2)]
        probe = fit_probes(
            float32(layer), y, int(y.max()) + 1, penalties, tolerance=work.tolerance, start=start
        )
        found.append(probe)
    return found


def run_ours(work: argparse.Namespace, corpus: dict) -> dict[str, Any]:
    """The same from this package: load the model, extract, fit, answer, and then rank."""
    from transformers import AutoModel, AutoTokenizer

    from healing_utils.probing.activations import extract_activations
    from healing_utils.probing.neurons import rank_neurons

    laps = [("", time.perf_counter())]
    # NeuroX's extraction loads the model as well, once a file.
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    model = AutoModel.from_pretrained(work.model, dtype=torch.float32).eval()
    laps.append(("loading the model", time.perf_counter()))
    x = {part: extract_activations(model, tokenizer, words) for part, (words, _) in corpus.items()}
    laps.append(("extraction", time.perf_counter()))
    names, y = np.unique(flat(corpus["train"][1]), return_inverse=True)
    probes = fit_layers(work, x["train"], y)
    scores = [p.scores(float32(own))[0] for p, own in zip(probes, x["test"], strict=True)]
    answers = names[torch.stack(scores).argmax(dim=-1).numpy()]
    laps.append(("probes", time.perf_counter()))
    ranking = rank_neurons(x["train"], names[y], l1=work.l1, l2=work.l2)
    laps.append(("ranking", time.perf_counter()))
    hidden = x["train"].shape[2]
    return {
        **x, "answers": answers, "probes": probes, "y": y, "names": names,
        "seconds": {name: end - start for (_, start), (name, end) in itertools.pairwise(laps)},
        "ranking": np.array([layer * hidden + neuron for layer, neuron in ranking]),
    }  # fmt: skip


def objective(weight, bias, z, y, l1, l2) -> float:
    """In float64: mean cross-entropy and the elastic net, of standardised activations z."""
    scores = torch.from_numpy(z).double() @ torch.from_numpy(weight).double().T
    loss = torch.nn.functional.cross_entropy(
        scores + torch.from_numpy(bias).double(), torch.from_numpy(y)
    )
    return float(loss + l1 * np.abs(weight).sum() + l2 / 2 * np.square(weight).sum())


def run_saga(
    work: argparse.Namespace, x: np.ndarray, y: np.ndarray, probes: list[Probes]
) -> list[dict]:
    """A layer at a time: scikit-learn's epochs doubled until it reaches our objective. The time is
    that of the last run alone."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    named = tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8)
    strength = work.l1 + work.l2
    given = {"solver": "saga", "C": 1 / (len(y) * strength), "l1_ratio": work.l1 / strength}
    given |= {"tol": 1e-12, "random_state": 0} | ({"penalty": "elasticnet"} if named else {})
    rows = []
    for layer in work.saga_layers if work.saga_layers is not None else range(len(x)):
        own = probes[layer]
        z = (x[layer] - own.mean.numpy()) / own.scale.numpy()
        goal = objective(own.weight[0].numpy(), own.bias[0].numpy(), z, y, work.l1, work.l2)
        epochs, spent, reached = 2, 0.0, np.inf
        while reached > goal and spent <= work.saga_limit:
            epochs *= 2
            peer = LogisticRegression(max_iter=epochs, **given)
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it has not converged is the point
                peer.fit(z, y)
            seconds = time.perf_counter() - start
            reached = objective(peer.coef_, peer.intercept_, z, y, work.l1, work.l2)
            spent += seconds
        rows.append(
            {
                "layer": layer, "seconds": seconds, "epochs": epochs, "objective": reached,
                "ours": goal, "reached": bool(reached <= goal),
            }
        )  # fmt: skip
        print(f"saga, layer {layer}: {seconds:.1f} s, {epochs} epochs, {reached:.5f} ({goal:.5f})")
    return rows


def measure(work: argparse.Namespace) -> dict[str, Any]:
    from throughput import matrix_rate
    from transformers import AutoModel, AutoTokenizer

    from healing_utils.probing.alignment import align
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

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokens = sum(align(tokenizer, words).windows.tokens for words, _ in corpus.values())
    named = AutoModel.from_pretrained(work.model).named_parameters()
    body = sum(p.numel() for name, p in named if "encoder" in name and p.ndim > 1)
    layers, words, hidden = ours["train"].shape
    # Logits and the gradient of the weights: a product each, two operations a weight and word.
    sweep = 2 * 2 * layers * words * hidden * len(ours["names"])
    probes = ours["probes"]
    iterations = [probe.iterations.item() for probe in probes]
    result = {
        "work": vars(work), "matrix_gflops": matrix_rate(), "tokens": tokens,
        "gflop": {
            "extraction": 2 * body * tokens / 1e9,
            "probes": sweep * float(np.mean(iterations)) / 1e9,
        },
        "words": {part: int(ours[part].shape[1]) for part in FILES},
        "shape": list(ours["train"].shape), "classes": len(ours["names"]),
        "processor": platform.machine(), "versions": {name: version(name) for name in PACKAGES},
        "ours": {
            "seconds": ours["seconds"], "end_to_end": ends,
            "accuracy": (ours["answers"] == truth).mean(axis=1).tolist(),
            "objective": [probe.objective.item() for probe in probes],
            "gap": [probe.gap.item() for probe in probes],
            "iterations": iterations,
        },
    }  # fmt: skip
    if work.neurox:
        with tempfile.TemporaryDirectory() as folder:
            result["neurox"] = compared(ours, run_neurox(work, corpus, Path(folder)), truth)
        print(f"NeuroX: {result['neurox']['seconds']}", flush=True)
    if not work.no_saga:
        times = []
        for _ in range(work.repeats):
            start = time.perf_counter()
            fit_layers(work, ours["train"], ours["y"])
            times.append(time.perf_counter() - start)
        saga = run_saga(work, ours["train"], ours["y"], probes)
        result["saga"] = {"ours_seconds": times, "layers": saga}
    return result


def compared(ours: dict[str, Any], peer: dict[str, Any], truth: np.ndarray) -> dict[str, Any]:
    """What NeuroX gave, beside ours."""
    from scipy.stats import spearmanr

    if peer["answers"].shape[1] != len(truth):
        raise SystemExit(f"NeuroX kept {peer['answers'].shape[1]} of {len(truth)} test words")
    for part in FILES:
        if ours[part].shape != peer[part].shape:
            raise SystemExit(f"{part} activations: {peer[part].shape}, ours {ours[part].shape}")
    places = [np.argsort(side["ranking"], kind="stable") for side in (ours, peer)]
    top = len(places[0]) // 20
    shared = len({*ours["ranking"][:top].tolist()} & {*peer["ranking"][:top].tolist()})
    return {
        "seconds": peer["seconds"],
        "end_to_end": sum(s for name, s in peer["seconds"].items() if name != "ranking"),
        "accuracy": (peer["answers"] == truth).mean(axis=1).tolist(),
        "activation_difference": {
            part: float(np.abs(ours[part] - peer[part]).max()) for part in FILES
        },
        "activation_size": float(np.abs(ours["train"]).max()),
        "ranking_spearman": float(spearmanr(*places).statistic),
        "ranking_top": {"neurons": top, "shared": shared, "by_chance": top**2 / len(places[0])},
    }


def checks(result: dict[str, Any]) -> dict[str, bool]:
    """What is to hold, by name."""
    held, ours = {}, result["ours"]
    if peer := result.get("neurox"):
        gained = np.subtract(ours["accuracy"], peer["accuracy"])
        ratio = peer["end_to_end"] / float(np.median(ours["end_to_end"]))
        # float16 keeps 11 bits: half of the last one at the size of the largest activation.
        precision, most = peer["activation_size"] * 2**-11, peer["activation_difference"].values()
        held["activations equal NeuroX's to float16 precision"] = max(most) <= precision
        held["no layer more than 0.5 points below NeuroX"] = bool(gained.min() >= -0.005)
        held["mean accuracy at least NeuroX's"] = bool(gained.mean() >= 0)
        held["at least 20 times as fast as NeuroX"] = ratio >= 20
    if saga := result.get("saga"):
        share = len(saga["layers"]) / result["shape"][0]
        seconds = float(np.median(saga["ours_seconds"])) * share
        theirs = sum(row["seconds"] for row in saga["layers"])
        held["the probes alone ahead of saga at the same objective"] = seconds < theirs
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
    for name, default, what in (
        ("train", 400, "training sentences"), ("test", 100, "test sentences"),
        ("threads", 2, "of a CPU"), ("repeats", 5, "runs of ours; the median counts"),
        ("l1", 1e-3, "of ours"), ("l2", 1e-2, "of ours"), ("tolerance", 1e-3, "duality gap"),
        ("neurox-strength", 1e-3, "its l1 and l2"), ("saga-limit", 16.0, "seconds a layer"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(default), default=default, help=what)
    parser.add_argument("--no-saga", action="store_true")
    parser.add_argument("--saga-layers", type=int, nargs="+", help="layers for saga; else all")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the two files")
    work = parser.parse_args()
    try:
        result = measure(work)
    except HealingError as error:  # the data are not there, say
        raise SystemExit(str(error)) from None
    given = {name: value for name, value in vars(work).items() if name not in ("neurox", "out")}
    result["work"] = given
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
