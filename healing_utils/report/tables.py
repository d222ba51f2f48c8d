"""Tables as a notebook shows them: numbers rounded, columns named for people, a caption."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import pandas as pd

from healing_utils.analysis.effects import as_fraction

PROSE = 32  # characters; a column with a longer cell is read as text


def show_table(frame: pd.DataFrame, caption: str = "") -> None:
    """Display a table with a caption; missing values are a dash, levels are fractions."""
    from IPython.display import display

    def text(value: Any) -> str:
        shown = f"{value:z.3f}" if isinstance(value, float) else str(value)
        return "–" if shown in ("nan", "None") else shown

    shown = frame.assign(level=frame["level"].map(as_fraction)) if "level" in frame else frame
    names = [str(name).replace("_", " ") for name in shown.columns]
    cells = [[text(value) for value in row] for row in shown.itertuples(index=False)]
    # Jupyter aligns to the right, which is right for numbers and names and not for sentences.
    left = " style='text-align:left'"
    prose = [left if any(len(row[i]) > PROSE for row in cells) else "" for i in range(len(names))]

    def line(tag: str, row: list[str]) -> str:
        inside = zip(row, prose, strict=True)
        return "<tr>" + "".join(f"<{tag}{p}>{html.escape(c)}</{tag}>" for c, p in inside) + "</tr>"

    note = f"<caption{left}>{html.escape(caption)}</caption>" if caption else ""
    body = "".join(line("td", row) for row in cells)
    table = f"<table>{note}<thead>{line('th', names)}</thead><tbody>{body}</tbody></table>"
    plain = "\n".join([caption, *(" | ".join(row) for row in [names, *cells])]).strip()
    display({"text/html": table, "text/plain": plain}, raw=True)


def show_claims(
    claims: pd.DataFrame,
    caption: str,
    before: Sequence[str] = ("model", "variant"),
    after: Sequence[str] = ("verdict", "n", "p", "reason"),
) -> None:
    """Display rows of `claims.decide`: claim, the columns `before`, the effect with its interval,
    and the columns `after`."""
    shown = claims[["claim", *before]].assign(effect=with_interval(claims, "effect"))
    show_table(pd.concat([shown, claims[list(after)]], axis=1), caption)


def with_interval(summary: pd.DataFrame, name: str, digits: int = 3) -> list[str]:
    """``mean [low, high]`` of a column of `recovery.summary`, or the effects of claims, as text."""
    ends = ["low", "high"] if name == "effect" else [f"{name}_low", f"{name}_high"]
    rows = summary[[name, *ends]].to_numpy()
    texts = [[f"{x:z.{digits}f}" for x in row] for row in rows]
    texts = [mean if low == "nan" else f"{mean} [{low}, {high}]" for mean, low, high in texts]
    return ["–" if text == "nan" else text for text in texts]
