"""Arrays on disk: after a kill, a power failure or a full disk, committed rows are read back; damage is refused."""

import os
import random
import signal
import stat
import subprocess
import time
from pathlib import Path

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
    filled(tmp_path / "x").close()
    store = Arrays(tmp_path / "x")
    assert store.facts == {"owner": "test", "n": 50}
    assert np.array_equal(store.slice("a", 0, 50), rows_of(1, 50))
    assert np.array_equal(store.slice("b", 0, 7), rows_of(2, 7, 1))
    index = np.random.default_rng(0).integers(0, 50, 200)
    assert np.array_equal(store.read("a", index), rows_of(1, 50)[index])
    assert store.rows("c") == 0
    with pytest.raises(ValueError, match="expected indices from 0 to 49, got 3 to 50"):
        store.read("a", np.array([3, 50]))
    for path in (tmp_path / "x").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o700


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


def create_until(signal, folder):
    Path.rename = lambda *paths: os.kill(os.getpid(), signal)
    Arrays.create(folder)


def test_what_a_killed_maker_left_is_deleted_and_what_a_living_one_makes_stays(tmp_path):
    living = start(create_until, signal.SIGSTOP, tmp_path / "x")
    until(lambda: list(tmp_path.glob(".new-*/manifest")))
    stopped = set(tmp_path.iterdir())
    killed = start(create_until, signal.SIGKILL, tmp_path / "x")
    killed.join()
    assert len(set(tmp_path.iterdir()) - stopped) == 1
    Arrays.create(tmp_path / "a").close()
    assert len(list(tmp_path.glob(".new-*"))) == 2  # too young
    for folder in tmp_path.glob(".new-*"):
        os.utime(folder, (time.time() - 61,) * 2)
    Arrays.create(tmp_path / "b").close()
    assert set(tmp_path.glob(".new-*")) == stopped
    living.kill()
    living.join()
    arrays.delete_incomplete(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


class Disk:
    """Records all writes and flushes, to reconstruct the folder as a failure at any of them would leave it."""

    def __init__(self, patch):
        self.log, pwrite, fsync = [], os.pwrite, os.fsync

        def note_write(fd, data, offset):
            self.log.append((os.readlink(f"/proc/self/fd/{fd}"), offset, bytes(data)))
            return pwrite(fd, data, offset)

        def note_sync(fd):
            self.log.append((os.readlink(f"/proc/self/fd/{fd}"), None, None))
            fsync(fd)

        patch.setattr(os, "pwrite", note_write)
        patch.setattr(os, "fsync", note_sync)

    def fail_at(self, at, folder, rng=None):
        """
        Create the files as they are after the first `at` operations. With rng, a power failure: each write that was not
        flushed is lost, partly there or complete, at random. Without, a kill: all writes are there, the last in part.
        """
        files, log = {}, self.log[:at]
        for i, (path, offset, data) in enumerate(log):
            if os.path.isdir(path) or os.path.basename(path)[0] == ".":  # a folder
                continue
            content = files.setdefault(os.path.basename(path), bytearray())
            if data is None:
                continue
            flushed = any(p == path and d is None for p, _, d in log[i + 1 :])
            if rng and not flushed:
                data = data[: rng.choice((0, rng.randrange(len(data) + 1), len(data)))]
            elif not rng and i == at - 1:
                data = data[: len(data) // 2]
            content.extend(bytes(max(0, offset + len(data) - len(content))))
            content[offset : offset + len(data)] = data
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)


def write_a_history(folder, kept):
    """Appends, commits and truncates; notes in `kept`, after each commit, the number of writes and the content."""
    store = Arrays.create(folder)
    kept.append(everything(store))
    for seed, n in enumerate((3, 20, 0, 9)):
        store.append("a", rows_of(seed, n))
        store.append("b", rows_of(seed, n // 3 + 1, 1))
        store.commit(step=seed)
        kept.append(everything(store))
        if seed == 1:
            store.truncate({"a": 11, "b": 2})
            kept.append(everything(store))
    store.close()


@pytest.mark.parametrize("power", [False, True])
def test_failure_at_every_write_leaves_the_last_commit_or_the_next(tmp_path, power):
    with pytest.MonkeyPatch.context() as patch:
        disk, moments = Disk(patch), []

        class Kept(list):
            def append(self, state):
                moments.append((len(disk.log), state))

        write_a_history(tmp_path / "original", Kept())
    assert len(disk.log) > 40
    for at in range(moments[0][0], len(disk.log) + 1):
        done = max(i for i, (n, _) in enumerate(moments) if n <= at)
        for attempt in range(5 if power else 1):
            folder = tmp_path / f"{at}-{attempt}"
            disk.fail_at(at, folder, random.Random(at * 10 + attempt) if power else None)
            store = Arrays(folder, write=True)
            found = everything(store)
            allowed = [state for _, state in moments[done : done + 2]]
            assert any(
                found.keys() == state.keys() and all(np.array_equal(found[k], state[k]) for k in state)
                for state in allowed
            ), at
            store.append("a", rows_of(99, 30))  # and it goes on
            store.commit()
            store.check()
            store.close()


def test_a_newer_page_whose_rows_are_damaged_gives_way_to_the_older(tmp_path):
    store, path = filled(tmp_path / "x"), tmp_path / "x" / "manifest"
    older = path.read_bytes()[: arrays.PAGE_BYTES]
    store.append("a", rows_of(3, 20))
    store.append("c", rows_of(4, 5))
    store.commit(n=70)
    store.close()
    newer = path.read_bytes()[: arrays.PAGE_BYTES]
    (tmp_path / "x" / "c.bin").write_bytes(b"")  # was never flushed
    for pages in (older + newer, newer + older):
        path.write_bytes(pages)
        reader = Arrays(tmp_path / "x")
        assert (reader.facts["n"], reader.names) == (50, ["a", "b"])
        assert np.array_equal(reader.slice("a", 0, 50), rows_of(1, 50))
        assert path.read_bytes() == pages
        Arrays(tmp_path / "x", write=True).close()
        assert path.read_bytes() == older + older
    path.write_bytes(newer + newer)
    with pytest.raises(Damaged, match="c.bin"):
        Arrays(tmp_path / "x")


def test_who_goes_on_after_a_failure_between_the_pages_may_fail_again(tmp_path):
    """A page left over from before names rows that were overwritten since: it must never be used again."""
    store, path = filled(tmp_path / "x"), tmp_path / "x" / "manifest"
    older = path.read_bytes()[: arrays.PAGE_BYTES]
    store.truncate({"a": 10})
    store.close()
    newer = path.read_bytes()[: arrays.PAGE_BYTES]
    path.write_bytes(newer + older)
    store = Arrays(tmp_path / "x", write=True)
    store.append("a", rows_of(3, 40))
    os.pwrite(store._manifest, b"torn", 0)  # the next commit, and the power fails again
    store.close()
    store = Arrays(tmp_path / "x")
    assert np.array_equal(store.slice("a", 0, store.rows("a")), rows_of(1, 50)[:10])


def test_a_folder_that_was_not_made_to_the_end_is_not_there(tmp_path, monkeypatch):
    """At each system call in turn, as if the process had died in it."""
    for at in range(100):
        (tmp_path / str(at)).mkdir()
        folder, left = tmp_path / str(at) / "x", [at]

        def dying(call, left=left):
            def wrapped(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return call(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for name in ("open", "pwrite", "fsync", "rename"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                Arrays.create(folder, {"owner": "test"}, a=("uint16", 3)).close()
                break
            except KeyboardInterrupt:
                pass
        store = Arrays(folder, write=True) if folder.exists() else Arrays.create(folder, {}, a=("uint16", 3))
        store.append("a", rows_of(1, 3))
        store.commit()
        store.close()
    assert at > 8
    with pytest.raises(UserError, match="there already"):
        Arrays.create(folder)


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
    """Mounts a file system of 256 KiB with the given options."""
    mounted = []

    def mount(options="size=256k"):
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(tmp_path / "disk")]
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
    (disk / "ballast").write_bytes(bytes(100_000))
    store = Arrays.create(disk / "x")

    def fill():
        while True:
            kept = store.rows("a") // 500
            store.append("a", rows_of(kept, 500))
            store.commit(kept=kept + 1)

    with pytest.raises(UserError, match="No space left on device.*free some space"):
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
    with pytest.raises(UserError, match="cannot open .*manifest .Read-only"):
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
@pytest.mark.parametrize("name", ["a.bin", "a.crc", "manifest"])
def test_damage_is_named_and_nothing_wrong_is_ever_read(tmp_path, name, kind):
    filled(tmp_path / "x").close()
    path = tmp_path / "x" / name
    content = path.read_bytes()
    for at in range(0, len(content), max(1, len(content) // 40)):
        path.unlink(missing_ok=True)
        if DAMAGE[kind]:
            path.write_bytes(DAMAGE[kind](content, at))
        found, error = outcome(tmp_path / "x")
        if error:
            assert name.split(".")[0] in str(error)
            assert isinstance(error, Damaged) or kind == "missing"
        else:  # the second page of the manifest is a copy
            assert np.array_equal(found, rows_of(1, 50))
            assert name == "manifest" or path.read_bytes() == content


def outcome(folder):
    try:
        store = Arrays(folder)
        return np.concatenate([store.slice("a", i, i + 1) for i in range(50)]), None
    except UserError as error:
        return None, error


def test_either_page_of_the_manifest_will_do_and_not_none(tmp_path):
    filled(tmp_path / "x").close()
    path = tmp_path / "x" / "manifest"
    whole = path.read_bytes()
    for first in (0, arrays.PAGE_BYTES):
        path.write_bytes(whole[:first] + bytes(arrays.PAGE_BYTES) + whole[first + arrays.PAGE_BYTES :])
        assert Arrays(tmp_path / "x").facts["n"] == 50
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(Damaged, match="manifest.*both copies of it are damaged"):
        Arrays(tmp_path / "x")


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
