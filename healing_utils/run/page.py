"""The page of a run: verdicts, figures, tables and executed notebooks in one folder of files.

`index.html` needs nothing but the run's folder: styles are inlined, figures are referred to by
relative path, and nothing is fetched from elsewhere. A content security policy and a clean-up of
the notebooks' HTML see to it: no script runs and no address outside of the folder is asked. What a
run does not hold (yet) is said on the page.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from healing_utils.analysis.statistics import as_fraction, layer_tuple, measures, summary
from healing_utils.base.errors import HealingError
from healing_utils.base.records import write_atomically
from healing_utils.report.figures import read_captions
from healing_utils.run.notebooks import quick_import

_SYMBOLS = {"holds": "✓", "fails": "✗", "undecided": "?"}  # never colour alone
_DPI = 200  # of saved figures; shown at 120 px an inch, so that 8 points are read as such
_NOT_SHOWN = ("run",)  # where the run lay when it was made means nothing to a reader


def write_page(run_folder: str | Path) -> Path:
    """Write ``index.html`` and ``notebooks/NAME.html`` into a run's folder; return the page's path.

    Reads ``tables/{claims,measures,results}.csv``, ``figures/*.png`` with ``captions.json``,
    ``parameters.json``, ``notebooks/*.ipynb`` and what the records say about versions and devices.
    A part that is missing or cannot be read is named on the page. Raises HealingError only where
    the folder itself does not exist.
    """
    run = Path(run_folder)
    if not run.is_dir():
        raise HealingError(f"no such run: {run}")
    notebooks = [_write_notebook(path) for path in sorted((run / "notebooks").glob("*.ipynb"))]
    provenance = _provenance(run)
    parameters, parameters_note = _parameters(run)
    page = (
        _environment()
        .get_template("index")
        .render(
            name=run.resolve().name,
            facts=_facts(parameters, provenance, notebooks),
            claims=_section(_claims, run),
            figures=_section(_figures, run),
            results=_section(_results, run),
            notebooks=notebooks,
            parameters={k: _shown(v) for k, v in parameters.items() if k not in _NOT_SHOWN},
            parameters_note=parameters_note,
            provenance=provenance,
        )
    )
    path = run / "index.html"
    write_atomically(path, page)
    return path


# --- what the run holds ----------------------------------------------------------------------


@dataclass
class _Section:
    """Rows to show, or a note on why there are none."""

    rows: list = field(default_factory=list)
    note: str = ""


def _section(build: Callable[[Path], list], run: Path) -> _Section:
    try:
        rows = build(run)
    except FileNotFoundError as error:
        name = _inside(run, error.filename)
        return _Section(note=f"Not there yet: {name}, which the analysis notebook writes.")
    except Exception as error:  # a page with a gap that is named is better than no page
        return _Section(note=f"Cannot be shown: {type(error).__name__}: {error}")
    return _Section(rows, "" if rows else "Nothing yet: the analysis notebook has not drawn any.")


def _inside(run: Path, path: object) -> str:
    try:
        return Path(str(path)).relative_to(run).as_posix()
    except ValueError:
        return Path(str(path)).name


def _table(run: Path, name: str) -> pd.DataFrame:
    path = run / "tables" / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(2, "no such table", str(path))
    # A side or kind may be called "none": only an empty field is a missing value.
    return pd.read_csv(path, keep_default_na=False, na_values=["", "nan", "NaN"])


def _claims(run: Path) -> list[dict[str, Any]]:
    rows = []
    for row in _table(run, "claims").to_dict("records"):
        verdict = str(row.get("verdict", "undecided"))
        evidence = str(row.get("evidence", ""))
        n, expected = row.get("n", math.nan), row.get("n_expected", math.nan)
        rows.append(
            {
                "model": _text(row.get("model")),
                "kind": _text(row.get("kind")),
                "claim": _text(row.get("claim")),
                "statement": _text(row.get("statement")),
                "definition": _text(row.get("definition")),
                "effect": _points(row.get("effect"), sign=True),
                "interval": _interval(row.get("low"), row.get("high"), 100, 1),
                "n": _text(n) + (f" of {expected:.0f}" if n < expected else ""),
                "units": _text(row.get("units")),
                "p": _number(row.get("p"), ".3g"),
                "smallest_p": _number(row.get("smallest_p"), ".3g"),
                "p_corrected": _number(row.get("p_corrected"), ".3g"),
                "verdict": verdict if verdict in _SYMBOLS else "undecided",
                "symbol": _SYMBOLS.get(verdict, "?"),
                "reason": _text(row.get("reason")),
                "note": "" if evidence in ("", "nan", "evidence") else evidence,
            }
        )
    return rows


def _figures(run: Path) -> list[dict[str, Any]]:
    folder = run / "figures"
    captions = read_captions(folder)
    found = {path.stem: path for path in sorted(folder.glob("*.png"))}
    order = [n for n in captions if n in found] + [n for n in found if n not in captions]
    rows = []
    for name in order:
        words = captions.get(name, {})
        size = _png_size(found[name])
        rows.append(
            {
                "name": name,
                "alt": words.get("alt") or f"Figure {name}, without alternative text",
                "caption": words.get("caption") or f"{name} (saved without a caption)",
                "svg": found[name].with_suffix(".svg").is_file(),
                "size": tuple(round(x * 120 / _DPI) for x in size) if size else None,
            }
        )
    return rows


def _png_size(path: Path) -> tuple[int, int] | None:
    """Width and height in pixels, from the header."""
    with path.open("rb") as file:
        head = file.read(24)
    return struct.unpack(">II", head[16:24]) if head[:4] == b"\x89PNG" and len(head) == 24 else None


def _results(run: Path) -> list[dict[str, Any]]:
    try:
        measured = _table(run, "measures")
    except FileNotFoundError:
        measured = measures(_table(run, "results"))
    measured["reason"] = measured.reason.fillna("")
    measured["layers"] = [layer_tuple(x) for x in measured.layers]
    order = dict.fromkeys(zip(measured.model, measured.task, strict=True))
    means = summary(measured)
    rows = []
    for model, task in order:
        part = means[(means.model == model) & (means.task == task)]
        for row in part.sort_values(
            ["kind", "level", "side"], ascending=[False, True, True]
        ).to_dict("records"):
            layers = row["layers"]
            rows.append(
                {
                    "model": str(model),
                    "task": str(task),
                    "metric": row["metric"],
                    "test": _test_error(row),
                    "kind": row["kind"] + ("" if row["part"] == "all" else f", {row['part']}"),
                    "level": str(as_fraction(row["level"])),
                    "layers": len(layers) or "",
                    "side": row["side"],
                    "n": row["n"],
                    "reason": row["reason"],
                    **{
                        name: (
                            _number(row[name], ".3f"),
                            _interval(row[f"{name}_low"], row[f"{name}_high"], 1, 3),
                        )
                        for name in ("intact", "broken", "healed", "retained", "healing")
                    },
                }
            )
    return rows


def _test_error(row: dict[str, Any]) -> str:
    if _missing(row["test_error"]):
        return ""
    return f"test set's own standard error {row['test_error']:.3f} on {row['test_size']:.0f}"


def _parameters(run: Path) -> tuple[dict[str, Any], str]:
    path = run / "parameters.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "Not there yet: parameters.json."
    except (OSError, ValueError) as error:
        return {}, f"parameters.json cannot be read: {error}"
    return (found, "") if isinstance(found, dict) else ({}, "parameters.json is not a table.")


def _provenance(run: Path) -> dict[str, Any]:
    """What made the records: how many cells by version, device, threads; and which are mixed."""
    values: dict[str, Counter] = {}
    finished, cells, unreadable = "", 0, 0
    for path in sorted((run / "records").glob("*/[!.]*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            made = dict(record["made"])
        except (OSError, ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        cells += 1
        versions = made.pop("versions", {})
        for name, value in {**made, **(versions if isinstance(versions, dict) else {})}.items():
            values.setdefault(str(name), Counter())[_shown(value)] += 1
        times = record.get("times")
        if isinstance(times, dict):
            finished = max(finished, str(times.get("finished", "")))
    if not cells:
        try:
            table = _table(run, "results")
        except Exception:
            table = pd.DataFrame()
        cells = len(table)
        for name in ("device", "precision", "threads"):
            if name in table:
                values[name] = Counter(_shown(v) for v in table[name].dropna())
    rows = [(name, [(v, count[v]) for v in sorted(count)]) for name, count in values.items()]
    return {
        "rows": rows,
        "mixed": [name for name, found in rows if len(found) > 1],
        "cells": cells,
        "finished": finished,
        "unreadable": unreadable,
    }


def _facts(parameters: dict, provenance: dict, notebooks: list[dict]) -> list[tuple[str, str]]:
    """The line below the title: what ran on what, and when."""
    when = provenance["finished"] or max((n["end"] for n in notebooks), default="")
    try:
        when = f"{datetime.fromisoformat(when):%d %B %Y, %H:%M} UTC"
    except ValueError:
        when = "not known"
    return [
        ("Model", _shown(parameters.get("model", "not known"))),
        ("Data", _shown(parameters.get("task", "not known"))),
        ("Seeds", _shown(parameters.get("seeds", "not known"))),
        ("Cells", str(provenance["cells"])),
        ("Last result", when),
    ]


# --- notebooks -------------------------------------------------------------------------------


def _write_notebook(path: Path) -> dict[str, Any]:
    """Convert an executed notebook to HTML beside it; what the page says about it."""
    with quick_import():
        import nbformat

    entry = {"name": path.stem, "title": path.stem, "href": "", "end": "", "seconds": ""}
    try:
        notebook = nbformat.read(path, as_version=4)
        entry["title"] = _title(notebook) or path.stem
        made = notebook.metadata.get("papermill") or {}
        entry["end"] = str(made.get("end_time") or "")
        seconds = made.get("duration")
        entry["seconds"] = f"{seconds:.0f} s" if isinstance(seconds, (int, float)) else ""
        entry["state"], entry["status"] = _notebook_status(notebook)
        body = _notebook_html(notebook)
        page = (
            _environment()
            .get_template("notebook")
            .render(
                title=entry["title"],
                body=Markup(body),
                status=entry["status"],
                state=entry["state"],
            )
        )
        write_atomically(path.with_suffix(".html"), page)
        entry["href"] = f"notebooks/{path.stem}.html"
    except Exception as error:  # one bad notebook must not hide the others
        entry["state"] = "fails"
        entry["status"] = f"cannot be shown: {type(error).__name__}: {str(error)[:200]}"
    return entry


def _notebook_status(notebook) -> tuple[str, str]:
    code = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
    for number, cell in enumerate(code, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                return "fails", f"stopped in code cell {number} with {output.ename}"
    ran = sum(cell.execution_count is not None for cell in code)
    if ran < len(code):
        return "undecided", f"{ran} of {len(code)} code cells ran"
    return "holds", f"ran to its end, {len(code)} code cell" + ("" if len(code) == 1 else "s")


def _title(notebook) -> str:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("# "):
                    return line[2:].strip()
    return ""


def _notebook_html(notebook) -> str:
    """The notebook as an HTML fragment without scripts and without outside addresses to load."""
    from bs4 import BeautifulSoup

    fragment, _ = _exporter().from_notebook_node(notebook)
    soup = BeautifulSoup(fragment, "html.parser")
    for tag in soup(["script", "iframe", "object", "embed", "link", "base", "meta", "form"]):
        tag.decompose()
    for tag in soup.find_all(True):
        for name in [n for n in tag.attrs if n.lower().startswith("on")]:
            del tag[name]
    for tag in soup.find_all(src=True):
        if not _stays_inside(tag["src"]):
            words = tag.get("alt", "")
            tag.replace_with(f"[{words}]" if words else "")
    for tag in soup.find_all(srcset=True):
        del tag["srcset"]
    for tag in soup.find_all(href=True):
        if tag["href"].strip().lower().startswith("javascript:"):
            del tag["href"]
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "wide", "tabindex": "0"}))
    return str(soup)


@functools.cache
def _exporter():
    from nbconvert import HTMLExporter

    return HTMLExporter(template_name="basic")  # a fragment: the page brings its own styles


def _stays_inside(address: str) -> bool:
    address = address.strip().lower()
    return address.startswith("data:image/") or not (
        address.startswith("//") or ":" in address.split("/")[0]
    )


# --- words -----------------------------------------------------------------------------------


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: object) -> str:
    if _missing(value):
        return ""
    return f"{value:.0f}" if isinstance(value, float) and value == int(value) else str(value)


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and 0 < value < 1 and as_fraction(value).denominator <= 12:
        fraction = as_fraction(value)
        return str(fraction) if abs(float(fraction) - value) < 1e-5 else f"{value:g}"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: object, spec: str) -> str:
    # "z" (PEP 682) leaves no sign on what rounds to zero
    return "" if _missing(value) or isinstance(value, str) else format(float(value), spec)


def _points(value: object, sign: bool = False) -> str:
    return "" if _missing(value) else _number(100 * value, "+z.1f" if sign else "z.1f")


def _interval(low: object, high: object, factor: float, digits: int) -> str:
    if _missing(low) or _missing(high):
        return ""
    return f"[{_number(factor * low, f'z.{digits}f')}, {_number(factor * high, f'z.{digits}f')}]"


# --- templates -------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light dark; --fg:#1c1e21; --soft:#5a616b; --bg:#fff; --line:#d9dde3;
  --panel:#f6f7f9; --link:#0058a3; --holds:#00614a; --holds-bg:#dff3ec; --fails:#9c3d00;
  --fails-bg:#fdebdf; --undecided:#4d5560; --undecided-bg:#eceff3; }
@media (prefers-color-scheme: dark) { :root { --fg:#e6e8eb; --soft:#a3abb6; --bg:#15181c;
  --line:#363c45; --panel:#1e2227; --link:#7cbcf5; --holds:#7fdcbf; --holds-bg:#123a30;
  --fails:#ffb184; --fails-bg:#4a2410; --undecided:#c3cad3; --undecided-bg:#2c323a; } }
* { box-sizing: border-box; }
body { margin:0 auto; padding:1.2rem clamp(.8rem, 3vw, 2rem) 4rem; max-width:78rem;
  background:var(--bg); color:var(--fg); font:16px/1.55 system-ui, "Segoe UI", "DejaVu Sans",
  sans-serif; overflow-wrap:break-word; }
h1 { font-size:1.75rem; line-height:1.2; margin:.4rem 0 .6rem; }
h2 { font-size:1.3rem; margin:2.4rem 0 .6rem; padding-top:.4rem; border-top:1px solid var(--line); }
a { color:var(--link); } nav a { margin-right:1rem; }
.soft, figcaption, caption { color:var(--soft); }
dl.facts { display:flex; flex-wrap:wrap; gap:.3rem 1.6rem; margin:0; } dl.facts div { min-width:0; }
dl.facts dt { color:var(--soft); font-size:.8rem; } dl.facts dd { margin:0; font-weight:600; }
.wide { width:fit-content; max-width:100%; overflow-x:auto; margin:.8rem 0;
  border:1px solid var(--line); border-radius:6px; }
.wide:focus-visible { outline:2px solid var(--link); }
table { border-collapse:collapse; width:100%; font-size:.88rem; font-variant-numeric:tabular-nums; }
caption { text-align:left; padding:.5rem .7rem; caption-side:top; }
th, td { padding:.38rem .7rem; text-align:left; vertical-align:top; border:0 solid var(--line);
  border-top-width:1px; }
thead th { background:var(--panel); white-space:nowrap; border-top-width:0; }
td.num, th.num { text-align:right; white-space:nowrap; }
td small { color:var(--soft); display:block; }
th[scope=rowgroup] { background:var(--panel); }
th[scope=row] { font-weight:600; white-space:nowrap; } td.say { min-width:12.5rem; }
.verdict { display:inline-block; padding:.08rem .55rem; border-radius:1rem; font-weight:700;
  white-space:nowrap; }
.holds { color:var(--holds); background:var(--holds-bg); }
.fails { color:var(--fails); background:var(--fails-bg); }
.undecided { color:var(--undecided); background:var(--undecided-bg); }
.note { padding:.6rem .8rem; border-left:4px solid var(--line); background:var(--panel);
  margin:.8rem 0; }
.note.warn { border-color:var(--fails); }
nav { margin:.8rem 0; } p { max-width:52rem; }
figure { margin:1.6rem 0; } figure a:has(img) { display:block; overflow-x:auto; }
@media (max-width:40rem) { figure img { min-width:36rem; } }
figure img { max-width:100%; height:auto; background:#fff;
  border-radius:6px; display:block; } figcaption { font-size:.9rem; margin-top:.5rem;
  max-width:52rem; }
ul.plain { list-style:none; padding:0; } ul.plain li { padding:.45rem 0;
  border-bottom:1px solid var(--line); }
table.short { width:auto; min-width:min(100%, 26rem); }
"""

_NOTEBOOK_CSS = """
pre { overflow-x:auto; padding:.6rem .8rem; margin:.4rem 0; font-size:.84rem; line-height:1.45;
  border-radius:6px; } .highlight pre, .highlight { background:var(--panel) !important; }
code { font-size:.92em; } .prompt, .anchor-link { display:none; }
.cell { margin:1rem 0; } .output_area { overflow-x:auto; max-width:100%; }
.output_area pre { background:transparent; border-left:3px solid var(--line); border-radius:0; }
.output_area img, .output_area svg { max-width:100%; height:auto; background:#fff; }
.output_stderr pre { border-color:var(--fails); } .wide table { width:auto; }
.ansi-red-fg { color:var(--fails); } .ansi-green-fg { color:var(--holds); }
.ansi-bold { font-weight:bold; } .ansi-cyan-fg, .ansi-blue-fg { color:var(--link); }
"""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:">
<title>{{ title }}</title>
<style>{{ css }}</style>
</head>
<body>
"""

_INDEX = """{% set title = "Healing study: " ~ name %}{% include "head" %}
<header>
<h1>{{ title }}</h1>
<dl class="facts">
{% for label, value in facts %}<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% if provenance.mixed %}<p class="note warn">These results were not all made alike:
{{ provenance.mixed | join(", ") }} differ{{ "s" if provenance.mixed | length == 1 }} between
cells (<a href="#made">which</a>).</p>{% endif %}
<nav aria-label="On this page"><a href="#verdicts">Verdicts</a><a href="#figures">Figures</a>
<a href="#results">Results</a><a href="#notebooks">Notebooks</a><a href="#parameters">Parameters</a>
<a href="#made">Versions</a></nav>
</header>
<main>

<section id="verdicts"><h2>Verdicts</h2>
{% if claims.rows %}
<p>Claims A1 to A3 are those of Han, Zhang and Simion (2024),
<a href="https://arxiv.org/abs/2406.14459">Healing Powers of BERT</a>, B1 to B3 those of Durrani,
Sajjad and Dalvi (2021), <a href="https://arxiv.org/abs/2105.15179">How transfer learning impacts
linguistic knowledge</a>; H is this study's own. A point is a hundredth: of the score (A), of
selectivity (B1), of the depth (B2), of the share healed (H). Intervals are 95&nbsp;% t-intervals
over units, a unit being a task and seed; p is exact and one-sided, and stands beside the smallest
that so many units can reach. A claim <em>holds</em> if the
corrected p is below 0.05 and the interval beyond the claim's margin (one point for A),
<em>fails</em> if the interval is within the margin of zero or on the other side, and is otherwise
<em>undecided</em>.</p>
<div class="wide" tabindex="0"><table>
<thead><tr><th scope="col">Claim</th><th scope="col">Verdict</th>
<th scope="col" class="num">Effect, points</th><th scope="col" class="num">Units</th>
<th scope="col" class="num">Corrected p</th><th scope="col">Why</th></tr></thead>
{% for (model, kind), rows in claims.rows | groupby_keys("model", "kind") %}<tbody>
<tr><th scope="rowgroup" colspan="6">{{ model }}
{%- if kind != "none" %}, {{ kind }}{% endif %}</th></tr>
{% for row in rows %}<tr>
<td class="say"><strong>{{ row.claim }}</strong> {{ row.statement }}.
<small>{{ row.definition }}</small></td>
<td><span class="verdict {{ row.verdict }}">{{ row.symbol }} {{ row.verdict }}</span></td>
<td class="num">{{ row.effect or "none" }}<small>{{ row.interval }}</small></td>
<td class="num">{{ row.n }}<small>{{ row.units }}</small></td>
<td class="num">{{ row.p_corrected or "none" }}{% if row.p %}<small>alone {{ row.p }}</small>
{%- endif %}{% if row.smallest_p %}<small>at best {{ row.smallest_p }}</small>{% endif %}</td>
<td class="say">{{ row.reason }}{% if row.note %}<small>{{ row.note }}</small>{% endif %}</td>
</tr>{% endfor %}</tbody>{% endfor %}</table></div>
{% else %}<p class="note">{{ claims.note }}</p>{% endif %}
</section>

<section id="figures"><h2>Figures</h2>
{% for row in figures.rows %}<figure id="figure-{{ row.name }}">
<a href="figures/{{ row.name | urlencode }}.png"><img src="figures/{{ row.name | urlencode }}.png"
 alt="{{ row.alt }}" loading="lazy"{% if row.size %} width="{{ row.size[0] }}"
 height="{{ row.size[1] }}"{% endif %}></a>
<figcaption>{{ row.caption }}{% if row.svg %}
 (<a href="figures/{{ row.name | urlencode }}.svg">SVG</a>){% endif %}</figcaption></figure>
{% else %}<p class="note">{{ figures.note }}</p>{% endfor %}
</section>

<section id="results"><h2>Results</h2>
{% if results.rows %}
<div class="wide" tabindex="0"><table>
<caption>Means over seeds with 95 % t-intervals. Retained is healed / intact; healing is
(healed - broken) / (intact - broken), left out where that damage is within its own interval of
zero.</caption>
<thead><tr><th scope="col">Corruption</th><th scope="col" class="num">Level</th>
<th scope="col">Side</th><th scope="col" class="num">Seeds</th>
<th scope="col" class="num">Intact</th><th scope="col" class="num">Broken</th>
<th scope="col" class="num">Healed</th><th scope="col" class="num">Healing</th>
<th scope="col" class="num">Retained</th><th scope="col">Note</th></tr></thead>
{% for (model, task, metric), rows in results.rows | groupby_keys("model", "task", "metric") %}
<tbody><tr><th scope="rowgroup" colspan="10">{{ task }} <span class="soft">({{ metric }}),
 {{ model }}{% if rows[0].test %}; {{ rows[0].test }}{% endif %}</span></th></tr>
{% for row in rows %}<tr><td>{{ row.kind }}</td>
<td class="num">{{ row.level }}{% if row.layers %}<small>{{ row.layers }}
 layer{{ "" if row.layers == 1 else "s" }}</small>{% endif %}</td><td>{{ row.side }}</td>
<td class="num">{{ row.n }}</td>
{% for name in ("intact", "broken", "healed", "healing", "retained") %}
<td class="num">{{ row[name][0] or "none" }}<small>{{ row[name][1] }}</small></td>{% endfor %}
<td{% if row.reason %} class="say"{% endif %}>{{ row.reason }}</td></tr>{% endfor %}</tbody>
{% endfor %}</table></div>
{% else %}<p class="note">{{ results.note }}</p>{% endif %}
</section>

<section id="notebooks"><h2>Executed notebooks</h2>
{% if notebooks %}<ul class="plain">{% for row in notebooks %}
<li>{% if row.href %}<a href="{{ row.href | urlencode }}">{{ row.name }}</a>
{%- else %}{{ row.name }}{% endif %}{% if row.title != row.name %}: {{ row.title }}{% endif %}
<br><span class="verdict {{ row.state }}">{{ row.status }}</span>
<span class="soft">{{ row.seconds }}</span></li>{% endfor %}</ul>
{% else %}<p class="note">Not there yet: no executed notebook in notebooks/.</p>{% endif %}
</section>

<section id="parameters"><h2>Parameters</h2>
{% if parameters %}<div class="wide" tabindex="0"><table>
<thead><tr><th scope="col">Parameter</th><th scope="col">Value</th></tr></thead>
<tbody>{% for name, value in parameters.items() %}<tr><th scope="row">{{ name }}</th>
<td>{{ value }}</td></tr>{% endfor %}</tbody></table></div>
{% else %}<p class="note">{{ parameters_note or "No parameters." }}</p>{% endif %}
</section>

<section id="made"><h2>Versions and device</h2>
{% if provenance.unreadable %}<p class="note warn">{{ provenance.unreadable }} record{{
 "" if provenance.unreadable == 1 else "s" }} could not be read.</p>{% endif %}
{% if provenance.rows %}<p>{% if provenance.mixed %}Mixed: {{ provenance.mixed | join(", ") }}. The
number of cells stands behind each value.{% else %}All {{ provenance.cells }} cells were made with
the same.{% endif %}</p>
<div class="wide" tabindex="0"><table>
<thead><tr><th scope="col">What</th><th scope="col">Value</th></tr></thead>
<tbody>{% for name, values in provenance.rows %}<tr><th scope="row">{{ name }}</th>
<td>{% for value, count in values %}{{ value }}{% if values | length > 1 %} ({{ count }}
 cell{{ "" if count == 1 else "s" }}){% endif %}{% if not loop.last %}, {% endif %}{% endfor %}</td>
</tr>{% endfor %}</tbody></table></div>
{% else %}<p class="note">Not there yet: no records.</p>{% endif %}
</section>
</main>
</body>
</html>
"""

_NOTEBOOK = """{% include "head" %}
<nav><a href="../index.html">Back to the run's page</a></nav>
<p><span class="verdict {{ state }}">{{ status }}</span></p>
<main>
{{ body }}
</main>
</body>
</html>
"""


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"head": _HEAD, "index": _INDEX, "notebook": _NOTEBOOK}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["groupby_keys"] = _by_keys
    environment.globals["css"] = Markup(_CSS + _NOTEBOOK_CSS + _highlight_css())
    return environment


def _by_keys(rows: list[dict], *names: str) -> list[tuple[tuple, list[dict]]]:
    """Rows grouped by the values of `names`, in the order in which these first come."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.items())


def _highlight_css() -> str:
    """Colours of highlighted code, for light and for dark screens."""
    from pygments.formatters import HtmlFormatter

    light, dark = (
        HtmlFormatter(style=name, nobackground=True).get_style_defs(".highlight")
        for name in ("default", "github-dark")
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
