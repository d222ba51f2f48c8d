"""Tables as a notebook shows them: numbers rounded, columns named for people, a caption."""

from __future__ import annotations

import html
import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


PROSE = 32  # characters; a column with a longer cell is read as text


def share(level: float) -> str:
    """A level as the fraction a person wrote: 0.1667 is ``1/6``."""
    return str(Fraction(level).limit_denominator(99))


def _text(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.{digits}f}"
    return "–" if value is None else str(value)


def show_table(frame: pandas.DataFrame, caption: str = "", digits: int = 3) -> None:
    """Display a table with a caption; missing values are a dash, levels are fractions."""
    from IPython.display import display

    shown = frame.copy()
    if "level" in shown:
        shown["level"] = shown["level"].map(share)
    cells = [[_text(value, digits) for value in row] for row in shown.itertuples(index=False)]
    names = [str(name).replace("_", " ") for name in shown.columns]
    # Jupyter aligns to the right, which is right for numbers and names and not for sentences.
    left = " style='text-align:left'"
    prose = [left if any(len(row[i]) > PROSE for row in cells) else "" for i in range(len(names))]
    head = "".join(f"<th{p}>{html.escape(n)}</th>" for n, p in zip(names, prose, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{p}>{html.escape(c)}</td>" for c, p in zip(row, prose, strict=True))
        + "</tr>"
        for row in cells
    )
    note = f"<caption style='text-align:left'>{html.escape(caption)}</caption>" if caption else ""
    table = f"<table>{note}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    plain = "\n".join([caption, *(" | ".join(row) for row in [names, *cells])]).strip()
    display({"text/html": table, "text/plain": plain}, raw=True)


def with_interval(summary: pandas.DataFrame, name: str, digits: int = 3) -> list[str]:
    """``mean [low, high]`` of a column of `statistics.summary`, as text."""
    rows = zip(summary[name], summary[f"{name}_low"], summary[f"{name}_high"], strict=True)
    out = []
    for mean, lowest, highest in rows:
        if math.isnan(mean):
            out.append("–")
        elif math.isnan(lowest):
            out.append(f"{mean:.{digits}f}")
        else:
            out.append(f"{mean:.{digits}f} [{lowest:.{digits}f}, {highest:.{digits}f}]")
    return out


def claim_sentences(claims: pandas.DataFrame) -> list[str]:
    """The verdicts of `statistics.claims` as sentences."""
    lines = []
    for row in claims.itertuples():
        if not row.n:
            lines.append(f"{row.claim}, {row.kind}, {row.model}: {row.verdict}, {row.reason}.")
            continue
        points = [100 * value for value in (row.effect, row.low, row.high)]
        lines.append(
            f"{row.claim}, {row.kind}, {row.model}: {row.statement}. {row.verdict.capitalize()}"
            f" - {points[0]:.1f} points, 95 % interval {points[1]:.1f} to {points[2]:.1f} over "
            f"{row.n} units ({row.units}); corrected p {row.p_corrected:.3f}, the smallest p that "
            f"so many units can reach {row.smallest_p:.2g}: {row.reason}."
            + ("" if row.evidence == "evidence" else f" ({row.evidence}.)")
        )
    return lines
