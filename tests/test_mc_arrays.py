"""Arrays on disk: after a kill, a power failure or a full disk, committed rows are read back; damage is refused."""

import os
import shutil
import signal
import stat
import subprocess
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext import arrays
from megacontext.arrays import Arrays, Damaged
from nanochat.common import UserError
from tests.helpers import start, until

CHUNK = 40  # bytes: a few rows


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", CHUNK)


def rows_of(seed, n, width=3):
    return np.random.default_rng(seed).integers(0, 65536, (n, width), dtype=np.uint16)


def everything(store):
    return {name: store.slice(name, 0, store.rows(name)) for name in store.names}


def filled(folder, n=50):
    store = Arrays.create(folder, {"owner": "test"})
    store.append("a", rows_of(1, n))
    store.append("b", rows_of(2, 7, 1), "uint32")
    store.commit(n=n)
    return store


def test_what_was_committed_is_read_back(tmp_path):
    writer = filled(tmp_path / "x")
    for path in (tmp_path / "x").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o700
    writer.close()
    store = Arrays(tmp_path / "x")
    assert store.facts == {"owner": "test", "n": 50}
    assert np.array_equal(store.slice("a", 0, 50), rows_of(1, 50))
    assert np.array_equal(store.slice("b", 0, 7), rows_of(2, 7, 1))
    index = np.random.default_rng(0).integers(0, 50, 200)
    assert np.array_equal(store.read("a", index), rows_of(1, 50)[index])
    assert store.rows("c") == 0
    with pytest.raises(ValueError, match="expected indices from 0 to 49, got 3 to 50"):
        store.read("a", np.array([3, 50]))


@given(st.lists(st.one_of(st.integers(0, 40), st.floats(0, 1)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_appends_and_cuts_equal_a_list(tmp_path_factory, steps):
    """An integer step appends that many rows, a fraction truncates to it; some steps commit, some also reopen."""
    folder, expected = tmp_path_factory.mktemp("arrays") / "x", rows_of(0, 0)
    store = Arrays.create(folder)
    store.append("a", expected)
    for i, step in enumerate(steps):
        if isinstance(step, int):
            more = rows_of(i, step)
            store.append("a", more)
            expected = np.concatenate((expected, more))
        else:
            expected = expected[: int(step * len(expected))]
            store.truncate({"a": len(expected)})
        if i % 3 == 0:
            store.commit()
        if i % 3 == 1:
            store.commit()
            store.close()
            store = Arrays(folder, write=True)
        assert np.array_equal(store.slice("a", 0, store.rows("a")), expected)
    store.commit()
    reader = Arrays(folder)
    reader.check()
    assert np.array_equal(reader.slice("a", 0, reader.rows("a")), expected)
    store.close()
    reader.close()


# ---------------------------------------------------------------------------------------------------------
# Kills and power failures


def create_and_die(folder, moment):
    setattr(arrays, moment, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    Arrays.create(folder, {"owner": "killed"}, a=("uint16", 3))


@pytest.mark.parametrize("moment", ["_manifest", "sync"])
def test_a_folder_that_was_not_made_to_the_end_is_made_again(tmp_path, moment):
    folder = tmp_path / "x"
    start(create_and_die, folder, moment).join()
    with pytest.raises(Damaged, match="there is nothing to read"):
        Arrays(folder)
    store = Arrays.create(folder, {"owner": "next"}, a=("uint16", 3))
    assert (store.facts, len(list(folder.iterdir()))) == ({"owner": "next"}, 3)
    store.append("a", rows_of(1, 3))
    store.commit()
    store.close()
    with pytest.raises(UserError, match="there already"):
        Arrays.create(folder)
    assert np.array_equal(Arrays(folder).slice("a", 0, 3), rows_of(1, 3))


def history(folder):
    """Appends, commits and truncates; yields after each of them what was committed last."""
    store = Arrays.create(folder)
    yield everything(store)
    for seed, n in enumerate((3, 20, 0, 9)):
        committed = everything(store)
        for name, rows in (("a", rows_of(seed, n)), ("b", rows_of(seed, n // 3 + 1, 1))):
            store.append(name, rows)
            yield committed
        store.commit(step=seed)
        yield everything(store)
        if seed == 1:
            store.truncate({"a": 11, "b": 2})
            yield everything(store)
    store.close()
    yield everything(Arrays(folder))


def same(found, expected):
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)


def left_by_a_kill(folder, copy):
    """What the disk has now; the third file is memory that processes share, which goes with them."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*-shm"))
    return Arrays(copy, write=True)


def test_a_kill_at_any_moment_leaves_the_last_commit(tmp_path):
    for i, committed in enumerate(history(tmp_path / "original")):
        store = left_by_a_kill(tmp_path / "original", tmp_path / str(i))
        assert same(everything(store), committed), i
        store.append("a", rows_of(99, 30))  # and it goes on
        store.commit()
        store.check()
        store.close()
    assert i > 12


def test_a_commit_that_was_written_in_part_is_the_one_before(tmp_path):
    store = filled(tmp_path / "x")
    log = tmp_path / "x" / f"{arrays.FILE}-wal"
    before, start = everything(store), log.stat().st_size
    store.append("a", rows_of(3, 20))
    store.append("c", rows_of(4, 5))
    store.commit(n=70)
    after, whole = everything(store), log.read_bytes()
    found = []
    for end in range(start, len(whole) + 1, 97):
        copy = tmp_path / str(end)
        shutil.copytree(tmp_path / "x", copy, ignore=shutil.ignore_patterns("*-shm"))
        (copy / log.name).write_bytes(whole[:end] + bytes(end % 3 * 50))
        state = everything(Arrays(copy, write=True))
        assert same(state, before) or (same(state, after) and end > len(whole) - 4096)
        found.append(same(state, before))
    assert found[0]
    assert len(found) > 20


def append_forever(folder, reports):
    store, fd, n = Arrays.create(folder), os.open(reports, os.O_WRONLY | os.O_CREAT), 0
    while True:
        store.append("a", rows_of(n, 100))
        n += 1
        store.commit(batches=n)
        os.pwrite(fd, n.to_bytes(4, "little"), 0)


def test_sigkill_loses_nothing_that_was_reported(tmp_path):
    for attempt in range(3):
        folder, reports = tmp_path / str(attempt), tmp_path / f"reports-{attempt}"
        process = start(append_forever, folder, reports)
        until(lambda reports=reports: reports.exists() and reports.stat().st_size == 4)
        time.sleep(0.1 + 0.07 * attempt)
        process.kill()
        process.join()
        store = Arrays(folder, write=True)
        store.check()
        n = store.facts["batches"]
        assert int.from_bytes(reports.read_bytes(), "little") <= n
        assert np.array_equal(store.slice("a", 0, store.rows("a")), np.concatenate([rows_of(i, 100) for i in range(n)]))


# ---------------------------------------------------------------------------------------------------------
# What else a disk does


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts a file system of 1 MiB."""
    mounted = []

    def mount():
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path / "disk")]
        (tmp_path / "disk").mkdir(exist_ok=True)
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount")
        mounted.append(1)
        return tmp_path / "disk"

    yield mount
    for _ in mounted:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def test_full_disk_keeps_what_was_committed_and_can_go_on(tmpfs):
    disk = tmpfs()
    (disk / "ballast").write_bytes(bytes(300_000))
    store = Arrays.create(disk / "x")

    def fill():
        while True:
            kept = store.rows("a") // 500
            store.append("a", rows_of(kept, 500))
            store.commit(kept=kept + 1)

    with pytest.raises(UserError, match="disk is full.*free some space"):
        fill()
    kept = store.facts["kept"]
    assert kept > 1
    assert store.rows("a") == 500 * kept
    store.check()
    (disk / "ballast").unlink()
    store.append("a", rows_of(kept, 500))
    store.commit()
    store.close()
    store = Arrays(disk / "x")
    expected = np.concatenate([rows_of(i, 500) for i in range(kept + 1)])
    assert np.array_equal(store.slice("a", 0, store.rows("a")), expected)


def test_a_disk_that_cannot_be_written_to(tmpfs):
    disk = tmpfs()
    filled(disk / "x").close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match="cannot open or read .*arrays.sqlite"):
        Arrays(disk / "x", write=True)
    with pytest.raises(UserError, match="cannot create .*Read-only"):
        Arrays.create(disk / "y")
    store = Arrays(disk / "x")  # it can be read
    store.check()
    store.close()


DAMAGE = {
    "bit": lambda content, at: content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :],
    "cut": lambda content, at: content[:at],
    "empty": lambda content, at: b"",
    "zeros": lambda content, at: content[:at] + bytes(len(content) - at),
    "foreign": lambda content, at: b"PK" + content[2:],
    "missing": None,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_nothing_wrong_is_ever_read(tmp_path, kind):
    filled(tmp_path / "x").close()
    path = tmp_path / "x" / arrays.FILE
    content, errors = path.read_bytes(), 0
    for at in range(0, len(content), max(1, len(content) // 200)):
        path.unlink(missing_ok=True)
        if DAMAGE[kind]:
            path.write_bytes(DAMAGE[kind](content, at))
        found, error = outcome(tmp_path / "x")
        if error:
            errors += 1
            assert isinstance(error, Damaged)
            assert path.name in str(error)
        else:  # it is where nothing is stored
            assert np.array_equal(found, rows_of(1, 50))
    assert errors > 10


def test_each_bit_of_a_row_counts(tmp_path):
    filled(tmp_path / "x").close()
    path = tmp_path / "x" / arrays.FILE
    content = path.read_bytes()
    first = content.index(rows_of(1, 1).tobytes())
    for at in range(first, first + 6):
        path.write_bytes(DAMAGE["bit"](content, at))
        _, error = outcome(tmp_path / "x")
        assert "rows 0 and following of a are damaged" in str(error)


def outcome(folder):
    try:
        store = Arrays(folder)
        return np.concatenate([store.slice("a", i, i + 1) for i in range(50)]), None
    except UserError as error:
        return None, error


def test_one_writes_and_others_read(tmp_path):
    writer = filled(tmp_path / "x")
    with pytest.raises(UserError, match="x is being written to by another process or session"):
        Arrays(tmp_path / "x", write=True)
    reader = Arrays(tmp_path / "x")
    writer.append("a", rows_of(3, 4))
    reader.refresh()
    assert reader.rows("a") == 50
    writer.commit()
    reader.refresh()
    assert np.array_equal(reader.slice("a", 50, 54), rows_of(3, 4))
    writer.close()
    Arrays(tmp_path / "x", write=True).close()
    with pytest.raises(UserError, match="there is nothing to read in .*nowhere"):
        Arrays(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there already"):
        Arrays.create(tmp_path / "x")
