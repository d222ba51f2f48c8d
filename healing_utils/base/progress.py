"""Progress, visible in a terminal, in Jupyter and in a batch log, that leaves notebooks clean.

Where it goes is decided by `HEALING_PROGRESS`:

- unset: a Jupyter kernel updates one display in place and removes its text when done; elsewhere it
  goes to standard error.
- ``terminal``: to the terminal that started the kernel (`healing run` sets this, so that executed
  notebooks hold results and not bars).
- ``quiet``: nowhere (tests).
"""

from __future__ import annotations

import os
import sys
import time

from tqdm.std import tqdm

LOG_EVERY = 15.0  # seconds between lines in a batch log, where a bar cannot be redrawn


def _in_kernel() -> bool:
    try:
        shell = get_ipython()  # type: ignore[name-defined]
    except NameError:
        return False
    # Colab's shell is a subclass of Jupyter's ZMQInteractiveShell.
    return any("ZMQ" in kind.__name__ for kind in type(shell).__mro__)


class Progress:
    """A bar of `total` units: ``with Progress(12, "cells", unit="cell") as bar: bar.update(1)``.

    `note` is short text shown after the numbers, for example the current score.
    """

    def __init__(self, total: int, label: str, unit: str = "it"):
        self.total, self.label, self.unit = total, label, unit
        self.done, self.note = 0, ""
        self.start = self.last = time.monotonic()
        self._bar = self._display = self._log = None
        mode = os.environ.get("HEALING_PROGRESS", "")
        if mode == "quiet":
            return
        stream = sys.__stderr__ if mode == "terminal" else sys.stderr
        if mode != "terminal" and _in_kernel():
            from IPython.display import display

            self._display = display({"text/plain": self._text()}, raw=True, display_id=True)
        elif stream is not None and stream.isatty():
            # With miniters=0 a new note is shown although the count stands still.
            self._bar = tqdm(
                total=total, desc=label, unit=unit, file=stream, leave=False, miniters=0
            )
        else:
            self._log = stream

    def _text(self) -> str:
        elapsed = time.monotonic() - self.start
        meter = tqdm.format_meter(
            self.done, self.total, elapsed, ncols=79, prefix=self.label, unit=self.unit
        )
        return f"{meter}  {self.note}".rstrip()

    def update(self, n: int = 1, note: str | None = None) -> None:
        self.done += n
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if self._display is not None and (now - self.last > 0.5 or self.done >= self.total):
            self.last = now
            self._display.update({"text/plain": self._text()}, raw=True)
        elif self._log is not None and (now - self.last > LOG_EVERY):
            self.last = now
            print(self._text(), file=self._log, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._display is not None:
            self._display.update({"text/plain": ""}, raw=True)
        # Short work needs no line of its own in a log.
        if self._log is not None and time.monotonic() - self.start > LOG_EVERY:
            print(self._text(), file=self._log, flush=True)
        self._bar = self._display = self._log = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
