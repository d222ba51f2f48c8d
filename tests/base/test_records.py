"""Records are whole or absent, corrupt ones are named, and claims keep two runs apart."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from healing_utils.base import records
from healing_utils.base.errors import HealingError
from healing_utils.base.records import Store, canonical, write_atomically

RECORD = {"result": {"score": 0.1 + 0.2, "curve": [1, None, float("nan")]}, "cell": {"name": "é"}}
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "run")
    store.begin()
    return store


def leftovers(folder) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file()]


def child(code: str, store: Store) -> subprocess.Popen:
    """A process that runs `code` with `store`, once it has said its first line."""
    code = f"import os, signal, sys, time\nfrom healing_utils.base.records import Store\n{code}"
    command = [sys.executable, "-c", code.replace("STORE", f"Store({str(store.run)!r})")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"
    return process


def age(path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def raising(error):
    def fails(*_, **__):
        raise error

    return fails


def test_what_is_written_is_read_to_the_last_bit(store):
    store.write("baseline", "k1", RECORD)
    got = store.read("baseline", "k1")
    assert canonical(got["result"]) == canonical(RECORD["result"]) and got["cell"] == RECORD["cell"]
    assert (got["stage"], got["key"], got["result"]["score"]) == ("baseline", "k1", 0.1 + 0.2)
    assert store.read("baseline", "k2") is None and store.read("recovery", "k1") is None
    text = store.path("baseline", "k1").read_bytes()
    store.write("baseline", "k1", dict(reversed(RECORD.items())))
    assert store.path("baseline", "k1").read_bytes() == text  # the order of writing leaves no trace
    assert leftovers(store.run) == ["k1.json"]


def test_a_kill_between_writing_and_renaming_leaves_the_old_record_and_is_swept(store):
    store.write("baseline", "k", {"version": 1})
    process = child(
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "print('ready', flush=True)\nSTORE.write('baseline', 'k', {'version': 2})\n",
        store,
    )
    assert process.wait() == -signal.SIGKILL
    assert [r["version"] for r in store.records("baseline")] == [1]
    (temporary,) = store.run.rglob(".*.tmp")
    host, living = socket.gethostname(), str(os.getpid())
    other = temporary.rename(temporary.with_name(temporary.name.replace(host, "elsewhere")))
    ours = other.with_name(f".k.json.{host}.{living}.x.tmp")
    (mine := other.with_name(f".k.json.{host}.{process.pid}.x.tmp")).touch()
    ours.touch()
    for silent in (-5000, 5000):  # no clock is trusted so far
        age(other, silent)
        store.sweep()
        assert other.exists() and ours.exists() and not mine.exists()
    age(other, -records.DAY - 1)
    ours.unlink()
    store.sweep()
    assert leftovers(store.run) == ["k.json"]


@pytest.mark.parametrize(
    ("function", "raised", "said"),
    [
        ("os.fsync", FULL, r"cannot write .*k\.json: No space"),
        ("os.replace", FULL, r"cannot write .*k\.json: No space"),
        # The permission bits of a folder do not stop root, so the refusal is planted.
        ("builtins.open", PermissionError(errno.EACCES, "denied"), "cannot write .*denied"),
        ("os.fsync", KeyboardInterrupt(), None),
    ],
)
def test_what_cannot_be_written_leaves_what_was_there(store, function, raised, said, monkeypatch):
    store.write("baseline", "k", {"version": 1})
    expected = HealingError if said else KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(expected, match=said):
        patch.setattr(function, raising(raised))
        store.write("baseline", "k", {"version": 2})
    assert store.read("baseline", "k")["version"] == 1
    assert leftovers(store.run) == ["k.json"]
    with pytest.raises(HealingError, match="cannot write .*file"):
        write_atomically(store.path("baseline", "k") / "sub" / "file", "x")


DAMAGE = {
    "one digit": lambda text: text.replace(b"0.30000000000000004", b"0.40000000000000004"),
    "another key": lambda text: text.replace(b'"key": "k"', b'"key": "j"'),
    "no checksum": lambda text: text.replace(b'"checksum"', b'"sum"'),
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "binary": lambda text: bytes(range(256)),
    "a list": lambda text: b"[1, 2]",
    "null": lambda text: b"null",
    "nested": lambda text: b"[" * 100_000,
    "half a character": lambda text: text.replace(b"\\u00e9", b"\\ud800"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("writable", [True, False])
def test_a_corrupt_record_is_named_and_set_aside(store, damage, writable, capsys, monkeypatch):
    for key in ("k", "whole"):
        store.write("baseline", key, RECORD)
    path = store.path("baseline", "k")
    whole, bad = path.read_bytes(), DAMAGE[damage](path.read_bytes())
    assert bad != whole
    path.write_bytes(bad)
    if not writable:
        monkeypatch.setattr("os.replace", raising(OSError(errno.EROFS, "Read-only file system")))
    assert [r["key"] for r in store.records("baseline")] == ["whole"]
    (said,) = capsys.readouterr().err.splitlines()
    if not writable:
        assert f"{path} is corrupt" in said and "Read-only file system" in said
        return
    (aside,) = path.parent.glob("k.json.corrupt-*")
    assert f"{path} is corrupt" in said and aside.name in said
    assert aside.read_bytes() == bad and not path.exists()
    assert store.read("baseline", "k") is None  # and it is not said again
    assert capsys.readouterr().err == ""


def test_one_of_two_stores_gets_the_claim_and_gives_it_back(store):
    other = Store(store.run)
    with store.claim("k") as mine:
        assert mine
        assert other.claimed_by_other("k") == store.owner
        assert store.claimed_by_other("k") is None
        with other.claim("k") as second, other.claim("another") as free:
            assert not second and free
        assert store.claim_path("k").exists()  # the refused one took nothing away
    with pytest.raises(RuntimeError, match="planted"), other.claim("k") as mine:
        assert mine
        raise RuntimeError("planted")
    assert leftovers(store.run) == []


def test_a_killed_owners_claim_is_taken_over_at_once(store):
    code = "with STORE.claim('k'):\n    print('ready', flush=True)\n    time.sleep(60)\n"
    process = child(code, store)
    with store.claim("k") as mine:
        assert not mine
    process.kill()
    process.communicate()
    claim = store.claim_path("k")
    content = claim.read_bytes()
    with store.claim("k") as mine:
        assert mine
    assert not claim.exists()
    claim.write_bytes(content)  # of a cell that was finished: nobody claims it again
    with store.claim("another"):
        Store(store.run).sweep()
        assert not claim.exists() and store.claim_path("another").exists()


@pytest.mark.parametrize(
    "content",
    [
        b'{"owner": "elsewhere:1:abc", "since": 0}', b"", b"{", b"[1]", b'{"owner": 5}',
        b'{"owner": "nobody"}', b'{"owner": "a:b:c"}', b"\xff\x00\xfe", b"[" * 100_000,
        f'{{"owner": "{socket.gethostname()}:{"9" * 5000}:x"}}'.encode(), None,
    ],
)  # fmt: skip
def test_a_claim_without_a_heartbeat_holds_until_it_is_stale(store, content):
    """Another machine's, whose clock may be wrong both ways, and one that is garbled, which may be
    one that is being written; None is a link to nowhere."""
    path = store.claim_path("k")
    path.parent.mkdir()
    for silent, free in ((records.STALE - 20, False), (records.STALE + 1, True)):
        for sign in (1, -1):
            path.symlink_to("/nowhere") if content is None else path.write_bytes(content)
            os.utime(path, (time.time() - sign * silent,) * 2, follow_symlinks=False)
            with store.claim("k") as mine:
                assert mine == free
            path.unlink(missing_ok=True)


def test_a_claim_is_kept_fresh_while_it_is_held(store, monkeypatch):
    monkeypatch.setattr(records, "BEAT", 0.02)
    with store.claim("k"):
        age(store.claim_path("k"), records.STALE + 1)
        time.sleep(0.2)
        assert Store(store.run).claimed_by_other("k") == store.owner


@pytest.mark.parametrize("function", ["json.dumps", "builtins.open"])
def test_what_cannot_be_claimed_leaves_no_empty_claim(store, function, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(function, raising(FULL))
        with pytest.raises(HealingError, match="cannot claim .*No space"), store.claim("k"):
            pass
    with Store(store.run).claim("k") as mine:
        assert mine


NAMES = ("../../victim", "", ".", "a/b", "/victim", "a\0", "k\n", "k" * 65, 5, None, ["k"])


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_what_is_no_name_of_a_cell_touches_nothing_outside_the_run(store, name):
    (store.run.parent / "victim.json").write_text("{}")
    for touch in (
        lambda: store.read("baseline", name), lambda: store.read(name, "k"),
        lambda: list(store.records(name)), lambda: store.write("baseline", name, RECORD),
        lambda: store.claimed_by_other(name), lambda: store.weights_path(name),
    ):  # fmt: skip
        with pytest.raises(HealingError, match="is no name of a stage or of a cell"):
            touch()
    assert leftovers(store.run.parent) == ["victim.json"]


def test_a_link_where_a_file_is_written_is_not_followed(store, tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", store.run / "parameters.json"
    victim.write_text("whole")
    path.symlink_to(victim)
    write_atomically(path, "new")
    assert path.read_text() == "new" and not path.is_symlink()
    monkeypatch.setattr(records.uuid, "uuid4", lambda: type("Guessed", (), {"hex": "guessed"}))
    temporary = f".parameters.json.{socket.gethostname()}.{os.getpid()}.guessed.tmp"
    (store.run / temporary).symlink_to(victim)
    with pytest.raises(HealingError, match="cannot write .*File exists"):
        write_atomically(path, "newer")
    assert victim.read_text() == "whole" and path.read_text() == "new"


def test_a_run_that_is_moved_away_is_not_begun_again(store, tmp_path):
    store.write("baseline", "k", RECORD)
    store.run.rename(tmp_path / "moved")
    for act in (
        lambda: store.write("baseline", "k2", RECORD), lambda: store.claim("k2").__enter__(),
        lambda: write_atomically(store.run / "tables" / "a.csv", ""), store.begin,
    ):  # fmt: skip
        with pytest.raises(HealingError, match="the run's folder is gone; was it moved?"):
            act()
    assert store.read("baseline", "k") is None and not store.run.exists()
