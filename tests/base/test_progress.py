"""Progress: a bar in a terminal, lines in a log, one display in a kernel, nothing when quiet."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios

import pytest

from healing_utils.base import progress
from healing_utils.base.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


class Errors:
    """What went to standard error so far."""

    def __init__(self, capsys):
        self.capsys, self.text = capsys, ""

    def getvalue(self):
        self.text += self.capsys.readouterr().err
        return self.text


@pytest.fixture
def stderr(monkeypatch, capsys):
    monkeypatch.delenv("HEALING_PROGRESS", raising=False)
    monkeypatch.setattr(progress, "_in_kernel", lambda: False)
    return Errors(capsys)


def test_a_log_gets_a_line_now_and_then_with_count_label_and_note(stderr, clock):
    with Progress(40, "recovery", unit="cell") as bar:
        for i in range(40):
            clock.now += 1
            bar.update(1, note=f"cell {i}")
    lines = stderr.getvalue().splitlines()
    assert 2 <= len(lines) <= 40 / progress.LOG_EVERY + 2
    assert "\r" not in stderr.getvalue()
    assert "recovery" in lines[0] and "16/40" in lines[0] and lines[0].endswith("cell 15")
    assert "40/40" in lines[-1] and lines[-1].endswith("cell 39")


def test_a_note_reaches_the_log_although_the_count_stands_still(stderr, clock):
    with Progress(3, "recovery") as bar:
        clock.now += progress.LOG_EVERY + 1
        bar.update(0, note="step 20/500")
        assert stderr.getvalue().rstrip().endswith("step 20/500") and "0/3" in stderr.getvalue()


def test_short_work_leaves_no_line_in_a_log(stderr, clock):
    with Progress(3, "fine-tuning") as bar:
        clock.now += 1
        bar.update(3, note="loss 0.1")
    assert stderr.getvalue() == ""


@pytest.mark.parametrize("stream", ["stderr", "__stderr__"])
def test_quiet_is_quiet(monkeypatch, clock, stream):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")
    monkeypatch.setattr(progress, "_in_kernel", lambda: True)
    written = io.StringIO()
    monkeypatch.setattr(sys, stream, written)
    with Progress(2, "x") as bar:
        clock.now += 100
        bar.update(2, note="done")
    assert written.getvalue() == ""


def test_the_terminal_is_the_one_that_started_the_kernel(monkeypatch, clock):
    """A kernel's sys.stderr is the notebook's output; its own process still has the terminal."""
    monkeypatch.setenv("HEALING_PROGRESS", "terminal")
    monkeypatch.setattr(progress, "_in_kernel", lambda: True)
    notebook, terminal = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", notebook)
    monkeypatch.setattr(sys, "__stderr__", terminal)
    with Progress(2, "recovery") as bar:
        clock.now += 100
        bar.update(1, note="half")
    assert notebook.getvalue() == "" and "1/2" in terminal.getvalue()
    monkeypatch.setattr(sys, "__stderr__", None)  # as under pythonw: nowhere to write, no failure
    with Progress(2, "recovery") as bar:
        clock.now += 100
        bar.update(2)


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
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
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
    assert any("0/2" in line and "step 2" in line for line in shown)
    assert any("1/2" in line and "step 2" in line for line in shown)
    left = seen.decode().split("\r")
    assert left[-1] == "" and not left[-2].strip(), "the bar was left behind"


class Display:
    def __init__(self):
        self.texts = []

    def update(self, data, raw):
        assert raw
        self.texts.append(data["text/plain"])


def test_a_kernel_updates_one_display_and_leaves_it_empty(monkeypatch, clock, stderr):
    import IPython.display

    monkeypatch.setattr(progress, "_in_kernel", lambda: True)
    shown, calls = Display(), []

    def display(data, raw, display_id):
        calls.append(data["text/plain"])
        return shown

    monkeypatch.setattr(IPython.display, "display", display)
    with Progress(100, "fine-tuning") as bar:
        for i in range(100):
            clock.now += 0.1
            bar.update(1, note=f"loss {i}")
    assert len(calls) == 1
    assert 10 < len(shown.texts) < 30  # at most two a second
    assert "100/100" in shown.texts[-2] and shown.texts[-2].endswith("loss 99")
    assert shown.texts[-1] == "" and stderr.getvalue() == ""


def test_kernels_are_known_by_their_shell(monkeypatch):
    class ZMQInteractiveShell:
        pass

    class Shell(ZMQInteractiveShell):  # as on Colab
        pass

    class TerminalInteractiveShell:
        pass

    kernels = {ZMQInteractiveShell: True, Shell: True, TerminalInteractiveShell: False}
    for shell, is_kernel in kernels.items():
        monkeypatch.setitem(progress.__dict__, "get_ipython", shell)
        assert progress._in_kernel() is is_kernel
    monkeypatch.delitem(progress.__dict__, "get_ipython")
    assert progress._in_kernel() is False


def test_nothing_to_do_is_no_error(stderr, clock):
    with Progress(0, "recovery") as bar:
        clock.now += 60
        bar.update(0, note="all found finished")
    assert "all found finished" in stderr.getvalue()
