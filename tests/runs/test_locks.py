"""One process at a time in a run directory, on a local path and on a store without locks."""

import json
import subprocess
import sys
import time

import pytest
from etils import epath

from tcc_jax.runs import locks
from tcc_jax.runs.locks import flock, hold, is_shared, owner_file
from tcc_jax.terminal import UserError

HOLD = """
import sys, time
from pathlib import Path
from tcc_jax.runs.locks import flock
with flock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_refused_until_the_first_one_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on "), flock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with flock(tmp_path), pytest.raises(UserError, match="in use by process"), flock(tmp_path):
        pass


@pytest.fixture(params=["pathlib", "epath"])
def folder(request, tmp_path):
    return tmp_path if request.param == "pathlib" else epath.Path(tmp_path)


def owned(folder, lost=lambda reason: None, stale_seconds=120.0):
    return owner_file(folder, lost, heartbeat_seconds=0.05, stale_seconds=stale_seconds)


def test_an_owner_with_a_fresh_heartbeat_keeps_others_out(folder):
    with owned(folder):
        first = json.loads((folder / "owner.json").read_text())
        time.sleep(0.3)
        assert json.loads((folder / "owner.json").read_text())["time"] > first["time"]
        with pytest.raises(UserError, match=f"in use by process {first['pid']} on "), owned(folder):
            pass
    assert not (folder / "owner.json").exists()


def test_a_stale_owner_is_followed(folder):
    dead = {"name": "x", "pid": 1, "host": "gone", "time": time.time() - 1000}
    for text in (json.dumps(dead), "{cut sho", "[]"):
        (folder / "owner.json").write_text(text)
        with owned(folder):
            assert json.loads((folder / "owner.json").read_text())["name"] != "x"


def test_an_owner_that_was_overtaken_hears_of_it_and_leaves_the_new_one_alone(folder):
    lost = []
    with owned(folder, lost.append):
        other = json.dumps({"name": "other", "pid": 7, "host": "elsewhere", "time": time.time()})
        # Twice, as the first may fall between the reading and the writing of a heartbeat.
        for _ in range(2):
            (folder / "owner.json").write_text(other)
            time.sleep(0.3)
    assert len(lost) == 1 and "process 7 on elsewhere has taken over" in lost[0]
    assert json.loads((folder / "owner.json").read_text())["name"] == "other"


def test_a_shared_path_has_an_owner_and_a_local_one_a_lock_alone(tmp_path, monkeypatch):
    def table(kind):
        (tmp_path / "mounts").write_text(
            f"disk / ext4 rw 0 0\nbucket {tmp_path} {kind} rw 0 0\nproc /proc proc rw 0 0\n"
        )
        return tmp_path / "mounts"

    (tmp_path / "run").mkdir()
    for kind, shared in (("ext4", False), ("tmpfs", False), ("fuse.gcsfuse", True), ("nfs4", True)):
        assert is_shared(tmp_path / "run", table(kind)) == shared
    assert not is_shared(tmp_path, tmp_path / "nowhere")
    with hold(tmp_path / "run", print):
        assert not (tmp_path / "run" / "owner.json").exists()
    monkeypatch.setattr(locks, "is_shared", lambda path: True)
    with hold(tmp_path / "run", print):
        assert (tmp_path / "run" / "owner.json").exists()


def test_the_owner_of_a_process_that_is_gone_is_followed_at_once_and_another_one_once_it_is_stale(folder):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = {"name": "x", "pid": gone.pid, "host": "here", "machine": locks._machine(), "time": time.time()}
    (folder / "owner.json").write_text(json.dumps(owner))
    with owned(folder):
        assert json.loads((folder / "owner.json").read_text())["name"] != "x"
    # A process of another machine may have the same number.
    began = time.time()
    (folder / "owner.json").write_text(json.dumps(owner | {"machine": "another", "time": began}))
    with owned(folder, stale_seconds=0.5):
        assert json.loads((folder / "owner.json").read_text())["time"] >= began + 0.5


def test_an_owner_that_cannot_be_read_is_not_followed(folder, monkeypatch):
    monkeypatch.setattr(type(folder), "read_text", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError), owned(folder):
        pass
    assert not (folder / "owner.json").exists()


def test_a_lock_that_was_removed_or_replaced_is_no_longer_held(tmp_path):
    with flock(tmp_path) as is_held:
        assert is_held()
        (tmp_path / ".lock").unlink()
        assert not is_held()
        with flock(tmp_path) as is_held_by_another:
            assert is_held_by_another() and not is_held()
    # A watch asks after the run has let go.
    assert is_held_by_another() and not is_held()
