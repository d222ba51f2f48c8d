"""Cells on a Ray cluster: the driver plans, claims and records, the workers only compute.

No shared file system is assumed. Ray carries this package to the workers, so that all run the
driver's code; hub models and data sets are loaded there by name, and refused where they are not
what the driver hashed into the key; local models, tables, corpora and the weights of fine-tuned
models travel through Ray's object store. A worker answers with a result and the weights that it
made; the driver alone writes them into the run's folder.

A worker that is lost (killed, out of memory, its node gone) costs the cell it was at, which is
given to another, a few times at most. An error of the cell itself is reported and not tried again.
Should the driver die, Ray ends its workers, and the same command goes on from the records.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
import traceback
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from healing_utils.base.errors import HealingError

if TYPE_CHECKING:
    from healing_utils.run.executors import Outcome
    from healing_utils.study.study import Cell, Study

LOSSES = 3  # workers that a cell may lose before it is reported: it may be what kills them
REACHED = 10.0  # seconds within which a cluster's address must answer
AHEAD = 1  # cells given to the cluster beyond those it can compute now, so that no worker waits
WEIGHTS_HELD = 8  # networks that the driver keeps in the object store
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")


# -- what travels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """A cell with what its worker may lack; values that end in `_ref` lie in the object store."""

    session: str  # one driver and stage: a worker keeps what it loaded for as long
    parameters: dict[str, Any]
    cell: Cell
    folders: dict[str, tuple[str, Any]]  # local model -> its content hash, its files_ref
    tasks: dict[str, Any]  # local task -> data_ref
    corpora: dict[tuple[str, str | None], Any]  # (corpus, column) -> data_ref
    weights: dict[str, Any]  # key of a cell -> weights_ref


@dataclass(frozen=True)
class Answer:
    """A result with what stands beside it in the record, or the error that the cell ended in."""

    record: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, bytes] = field(default_factory=dict)  # made on the way, by the cell's key
    error: str | None = None
    trace: str = ""


# -- the driver ------------------------------------------------------------------------------------


@dataclass
class Ray:
    """The cluster at `address`; without one, that of ``RAY_ADDRESS``, of this machine, or a new one
    on this machine, in this order. Raises HealingError where Ray is not installed."""

    address: str | None = None

    def __post_init__(self) -> None:
        _ray()

    def check(self) -> None:
        """Raise HealingError where nothing listens at the address."""
        _reach(self.address)

    def outcomes(
        self, study: Study, stage: str, cells: list[Cell], note: Callable[[str], None]
    ) -> Iterator[Outcome]:
        """As every executor. Raises HealingError where the cluster cannot be reached or no node of
        it has as many CPUs as a cell has threads."""
        if not cells:
            return
        shared = _Shared(_Cluster(self.address, study), study, cells)
        try:
            while shared.left():
                yield from shared.hand_out()
                note(shared.describe())
                yield from shared.take_back()
        finally:
            shared.recall()


@dataclass
class _Turn:
    """A cell on its way: its claim, and how many workers it has lost."""

    cell: Cell
    losses: int = 0
    claim: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def begin(self, study: Study) -> bool:
        """Claim the cell; False where another run has it or has done it."""
        try:
            mine = self.claim.enter_context(study.store.claim(self.cell.key))
            if mine and study.store.read(self.cell.stage, self.cell.key) is None:
                return True
        except BaseException:
            self.end()
            raise
        self.end()
        return False

    def end(self) -> None:
        self.claim.close()


class _Shared:
    """Cells that wait for a place on the cluster, and those that are there, by reference."""

    def __init__(self, cluster: _Cluster, study: Study, cells: list[Cell]):
        self.cluster, self.study = cluster, study
        self.waiting = deque(_Turn(cell) for cell in cells)
        self.running: dict[Any, _Turn] = {}

    def left(self) -> bool:
        return bool(self.waiting or self.running)

    def describe(self) -> str:
        if not self.running:
            return f"waiting for another run: {self.waiting[0].cell.name}" if self.waiting else ""
        first = next(iter(self.running.values())).cell
        return f"{len(self.running)} on the cluster, first {first.name}"

    def hand_out(self) -> Iterator[Outcome]:
        """Give the cluster what there is room for; yields cells that need it no more."""
        room = self.cluster.room()
        for _ in range(len(self.waiting)):
            if len(self.running) >= room:
                return
            turn = self.waiting.popleft()
            if turn.begin(self.study):
                try:
                    self.running[self.cluster.submit(turn.cell)] = turn
                except Exception as error:  # what it needs cannot be read here
                    turn.end()
                    yield turn.cell, _one_line(error)
                except BaseException:  # stopped: no other run may wait for this one's claim
                    turn.end()
                    raise
            elif self.study.store.read(turn.cell.stage, turn.cell.key) is not None:
                yield turn.cell, None
            else:
                self.waiting.append(turn)

    def take_back(self) -> Iterator[Outcome]:
        """Wait a little for answers; yields the cells that ended, and puts back those whose workers
        were lost."""
        if not self.running:
            time.sleep(1 if self.waiting else 0)
            return
        for reference in self.cluster.finished(list(self.running)):
            turn = self.running[reference]
            try:
                error = _keep(self.study, turn.cell, self.cluster.fetch(reference))
            except self.cluster.lost as loss:
                turn.losses += 1
                if turn.losses < LOSSES:
                    del self.running[reference]
                    turn.end()
                    self.waiting.appendleft(turn)
                    continue
                error = _given_up(turn.losses, loss)
            except Exception as failure:  # Ray's, or the record cannot be written
                error = _one_line(failure)
            del self.running[reference]  # only now: a stop before this is seen by `recall`
            turn.end()
            yield turn.cell, error

    def recall(self) -> None:
        """Where this stops early: end what still runs, and free its cells for others."""
        for reference, turn in self.running.items():
            self.cluster.cancel(reference)
            turn.end()


class _Cluster:
    """A connection to the cluster, and what was put into its object store for one study."""

    def __init__(self, address: str | None, study: Study):
        ray, errors = _ray(), _ray().exceptions
        self.ray, self.study, self.session = ray, study, uuid.uuid4().hex
        # A result can be lost after its cell, with the node that held it.
        self.lost = (
            errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError,
            errors.OutOfMemoryError, errors.ObjectLostError,
        )  # fmt: skip
        _connect(ray, address)
        self.threads = study.parameters["threads"]
        with_gpu = any(node["Resources"].get("GPU") for node in self._nodes())
        self.gpus = int(with_gpu and study.parameters["device"] != "cpu")
        if not self._places():
            gpu = " and a GPU" if self.gpus else ""
            raise HealingError(
                f"no node of the Ray cluster has the {self.threads} CPUs of a cell's threads{gpu}; "
                "start nodes with more, or set threads, which is part of the cells' keys"
            )
        # Losses are counted by this driver: Ray would try again in silence.
        options = {"num_cpus": self.threads, "num_gpus": self.gpus, "max_retries": 0}
        # Given here and not as options later, so that Ray ends a GPU's process with its cell: one
        # that is reused stays on the card that it saw first.
        self.remote = ray.remote(**options)(compute_cell)
        self._parameters = {**study.parameters, "run": ""}  # it lies on the driver's machine
        self._references: dict[Any, Any] = {}
        self._weights: OrderedDict[str, Any] = OrderedDict()

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _places(self) -> int:
        """How many cells the nodes can compute at once; a cell has its CPUs and GPU on one node."""

        def cells(there: dict[str, float]) -> int:
            by_cpu = int(there.get("CPU", 0) // self.threads)
            return min(by_cpu, int(there.get("GPU", 0))) if self.gpus else by_cpu

        return sum(cells(node["Resources"]) for node in self._nodes())

    def room(self) -> int:
        """How many cells may be on the cluster at once; nodes may come and go."""
        return self._places() + AHEAD

    def submit(self, cell: Cell) -> Any:
        from healing_utils.healing import models

        folder = Path(models.resolve(cell.model))
        folders = {}
        if folder.is_dir():
            identity = models.identity(cell.model, self.study.parameters["model_revision"])
            reference = self._once(identity, lambda: _files(folder))
            folders[cell.model] = (identity, reference)
        tasks = {}
        if cell.task != "none" and _is_local(cell.task):
            tasks[cell.task] = self._once(cell.task, lambda: self.study.task(cell.task))
        corpora = {}
        if source := getattr(cell, "source", None):
            corpora[source[:2]] = self._once(source[:2], lambda: self.study.corpora[source[:2]])
        weights = {key: self._network(key) for key in _networks(self.study, cell)}
        order = Order(
            self.session, self._parameters, cell, folders, tasks, corpora,
            {key: reference for key, reference in weights.items() if reference is not None},
        )  # fmt: skip
        return self.remote.remote(order)

    def _once(self, name: Any, load: Callable[[], Any]) -> Any:
        if name not in self._references:
            self._references[name] = self.ray.put(load())
        return self._references[name]

    def _network(self, key: str) -> Any:
        """Kept weights as a reference; None where they are not kept: they are made again there."""
        if key not in self._weights:
            try:
                self._weights[key] = self.ray.put(self.study.store.weights_path(key).read_bytes())
            except FileNotFoundError:
                return None
        self._weights.move_to_end(key)
        reference = self._weights[key]
        while len(self._weights) > WEIGHTS_HELD:  # what is under way keeps its own reference
            self._weights.popitem(last=False)
        return reference

    def finished(self, references: list[Any]) -> list[Any]:
        return self.ray.wait(references, num_returns=1, timeout=1.0)[0]

    def fetch(self, reference: Any) -> Answer:
        return self.ray.get(reference)

    def cancel(self, reference: Any) -> None:
        with contextlib.suppress(Exception):  # the cluster itself may be gone
            self.ray.cancel(reference, force=True)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise HealingError(
            "the executor 'ray' needs the package ray: pip install .[cluster] in a checkout"
        ) from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Once a process; the connection ends with it."""
    if ray.is_initialized():
        return
    _reach(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here stays silent
    settings = {
        "py_modules": [str(Path(__file__).resolve().parents[1])],
        "env_vars": {"HEALING_PROGRESS": "quiet"},
    }
    try:
        ray.init(address, runtime_env=settings, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray's own, or the address is none
        raise _out_of_reach(address, error) from error


def _reach(address: str | None) -> None:
    """See that something listens at ``host:port``: Ray itself tries for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        try:
            host = host.rpartition("/")[2].strip("[]")
            socket.create_connection((host, int(port)), REACHED).close()
        except (OSError, OverflowError, ValueError) as error:  # the last two: no port, no host
            raise _out_of_reach(address, error) from error


def _out_of_reach(address: str | None, error: Exception) -> HealingError:
    where = f"the Ray cluster at {address}" if address else "or start a Ray cluster"
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    return HealingError(f"cannot reach {where}: {cause}")


def _is_local(task: str) -> bool:
    """Whether a task's data lie on this machine alone: a file, a folder, or the organism's."""
    from healing_utils import organism
    from healing_utils.texts.tasks import SUFFIXES

    path = Path(task).expanduser()
    return task in organism.TASKS or path.exists() or path.suffix in SUFFIXES


def _files(folder: Path) -> dict[str, bytes]:
    """What loading a model reads, by name."""
    found = [path for pattern in MODEL_FILES for path in folder.glob(pattern)]
    return {path.name: path.read_bytes() for path in found}


def _networks(study: Study, cell: Cell) -> set[str]:
    """Keys of the fine-tuned models that computing a cell loads where they are kept."""
    from healing_utils.healing.recipes import RECIPES
    from healing_utils.study.study import PROBING_STAGES

    probing = cell.stage in PROBING_STAGES
    network = cell.network if probing else cell
    if network is None:
        return set()
    keys = {network.key} if probing and network.state != "broken" else set()
    taught = "teacher" in RECIPES[network.recipe].needs
    compared = probing and network.state == "healed"
    if network.state == "broken" or network.start == "fine-tuned" or taught or compared:
        keys.add(study.cell("intact", network.model, network.task, network.seed).key)
    return keys


def _keep(study: Study, cell: Cell, answer: Answer) -> Exception | None:
    """Write what a worker made; return the error that the cell ended in, with its traceback."""
    from healing_utils.base.records import write_atomically

    for key, weights in answer.weights.items():
        write_atomically(study.store.weights_path(key), weights)
    if answer.error is not None:
        error = HealingError(answer.error)
        error.add_note("On the cluster:\n" + answer.trace)
        return error
    study.write(cell, answer.record)
    return None


def _given_up(losses: int, loss: Exception) -> HealingError:
    cause = str(loss).strip().splitlines()[0] if str(loss).strip() else type(loss).__name__
    return HealingError(f"{losses} workers were lost over it, which may be out of memory: {cause}")


def _one_line(failure: Exception) -> Exception:
    """Ray's own errors are pages long: the first line, with the rest as a note."""
    if isinstance(failure, HealingError):
        return failure
    text = str(failure).strip() or type(failure).__name__
    error = HealingError(f"{type(failure).__name__}: {text.splitlines()[0]}")
    error.add_note(text)
    return error


# -- a worker --------------------------------------------------------------------------------------

_kept: dict[str, Any] = {}  # of the session that this process last worked for


def compute_cell(order: Order) -> Answer:
    """Compute a cell on a worker. An error of its own is an answer too."""
    try:
        return _compute(order)
    except HealingError as error:
        return Answer(error=str(error), trace=traceback.format_exc())
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip()
        return Answer(error=text, trace=traceback.format_exc())


def _compute(order: Order) -> Answer:
    study, cell = _study(order), order.cell
    _check(study, cell)
    folder = study.run_folder / "weights"
    shutil.rmtree(folder, ignore_errors=True)  # the last cell's: networks are large
    folder.mkdir(parents=True)
    for key, reference in order.weights.items():
        study.store.weights_path(key).write_bytes(_ray().get(reference))
    given = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    record = study.result(cell, lambda *_: None)
    made = [p for p in folder.glob("*.safetensors") if given.get(p) != p.stat().st_mtime_ns]
    return Answer(record, {path.stem: path.read_bytes() for path in made})


def _study(order: Order) -> Study:
    """The driver's study, with this machine's folders; kept from cell to cell of one session."""
    from healing_utils.healing import models
    from healing_utils.study.study import Study

    get = _ray().get
    if _kept.get("session") != order.session:
        if "scratch" not in _kept:
            _kept["scratch"] = _scratch()
        run = str(_kept["scratch"] / "run")
        study = Study({**order.parameters, "run": run})
        _kept.update(session=order.session, study=study)
    study = _kept["study"]
    for name, (identity, files) in order.folders.items():
        folder = _kept["scratch"] / identity.replace(":", "-")
        if not folder.is_dir():
            half = folder.with_suffix(".half")
            half.mkdir(exist_ok=True)
            for file, content in get(files).items():
                (half / file).write_bytes(content)
            half.rename(folder)
        if models.FOLDERS.get(name) != str(folder):
            models.FOLDERS[name] = str(folder)
            models.forget()
    for name, data in order.tasks.items():
        if name not in study._tasks:
            study._tasks[name] = get(data)
    for name, data in order.corpora.items():
        if name not in study.corpora:
            study.corpora[name] = get(data)
    return study


def _check(study: Study, cell: Cell) -> None:
    """What is loaded by name here is what the driver hashed: a hub's newest version may not be."""
    from healing_utils.healing import models

    said = json.loads(cell.determinants)
    said = said.get("network", said)
    if models.identity(cell.model, study.parameters["model_revision"]) != said["model"]:
        raise HealingError(
            f"this worker finds another version of model {cell.model!r} than the driver; name one "
            "with model_revision"
        )
    if "data" not in said:
        return
    size = study.settings(cell)["train_size"]
    if list(study.content(cell.task, cell.seed, size)) != said["data"]:
        raise HealingError(
            f"this worker finds other examples of task {cell.task!r} than the driver; name a "
            "version with data_revision"
        )


def _scratch() -> Path:
    """A folder of this process's own, removed with it; first, those of processes that were killed
    are removed."""
    import atexit

    from healing_utils.base.records import _alive

    here = f"healing-{socket.gethostname()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{here}*-*"):
        process = left.name.removeprefix(here).split("-")[0]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{here}{os.getpid()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
