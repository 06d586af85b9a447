"""
Append-only arrays in a folder. Committed rows survive SIGKILL, torn writes and a full disk; damaged files are reported.

    NAME.bin   rows of little-endian numbers, one after the other
    NAME.crc   CRC-32 (uint32) of each full chunk of rows, one after the other
    manifest   twice the same page of PAGE_BYTES: CRC-32 of the rest (8 hex digits), a space, JSON, a newline, zeros

The JSON has `format`, `sequence`, a number that each commit raises, `facts`, whatever the owner wants to know again,
and `arrays`: name → dtype, width (numbers per row), chunk_rows, rows, and crc, of the rows after the last full chunk.
Bytes of a file beyond its rows are ignored.

A commit flushes the data, then writes and flushes the first page, then the second. So at least one page is always
intact, and after a commit both are equal: losing either of them loses no data. If a failure has left two pages that
differ, the newer one is used, unless the last rows it names are damaged; opening for writing first makes both equal.
The checksum of a chunk is verified when one of its rows is first read. Files are read with pread rather than mapped: a
file that was cut raises an error instead of SIGBUS, and the process's memory does not grow with the arrays.

Files are private (0600, folders 0700). One process may write, under a lock (flock) on the manifest; others may read.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nanochat.common import UserError, sync

FORMAT = "megacontext arrays 1"
CHUNK_BYTES = 65536  # of the chunks of new arrays, if a row is not longer
PAGE_BYTES = 8192
INCOMPLETE = ".new-"  # how the names of folders begin that are being made
DTYPES = {"uint16": "<u2", "uint32": "<u4", "float32": "<f4", "bfloat16": "<u2"}  # numpy has no bfloat16: its bits


class Damaged(UserError):
    """A file differs from what was committed to it. The message names the file."""


@dataclass
class _Array:
    """One array's entry in the manifest."""

    dtype: str
    width: int
    chunk_rows: int
    rows: int = 0
    crc: int = 0

    @classmethod
    def new(cls, dtype, width):
        return cls(dtype, width, max(1, CHUNK_BYTES // cls(dtype, width, 1).row_bytes))

    @property
    def row_bytes(self) -> int:
        return self.width * np.dtype(DTYPES[self.dtype]).itemsize


class Arrays:
    """
    The arrays of a folder, opened for reading or (write=True) for reading and writing.

    This object sees `append` and `truncate` at once; other processes see them, and they become durable, after `commit`.
    If the disk refuses a write, UserError is raised and the object returns to the state of its last commit.
    """

    def __init__(self, folder, write=False):
        self.folder, self.write, self._manifest = Path(folder), write, None
        self._folder_grew = False
        self._files = {}  # name → descriptors of the two files
        self._checked, self._tail_checked = {}, {}  # name → a byte per full chunk; how many rows the last check saw
        path = self.folder / "manifest"
        try:
            self._manifest = os.open(path, os.O_RDWR if write else os.O_RDONLY)
        except FileNotFoundError:
            raise Damaged(f"there is nothing to read in {self.folder}: {path.name} is missing") from None
        except OSError as error:
            raise UserError(f"cannot open {path} ({error.strerror}): have its permissions changed") from error
        try:
            if write:
                self._lock()
            self._begin()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, folder, facts=None, **arrays: tuple[str, int]) -> "Arrays":
        """
        A new folder, open for writing, with these arrays: name → dtype and width, without rows. It is made under a
        hidden name and then renamed, so that nobody finds it incomplete. Raises UserError if there is one already.
        """
        folder, temporary, lock = Path(folder), None, None
        entries = {name: asdict(_Array.new(*shape)) for name, shape in arrays.items()}
        page = _page({"format": FORMAT, "sequence": 0, "facts": facts or {}, "arrays": entries})
        try:
            folder.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
            delete_incomplete(folder.parent)
            temporary = Path(tempfile.mkdtemp(prefix=INCOMPLETE, dir=folder.parent))
            lock = os.open(temporary, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in ["manifest", *(f"{array}.{ending}" for array in arrays for ending in ("bin", "crc"))]:
                fd = os.open(temporary / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    _write(fd, page + page if name == "manifest" else b"", 0)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            sync(temporary)
            temporary.rename(folder)  # fails if there is one with something in it
            sync(folder.parent)
        except OSError as error:
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise UserError(f"{folder} is there already: choose another name") from None
            raise UserError(f"cannot create {folder} ({error.strerror}): free some space or change it") from error
        finally:
            if lock is not None:
                os.close(lock)
        return cls(folder, write=True)

    def close(self):
        """Close the files and release the lock. May be called twice."""
        fds = [self._manifest, *(fd for pair in self._files.values() for fd in pair)]
        self._files, self._manifest = {}, None
        for fd in fds:
            if fd is not None:
                os.close(fd)

    __del__ = close

    # -----------------------------------------------------------------------------------------------------
    # Reading

    @property
    def names(self) -> list[str]:
        return list(self._arrays)

    def rows(self, name) -> int:
        """Number of rows of an array, including uncommitted ones; 0 if there is no such array."""
        return self._arrays[name].rows if name in self._arrays else 0

    def dtype(self, name) -> str:
        return self._arrays[name].dtype

    @property
    def nbytes(self) -> int:
        return sum(array.rows * array.row_bytes for array in self._arrays.values())

    def refresh(self):
        """Go to the state of the last commit, of this or another process."""
        self._go_to(self._pages()[0])

    def _pages(self) -> list[dict]:
        """The intact pages of the manifest, the newer one first."""
        content = os.pread(self._manifest, 2 * PAGE_BYTES, 0)
        pages = [page for i in (0, PAGE_BYTES) if (page := _read_page(content[i : i + PAGE_BYTES]))]
        pages.sort(key=lambda page: page["sequence"], reverse=True)
        if not pages or pages[0].get("format") != FORMAT:
            what = f"it says {pages[0].get('format')!r}" if pages else "both copies of it are damaged"
            raise Damaged(f"{self.folder / 'manifest'}: expected one of {FORMAT!r}, but {what}")
        return pages

    def _go_to(self, page):
        self.sequence, self.facts = page["sequence"], page["facts"]
        self._arrays = {name: _Array(**entry) for name, entry in page["arrays"].items()}
        self._to_sync = set()

    def _begin(self):
        """Go to the newest commit whose last rows are intact."""
        pages, error = self._pages(), None
        for page in pages:
            self._go_to(page)
            self._checked, self._tail_checked = {}, {}
            try:
                for name in self._arrays:
                    self._check_tail(name)
                break
            except Damaged as found:
                error = error or found
        else:
            raise error
        if self.write and pages != [page, page]:  # rows that only one of them knows may be written over from now on
            with self._writing():
                self._write_manifest()

    def read(self, name, index) -> np.ndarray:
        """Rows [n, width] at index [n]. Raises Damaged if their checksum is wrong."""
        array = self._arrays[name]
        if not len(index):
            return np.empty((0, array.width), DTYPES[array.dtype])
        unique, inverse = np.unique(index, return_inverse=True)
        if not 0 <= unique[0] <= unique[-1] < array.rows:
            raise ValueError(f"{name}: expected indices from 0 to {array.rows - 1}, got {unique[0]} to {unique[-1]}")
        self._check(name, np.unique(unique // array.chunk_rows))
        out = np.empty((len(unique), array.width), DTYPES[array.dtype])
        starts = np.flatnonzero(np.diff(unique, prepend=-2) != 1).tolist()  # of runs of neighbours
        for start, end in zip(starts, [*starts[1:], len(unique)], strict=True):
            self._read_into(name, out[start:end], int(unique[start]))
        return out[inverse]

    def slice(self, name, start, end) -> np.ndarray:
        """Rows [start, end)."""
        return self.read(name, np.arange(start, end))

    def check(self):
        """Read everything. Raises Damaged at the first chunk whose checksum is wrong."""
        self._checked, self._tail_checked = {}, {}
        for name, array in self._arrays.items():
            self._check(name, range(-(-array.rows // array.chunk_rows)))

    def _open(self, name):
        """File descriptors of an array's rows and of its chunks' checksums."""
        if name not in self._files:
            flags = os.O_RDWR | os.O_CREAT if self.write else os.O_RDONLY
            fds = []
            try:
                for ending in ("bin", "crc"):
                    fds.append(os.open(self.folder / f"{name}.{ending}", flags, 0o600))
            except FileNotFoundError as error:
                for fd in fds:
                    os.close(fd)
                raise Damaged(f"{error.filename} is missing") from None
            self._files[name] = fds
            self._folder_grew |= self.write
        return self._files[name]

    def _read_into(self, name, out, first):
        fd, size = self._open(name)[0], self._arrays[name].row_bytes
        view, offset = _bytes_of(out), first * size
        while view:
            n = os.preadv(fd, [view], offset)
            if not n:
                raise Damaged(f"{self.folder / name}.bin: expected {self.rows(name):,} rows of {size} bytes, it is cut")
            view, offset = view[n:], offset + n

    def _check(self, name, chunks):
        checked = self._checked.setdefault(name, bytearray())  # a byte per chunk
        array = self._arrays[name]
        for chunk in chunks:
            first = int(chunk) * array.chunk_rows
            full = first + array.chunk_rows <= array.rows
            if (chunk < len(checked) and checked[chunk]) or (not full and self._tail_checked.get(name) == array.rows):
                continue
            expected = self._chunk_crc(name, chunk) if full else array.crc
            if self._crc(name, first, min(first + array.chunk_rows, array.rows)) != expected:
                raise Damaged(
                    f"{self.folder / name}.bin: rows {first:,} and following are damaged: their checksum differs from "
                    f"that in {'the .crc file' if full else 'the manifest'}"
                )
            if full:
                self._mark(name, chunk)
            else:
                self._tail_checked[name] = array.rows

    def _mark(self, name, chunk):
        checked = self._checked.setdefault(name, bytearray())
        checked.extend(bytes(max(0, chunk + 1 - len(checked))))
        checked[chunk] = 1

    def _chunk_crc(self, name, chunk):
        content = os.pread(self._open(name)[1], 4, 4 * int(chunk))
        if len(content) != 4:
            raise Damaged(f"{self.folder / name}.crc: expected the checksum of chunk {chunk}, the file is cut")
        return int.from_bytes(content, "little")

    def _crc(self, name, start, end):
        array = self._arrays[name]
        rows = np.empty((end - start, array.width), DTYPES[array.dtype])
        self._read_into(name, rows, start)
        return zlib.crc32(rows)

    def _check_tail(self, name):
        """Check the last rows, which a torn write would have damaged, and the lengths of the files."""
        array = self._arrays[name]
        for fd, size, ending in zip(
            self._open(name),
            (array.rows * array.row_bytes, array.rows // array.chunk_rows * 4),
            ("bin", "crc"),
            strict=True,
        ):
            there = os.fstat(fd).st_size
            if there < size:
                raise Damaged(f"{self.folder / name}.{ending}: expected {size:,} bytes or more, got {there:,}")
        if array.rows:
            self._check(name, [(array.rows - 1) // array.chunk_rows])

    # -----------------------------------------------------------------------------------------------------
    # Writing

    def _lock(self):
        try:
            fcntl.flock(self._manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder} is being written to by another process or session: wait for its end, or stop it"
            ) from None

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            self.refresh()
            raise UserError(
                f"cannot write to {self.folder} ({error.strerror}): free some space or have that changed; what was "
                "kept until now is whole"
            ) from error

    def append(self, name, values, dtype=None):
        """Add rows [n, width]. dtype: of a new array, one of DTYPES, if it is not the values' own."""
        if name not in self._arrays:
            self._arrays[name] = _Array.new(dtype or str(values.dtype), values.shape[1])
        array = self._arrays[name]
        data = _bytes_of(np.ascontiguousarray(values, DTYPES[array.dtype]))
        crcs, first = [], array.rows // array.chunk_rows
        with self._writing():
            _write(self._open(name)[0], data, array.rows * array.row_bytes)
            while data:
                n = min(array.chunk_rows - array.rows % array.chunk_rows, len(data) // array.row_bytes)
                array.crc = zlib.crc32(data[: n * array.row_bytes], array.crc)
                array.rows, data = array.rows + n, data[n * array.row_bytes :]
                if array.rows % array.chunk_rows == 0:
                    crcs.append(array.crc)
                    array.crc = 0
            if crcs:
                _write(self._open(name)[1], np.array(crcs, "<u4").tobytes(), 4 * first)
        for chunk in range(first, first + len(crcs)):
            self._mark(name, chunk)
        self._tail_checked[name] = array.rows
        self._to_sync.add(name)

    def truncate(self, rows: dict[str, int]):
        """Keep only the first rows of these arrays, and commit, since the next rows overwrite the others."""
        for name, count in rows.items():
            array = self._arrays[name]
            chunk = count // array.chunk_rows
            self._check(name, [chunk])
            array.rows, array.crc = count, self._crc(name, chunk * array.chunk_rows, count)
            del self._checked[name][chunk:]
            self._tail_checked[name] = count
        self.commit()

    def trim(self):
        """Truncate the files to what was committed."""
        self.refresh()
        for name, array in self._arrays.items():
            data, crcs = self._open(name)
            os.ftruncate(data, array.rows * array.row_bytes)
            os.ftruncate(crcs, array.rows // array.chunk_rows * 4)

    def commit(self, **facts):
        """Make all changes, and these facts, durable: they survive a power failure."""
        self.facts, self.sequence = self.facts | facts, self.sequence + 1
        with self._writing():
            for fd in [fd for name in self._to_sync for fd in self._open(name)]:
                os.fsync(fd)
            if self._folder_grew:
                sync(self.folder)
            self._write_manifest()
        self._to_sync, self._folder_grew = set(), False

    def _write_manifest(self):
        arrays = {name: asdict(array) for name, array in self._arrays.items()}
        page = _page({"format": FORMAT, "sequence": self.sequence, "facts": self.facts, "arrays": arrays})
        for offset in (0, PAGE_BYTES):
            _write(self._manifest, page, offset)
            os.fsync(self._manifest)


def delete_incomplete(folder):
    """Delete what killed calls of `Arrays.create` left in a folder: what is older than a minute and not locked."""
    for left in Path(folder).glob(f"{INCOMPLETE}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # somebody was faster; its maker lives
            fd = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(fd).st_mtime > 60:  # a new one may not be locked yet
                    shutil.rmtree(left)
            finally:
                os.close(fd)


def _bytes_of(rows):
    return rows.reshape(-1).view(np.uint8).data


def _page(content: dict) -> bytes:
    text = json.dumps(content).encode() + b"\n"
    page = b"%08x " % zlib.crc32(text) + text
    if len(page) > PAGE_BYTES:
        raise ValueError(f"expected facts and arrays of at most {PAGE_BYTES} bytes, got {len(page)}")
    return page.ljust(PAGE_BYTES, b"\0")


def _read_page(page: bytes) -> dict | None:
    """The content of a page; None if it is damaged or only partly written."""
    crc, _, text = page.rstrip(b"\0").partition(b" ")
    return json.loads(text) if crc == b"%08x" % zlib.crc32(text) else None


def _write(fd, data, offset):
    """Write all of the data: one call may write less of it when the disk is nearly full."""
    data = memoryview(data)
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n
