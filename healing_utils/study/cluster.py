"""Cells on a Ray cluster whose machines share the run's folder.

The driver plans and claims; a task loads what it needs by the study's parameters, as here, and
writes record and weights into the folder. Models and data that lie in files must be reachable under
the same path too. A machine where the folder is not the driver's refuses with one line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from healing_utils.base.errors import HealingError
from healing_utils.study import pool

REACHED = 10.0  # seconds within which a cluster's address must answer
_studies: dict[str, Any] = {}  # of the driver that this process last worked for


class Ray:
    """The cluster at `address`; without one, that of ``RAY_ADDRESS``, of this machine, or a new one
    on this machine, in this order. Raises HealingError where Ray is not installed, the cluster
    cannot be reached, or no node of it has what a cell takes."""

    def __init__(
        self, make: Callable[[], Any], parameters: Mapping[str, Any], address: str | None = None
    ):
        try:
            import ray
        except ImportError as error:
            raise HealingError(
                "the executor 'ray' needs the package ray: pip install .[cluster] in a checkout"
            ) from error
        self.ray, errors = ray, ray.exceptions
        self.lost = (
            errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError,
            errors.OutOfMemoryError, errors.ObjectLostError,
        )  # fmt: skip
        _connect(ray, address)
        self.threads = parameters["threads"]
        with_gpu = any(node["Resources"].get("GPU") for node in self._nodes())
        self.gpus = int(with_gpu and parameters["device"] != "cpu")
        if not self._places():
            gpu = " and a GPU" if self.gpus else ""
            raise HealingError(
                f"no node of the Ray cluster has the {self.threads} CPUs of a cell's threads{gpu}; "
                "start nodes with more, or set threads, which is part of the cells' keys"
            )
        # Losses are counted by the driver: Ray would try again in silence. Given here and not as
        # options later, so that Ray ends a GPU's process with its cell: one that is reused stays on
        # the card that it saw first.
        options = {"num_cpus": self.threads, "num_gpus": self.gpus, "max_retries": 0}
        self.remote = ray.remote(**options)(compute)
        study = make()
        # What a node must see there: a claim, so that it goes with its driver, however that ends.
        token, self.claim = f"driver-{uuid.uuid4().hex}", contextlib.ExitStack()
        self.claim.enter_context(study.store.claim(token))
        self.token = study.store.claim_path(token)
        self.make = ray.put(make)
        self.running: list[Any] = []

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _places(self) -> int:
        """How many cells the nodes can compute at once; a cell has its CPUs and GPU on one node."""
        places = 0
        for there in (node["Resources"] for node in self._nodes()):
            by_cpu = int(there.get("CPU", 0) // self.threads)
            places += min(by_cpu, int(there.get("GPU", 0))) if self.gpus else by_cpu
        return places

    def room(self) -> int:
        return self._places() + 1  # one ahead, so that no worker waits; nodes may come and go

    def submit(self, cell: Any) -> Any:
        task = self.remote.remote(str(self.token), self.make, cell)
        self.running.append(task)
        return task

    def finished(self, note: pool.Note) -> Iterator[tuple[Any, Exception | None]]:
        for task in self.ray.wait(self.running, num_returns=1, timeout=1.0)[0]:
            self.running.remove(task)
            try:
                yield task, self.ray.get(task)
            except self.lost as loss:
                yield task, pool.Lost(_first_line(loss))
            except Exception as failure:  # Ray's own are pages long
                error = HealingError(f"{type(failure).__name__}: {_first_line(failure)}")
                error.add_note(str(failure))
                yield task, error

    def close(self) -> None:
        for task in self.running:
            with contextlib.suppress(Exception):  # the cluster itself may be gone
                self.ray.cancel(task, force=True)
        self.claim.close()


def compute(token: str, make: Callable[[], Any], cell: Any) -> Exception | None:
    """Compute and record a cell, on a node; the error that it ended in."""
    if not Path(token).exists():
        return HealingError(
            f"node {socket.gethostname()} does not see the run's folder {Path(token).parents[1]}: "
            "give --out a folder that all nodes share, under the same path"
        )
    if token not in _studies:
        _studies.clear()
        _studies[token] = make()
    return pool.compute(_studies[token], cell, lambda _: None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _connect(ray: Any, address: str | None) -> None:
    """Once a process; the connection ends with it. Ray itself would try for minutes."""
    where = f"the Ray cluster at {address}" if address else "or start a Ray cluster"
    host, _, port = (address or "").rpartition(":")
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here stays silent
    settings = {
        "py_modules": [str(Path(__file__).resolve().parents[1])],
        "env_vars": {"HEALING_PROGRESS": "quiet"},
    }
    try:
        if host and port.isdigit():
            host = host.rpartition("/")[2].strip("[]")
            socket.create_connection((host, int(port)), REACHED).close()
        ray.init(address, runtime_env=settings, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray's own, or the address is none
        raise HealingError(f"cannot reach {where}: {_first_line(error)}") from error
