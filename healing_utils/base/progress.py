"""Progress, visible in a terminal, in Jupyter and in a batch log, that leaves notebooks clean.

Where it goes is decided by `HEALING_PROGRESS`. Unset: a Jupyter kernel updates one display in place
and empties it when done, elsewhere it goes to standard error. ``terminal``: to the terminal that
started the kernel (so that executed notebooks hold results and not bars). ``quiet``: nowhere.
"""

from __future__ import annotations

import os
import sys
import time

from tqdm.std import tqdm

LOG_EVERY = 15.0  # seconds between lines in a batch log, where a bar cannot be redrawn


class Progress:
    """A bar of `total` units: ``with Progress(12, "cells", unit="cell") as bar: bar.update(1)``.

    `note` is short text shown after the numbers, for example the current score.
    """

    def __init__(self, total: int, label: str, unit: str = "it"):
        self.total, self.label, self.unit = total, label, unit
        self.done, self.note = 0, ""
        self.start = self.last = time.monotonic()
        self._every, self._show = self._where_to(os.environ.get("HEALING_PROGRESS"))

    def _where_to(self, mode: str | None):
        """Seconds between two looks, and what shows a text; "" at the end leaves nothing behind."""
        stream = sys.__stderr__ if mode == "terminal" else sys.stderr
        if mode == "quiet" or stream is None:
            return float("inf"), lambda text: None
        if type(stream).__module__.startswith("ipykernel"):  # Jupyter's and Colab's kernels
            from IPython.display import display

            shown = display({"text/plain": self._text()}, raw=True, display_id=True)
            return 0.5, lambda text: shown.update({"text/plain": text}, raw=True)
        if not stream.isatty():
            return LOG_EVERY, lambda text: text and print(text, file=stream, flush=True)

        def redraw(text: str) -> None:
            width = (os.get_terminal_size(stream.fileno()).columns or 80) - 1  # 0: not told
            print(text[:width].ljust(width), end="\r", file=stream, flush=True)

        redraw(self._text())
        return 0.1, redraw

    def _text(self) -> str:
        elapsed, width = time.monotonic() - self.start, max(60, 77 - len(self.note))
        meter = tqdm.format_meter(
            self.done, self.total, elapsed, ncols=width, prefix=self.label, unit=self.unit
        )
        return f"{meter}  {self.note}".rstrip()

    def update(self, n: int = 1, note: str | None = None) -> None:
        self.done += n
        self.note = self.note if note is None else note
        if time.monotonic() - self.last > self._every:
            self.last = time.monotonic()
            self._show(self._text())

    def close(self) -> None:
        if time.monotonic() - self.start > self._every:  # short work needs no line in a log
            self._show(self._text())
        self._show("")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
