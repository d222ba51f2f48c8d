"""Progress: a bar in a terminal, lines in a log, one display in a kernel, nothing when quiet."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys

import pytest

from healing_utils.base import progress
from healing_utils.base.progress import Progress


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class KernelStream(io.StringIO):
    """What a kernel puts in the place of standard error; the notebook shows what it gets."""

    __module__ = "ipykernel.iostream"


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


@pytest.fixture
def said(monkeypatch, capsys):
    """What went to standard error since the last call."""
    monkeypatch.delenv("HEALING_PROGRESS", raising=False)
    return lambda: capsys.readouterr().err


def test_a_log_gets_a_line_now_and_then_with_count_label_and_note(said, clock):
    with Progress(40, "recovery", unit="cell") as bar:
        for i in range(40):
            clock.now += 1
            bar.update(1, note=f"cell {i}")
    text = said()
    lines = text.splitlines()
    assert 2 <= len(lines) <= 40 / progress.LOG_EVERY + 2
    assert "\r" not in text
    assert "recovery" in lines[0] and "16/40" in lines[0] and lines[0].endswith("cell 15")
    assert "40/40" in lines[-1] and lines[-1].endswith("cell 39")


def test_a_note_reaches_the_log_although_the_count_stands_still(said, clock):
    with Progress(3, "recovery") as bar:
        clock.now += progress.LOG_EVERY + 1
        bar.update(0, note="step 20/500")
        text = said()
        assert text.rstrip().endswith("step 20/500") and "0/3" in text
    with Progress(0, "nothing to do") as bar:
        clock.now += 60
        bar.update(0, note="all found finished")
    assert "all found finished" in said()


def test_short_work_leaves_no_line_in_a_log(said, clock):
    with Progress(3, "fine-tuning") as bar:
        clock.now += 1
        bar.update(3, note="loss 0.1")
    assert said() == ""


@pytest.mark.parametrize(("mode", "shown"), [("quiet", ""), ("terminal", "1/2")])
def test_a_kernels_notebook_stays_clean_where_it_is_told_to(monkeypatch, clock, mode, shown):
    """A kernel's sys.stderr is the notebook's output; its own process still has the terminal."""
    monkeypatch.setenv("HEALING_PROGRESS", mode)
    notebook, terminal = KernelStream(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", notebook)
    monkeypatch.setattr(sys, "__stderr__", terminal)
    with Progress(2, "recovery") as bar:
        clock.now += 100
        bar.update(1, note="half")
    assert notebook.getvalue() == "" and shown in terminal.getvalue()
    assert bool(terminal.getvalue()) == bool(shown)
    monkeypatch.setattr(sys, "__stderr__", None)  # as under pythonw: nowhere to write, no failure
    with Progress(2, "recovery") as bar:
        clock.now += 100
        bar.update(2)


def test_a_kernel_updates_one_display_and_leaves_it_empty(monkeypatch, clock, said):
    import IPython.display

    monkeypatch.setattr(sys, "stderr", KernelStream())
    texts, calls = [], []

    class Display:
        def update(self, data, raw):
            texts.append(data["text/plain"])

    def display(data, raw, display_id):
        calls.append(data["text/plain"])
        return Display()

    monkeypatch.setattr(IPython.display, "display", display)
    with Progress(100, "fine-tuning") as bar:
        for i in range(100):
            clock.now += 0.1
            bar.update(1, note=f"loss {i}")
    assert len(calls) == 1
    assert 10 < len(texts) < 30  # at most two a second
    assert "100/100" in texts[-2] and texts[-2].endswith("loss 99")
    assert texts[-1] == "" and sys.stderr.getvalue() == ""


def test_the_stream_of_a_kernel_is_known_by_its_module():
    iostream = pytest.importorskip("ipykernel.iostream")
    assert iostream.OutStream.__module__ == KernelStream.__module__


def test_a_terminal_shows_a_bar_its_notes_and_cleans_up():
    """In a real terminal: the note of a long cell appears before the count moves."""
    code = (
        "import time\n"
        "from healing_utils.base.progress import Progress\n"
        "with Progress(2, 'recovery', unit='cell') as bar:\n"
        "    for _ in range(2):\n"
        "        for step in range(4):\n"
        "            time.sleep(0.15)\n"
        "            bar.update(0, note=f'step {step}')\n"
        "        bar.update(1)\n"
    )
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "HEALING_PROGRESS"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while select.select([ours], [], [], 20)[0]:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    assert process.wait(20) == 0
    os.close(ours)
    shown = [line for line in re.split(r"[\r\n]+", seen.decode()) if line.strip()]
    assert "0/2" in shown[0] and "step" not in shown[0]  # at once
    assert any("0/2" in line and "step 2" in line for line in shown)
    assert any("1/2" in line and "step 2" in line for line in shown)
    left = seen.decode().split("\r")
    assert left[-1] == "" and not left[-2].strip(), "the bar was left behind"
