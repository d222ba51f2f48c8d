"""Progress, visible in a terminal, in Jupyter and in a batch log, that leaves notebooks clean.

By `HEALING_PROGRESS`, unset: one display of a Jupyter kernel, emptied when done, or standard error;
``terminal``: that which started the kernel, so that notebooks hold no bars; ``quiet``: nowhere.
"""

import os
import sys
import time
from typing import Self

from tqdm.std import tqdm

LOG_EVERY = 15.0  # seconds between lines in a batch log, where a bar cannot be redrawn


class Progress:
    """A bar of `total` units: ``with Progress(12, "cells", unit="cell") as bar: bar.update(1)``.
    Those `found` done at the start took no time, and say nothing of what is left."""

    def __init__(self, total: int, label: str, unit: str = "it", found: int = 0):
        self.total, self.label, self.unit, self.found = total, label, unit, found
        self.done, self.note, self.between = found, "", "  "
        self.start = self.last = time.monotonic()
        self._every, self._show = self._where_to(os.environ.get("HEALING_PROGRESS"))

    def _where_to(self, mode: str | None):
        """Seconds between two looks, and what shows a text; "" at the end leaves nothing behind."""
        stream = sys.__stderr__ if mode == "terminal" else sys.stderr
        if mode == "quiet" or stream is None:
            return float("inf"), str
        if type(stream).__module__.startswith("ipykernel"):  # Jupyter's and Colab's kernels
            from IPython.display import display

            self.between = "\n"  # a notebook is narrow
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
        width, spent = max(60, 77 - len(self.note)), time.monotonic() - self.start
        about = {"ncols": width, "prefix": self.label, "unit": self.unit, "initial": self.found}
        meter = tqdm.format_meter(self.done, self.total, spent, **about)
        return f"{meter}{self.between}{self.note}".rstrip()

    def update(self, n: int = 1, note: str | None = None) -> None:
        """`n` units more; `note` is shown after the numbers, for example the current score."""
        self.done += n
        self.note = self.note if note is None else note
        if time.monotonic() - self.last > self._every:
            self.last = time.monotonic()
            self._show(self._text())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if time.monotonic() - self.start > self._every:  # short work needs no line in a log
            self._show(self._text())
        self._show("")


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
