"""Records are whole or absent, corrupt ones are named, and claims keep two runs apart."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from healing_utils.base import records
from healing_utils.base.errors import HealingError
from healing_utils.base.records import Store, canonical, write_atomically

RECORD = {"result": {"score": 0.1 + 0.2, "curve": [1, None, float("nan")]}, "cell": {"name": "é"}}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "run")


def leftovers(folder) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file()]


# --- Whole or not at all --------------------------------------------------------------------------


def test_what_is_written_is_read_to_the_last_bit(store):
    store.write("baseline", "k1", RECORD)
    got = store.read("baseline", "k1")
    assert canonical(got["result"]) == canonical(RECORD["result"]) and got["cell"] == RECORD["cell"]
    assert got["result"]["score"] == 0.1 + 0.2
    assert (got["stage"], got["key"]) == ("baseline", "k1")
    assert store.read("baseline", "k2") is None and store.read("recovery", "k1") is None
    text = store.path("baseline", "k1").read_bytes()
    store.write("baseline", "k1", dict(reversed(RECORD.items())))
    assert store.path("baseline", "k1").read_bytes() == text  # the order of writing leaves no trace
    assert leftovers(store.run) == ["k1.json"]


WRITER = """
import sys
from healing_utils.base.records import Store
store = Store(sys.argv[1])
print("ready", flush=True)
while True:
    for version in range(1000):
        for key in ("a", "b"):
            store.write("baseline", key, {"version": version, "payload": [version] * 20000})
"""


def test_killed_writers_leave_whole_records(store):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the moments: {seed}")
    rng = random.Random(seed)
    sizes = set()
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store.run)], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for key in ("a", "b"):
            record = store.read("baseline", key)
            if record is not None:
                assert record["payload"] == [record["version"]] * 20000
                sizes.add(record["version"])
    assert sizes, "no record was ever written: the test saw nothing"
    assert not list(store.run.rglob("*.corrupt-*")), f"seed {seed}"


def test_a_kill_between_writing_and_renaming_leaves_the_old_record_and_is_swept(store):
    store.write("baseline", "k", {"version": 1})
    code = (
        "import os, signal, sys\n"
        "from healing_utils.base.records import Store\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Store(sys.argv[1]).write('baseline', 'k', {'version': 2})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store.run)])
    assert done.returncode == -signal.SIGKILL
    assert store.read("baseline", "k")["version"] == 1
    assert [r["version"] for r in store.records("baseline")] == [1]
    (temporary,) = store.run.rglob(".*.tmp")
    store.sweep()
    assert temporary.exists()  # so young that another run may be writing it
    old = time.time() - records.STALE - 1
    os.utime(temporary, (old, old))
    store.sweep()
    assert leftovers(store.run) == ["k.json"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(store, function, monkeypatch):
    store.write("baseline", "k", {"version": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(HealingError, match=r"cannot write .*k\.json: No space left on device"):
            store.write("baseline", "k", {"version": 2})
    assert store.read("baseline", "k")["version"] == 1
    assert leftovers(store.run) == ["k.json"]


def test_an_interrupted_write_leaves_no_temporary_file(store, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write("baseline", "k", {"version": 2})
    assert leftovers(store.run) == []


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(HealingError, match="cannot write .*file"):
        write_atomically(tmp_path / "file" / "sub" / "k.json", "x")

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # The permission bits of a folder do not stop root, so the refusal is planted.
    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(HealingError, match="cannot write .*Permission denied"):
        write_atomically(tmp_path / "k.json", "x")
    with (
        pytest.raises(HealingError, match="cannot claim .*Permission denied"),
        Store(tmp_path).claim("k"),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="the permission bits of a folder do not stop root")
def test_a_read_only_folder_is_a_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(HealingError, match="cannot write"):
            Store(tmp_path).write("baseline", "k", RECORD)
        with pytest.raises(HealingError, match="cannot claim"), Store(tmp_path).claim("k"):
            pass
    finally:
        tmp_path.chmod(0o700)


# --- Corrupt records ------------------------------------------------------------------------------


def changed(text: bytes, old: bytes, new: bytes) -> bytes:
    assert old in text
    return text.replace(old, new)


DAMAGE = {
    "one digit": lambda text: changed(text, b"0.30000000000000004", b"0.40000000000000004"),
    "another key": lambda text: changed(text, b'"key": "k"', b'"key": "j"'),
    "no checksum": lambda text: json.dumps(
        {k: v for k, v in json.loads(text).items() if k != "checksum"}
    ).encode(),
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "zeros": lambda text: bytes(len(text)),
    "binary": lambda text: bytes(range(256)),
    "a list": lambda text: b"[1, 2]",
    "a number": lambda text: b"3",
    "null": lambda text: b"null",
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_corrupt_record_is_named_and_set_aside(store, damage, capsys):
    store.write("baseline", "k", RECORD)
    store.write("baseline", "whole", RECORD)
    path = store.path("baseline", "k")
    bad = DAMAGE[damage](path.read_bytes())
    path.write_bytes(bad)
    assert [r["key"] for r in store.records("baseline")] == ["whole"]
    said = capsys.readouterr().err
    assert str(path) in said and "corrupt" in said and len(said.strip().splitlines()) == 1
    (aside,) = path.parent.glob("k.json.corrupt-*")
    assert aside.name in said and aside.read_bytes() == bad and not path.exists()
    assert store.read("baseline", "k") is None  # and it is not said again
    assert capsys.readouterr().err == ""
    store.write("baseline", "k", RECORD)
    assert len(list(store.records("baseline"))) == 2


# --- Claims ---------------------------------------------------------------------------------------


def claim_of(store: Store, key: str, owner: object) -> None:
    write_atomically(store.claim_path(key), json.dumps({"owner": owner, "since": 0}))


def age(path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_one_of_two_stores_gets_the_claim_and_gives_it_back(store):
    other = Store(store.run)
    with store.claim("k") as mine:
        assert mine
        assert other.claimed_by_other("k") == store.owner
        assert store.claimed_by_other("k") is None
        with other.claim("k") as second, other.claim("another") as free:
            assert not second and free
        assert store.claim_path("k").exists()  # the refused one took nothing away
    with other.claim("k") as mine:
        assert mine
    with pytest.raises(RuntimeError, match="planted"), store.claim("k"):
        raise RuntimeError("planted")
    assert leftovers(store.run) == []


RACER = """
import sys, time
from pathlib import Path
from healing_utils.base.records import Store
store = Store(sys.argv[1])
print("ready", flush=True)
while not (store.run / "go").exists():
    time.sleep(0.001)
for i in range(30):
    with store.claim(f"k{i}") as mine:
        if mine:
            alone = store.run / f"alone-{i}"
            alone.touch(exist_ok=False)  # fails where another is in the block
            time.sleep(0.02)
            alone.unlink()
            (store.run / f"done-{i}").touch()
        else:
            print("refused", flush=True)
"""


def test_claims_are_exclusive_between_processes(store):
    store.run.mkdir(parents=True)
    command = [sys.executable, "-c", RACER, str(store.run)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    (store.run / "go").touch()
    said = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert "refused" in "".join(said), "they never met: the test saw nothing"
    assert len(list(store.run.glob("done-*"))) == 30
    assert not list((store.run / "claims").iterdir())


HOLDER = """
import sys, time
from healing_utils.base.records import Store
with Store(sys.argv[1]).claim("k") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_killed_owners_claim_is_taken_over_at_once(store):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "True"
    with store.claim("k") as mine:
        assert not mine
    process.kill()
    process.wait()
    process.stdout.close()
    claim = store.claim_path("k")
    content = claim.read_bytes()
    with store.claim("k") as mine:
        assert mine
    assert not claim.exists()
    claim.write_bytes(content)  # of a cell that was finished: nobody claims it again
    with store.claim("another"):
        Store(store.run).sweep()
        assert not claim.exists() and store.claim_path("another").exists()


def test_a_claim_without_a_heartbeat_is_taken_over(store):
    claim_of(store, "k", "elsewhere:1:abc")
    age(store.claim_path("k"), records.STALE - 20)
    with store.claim("k") as mine:
        assert not mine
    age(store.claim_path("k"), records.STALE + 1)
    with store.claim("k") as mine:
        assert mine


def test_a_claim_is_kept_fresh_while_it_is_held(store, monkeypatch):
    monkeypatch.setattr(records, "BEAT", 0.02)
    with store.claim("k"):
        age(store.claim_path("k"), records.STALE + 1)
        time.sleep(0.2)
        assert Store(store.run).claimed_by_other("k") == store.owner


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b'{"owner": 5}', b'{"owner": "nobody"}', b"\xff\x00\xfe", b"{}"],
)
def test_a_garbled_claim_holds_until_it_is_stale(store, content):
    path = store.claim_path("k")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with store.claim("k") as mine:
        assert not mine  # it may be one that is being written
    age(path, records.STALE + 1)
    with store.claim("k") as mine:
        assert mine


def test_a_full_disk_leaves_no_empty_claim(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(records.json, "dumps", full)
        with pytest.raises(HealingError, match="cannot claim .*No space"), store.claim("k"):
            pass
    with Store(store.run).claim("k") as mine:
        assert mine
