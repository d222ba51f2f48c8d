"""What is shipped agrees with itself: the README with the tables, the tables with the records."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pandas as pd
import papermill
import pytest
from helpers import CUES, FILLERS, save_tiny_bert, tiny_study, write_planted_task

from healing_utils import load_results
from healing_utils.analysis.harm import gather
from healing_utils.analysis.results import load_curves

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(p.name for p in (ROOT / "data" / "results").iterdir() if p.is_dir())
README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_readme_gives_the_effects_of_the_shipped_tables(name):
    claims = pd.read_csv(ROOT / "data" / "results" / name / "tables" / "claims.csv")
    shown = claims[claims["primary"] & claims["claim"].isin(["A3", "H"])]
    assert set(shown["claim"]) == {"A3", "H"}
    for row in shown.itertuples():
        effect, low, high = (f"{100 * x:.1f}" for x in (row.effect, row.low, row.high))
        assert f"{effect} [{low}, {high}]" in README, (name, row.claim)


def intervals(folder: Path) -> set[tuple[float, float, float]]:
    """Every mean with its interval in a study's tables, rounded as people read it: to hundredths
    and, times 100, to tenths."""
    found = set()
    for path in (folder / "tables").glob("*.csv"):
        table = pd.read_csv(path)
        ends = [n.removesuffix("_low") for n in table if n.endswith("_low")]
        names = [(name, f"{name}_low", f"{name}_high") for name in ends if name in table]
        if {"effect", "low", "high"} <= set(table):
            names.append(("effect", "low", "high"))
        for columns in names:
            rows = table[list(columns)].dropna().drop_duplicates()
            for row in rows.itertuples(index=False):
                found.add(tuple(round(x, 2) + 0.0 for x in row))
                found.add(tuple(round(100 * x, 1) + 0.0 for x in row))
    return found


def test_every_interval_among_the_findings_stands_in_a_shipped_table():
    findings = README.split("## How far to trust it")[0]
    said = re.findall(r"([-+]?\d+\.\d+) \[(-?\d+\.\d+), (-?\d+\.\d+)\]", findings)
    shipped = set().union(*(intervals(ROOT / "data" / "results" / name) for name in SHIPPED))
    assert len(said) >= 10
    # What is said in hundredths of a remaining gap has three digits: its table has them all.
    lost = [
        triple
        for triple in said
        if tuple(map(float, triple)) not in shipped and len(triple[0].split(".")[1]) < 3
    ]
    assert not lost


def test_the_readme_gives_what_is_kept_at_the_longer_budget():
    run = ROOT / "data" / "results" / "minilm_long"
    cells = gather(run, ["baseline", "recovery", "scans"])
    floors = load_curves(run).drop_duplicates("key")[["key", "floor"]]
    cells = cells.merge(floors, how="left")
    intact = cells.state == "intact"
    cells["retained"] = cells.retained.mask(intact, 1.0)
    table = README.split("| mean over seeds ")[1].split("\n\n")[0]
    header, _, *rows = table.splitlines()
    assert header.count("|") == 4 and len(rows) == 6
    for row in rows:
        what, *said = [text.strip() for text in row.split("|")[1:-1]]
        for task, text in zip(("emotion", "sst2", "cola"), said, strict=True):
            own = cells[(cells.task == task) & intact]
            if "half" in what:
                own = cells[(cells.task == task) & (cells.side == what.split()[0])]
                recipe = "drop" if "taken out" in what else "full"
                own = own[own.level.between(0.49, 0.51) & (own.recipe == recipe)]
            kept = own.score if task == "cola" else own.retained
            kept = kept * own.floor if "floor" in what else kept
            assert f"{kept.mean():.2f}" == text, (what, task)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_study_is_drawn_again_from_its_records(name, tmp_path):
    folder = ROOT / "data" / "results" / name
    run = tmp_path / name
    shutil.copytree(folder, run, ignore=shutil.ignore_patterns("tables"))
    papermill.execute_notebook(
        ROOT / "notebooks" / "05_analysis.ipynb", tmp_path / "out.ipynb", {"run": str(run)},
        kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    for path in sorted((folder / "tables").glob("*.csv")):
        # Written with all digits, and read back by the same parser.
        pd.testing.assert_frame_equal(
            pd.read_csv(path), pd.read_csv(run / "tables" / path.name), rtol=1e-9
        )
    drawn = {path.name for path in (run / "figures").iterdir()}
    assert drawn == {path.name for path in (ROOT / "figures" / name).iterdir()}


def test_a_researcher_probes_a_model_and_a_treebank_of_her_own(tmp_path):
    """04 alone, under papermill: no run before it, a CoNLL-U file with both kinds of line endings,
    an empty sentence and a label that training lacks."""

    def conllu(sentences: list[list[tuple[str, str]]], end: str) -> str:
        rows = [
            [f"{i}\t{word}\t_\t{tag}\t_\t_\t0\troot\t_\t_" for i, (word, tag) in enumerate(s, 1)]
            for s in sentences
        ]
        return "".join(end.join([f"# sent_id = {n}", *r]) + end + end for n, r in enumerate(rows))

    rng, words = random.Random(0), [*CUES, *FILLERS[:4]]
    drawn = [
        [(word, "ADJ" if word in CUES else "NOUN") for word in rng.choices(words, k=5)]
        for _ in range(36)
    ]
    train = conllu(drawn[:15], "\n") + "\n\n" + conllu(drawn[15:30], "\r\n")
    (tmp_path / "own-ud-train.conllu").write_bytes(train.encode())
    test = conllu([*drawn[30:], [("w0", "X")]], "\n")
    (tmp_path / "own-ud-test.conllu").write_text(test)
    parameters = tiny_study(
        tmp_path / "run", save_tiny_bert(tmp_path / "model"), write_planted_task(tmp_path / "task"),
        corpus=str(tmp_path / "own-ud-train.conllu"), column="upos", probe_train=None,
        probe_test=None, probe_levels=["1/3"], seeds=[0], sides="top", levels="1/3",
    )  # fmt: skip
    papermill.execute_notebook(
        ROOT / "notebooks" / "04_linguistics.ipynb", tmp_path / "out.ipynb", parameters,
        kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    table = load_results(tmp_path / "run", "probing")
    pretrained = table[table.state == "pretrained"]
    # 30 words of 6 sentences, and one whose label no probe can know.
    assert pretrained.accuracy.max() == pytest.approx(30 / 31)
    printed = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    assert "1 test words with labels unseen in training count as errors" in printed
