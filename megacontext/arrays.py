"""
Append-only arrays in a folder, kept by SQLite. Committed rows survive SIGKILL, power failures and a full disk; damaged
files are reported.

    arrays.sqlite   table `chunks`: array (name), number, data (rows of little-endian numbers, one after the other; all
                    chunks of an array are full but the last), crc (CRC-32 of data)
                    table `manifest`, of one row: content (JSON in UTF-8), crc (CRC-32 of content)

The JSON has `format`; `facts`, the owner's metadata; and `arrays`: name → dtype, width (numbers per row), chunk_rows
and rows. Data in chunks beyond the rows of their array is ignored.

SQLite makes a commit atomic and durable. It does not detect flipped bits in stored data; the checksums do, whenever a
chunk is read.

Files are private (0600, folders 0700). One process may write, under a lock (flock) on the folder; others may read.
"""

import contextlib
import json
import os
import sqlite3
import threading
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nanochat.common import UserError, locked, sync

FORMAT = "megacontext arrays 2"
FILE = "arrays.sqlite"
CHUNK_BYTES = 32768  # largest chunk of new arrays, unless a single row is longer
DTYPES = {"uint16": "<u2", "uint32": "<u4", "float32": "<f4", "bfloat16": "<u2"}  # numpy has no bfloat16: its bits
TABLES = (
    "PRAGMA journal_mode = WAL",  # readers do not wait for the writer
    "CREATE TABLE chunks (array TEXT, number INTEGER, data BLOB, crc INTEGER, PRIMARY KEY (array, number))",
    "CREATE TABLE manifest (content BLOB, crc INTEGER)",
)
REFUSED = {  # errors of the machine, such as missing permission or space; all others mean that the file is damaged
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR),
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM),
}


class Damaged(UserError):
    """A file differs from what was committed to it. The message names the file."""


@dataclass
class _Array:
    """One array's entry in the manifest."""

    dtype: str
    width: int
    chunk_rows: int
    rows: int = 0

    @classmethod
    def new(cls, dtype, width):
        return cls(dtype, width, max(1, CHUNK_BYTES // cls(dtype, width, 1).row_bytes))

    @property
    def row_bytes(self) -> int:
        return self.width * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)


class Arrays:
    """
    The arrays of a folder, opened for reading or (write=True) for reading and writing. May be read by several threads.

    This object sees `append` and `truncate` at once; other processes see them, and they become durable, after `commit`.
    If the disk refuses a write, UserError is raised and the object returns to the state of its last commit.
    """

    def __init__(self, folder, write=False):
        self.folder, self.path, self.write = Path(folder), Path(folder) / FILE, write
        self._database, self._lock = None, contextlib.ExitStack()
        self._thread_lock = threading.Lock()
        if not self.path.exists():
            raise Damaged(f"there is nothing to read in {self.folder}: {FILE} is missing")
        try:
            if write:
                self._lock.enter_context(_locked(self.folder))
            self._connect()
            self.refresh()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, folder, facts=None, **arrays: tuple[str, int]) -> "Arrays":
        """
        A new folder, open for writing, with these empty arrays: name → (dtype, width). Takes over a folder whose
        creation was interrupted by a kill. Raises UserError if there are arrays already.
        """
        folder, temporary = Path(folder), Path(folder) / f".{FILE}"
        arrays = {name: _Array.new(*shape) for name, shape in arrays.items()}
        try:
            folder.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            with _locked(folder):
                if (folder / FILE).exists():
                    raise UserError(f"{folder} is there already: choose another name")
                for left in folder.glob(f"*{FILE}*"):  # left by a killed process: SQLite would replay its log
                    left.unlink()
                os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600))
                with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as database:
                    for statement in TABLES:
                        database.execute(statement)
                    database.execute("INSERT INTO manifest VALUES (?, ?)", _manifest(facts or {}, arrays))
                sync(temporary)
                temporary.rename(folder / FILE)
                sync(folder)
                sync(folder.parent)
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", error)
            raise UserError(f"cannot create {folder} ({reason}): free some space or change it") from error
        return cls(folder, write=True)

    def close(self):
        """Close the file and release the lock. May be called twice."""
        if self._database:
            self._database.close()
        self._lock.close()

    __del__ = close

    def _connect(self):
        mode = "rw" if self.write else "ro" if os.access(self.folder, os.W_OK) else "ro&immutable=1"
        with self._reading():
            uri = f"{self.path.absolute().as_uri()}?mode={mode}"
            self._database = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA cache_size = -256")  # KiB
            if self.write:
                self._database.execute("PRAGMA synchronous = FULL")

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

    def refresh(self):
        """Go to the state of the last commit, of this or another process."""
        with self._reading():
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            row = self._database.execute("SELECT content, crc FROM manifest").fetchone()
        if row is None or not isinstance(row[0], bytes) or zlib.crc32(row[0]) != row[1]:
            raise Damaged(f"{self.path}: the checksum of the manifest is wrong")
        content = json.loads(row[0])
        if content["format"] != FORMAT:
            raise Damaged(f"{self.path}: expected {FORMAT!r}, it says {content['format']!r}")
        self.facts = content["facts"]
        self._arrays = {name: _Array(**entry) for name, entry in content["arrays"].items()}

    @contextlib.contextmanager
    def _reading(self):
        try:
            with self._thread_lock:
                yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in REFUSED:
                raise UserError(f"cannot open or read {self.path} ({error}): check permissions and disk") from error
            raise Damaged(f"{self.path}: {error}") from error

    def read(self, name, index) -> np.ndarray:
        """Rows [n, width] at index [n]. Raises Damaged if their checksum is wrong."""
        array, index = self._arrays[name], np.asarray(index, dtype=np.int64)
        out = np.empty((len(index), array.width), DTYPES[array.dtype])
        if not len(index):
            return out
        if not 0 <= index.min() <= index.max() < array.rows:
            limits = f"expected indices from 0 to {array.rows - 1}, got {index.min()} to {index.max()}"
            raise ValueError(f"{name}: {limits}")
        numbers, places = np.divmod(index, array.chunk_rows)
        order = np.argsort(numbers, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            out[here] = self._chunk(name, int(numbers[here[0]]))[places[here]]
        return out

    def slice(self, name, start, end) -> np.ndarray:
        """Rows [start, end)."""
        return self.read(name, np.arange(start, end))

    def check(self):
        """Read everything. Raises Damaged at the first chunk whose checksum is wrong."""
        for name, array in self._arrays.items():
            for number in range(array.chunks):
                self._chunk(name, number)

    def _chunk(self, name, number) -> np.ndarray:
        """All rows of a chunk, as of this object's state."""
        array, query = self._arrays[name], "SELECT data, crc FROM chunks WHERE array = ? AND number = ?"
        first = number * array.chunk_rows
        rows = min(array.chunk_rows, array.rows - first)
        with self._reading():
            data, crc = self._database.execute(query, (name, number)).fetchone() or (None, 0)
        if not isinstance(data, bytes) or zlib.crc32(data) != crc or len(data) < rows * array.row_bytes:
            raise Damaged(f"{self.path}: rows {first:,} and following of {name} are damaged or missing")
        return np.frombuffer(data, DTYPES[array.dtype], rows * array.width).reshape(rows, array.width)

    # -----------------------------------------------------------------------------------------------------
    # Writing

    @contextlib.contextmanager
    def _writing(self):
        """The block is part of the transaction that the next commit ends."""
        try:
            with self._thread_lock:
                if not self._database.in_transaction:
                    self._database.execute("BEGIN IMMEDIATE")
                yield
        except sqlite3.Error as error:
            self.refresh()
            raise UserError(
                f"cannot write to {self.folder} ({error}): free some space or fix its permissions; what was committed "
                "before is intact"
            ) from error

    def append(self, name, values, dtype=None):
        """Add rows [n, width]. dtype: for a new array, one of DTYPES; default: that of the values."""
        if name not in self._arrays:
            self._arrays[name] = _Array.new(dtype or str(values.dtype), values.shape[1])
        array = self._arrays[name]
        number, begun = divmod(array.rows, array.chunk_rows)
        data = np.ascontiguousarray(values, DTYPES[array.dtype]).tobytes()
        if begun:
            data = self._chunk(name, number).tobytes() + data
        size = array.chunk_rows * array.row_bytes
        with self._writing():
            for i, start in enumerate(range(0, len(data), size), number):
                part = data[start : start + size]
                self._database.execute("REPLACE INTO chunks VALUES (?, ?, ?, ?)", (name, i, part, zlib.crc32(part)))
            array.rows += len(values)

    def truncate(self, rows: dict[str, int]):
        """Keep only the first rows of these arrays, and commit."""
        for name, count in rows.items():
            self._arrays[name].rows = count
            with self._writing():
                query = "DELETE FROM chunks WHERE array = ? AND number >= ?"
                self._database.execute(query, (name, self._arrays[name].chunks))
        self.commit()

    def trim(self):
        """Return the space of truncated rows to the file system."""
        self.refresh()
        with self._reading():
            self._database.execute("VACUUM")
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def commit(self, **facts):
        """Make all changes, and these facts, durable: they survive a power failure."""
        self.facts = self.facts | facts
        with self._writing():
            content = _manifest(self.facts, self._arrays)
            self._database.execute("UPDATE manifest SET content = ?, crc = ?", content)
            self._database.execute("COMMIT")


def _locked(folder):
    return locked(folder, f"{folder} is being written to by another process or session: wait for its end, or stop it")


def _manifest(facts, arrays) -> tuple[bytes, int]:
    """The row of table `manifest`: (content, crc)."""
    arrays = {name: asdict(array) for name, array in arrays.items()}
    content = json.dumps({"format": FORMAT, "facts": facts, "arrays": arrays}).encode()
    return content, zlib.crc32(content)
