"""Records as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from healing_utils.errors import HealingError, choose
from healing_utils.paths import run_folder
from healing_utils.records import Store, write_atomically

if TYPE_CHECKING:
    import pandas

TASK_STAGES = ("baseline", "corruption", "recovery")
COLUMNS = (
    "model", "task", "state", "side", "level", "kind", "part", "strength", "layers", "n_layers",
    "seed", "metric", "score", "score_f1", "score_accuracy", "score_matthews", "score_spearman",
    "chance", "chance_f1", "chance_accuracy", "test_size", "train_size", "train_tokens", "seconds",
    "device", "precision", "threads", "versions", "key",
)  # fmt: skip
CELL_COLUMNS = ("model", "task", "state", "side", "level", "kind", "part", "strength", "n_layers",
                "seed", "metric")  # fmt: skip


def row(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a task stage as one flat row: `COLUMNS`, NaN where a metric does not apply."""
    cell, result, nan = record["cell"], record["result"], float("nan")
    scores, chance, metric = result["scores"], result["chance"], cell["metric"]
    flat: dict[str, Any] = {name: cell[name] for name in CELL_COLUMNS}
    flat["layers"] = tuple(cell["layers"])
    flat["score"], flat["chance"] = scores[metric], chance[metric]
    for name in ("f1", "accuracy", "matthews", "spearman"):
        flat[f"score_{name}"] = scores.get(name, nan)
    for name in ("f1", "accuracy"):
        flat[f"chance_{name}"] = chance.get(name, nan)
    for name in ("test_size", "train_size", "train_tokens"):
        flat[name] = result.get(name)
    flat["precision"] = result.get("precision", "float32")  # scoring alone is in float32
    versions = record["made"]["versions"]
    flat["versions"] = f"torch {versions['torch']}, transformers {versions['transformers']}"
    flat["seconds"] = record["times"]["seconds"]
    flat["device"], flat["threads"] = record["made"]["device"], record["made"]["threads"]
    flat["key"] = record["key"]
    return flat


def table(records: Iterable[dict[str, Any]]) -> pandas.DataFrame:
    """One row a record, ordered by what the rows say and not by when they were made."""
    import pandas

    frame = pandas.DataFrame([row(r) for r in records], columns=list(COLUMNS))
    order = ["model", "task", "state", "kind", "level", "side", "layers", "seed", "key"]
    return frame.sort_values(order, ignore_index=True, kind="stable")


def planned_records(folder: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Records of the cells that the run's last plan of this stage names, or all without a plan.

    A folder may hold more: records of another recipe, or of older numerics.
    """
    try:
        plan = json.loads((folder / "plans" / f"{stage}.json").read_text(encoding="utf-8"))
        cells = {cell["key"]: cell.get("cell", {}) for cell in plan["cells"]}
    except (OSError, ValueError, KeyError, TypeError):
        cells = None
    for record in Store(folder).records(stage):
        if cells is None or record["key"] in cells:
            # What the plan calls the cell: another run may have computed it under other names.
            record["cell"] |= cells[record["key"]] if cells else {}
            yield record


def load_results(run: str | Path, stage: str) -> pandas.DataFrame:
    """The finished cells of a stage of a run: one row a cell, with at least ``model task side level
    kind seed metric score score_f1 score_accuracy``.

    Where the run says what it planned, records of other plans in the same folder are left out.
    Raises HealingError for an unknown stage and for a run that has no records of it.
    """
    choose(stage, TASK_STAGES, "stage")
    folder = run_folder(run)
    if not folder.is_dir():
        raise HealingError(f"no such run: {folder}; make it with: healing run PROFILE")
    frame = table(planned_records(folder, stage))
    if frame.empty:
        raise HealingError(f"run {folder} has no records of stage {stage!r}: run that stage first")
    return frame


def write_tables(run: str | Path, tables: dict[str, pandas.DataFrame]) -> list[Path]:
    """Each table as ``RUN/tables/NAME.csv``, for readers without Python."""
    paths = []
    for name, frame in tables.items():
        path = run_folder(run) / "tables" / f"{name}.csv"
        write_atomically(path, frame.to_csv(index=False, float_format="%.9g"))
        paths.append(path)
    return paths


def load_curves(run: str | Path) -> pandas.DataFrame:
    """Score on held-out examples over training: ``model task state side level kind seed metric step
    score loss``, one row a point; of the stages baseline and recovery."""
    import pandas

    rows = []
    for stage in ("baseline", "recovery"):
        for record in planned_records(run_folder(run), stage):
            cell = {name: record["cell"][name] for name in CELL_COLUMNS}
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


def load_similarity(run: str | Path) -> pandas.DataFrame:
    """Similarity of broken to intact representations: ``model task side level kind seed layer
    layers measure similarity``, one row a layer (0 is the embeddings) and measure (cosine, cka)."""
    import pandas

    rows = []
    for record in planned_records(run_folder(run), "corruption"):
        cell = {name: record["cell"][name] for name in CELL_COLUMNS}
        layers = tuple(record["cell"]["layers"])
        for measure, values in record["result"]["similarity"].items():
            for layer, value in enumerate(values):
                rows.append(
                    {
                        **cell,
                        "layers": layers,
                        "layer": layer,
                        "measure": measure,
                        "similarity": value,
                    }
                )
    if not rows:
        raise HealingError(f"run {run_folder(run)} has no broken models: run 02_corruption first")
    return _ordered(pandas.DataFrame(rows))


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
