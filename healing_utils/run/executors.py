"""Where the missing cells of a stage are computed, and which of them are this run's to compute.

An executor computes cells and leaves their records in the run's folder. It says of each cell, once,
that it is done or in which error it ended; one that fails stops no other. Which executor it is
changes no result, so the choice is no parameter of a study: it stands in the environment, which
notebook kernels and worker processes inherit.

- ``HEALING_EXECUTOR``: ``in-process``, ``workers`` (default: as many processes on this machine as
  the parameter `workers` says) or ``ray`` (a cluster, see `cluster`).
- ``HEALING_RAY_ADDRESS``: the cluster's, ``host:port``; without it Ray finds or starts one.
- ``HEALING_SHARD``: ``2/8``, the second of eight shares that runs in folders of their own compute.
- ``HEALING_HELPED``: stages that have workers: `healing run` says so to its kernels (see `ahead`),
  which then start none of their own for these.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from healing_utils.base.errors import HealingError, choose
from healing_utils.run.workers import Job, helping

if TYPE_CHECKING:
    from healing_utils.study.study import Cell, Study

NAMES = ("in-process", "workers", "ray")
LOOK_AGAIN = 0.2  # seconds between two looks for a record that another process is to write
CELLS_FOR_A_WORKER = 3  # a process takes seconds to start: it pays from a few cells on

Outcome = tuple["Cell", Exception | None]


class Executor(Protocol):
    """Computes cells: yields each with None once its record is there, else with its error."""

    def check(self) -> None:
        """Raise HealingError where it is clear from here that no cell can be computed."""

    def outcomes(
        self, study: Study, stage: str, cells: list[Cell], note: Callable[[str], None]
    ) -> Iterator[Outcome]: ...


class InProcess:
    """One cell after the other, here. What another run on the same folder is at is waited for."""

    def check(self) -> None:
        pass

    def outcomes(
        self, study: Study, stage: str, cells: list[Cell], note: Callable[[str], None]
    ) -> Iterator[Outcome]:
        while cells:
            waiting = []
            for cell in cells:
                note(cell.name)

                def on_step(step: int, steps: int, loss: float, name: str = cell.name) -> None:
                    note(f"{name}: step {step}/{steps}, loss {loss:.3f}")

                try:
                    done = study._compute(cell, on_step)
                except Exception as error:
                    yield cell, error
                    continue
                if done:
                    yield cell, None
                else:
                    waiting.append(cell)
            if waiting and len(waiting) == len(cells):
                note(f"waiting for another run: {waiting[0].name}")
                time.sleep(LOOK_AGAIN)
            cells = waiting


def further_workers(parameters: Mapping[str, Any], cells: int) -> int:
    """How many processes share so many missing cells with this one."""
    return min(parameters["workers"] - 1, cells // CELLS_FOR_A_WORKER)


class Workers(InProcess):
    """As in this process, with further ones that share the cells; it starts them for the stage
    where none are at it."""

    def outcomes(
        self, study: Study, stage: str, cells: list[Cell], note: Callable[[str], None]
    ) -> Iterator[Outcome]:
        helped = stage in os.environ.get("HEALING_HELPED", "").split()
        count = 0 if helped else further_workers(study.parameters, len(cells))
        with helping([(study.parameters, [stage])], count):
            yield from super().outcomes(study, stage, cells, note)


@contextlib.contextmanager
def ahead(jobs: Sequence[Job], usual: Mapping[str, str]) -> Iterator[None]:
    """Have one set of workers compute cells of all `jobs` while the block runs, beside what it
    starts and ahead of it; `usual` as of `helping`.

    None are started where cells are computed in another way, or in one process.
    """
    count = min(parameters.get("workers", 1) for parameters, _ in jobs) - 1
    if not count or not isinstance(chosen(), Workers):
        yield
        return
    with helping(jobs, count, usual):
        os.environ["HEALING_HELPED"] = " ".join(stage for _, stages in jobs for stage in stages)
        try:
            yield
        finally:
            del os.environ["HEALING_HELPED"]


def chosen() -> Executor:
    """The executor that the environment names. Raises HealingError for an unknown name, and where
    Ray is not installed."""
    name = choose(os.environ.get("HEALING_EXECUTOR") or "workers", NAMES, "executor")
    if name == "ray":
        from healing_utils.run.cluster import Ray

        return Ray(os.environ.get("HEALING_RAY_ADDRESS") or None)
    return Workers() if name == "workers" else InProcess()


@dataclass(frozen=True)
class Shard:
    """Share `index` (from 1) of `count`: a cell's key alone decides whose it is, so that machines
    that never speak to each other agree, whatever each has done already."""

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, cell: Cell) -> bool:
        return int(cell.key, 16) % self.count == self.index - 1


def shard(text: str | None = None) -> Shard:
    """The share that `text` (``2/8``) or else the environment names; without either, the whole.

    Raises HealingError for anything else.
    """
    text = os.environ.get("HEALING_SHARD") if text is None else text
    if not text:
        return Shard()
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise HealingError(f"shard {text!r} must be i/n with i from 1 to n, such as 2/8")
    return Shard(int(found[1]), int(found[2]))


def choice(executor: str | None, address: str | None, share: str | None) -> Mapping[str, str]:
    """What of these is given, as the environment that kernels and workers inherit.

    Raises HealingError where one is wrong, or an address is given to another executor than Ray.
    """
    if executor is not None:
        choose(executor, NAMES, "executor")
    if address is not None and (executor or os.environ.get("HEALING_EXECUTOR")) != "ray":
        raise HealingError("an address is for the executor ray: add --executor ray")
    if share is not None:
        shard(share)
    given = {"HEALING_EXECUTOR": executor, "HEALING_RAY_ADDRESS": address, "HEALING_SHARD": share}
    return {name: value for name, value in given.items() if value is not None}
