"""One record a cell: written whole or not at all, never computed twice, safe beside other runs.

A run's folder may be a mounted drive where file locks mean nothing, so that nothing relies on them
(filelock's SoftFileLease would block a cell for ever where a full disk left its file empty). A
*claim* tells other runs which cell is being computed: a file created exclusively and kept fresh by
a heartbeat. Should two runs hold one after all, the second record replaces the first by its equal.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from healing_utils.base.errors import HealingError, Unwritable

BEAT = 15.0  # seconds between heartbeats of a claim
STALE = 120.0  # a claim without a heartbeat for so long belongs to a run that is gone
DAY = 86400.0  # no clock is so wrong: what another machine was writing then is of no use any more


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """A short hash of anything JSON holds."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:20]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; a full disk leaves what was there. Its folder is made, and
    none above that: a run that was moved away is not begun a second time where it lay."""
    ours = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    temporary = path.with_name(f".{path.name}.{ours}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "xb") as file:  # which follows no link
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Unwritable(f"cannot write {path}: {_why(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # there only where the writing failed
            temporary.unlink()


def _why(error: OSError) -> str:
    gone = isinstance(error, FileNotFoundError)
    return "the run's folder is gone; was it moved?" if gone else error.strerror or str(error)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; empty where it is missing or cannot be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):  # the last: lists in lists without end
        return {}
    return found if isinstance(found, dict) else {}


def set_aside(path: Path, why: object) -> None:
    """Give a file of a run that is not what it should be another name, which is said: it is made
    again."""
    aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
    done = f"set aside as {aside.name}"
    try:
        os.replace(path, aside)
    except FileNotFoundError:  # another run was quicker
        pass
    except OSError as error:
        done = f"passed over, as it cannot be set aside: {error.strerror}"
    print(f"{path} is corrupt ({why}); {done}", file=sys.stderr)


def _named(name: object) -> str:
    """A stage or a key as it may come out of a file: none leads out of the run's folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII):
        raise HealingError(f"{repr(name)[:80]} is no name of a stage or of a cell")
    return name


def _is_left(path: Path, here: bool, pid: str, patience: float) -> bool:
    """Whether who wrote a file is gone: a process of this machine (`here`) that is no more, or any
    that has not touched it for `patience` seconds."""
    silent = abs(time.time() - path.lstat().st_mtime)  # clocks differ both ways
    try:
        if here:
            os.kill(int(pid), 0)  # only asks whether it is there
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, ValueError):  # somebody else's, or no number
        pass
    return silent > patience


class Store:
    """The records of a run, by stage and key: ``RUN/records/STAGE/KEY.json``."""

    def __init__(self, run: str | Path):
        self.run, self.begun = Path(run), False
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    def begin(self) -> None:
        """Make the run's folder where it is missing, once. Raises HealingError where that fails,
        or it is gone later."""
        try:
            if not self.begun:
                self.run.mkdir(parents=True, exist_ok=True)
                self.begun = True
            self.run.stat()
        except OSError as error:
            raise HealingError(f"cannot use {self.run}: {_why(error)}") from error

    def path(self, stage: str, key: str) -> Path:
        return self.run / "records" / _named(stage) / f"{_named(key)}.json"

    def weights_path(self, key: str) -> Path:
        return self.run / "weights" / f"{_named(key)}.safetensors"

    def claim_path(self, key: str) -> Path:
        return self.run / "claims" / f"{_named(key)}.json"

    def write(self, stage: str, key: str, record: dict[str, Any]) -> None:
        record = {**record, "stage": stage, "key": key}
        record["checksum"] = digest(record)
        with contextlib.suppress(OSError):  # which writing then tells
            (self.run / "records").mkdir(exist_ok=True)
        write_atomically(self.path(stage, key), json.dumps(record, indent=1, sort_keys=True) + "\n")

    def read(self, stage: str, key: str) -> dict[str, Any] | None:
        """The record, or None where there is none. A corrupt one is set aside, which is said."""
        return self._read(self.path(stage, key))

    def records(self, stage: str) -> Iterator[dict[str, Any]]:
        """All whole records of a stage, in the order of their keys."""
        paths = sorted((self.run / "records" / _named(stage)).glob("*.json"))
        yield from filter(None, map(self._read, paths))

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            record = json.loads(path.read_text("utf-8"))
            checksum = record.pop("checksum")
            if record["key"] != path.stem or digest(record) != checksum:
                raise ValueError("its checksum does not match")
            return record
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HealingError(f"cannot read {path}: {_why(error)}") from error
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
            set_aside(path, error)
            return None

    def sweep(self) -> None:
        """Remove what runs that are gone left: their claims and temporary files."""
        for path in (self.run / "claims").glob("*.json"):
            with contextlib.suppress(OSError, HealingError):
                self.claimed_by_other(path.stem)  # removes it where its run is gone
        for path in self.run.rglob(".*.tmp"):
            with contextlib.suppress(OSError, ValueError):
                name, pid, _, _ = path.name.rsplit(".", 3)
                if _is_left(path, name.endswith(f".{socket.gethostname()}"), pid, DAY):
                    path.unlink()

    def claimed_by_other(self, key: str) -> str | None:
        """Who is computing the cell, or None. A claim whose run is gone is removed."""
        path = self.claim_path(key)
        owner = str(read_json(path).get("owner"))  # it may be cut off, or still being written
        if owner == self.owner:
            return None
        host, pid, *_ = [*owner.split(":"), ""]
        with contextlib.suppress(FileNotFoundError):  # there is none
            if not _is_left(path, host == socket.gethostname(), pid, STALE):
                return owner
            path.unlink()
        return None

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Claim a cell for the block; yields False where another run has it. One may have finished
        it between our look and our claim: look again for the record before computing."""
        path, mine, stop = self.claim_path(key), False, threading.Event()
        try:
            path.parent.mkdir(exist_ok=True)
            if not self.claimed_by_other(key):
                with contextlib.suppress(FileExistsError), open(path, "x") as file:
                    mine = True
                    file.write(json.dumps({"owner": self.owner, "since": time.time()}))
        except OSError as error:
            if mine:  # a full disk: an empty claim would hold up every run until it is stale
                path.unlink(missing_ok=True)
            raise HealingError(f"cannot claim {path}: {_why(error)}") from error
        if not mine:
            yield False
            return

        def beat() -> None:
            while not stop.wait(BEAT):
                with contextlib.suppress(OSError):
                    os.utime(path)

        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield True
        finally:
            stop.set()
            heart.join()
            with contextlib.suppress(OSError):  # it goes stale without a heartbeat
                path.unlink()
