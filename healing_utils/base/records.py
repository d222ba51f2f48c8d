"""One record a cell: written whole or not at all, never computed twice, safe beside other runs.

A run's folder may be a mounted drive where file locks mean nothing, so that nothing relies on them.
A record is renamed into place and carries a checksum. A *claim* tells other runs which cell is
being computed: a file created exclusively and kept fresh by a heartbeat. Should two runs hold the
same claim after all, both compute the cell, and the second record replaces the first by its equal.

filelock's SoftFileLease is no substitute: its empty file (a full disk, a drive that went away)
blocks a cell for ever, and a claim's age counts only from when a contender began to watch it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from healing_utils.base.errors import HealingError

BEAT = 15.0  # seconds between heartbeats of a claim
STALE = 120.0  # a claim without a heartbeat for so long belongs to a run that is gone


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """A short hash of anything JSON holds."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:20]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; a full disk leaves what was there."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise HealingError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # there only where the writing failed
            temporary.unlink()


def alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


class Store:
    """The records of a run, by stage and key: ``RUN/records/STAGE/KEY.json``."""

    def __init__(self, run: str | Path):
        self.run = Path(run)
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    def path(self, stage: str, key: str) -> Path:
        return self.run / "records" / stage / f"{key}.json"

    def weights_path(self, key: str) -> Path:
        return self.run / "weights" / f"{key}.safetensors"

    def claim_path(self, key: str) -> Path:
        return self.run / "claims" / f"{key}.json"

    def write(self, stage: str, key: str, record: dict[str, Any]) -> None:
        record = {**record, "stage": stage, "key": key}
        record["checksum"] = digest(record)
        write_atomically(self.path(stage, key), json.dumps(record, indent=1, sort_keys=True) + "\n")

    def read(self, stage: str, key: str) -> dict[str, Any] | None:
        """The record, or None where there is none. A corrupt one is set aside, which is said."""
        path = self.path(stage, key)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            checksum = record.pop("checksum")
            if record["key"] != key or digest(record) != checksum:
                raise ValueError("its checksum does not match")
            return record
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HealingError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
            with contextlib.suppress(FileNotFoundError):  # another run was quicker
                os.replace(path, aside)
            print(
                f"record {path} is corrupt ({error}); set aside as {aside.name}, computed again",
                file=sys.stderr,
            )
            return None

    def records(self, stage: str) -> Iterator[dict[str, Any]]:
        """All whole records of a stage, in the order of their keys."""
        paths = sorted((self.run / "records" / stage).glob("*.json"))
        yield from filter(None, (self.read(stage, path.stem) for path in paths))

    def sweep(self) -> None:
        """Remove what a killed run left: claims, and temporary files too old to be another's."""
        claims = (self.run / "claims").glob("*.json")
        for path in [*self.run.rglob(".*.tmp"), *claims]:
            with contextlib.suppress(OSError):
                if path.suffix == ".json":
                    self.claimed_by_other(path.stem)  # removes it where its run is gone
                elif time.time() - path.stat().st_mtime > STALE:
                    path.unlink()

    def claimed_by_other(self, key: str) -> str | None:
        """Who is computing the cell, or None. A claim whose run is gone is removed."""
        path = self.claim_path(key)
        try:
            age = time.time() - path.stat().st_mtime
            owner = json.loads(path.read_text())["owner"]
            host, pid, _ = owner.split(":")
            gone = host == socket.gethostname() and not alive(int(pid))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            owner, gone = "unknown", False  # cut off, or still being written
        if owner == self.owner:
            return None
        if gone or age > STALE:
            path.unlink(missing_ok=True)
            return None
        return owner

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Claim a cell for the block; yields False where another run has it.

        Another run may have finished the cell between our look and our claim: look again for the
        record before computing.
        """
        path = self.claim_path(key)
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT):
                with contextlib.suppress(OSError):
                    os.utime(path)

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mine = not self.claimed_by_other(key) and self._create(path)
        except OSError as error:
            raise HealingError(f"cannot claim {path}: {error.strerror or error}") from error
        if not mine:
            yield False
            return
        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield True
        finally:
            stop.set()
            heart.join()
            with contextlib.suppress(OSError):  # it goes stale without a heartbeat
                path.unlink()

    def _create(self, path: Path) -> bool:
        """Create a claim's file; False where another run was quicker."""
        try:
            with open(path, "x") as file:
                file.write(json.dumps({"owner": self.owner, "since": time.time()}))
        except FileExistsError:
            return False
        except OSError:  # a full disk: an empty claim would hold up every run until it is stale
            path.unlink(missing_ok=True)
            raise
        return True
