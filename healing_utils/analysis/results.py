"""Records as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.paths import run_folder
from healing_utils.base.records import Store, write_atomically

if TYPE_CHECKING:
    import pandas

TASK_STAGES = ("baseline", "corruption", "recovery")
SCAN_STAGES = ("harms", "scans")  # broken and trained cells beside the main grid, see `scans`
STAGES = (*TASK_STAGES, *SCAN_STAGES, "probing", "neurons")
COLUMNS = (
    "model", "task", "state", "side", "level", "kind", "part", "strength", "layers", "n_layers",
    "start", "recipe", "seed", "metric", "score", "score_f1", "score_accuracy", "score_matthews",
    "score_spearman", "chance", "chance_f1", "chance_accuracy", "test_size", "train_size", "epochs",
    "learning_rate", "evaluations", "head", "train_tokens", "diverged", "seconds", "device",
    "precision", "threads", "versions", "key",
)  # fmt: skip
PROBED_COLUMNS = (
    "model", "architecture", "task", "state", "side", "level", "kind", "layers", "n_layers", "seed",
    "corpus", "column",
)  # fmt: skip
PROBING_COLUMNS = (
    *PROBED_COLUMNS, "scan", "layer", "accuracy", "macro_f1", "majority", "control_accuracy",
    "selectivity", "codelength", "uniform", "cka", "l1", "nonzero", "converged", "n_train",
    "n_test", "n_classes", "seconds", "device", "threads", "versions", "key",
)  # fmt: skip
NEURON_COLUMNS = (
    *PROBED_COLUMNS, "k", "neurons", "share", "delta", "dev_full", "dev_minimal", "test_full",
    "test_minimal", "center_of_mass", "seconds", "device", "threads", "versions", "key",
)  # fmt: skip
CELL_COLUMNS = ("model", "task", "state", "side", "level", "kind", "part", "strength", "n_layers",
                "seed", "metric")  # fmt: skip
CURVE_COLUMNS = (
    "layers", "start", "recipe", "train_size", "epochs", "learning_rate", "evaluations", "head",
    "key",
)  # fmt: skip


def row(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a task stage as one flat row: `COLUMNS`, NaN where a metric does not apply."""
    cell, result, nan = record["cell"], record["result"], float("nan")
    scores, chance, metric = result["scores"], result["chance"], cell["metric"]
    flat: dict[str, Any] = {name: cell[name] for name in CELL_COLUMNS}
    flat["start"], flat["recipe"] = cell.get("start", "pre-trained"), cell.get("recipe", "full")
    flat["layers"] = tuple(cell["layers"])
    flat["score"], flat["chance"] = scores[metric], chance[metric]
    for name in ("f1", "accuracy", "matthews", "spearman"):
        flat[f"score_{name}"] = scores.get(name, nan)
    for name in ("f1", "accuracy"):
        flat[f"chance_{name}"] = chance.get(name, nan)
    for name in ("test_size", "train_size", "train_tokens"):
        flat[name] = result.get(name)
    for name in ("epochs", "learning_rate", "evaluations"):
        flat[name] = record["determinants"]["recipe"][name]
    flat["head"] = record["determinants"].get("head", "first")
    flat["diverged"] = result.get("diverged", "")
    if "scan" in cell:
        flat["scan"] = cell["scan"]
    flat["precision"] = result.get("precision", "float32")  # scoring alone is in float32
    return flat | _made(record)


def _made(record: dict[str, Any]) -> dict[str, Any]:
    """What stands beside a record's numbers."""
    versions = record["made"]["versions"]
    return {
        "versions": f"torch {versions['torch']}, transformers {versions['transformers']}",
        "seconds": record["times"]["seconds"],
        "device": record["made"]["device"],
        "threads": record["made"]["threads"],
        "key": record["key"],
    }


def _probed(record: dict[str, Any]) -> dict[str, Any]:
    """The cell of a record of the stages `probing` and `neurons`."""
    cell = record["cell"]
    return {name: cell[name] for name in PROBED_COLUMNS} | {"layers": tuple(cell["layers"])}


def _probing_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a layer."""
    cka = record["result"].get("cka")
    return [
        {
            **_probed(record), **_made(record), **layer, "scan": record["cell"].get("scan", "main"),
            "cka": cka[layer["layer"]] if cka else float("nan"),
        }
        for layer in record["result"]["layers"]
    ]  # fmt: skip


def _neuron_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    result = record["result"]
    found = {name: result[name] for name in NEURON_COLUMNS if name in result}
    share = result["k"] / result["neurons"]
    return [{**_probed(record), **_made(record), **found, "share": share}]


def table(records: Iterable[dict[str, Any]], stage: str = "baseline") -> pandas.DataFrame:
    """One row a record (of `probing` one a record and layer), ordered by what the rows say and not
    by when they were made."""
    import pandas

    rows, columns = {
        "probing": (_probing_rows, PROBING_COLUMNS), "neurons": (_neuron_rows, NEURON_COLUMNS),
    }.get(
        stage,
        (
            lambda record: [row(record)],
            ("scan", *COLUMNS) if stage in SCAN_STAGES else COLUMNS,
        ),
    )  # fmt: skip
    frame = pandas.DataFrame([r for record in records for r in rows(record)], columns=list(columns))
    order = ["model", "task", "state", "kind", "level", "side", "layers", "seed"]
    order = [name for name in ("scan",) if name in frame] + order
    order += ["part", "strength", "recipe"] if stage in SCAN_STAGES else []
    order += [name for name in ("corpus", "column", "layer", "key") if name in frame]
    return frame.sort_values(order, ignore_index=True, kind="stable")


def _plan(folder: Path, stage: str) -> list[dict[str, Any]] | None:
    """The cells that the run's last plan of a stage names; None where there is no readable plan."""
    try:
        plan = json.loads((folder / "plans" / f"{stage}.json").read_text(encoding="utf-8"))
        return [{"key": cell["key"], **cell} for cell in plan["cells"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def planned_records(folder: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Records of the cells that the run's last plan of this stage names, or all without a plan.

    A folder may hold more: records of another recipe, or of older numerics.
    """
    store = Store(folder)
    plan = _plan(folder, stage)
    cells = None if plan is None else {cell["key"]: cell.get("cell", {}) for cell in plan}
    if stage in SCAN_STAGES:  # a plan alone: its records lie among those of the task stages
        for entry in plan or ():
            record = store.read(entry["stage"], entry["key"])
            if record is not None:
                yield {**record, "cell": record["cell"] | entry["cell"]}
        return
    for record in store.records(stage):
        if cells is None or record["key"] in cells:
            # What the plan calls the cell: another run may have computed it under other names.
            record["cell"] |= cells[record["key"]] if cells else {}
            yield record


def planned_grid(run: str | Path, stage: str, kind: str = "reinit") -> dict[str, list] | None:
    """What the run's last plan of ``recovery`` or ``probing`` expects: the `grid` of the claims.

    A verdict on what happens to be there would pass over what is missing. None without a plan.
    """
    choose(stage, ("recovery", "probing"), "stage with claims")
    plan = _plan(run_folder(run), stage)
    if plan is None or not all("cell" in entry for entry in plan):
        return None
    cells = [entry["cell"] for entry in plan]

    def found(name: str, rows: Iterable[dict[str, Any]]) -> list:
        return sorted({row[name] for row in rows})

    healed = [
        c for c in cells
        if c["state"] == "healed" and c["kind"] == kind and c["side"] in ("bottom", "top", "all")
        and c["part"] == "all"
    ]  # fmt: skip
    grid = {
        "seeds": found("seed", healed or cells), "levels": found("level", healed),
        "sides": [side for side in found("side", healed) if side != "all"],
    }  # fmt: skip
    if stage == "recovery":
        return {**grid, "tasks": found("task", healed)}
    return {
        **grid,
        "tasks": found("task", [c for c in cells if c["state"] == "intact"]),
        "healed_tasks": found("task", healed),
        "corpora": sorted({(c["corpus"], c["column"]) for c in cells}),
    }


def load_results(run: str | Path, stage: str) -> pandas.DataFrame:
    """The finished cells of a stage of a run: one row a cell, with at least ``model task side level
    kind seed metric score score_f1 score_accuracy``.

    Of the stage ``probing`` it is one row a cell and layer (0 is the embeddings), with the columns
    `PROBING_COLUMNS`; of ``neurons`` one row a cell, with `NEURON_COLUMNS` (`load_neurons` has the
    rest). Where the run says what it planned, records of other plans in the same folder are left
    out.
    Raises HealingError for an unknown stage and for a run that has no records of it.
    """
    choose(stage, STAGES, "stage")
    folder = run_folder(run)
    if not folder.is_dir():
        raise HealingError(f"no such run: {folder}; make it with: healing run PROFILE")
    frame = table(planned_records(folder, stage), stage)
    if frame.empty:
        raise HealingError(f"run {folder} has no records of stage {stage!r}: run that stage first")
    if stage in SCAN_STAGES:  # their tables have no grid in which a gap would show
        there = set(frame["key"])
        lost = [c for c in _plan(folder, stage) if c["key"] not in there]
        if lost:
            raise HealingError(
                f"run {folder} lacks {len(lost)} planned cells of {stage!r}, the first is "
                f"{lost[0]['name']}: run that stage again"
            )
    return frame


def write_tables(run: str | Path, tables: dict[str, pandas.DataFrame]) -> list[Path]:
    """Each table as ``RUN/tables/NAME.csv``, for readers without Python."""
    paths = []
    for name, frame in tables.items():
        path = run_folder(run) / "tables" / f"{name}.csv"
        write_atomically(path, frame.to_csv(index=False, float_format="%.9g"))
        paths.append(path)
    return paths


def load_curves(run: str | Path, scans: bool = False) -> pandas.DataFrame:
    """Score on held-out examples over training: ``model task state side level kind seed metric step
    score loss``, one row a point; of the stages baseline and recovery, with `scans` also of those.

    Beside them stand ``scan layers start recipe train_size epochs learning_rate evaluations head
    key``."""
    import pandas

    rows = []
    for stage in ("baseline", "recovery", *(["scans"] if scans else [])):
        for record in planned_records(run_folder(run), stage):
            flat = row(record)
            cell = {name: flat[name] for name in (*CELL_COLUMNS, *CURVE_COLUMNS)}
            cell["scan"] = flat.get("scan", "main")
            for point in record["result"]["curve"]:
                score, loss = point.get(cell["metric"]), point["loss"]
                rows.append({**cell, "step": point["step"], "score": score, "loss": loss})
    if not rows:
        raise HealingError(f"run {run_folder(run)} has no learning curves: run 01 and 03 first")
    return _ordered(pandas.DataFrame(rows))


def _ordered(frame: pandas.DataFrame) -> pandas.DataFrame:
    """By what the rows say; a record's file name, and so their first order, is a hash."""
    order = ["model", "task", "kind", "level", "side", "seed"]
    return frame.sort_values(order, kind="stable", ignore_index=True)


def load_similarity(
    run: str | Path, stage: str = "corruption", state: str = "broken"
) -> pandas.DataFrame:
    """Similarity of broken to intact representations: ``model task side level kind strength part
    seed key layer layers measure similarity``, one row a layer (0 is the embeddings) and measure
    (cosine, cka, stream: see `similarity.layer_similarity`); of the stage `corruption` or `harms`.
    The state ``untrained`` is the floor: a network that has learnt nothing, of `corruption`."""
    import pandas

    rows = []
    for record in planned_records(run_folder(run), stage):
        if record["cell"]["state"] != state:
            continue
        cell = {name: record["cell"][name] for name in CELL_COLUMNS}
        layers = tuple(record["cell"]["layers"])
        for measure, values in record["result"]["similarity"].items():
            for layer, value in enumerate(values):
                rows.append(
                    {
                        **cell,
                        "key": record["key"],
                        "layers": layers,
                        "layer": layer,
                        "measure": measure,
                        "similarity": value,
                    }
                )
    if not rows:
        raise HealingError(f"run {run_folder(run)} has no broken models: run 02_corruption first")
    return _ordered(pandas.DataFrame(rows))


def load_changes(run: str | Path, stage: str = "corruption") -> pandas.DataFrame:
    """What broke each model, of the stage `corruption` or `harms`: the cell's columns, ``key values
    not_finite`` (values put through the kind, and those that are infinite or not a number now) and
    ``change_ROLE``, by role of the tensors the mean norm of the change over the norm before."""
    import pandas

    rows = []
    for record in planned_records(run_folder(run), stage):
        if record["cell"]["state"] == "untrained":
            continue
        changed = record["result"]["changed"]
        rows.append(
            {
                **{name: record["cell"][name] for name in CELL_COLUMNS},
                "key": record["key"],
                "values": changed["values"],
                "not_finite": changed.get("not_finite", 0),
                **{f"change_{role}": v for role, v in changed["relative_change"].items()},
            }
        )
    if not rows:
        raise HealingError(f"run {run_folder(run)} has no broken models: run 02_corruption first")
    return _ordered(pandas.DataFrame(rows))


def load_probed_scores(run: str | Path) -> pandas.DataFrame:
    """The task scores of the models that the stage ``probing`` looked into, as `load_results` gives
    them: also of tasks that the task stages did not plan, and without those of scans. Raises
    HealingError where one is missing.
    """
    store = Store(run_folder(run))
    names: dict[str, dict[str, Any]] = {}
    for record in planned_records(store.run, "probing"):
        cell = record["cell"]
        if cell["network"] and cell.get("scan", "main") == "main":
            stage, key = cell["network"]
            scored = store.read(stage, key)
            if scored is None:
                raise HealingError(
                    f"run {store.run} lacks the score of the {cell['state']} model of task "
                    f"{cell['task']}, seed {cell['seed']}: run 04_linguistics again"
                )
            # What the probing plan calls it: another run may have computed it under other names.
            here = {name: cell[name] for name in ("model", "task", "side", "level", "kind")}
            names[key] = {**scored, "cell": scored["cell"] | here}
    if not names:
        raise HealingError(f"run {store.run} has no probed models with a task: run 04 first")
    return table(names.values())


def has_stage(run: str | Path, stage: str) -> bool:
    """Whether a run has finished cells of a stage."""
    return next(planned_records(run_folder(run), choose(stage, STAGES, "stage")), None) is not None


def load_neurons(run: str | Path, what: str) -> pandas.DataFrame:
    """What the stage `neurons` found beside its table, a row each, with the cell's columns.

    `what`: ``by_layer`` (``layer count share``: the minimal set's neurons in each layer), ``curve``
    (``k share which accuracy``), ``ablation`` (``k share which score metric``), ``agreement``
    (``first second spearman overlap``) or ``strongest`` (``rank layer neuron``).
    """
    import pandas

    read = {
        "by_layer": lambda r: [
            {"layer": i, "count": n, "share": n / r["k"] if r["k"] else float("nan")}
            for i, n in enumerate(r["by_layer"])
        ],
        "curve": lambda r: [row | {"share": row["k"] / r["neurons"]} for row in r["curve"]],
        "ablation": lambda r: [row | {"share": row["k"] / r["neurons"]} for row in r["ablation"]],
        "agreement": lambda r: [
            {("overlap" if n.startswith("overlap") else n): v for n, v in row.items()}
            for row in r["agreement"]
        ],
        "strongest": lambda r: [
            {"rank": i, "layer": layer, "neuron": neuron}
            for i, (layer, neuron) in enumerate(r["strongest"])
        ],
    }
    choose(what, read, "table of the neurons")
    rows = [
        {**_probed(record), "key": record["key"], **found}
        for record in planned_records(run_folder(run), "neurons")
        for found in read[what](record["result"])
    ]
    if not rows:
        raise HealingError(f"run {run_folder(run)} has no {what} of neurons: run 04 first")
    frame = pandas.DataFrame(rows)
    order = ["model", "task", "state", "seed", "corpus", "column"]
    return frame.sort_values(order, kind="stable", ignore_index=True)


def architectures(probing: pandas.DataFrame) -> dict[str, str]:
    """Each model's architecture, from a table of the stage `probing`."""
    return dict(zip(probing["model"], probing["architecture"], strict=True))


def describe_origin(frame: pandas.DataFrame) -> str:
    """One or two lines on where results come from; says so where devices or precisions mix."""
    lines = [
        f"models: {', '.join(frame['model'].unique())}; tasks: {', '.join(frame['task'].unique())}"
    ]
    made = frame[["device", "precision", "threads", "versions"]].drop_duplicates()
    each = [
        f"{m.device} in {m.precision}, threads: {m.threads}, {m.versions}"
        for m in made.itertuples()
    ]
    lines.append(("computed on " if len(each) == 1 else "MIXED: computed on ") + "; ".join(each))
    return "\n".join(lines)
