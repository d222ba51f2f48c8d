"""Records as tables: the cells that a run's plan names, joined to what is finished of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.paths import run_folder
from healing_utils.base.records import Store, read_json, write_atomically

Record = dict[str, Any]

TASK_STAGES = ("baseline", "corruption", "recovery")
SCAN_STAGES = ("harms", "scans")  # broken and trained cells beside the main grid, see `scans`
STAGES = (*TASK_STAGES, *SCAN_STAGES, "probing", "neurons")
_MADE = ["device", "threads", "versions", "key"]
_CELL = ["model", "task", "state", "side", "level", "kind", "part", "strength"]
_PROBED = ["model", "architecture", *_CELL[1:6], "layers", "n_layers", "seed", "corpus", "column"]
_SCORES = [
    *_CELL, "layers", "n_layers", "start", "recipe", "seed", "metric", "score", "score_f1",
    "score_accuracy", "score_matthews", "score_spearman", "chance", "chance_f1", "chance_accuracy",
    "test_size", "train_size", "epochs", "steps", "learning_rate", "evaluations", "head",
    "train_tokens", "diverged", "seconds", "device", "precision", "threads", "versions", "key",
]  # fmt: skip
COLUMNS = {
    **dict.fromkeys(TASK_STAGES, _SCORES),
    **dict.fromkeys(SCAN_STAGES, ["scan", *_SCORES]),
    "probing": [
        *_PROBED, "scan", "layer", "accuracy", "macro_f1", "majority", "control_accuracy",
        "selectivity", "codelength", "uniform", "cka", "l1", "nonzero", "converged", "n_train",
        "n_test", "n_classes", "seconds", *_MADE,
    ],
    "neurons": [
        *_PROBED, "k", "neurons", "share", "delta", "dev_full", "dev_minimal", "test_full",
        "test_minimal", "center_of_mass", "seconds", *_MADE,
    ],
}  # fmt: skip
_PLACE = [*_CELL, "n_layers", "seed", "metric", "key"]


def _flat(record: Record) -> Record:
    """The cell of a record and what stands beside its numbers."""
    made = record["made"]
    return {
        "start": "pre-trained", "recipe": "full", "scan": "main", **record["cell"],
        "layers": tuple(record["cell"]["layers"]), "key": record["key"],
        "seconds": record["times"]["seconds"], "device": made["device"], "threads": made["threads"],
        "versions": f"torch {made['versions']['torch']}, "
                    f"transformers {made['versions']['transformers']}",
    }  # fmt: skip


def _scored(record: Record) -> list[Record]:
    """The one row of a record of a task stage, NaN where a metric does not apply."""
    row, result, training = _flat(record), record["result"], record["determinants"]
    for name, found in (("score", result["scores"]), ("chance", result["chance"])):
        row[name] = found[row["metric"]]
        row |= {f"{name}_{metric}": value for metric, value in found.items()}
    row |= {name: training["recipe"][name] for name in ("epochs", "learning_rate", "evaluations")}
    row |= {name: result.get(name) for name in ("test_size", "train_size", "steps", "train_tokens")}
    row |= {"head": training.get("head", "first"), "diverged": result.get("diverged", "")}
    return [row | {"precision": result.get("precision", "float32")}]  # scoring is in float32


def _layers(record: Record) -> list[Record]:
    cka = record["result"].get("cka")
    return [
        {**_flat(record), **layer, "cka": cka[layer["layer"]] if cka else math.nan}
        for layer in record["result"]["layers"]
    ]


def _minimal(record: Record) -> list[Record]:
    result = record["result"]
    return [{**_flat(record), **result, "share": result["k"] / result["neurons"]}]


_ROWS = {"probing": _layers, "neurons": _minimal}  # else `_scored`


def table(records: Iterable[Record], stage: str = "baseline") -> pd.DataFrame:
    """One row a record (of `probing` one a record and layer), ordered by what the rows say and not
    by when they were made."""
    rows = [row for record in records for row in _ROWS.get(stage, _scored)(record)]
    frame = pd.DataFrame(rows, columns=COLUMNS[stage])
    order = ["model", "task", "state", "kind", "level", "side", "layers", "seed"]
    if stage in SCAN_STAGES:
        order = ["scan", *order, "part", "strength", "recipe"]
    elif stage == "probing":
        order = ["scan", *order]
    order += [name for name in ("corpus", "column", "layer", "key") if name in frame]
    return frame.sort_values(order, ignore_index=True, kind="stable")


def _plan(folder: Path, stage: str) -> list[Record] | None:
    """The cells of the run's last plan of a stage; None where there is no readable plan."""
    try:
        plan = read_json(folder / "plans" / f"{stage}.json")
        return [{"key": cell["key"], **cell} for cell in plan["cells"]]
    except (KeyError, TypeError):
        return None


def planned_records(folder: Path, stage: str) -> Iterator[Record]:
    """Records of the cells of the run's last plan of a stage (a folder may hold more), or all
    without a plan, called what the plan calls them: another run may have other names for them."""
    store, plan = Store(folder), _plan(folder, stage)
    if plan is None:  # the records of scans lie among those of the task stages
        yield from () if stage in SCAN_STAGES else store.records(stage)
        return
    for entry in plan:
        record = store.read(entry.get("stage", stage), entry["key"])
        if record is not None:
            record["cell"] |= entry.get("cell", {})
            yield record


def has_stage(run: str | Path, stage: str) -> bool:
    """Whether a run has finished cells of a stage."""
    return next(planned_records(run_folder(run), choose(stage, STAGES, "stage")), None) is not None


def missing_cells(run: str | Path, stage: str) -> list[str]:
    """Names of the cells of the run's last plan of a stage that have no record: a verdict on what
    happens to be there would pass over them."""
    store = Store(run_folder(run))
    return [
        cell["name"]
        for cell in _plan(store.run, stage) or ()
        if store.read(cell.get("stage", stage), cell["key"]) is None
    ]


def load_results(run: str | Path, stage: str) -> pd.DataFrame:
    """The finished cells of a stage of a run, one row a cell with the names of `COLUMNS`; of
    ``probing`` one a cell and layer (0 is the embeddings). `load_neurons` has what ``neurons``
    found besides. Raises HealingError for an unknown stage and one without records."""
    choose(stage, STAGES, "stage")
    folder = run_folder(run)
    if not folder.is_dir():
        raise HealingError(f"no such run: {folder}; make it with: healing run PROFILE")
    frame = table(planned_records(folder, stage), stage)
    if frame.empty:
        raise HealingError(f"run {folder} has no records of stage {stage!r}: run that stage first")
    return frame


def _load(
    run: str | Path, stages: Sequence[str], names: Sequence[str], what: str,
    parts: Callable[[Record], Iterable[Record]],
    order: Sequence[str] = ("model", "task", "kind", "level", "side", "seed"),
) -> pd.DataFrame:  # fmt: skip
    """A row for each of a record's `parts`, beside columns `names` of the record's own row."""
    folder = run_folder(run)
    rows = [
        {name: row[name] for name in names} | part
        for stage in stages
        for record in planned_records(folder, stage)
        for row in _ROWS.get(stage, _scored)(record)[:1]
        for part in parts(record)
    ]
    if not rows:
        raise HealingError(f"run {folder} has no {what} first")
    return pd.DataFrame(rows).sort_values(list(order), kind="stable", ignore_index=True)


def load_curves(run: str | Path, scans: bool = False) -> pd.DataFrame:
    """Score on held-out examples over training, a row a point: ``step score loss`` beside what
    names the cell and its training; of baseline and recovery, with `scans` of those too. Of intact
    models ``floor`` is the test score of the better linear model without layers, as a share."""
    names = [*_PLACE, "layers", "start", "recipe", "train_size", "epochs", "learning_rate",
             "evaluations", "head", "scan"]  # fmt: skip

    def points(record: Record) -> Iterable[Record]:
        metric, result = record["cell"]["metric"], record["result"]
        linear = [x["scores"][metric] for x in result.get("floors", {}).values()]
        intact = result["scores"][metric]
        floor = max(linear) / intact if linear and intact > 0 else None
        for point in record["result"]["curve"]:
            score = {"score": point.get(metric), "floor": floor}
            yield {"step": point["step"], "loss": point["loss"]} | score

    stages = ("baseline", "recovery", *(["scans"] if scans else []))
    return _load(run, stages, names, "learning curves: run 01 and 03", points)


def load_answers(run: str | Path) -> dict[str, np.ndarray]:
    """Which test items each scored cell answers right, by its key: (items,) of 0 and 1; of those
    whose record has it."""
    stages = [*TASK_STAGES, *SCAN_STAGES]
    records = [r for stage in stages for r in planned_records(run_folder(run), stage)]
    right = {r["key"]: r["result"]["right"] for r in records if "right" in r["result"]}
    return {key: np.frombuffer(x.encode(), np.uint8) - ord("0") for key, x in right.items()}


def load_similarity(run: str | Path, *stages: str) -> pd.DataFrame:
    """Similarity of broken to intact representations: ``layer measure similarity`` beside what
    names the cell, a row a layer (0 is the embeddings) and measure (cosine, cka, stream); of
    `corruption`, where the state ``untrained`` is the floor, or of these stages, ``harms`` too."""

    def layers(record: Record) -> Iterable[Record]:
        for measure, values in record["result"].get("similarity", {}).items():
            for layer, value in enumerate(values):
                yield {"layer": layer, "measure": measure, "similarity": value}

    what = "broken models: run 02_corruption"
    return _load(run, stages or ["corruption"], [*_PLACE, "layers"], what, layers)


def load_changes(run: str | Path, *stages: str) -> pd.DataFrame:
    """What broke each model, of stages as in `load_similarity`: the cell's names, ``values
    not_finite`` (values put through the kind, and those that are infinite or not a number now) and
    ``change_ROLE``, by role of the tensors the mean norm of the change over the norm before."""

    def change(record: Record) -> Iterable[Record]:
        if changed := record["result"].get("changed"):  # not of what is untrained or taken out
            roles = {f"change_{role}": x for role, x in changed["relative_change"].items()}
            finite = {"values": changed["values"], "not_finite": changed.get("not_finite", 0)}
            yield finite | roles

    return _load(run, stages or ["corruption"], _PLACE, "broken models: run 02_corruption", change)


def load_neurons(run: str | Path, what: str) -> pd.DataFrame:
    """What the stage `neurons` found beside its table, a row each, beside what names the cell:
    ``by_layer`` (``layer count share`` of the minimal set), ``curve`` (``k share which accuracy``),
    ``ablation`` (``k share which score metric``) or ``agreement`` (``first second spearman
    overlap``)."""

    def found(record: Record) -> list[Record]:
        result = record["result"]
        if what == "by_layer":
            k = result["k"] or math.nan
            return [
                {"layer": i, "count": n, "share": n / k} for i, n in enumerate(result["by_layer"])
            ]
        if what == "agreement":  # of so many of the strongest: overlap_50
            return [{name.split("_")[0]: x for name, x in row.items()} for row in result[what]]
        return [row | {"share": row["k"] / result["neurons"]} for row in result[what]]

    choose(what, ["by_layer", "curve", "ablation", "agreement"], "table of the neurons")
    order = ["model", "task", "state", "seed", "corpus", "column"]
    return _load(run, ["neurons"], [*_PROBED, "key"], f"{what} of neurons: run 04", found, order)


def _networks(run: str | Path) -> Iterator[tuple[Record, Record]]:
    """Each record of `probing` with that of the network that it looks into, where there is one: a
    network that is missing is missing with its cell, and the claims name it."""
    store = Store(run_folder(run))
    for record in planned_records(store.run, "probing"):
        network = record["cell"]["network"]
        scored = store.read(*network) if network else None
        if scored is not None:
            yield record, scored


def load_probed_scores(run: str | Path) -> pd.DataFrame:
    """The task scores of the models that ``probing`` looked into, as `load_results` gives them: of
    tasks that the task stages did not plan too, and without those of scans."""
    found: dict[str, Record] = {}
    for record, scored in _networks(run):
        cell = record["cell"]
        if cell.get("scan", "main") == "main":
            # What the probing plan calls it: another run may have other names for it.
            named = {n: cell[n] for n in ("model", "task", "side", "level", "kind")}
            found[scored["key"]] = {**scored, "cell": scored["cell"] | named}
    return table(found.values())


def probed_steps(run: str | Path) -> dict[str, float]:
    """For how many steps the network behind each cell of `probing` was trained, by the cell's key;
    of those that were trained, scans' too."""
    return {
        record["key"]: float(scored["result"]["steps"])
        for record, scored in _networks(run)
        if "steps" in scored["result"]
    }


def write_tables(run: str | Path, tables: dict[str, pd.DataFrame]) -> None:
    """Each table as ``RUN/tables/NAME.csv``, for readers without Python."""
    for name, frame in tables.items():
        path = run_folder(run) / "tables" / f"{name}.csv"
        write_atomically(path, frame.to_csv(index=False, float_format="%.9g"))


def describe_origin(frame: pd.DataFrame) -> str:
    """One or two lines on where results come from; says so where devices or precisions mix, in
    what was trained if anything was."""
    trained = frame[~frame["state"].isin(["broken", "untrained"])]
    made = trained if len(trained) else frame
    made = made[["device", "precision", "threads", "versions"]].drop_duplicates()
    each = [
        f"{m.device} in {m.precision}, threads: {m.threads}, {m.versions}"
        for m in made.itertuples()
    ]
    models, tasks = (", ".join(frame[name].unique()) for name in ("model", "task"))
    mixed = "" if len(each) == 1 else "MIXED: "
    return f"models: {models}; tasks: {tasks}\n{mixed}computed on {'; '.join(each)}"
