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


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; empty where it is missing or cannot be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
            record = json.loads(path.read_text("utf-8"))
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
            print(f"record {path} is corrupt ({error}); set aside as {aside.name}", file=sys.stderr)
            return None

    def records(self, stage: str) -> Iterator[dict[str, Any]]:
        """All whole records of a stage, in the order of their keys."""
        paths = sorted((self.run / "records" / stage).glob("*.json"))
        yield from filter(None, (self.read(stage, path.stem) for path in paths))

    def sweep(self) -> None:
        """Remove what a killed run left: claims, and temporary files too old to be another's."""
        for path in [*self.run.rglob(".*.tmp"), *(self.run / "claims").glob("*.json")]:
            with contextlib.suppress(OSError):
                if path.suffix == ".json":
                    self.claimed_by_other(path.stem)  # removes it where its run is gone
                elif time.time() - path.stat().st_mtime > STALE:
                    path.unlink()

    def claimed_by_other(self, key: str) -> str | None:
        """Who is computing the cell, or None. A claim whose run is gone is removed."""
        path, owner, gone = self.claim_path(key), "unknown", False
        try:
            gone = time.time() - path.stat().st_mtime > STALE
            owner = json.loads(path.read_text())["owner"]
            host, pid, _ = owner.split(":")
            if host == socket.gethostname():
                os.kill(int(pid), 0)  # only asks whether it is there
        except FileNotFoundError:
            return None
        except ProcessLookupError:
            gone = True
        except (PermissionError, ValueError, KeyError, TypeError, AttributeError):
            pass  # a process of somebody else's; a claim cut off, or still being written
        if gone and owner != self.owner:
            path.unlink(missing_ok=True)
        return None if gone or owner == self.owner else owner

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Claim a cell for the block; yields False where another run has it. One may have finished
        it between our look and our claim: look again for the record before computing."""
        path, mine, stop = self.claim_path(key), False, threading.Event()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self.claimed_by_other(key):
                with contextlib.suppress(FileExistsError), open(path, "x") as file:
                    mine = True
                    file.write(json.dumps({"owner": self.owner, "since": time.time()}))
        except OSError as error:
            if mine:  # a full disk: an empty claim would hold up every run until it is stale
                path.unlink(missing_ok=True)
            raise HealingError(f"cannot claim {path}: {error.strerror or error}") from error
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
