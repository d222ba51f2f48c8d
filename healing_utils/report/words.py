"""What the words of figures share: names for people, numbers of seeds, and a table's checks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from healing_utils.analysis.effects import as_fraction
from healing_utils.base.errors import HealingError, nearest
from healing_utils.report.plots import banded


def usable(table: pd.DataFrame, value: str, names: str, once: str = "") -> pd.DataFrame:
    """The rows that hold a value, with short names of models, tasks and corpora.

    Raises HealingError where one of the columns `names` is missing, where no row is left, and where
    two rows agree in all columns `once`.
    """
    missing = [name for name in [*names.split(), value] if name not in table]
    if missing:
        near = nearest(missing[0], table.columns)
        hint = f" Did you mean {near!r}?" if near else ""
        raise HealingError(f"no column {missing[0]!r} among {', '.join(table.columns)}.{hint}")
    frame = shortened(table[table[value].notna()])
    if frame.empty:
        raise HealingError(f"no {value}: nothing to draw")
    by = once.split()
    twice = frame[frame.duplicated(by)] if by else frame.head(0)
    if len(twice):
        first = ", ".join(f"{name} {twice.iloc[0][name]}" for name in by)
        raise HealingError(f"{len(twice)} duplicate cells to draw; the first is {first}")
    return frame


def shortened(table: pd.DataFrame) -> pd.DataFrame:
    """Models, tasks and corpora without folders and owners, unless two would become one."""
    named = {name: table[name].map(short) for name in ("model", "task", "corpus") if name in table}
    return table.assign(
        **{n: column for n, column in named.items() if column.nunique() == table[n].nunique()}
    )


def titled(frame: pd.DataFrame, always: str, *others: str) -> pd.DataFrame:
    """With a column `panel`: a title of one column, and of the others that tell panels apart."""
    several = [name for name in others if name in frame and frame[name].nunique() > 1]
    lines = [frame[name] for name in [always, *several] if name in frame]
    return frame.assign(panel=["\n".join(filter(None, x)) for x in zip(*lines, strict=True)] or "")


def short(name: object) -> str:
    return str(name).rstrip("/").split("/")[-1]


def place(side: str, level: float) -> str:
    """Where a corruption hit: ``bottom 1/2``, ``all layers``, ``chosen 1/3``."""
    if side == "all":
        return "all layers"
    return f"{'chosen' if side == 'custom' else side} {as_fraction(level)}"


def models(frame: pd.DataFrame) -> str:
    names = list(dict.fromkeys(frame["model"]))
    return ("model " if len(names) == 1 else "models ") + ", ".join(names)


def span(values: Iterable[float]) -> str:
    """``1,200``, or ``800 to 1,200`` where they differ."""
    low, high = int(min(values)), int(max(values))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def seeds(frame: pd.DataFrame, *by: str) -> str:
    """The number of seeds behind a mean, as a range where it is not everywhere the same."""
    counts = frame.groupby(list(by or ["panel", "line"]))["seed"].nunique()
    return f"n = {span(counts)} seed{'' if counts.max() == 1 else 's'}"


def bands(frame: pd.DataFrame) -> str:
    """The seeds of a figure of curves, and what its bands are."""
    drawn = frame["seed"].nunique() > 1 and banded(frame)
    return seeds(frame) + ("; bands are 95 % t-intervals over seeds" if drawn else "")


def metric(name: object) -> str:
    return {"f1": "macro-F1", "": "score"}.get(str(name), str(name))


def metrics(frame: pd.DataFrame) -> str:
    """``macro-F1 (sst2, emotion); matthews (cola)``."""
    named = frame.dropna(subset="metric").groupby("metric", sort=False)["task"]
    return "; ".join(f"{metric(m)} ({', '.join(dict.fromkeys(t))})" for m, t in named)


def demonstration(frame: pd.DataFrame) -> str:
    """What a figure that compares sides has to say of the organism."""
    if "organism" in set(frame["model"]):
        return (
            "The organism was built so that pre-training matters: what it shows of bottom against "
            "top is a demonstration, never evidence."
        )
    return ""


def number(x: float) -> str:
    """Two significant digits, or all of a larger number, never as a power of ten."""
    return f"{x:,.0f}" if abs(x) >= 10 else f"{float(f'{x:.2g}'):g}"


def spoken(frame: pd.DataFrame, x: str, y: str, unit: str = "") -> str:
    """The curves in words: of every panel and line the mean at its ends, and its peak between."""
    said = []
    for names, part in frame.groupby(["panel", "line"], sort=False):
        mean = part.groupby(x)[y].mean().dropna()
        ends = dict.fromkeys([mean.index[0], mean.index[-1]])
        words = " to ".join(f"{mean[at]:.2f} at {number(at)}{unit}" for at in ends)
        if mean.max() > mean[list(ends)].max() + 0.005:
            words += f", highest {mean.max():.2f} at {number(mean.idxmax())}{unit}"
        said.append(f"{_joined(names)}: {words}")
    return "; ".join(said)


def means(frame: pd.DataFrame, by: list[str], value: str, form: str = ".2f") -> str:
    """The mean of every group in words."""
    found = frame.groupby(by, sort=False)[value].mean()
    return "; ".join(
        f"{_joined(names)} {'none' if np.isnan(mean) else format(mean, form)}"
        for names, mean in found.items()
    )


def _joined(names: tuple[str, ...]) -> str:
    return ", ".join(filter(None, names)).replace("\n", ", ")


def stretches(layers: Iterable[int]) -> list[np.ndarray]:
    """Neighbouring layers together: (0, 1, 4) gives (0, 1) and (4,)."""
    found = np.array(sorted(layers), dtype=int)
    return np.split(found, np.flatnonzero(np.diff(found) > 1) + 1) if len(found) else []
