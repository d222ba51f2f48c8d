"""One record a cell: written whole or not at all, never computed twice, safe beside other runs.

A run's folder may be a mounted drive where file locks mean nothing. So nothing here relies on them:

- a record is written under a temporary name, flushed, and renamed into place;
- it carries a checksum, and one that does not match is named, set aside and computed again;
- a *claim* tells other runs on the same folder which cell is being computed. It is a file created
  exclusively and kept fresh by a heartbeat. Should two runs hold the same claim after all, both
  compute the cell, get the same result, and the second write replaces the first by its equal.
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
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise HealingError(f"cannot write {path}: {error.strerror or error}") from error


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

    # -- records -----------------------------------------------------------------------------

    def write(self, stage: str, key: str, record: dict[str, Any]) -> None:
        record = {**record, "stage": stage, "key": key}
        record["checksum"] = digest(record)
        write_atomically(self.path(stage, key), json.dumps(record, indent=1, sort_keys=True) + "\n")

    def read(self, stage: str, key: str) -> dict[str, Any] | None:
        """The record, or None where there is none. A corrupt one is set aside, which is said."""
        path = self.path(stage, key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            text = ""
        except OSError as error:
            raise HealingError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            record = json.loads(text)
            checksum = record.pop("checksum")
            if record["key"] != key or digest(record) != checksum:
                raise ValueError("its checksum does not match")
            return record
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
        for path in sorted((self.run / "records" / stage).glob("*.json")):
            if path.name.startswith("."):
                continue
            record = self.read(stage, path.stem)
            if record is not None:
                yield record

    def sweep(self) -> None:
        """Remove what a killed run left: its claims, and temporary files, of which young ones may
        be another run's."""
        for path in self.run.rglob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
        for path in (self.run / "claims").glob("*.json"):
            with contextlib.suppress(OSError):
                self.claimed_by_other(path.stem)  # removes it where its run is gone

    # -- claims ------------------------------------------------------------------------------

    def claimed_by_other(self, key: str) -> str | None:
        """Who is computing the cell, or None. A claim whose run is gone is removed."""
        path = self.claim_path(key)
        try:
            age = time.time() - path.stat().st_mtime
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        try:
            owner = json.loads(text)["owner"]
            host, pid, _ = owner.split(":")
        except (ValueError, KeyError, TypeError, AttributeError):
            owner, host, pid = "unknown", "", ""  # cut off while being written
        if owner == self.owner:
            return None
        gone = host == socket.gethostname() and pid.isdigit() and not _alive(int(pid))
        if gone or age > STALE:
            path.unlink(missing_ok=True)
            return None
        return owner

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Claim a cell for the block; yields False where another run has it."""
        path = self.claim_path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mine = not self.claimed_by_other(key) and self._create_claim(path)
        except OSError as error:
            raise HealingError(f"cannot claim {path}: {error.strerror or error}") from error
        if not mine:
            yield False
            return
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT):
                with contextlib.suppress(OSError):
                    os.utime(path)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            # Another run may have finished the cell between our look and our claim: the caller
            # looks again for the record before it computes.
            yield True
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(OSError):  # it goes stale without a heartbeat
                path.unlink(missing_ok=True)

    def _create_claim(self, path: Path) -> bool:
        """Create the claim's file; False where another run was quicker."""
        try:
            file = open(path, "x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(json.dumps({"owner": self.owner, "since": time.time()}))
        except OSError:  # a full disk: an empty claim would hold up every run until it is stale
            path.unlink(missing_ok=True)
            raise
        return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
