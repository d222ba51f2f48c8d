"""Progress: a bar in a terminal, lines in a log, one display in a kernel, nothing when quiet."""

import io
import os
import pty
import re
import select
import subprocess
import sys
from types import SimpleNamespace

import IPython.display
import pytest
from ipykernel import iostream

from healing_utils.base import progress
from healing_utils.base.progress import Progress


class KernelStream(io.StringIO):
    """What a kernel puts in the place of standard error; the notebook shows what it gets."""

    __module__ = iostream.OutStream.__module__


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.delenv("HEALING_PROGRESS", raising=False)
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def test_a_log_gets_a_line_now_and_then_with_count_label_and_note(clock, capsys):
    with Progress(40, "recovery", unit="cell") as bar:
        for i in range(40):
            clock.now += 1
            bar.update(1, note=f"cell {i}")
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert 2 <= len(lines) <= 40 / progress.LOG_EVERY + 2 and "\r" not in text
    assert "recovery" in lines[0] and "16/40" in lines[0] and lines[0].endswith("cell 15")
    assert "40/40" in lines[-1] and lines[-1].endswith("cell 39")


def test_the_time_that_is_left_is_told_by_what_took_time(clock, capsys):
    with Progress(120, "recovery", unit="cell", found=100) as bar:
        clock.now += 20
        bar.update(10)
    assert "110/120 [00:20<00:20," in capsys.readouterr().err  # 10 took 20 s, 10 are left


@pytest.mark.parametrize(
    ("total", "seconds", "shown"), [(3, 16, "0/3"), (0, 60, "nothing"), (3, 1, "")]
)
def test_a_note_reaches_the_log_although_the_count_stands_still(
    clock, capsys, total, seconds, shown
):
    with Progress(total, "nothing to do") as bar:
        clock.now += seconds
        bar.update(0, note="step 20/500")
    said = capsys.readouterr().err
    assert shown in said and ("step 20/500" in said) == bool(shown)  # short work leaves no line


@pytest.mark.parametrize(("mode", "shown"), [("quiet", ""), ("terminal", "1/2")])
def test_a_kernels_notebook_stays_clean_where_it_is_told_to(monkeypatch, clock, mode, shown):
    """A kernel's sys.stderr is the notebook's output; its own process still has the terminal."""
    monkeypatch.setenv("HEALING_PROGRESS", mode)
    monkeypatch.setattr(sys, "stderr", KernelStream())
    terminal = io.StringIO()
    for stream in (terminal, None):  # as under pythonw: nowhere to write, no failure
        monkeypatch.setattr(sys, "__stderr__", stream)
        with Progress(2, "recovery") as bar:
            clock.now += 100
            bar.update(1, note="half")
    assert sys.stderr.getvalue() == "" and shown in terminal.getvalue()
    assert bool(terminal.getvalue()) == bool(shown)


def test_a_kernel_updates_one_display_and_leaves_it_empty(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", KernelStream())
    texts, calls = [], []

    def display(data, raw, display_id):
        calls.append(data["text/plain"])
        return SimpleNamespace(update=lambda data, raw: texts.append(data["text/plain"]))

    monkeypatch.setattr(IPython.display, "display", display)
    with Progress(100, "fine-tuning") as bar:
        for i in range(100):
            clock.now += 0.1
            bar.update(1, note=f"loss {i}")
    assert len(calls) == 1 and 10 < len(texts) < 30  # at most two a second
    assert "100/100" in texts[-2] and texts[-2].endswith("loss 99")
    assert texts[-1] == "" and sys.stderr.getvalue() == ""


def test_a_terminal_shows_a_bar_its_notes_and_cleans_up():
    """In a real terminal: the note of a long cell appears before the count moves."""
    code = (
        "import time\n"
        "from healing_utils.base.progress import Progress\n"
        "with Progress(2, 'recovery', unit='cell') as bar:\n"
        "    for step in range(8):\n"
        "        time.sleep(0.15)\n"
        "        bar.update(step // 4 - bar.done, note=f'step {step % 4}')\n"
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
        seen += chunk
    assert process.wait(20) == 0
    os.close(ours)
    shown = [line for line in re.split(r"[\r\n]+", seen.decode()) if line.strip()]
    assert "0/2" in shown[0] and "step" not in shown[0]  # at once
    assert any("0/2" in line and "step 2" in line for line in shown)
    assert any("1/2" in line and "step 2" in line for line in shown)
    left = seen.decode().split("\r")
    assert left[-1] == "" and not left[-2].strip(), "the bar was left behind"
