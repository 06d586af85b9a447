"""Files over HTTP: several at a time, resumed, verified, retried, under one progress bar."""

import contextlib
import fcntl
import hashlib
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import requests
from requests.structures import CaseInsensitiveDict
from rich import progress

RETRIES = 5  # in a row without a byte received
BACKOFF_SECONDS = 1.0  # before the first retry; doubles with each
TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte
BLOCK = 1 << 16  # bytes at a time; a broken connection loses what has come of the last block
PASSING_FAULTS = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class TryAgain(Exception):
    """A fault that may pass: the connection, a busy server, bytes that do not fit their hash."""

    def __init__(self, reason, wait=0.0):
        super().__init__(reason)
        self.wait = wait  # seconds the server asked for


def download(files: dict[Path, str], workers: int = 4, headers: dict | None = None) -> dict[Path, str]:
    """
    Fetch each URL to its path, in order, and return what failed: path -> reason.

    A file appears under its name only when it is whole. Until then its bytes are in `<name>.part`, which a
    later call goes on with. Several processes may fetch the same file: one does, the others wait and find it.
    When the first `workers` files all fail, the server counts as out of reach and the rest is not tried.
    """
    files = {path: url for path, url in files.items() if not path.exists()}
    failed, done, stop = {}, 0, threading.Event()
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as display, ThreadPoolExecutor(workers) as pool:
        bar = _Bar(display, len(files))
        jobs = {pool.submit(_fetch, url, path, headers or {}, bar, stop): path for path, url in files.items()}
        try:
            for job in as_completed(jobs):
                if reason := job.result():
                    failed[jobs[job]] = reason
                else:
                    done += 1
                if not done and len(failed) == workers:
                    stop.set()
        finally:
            stop.set()  # after Ctrl-C the workers must not go on to the end of the list
    return failed


class _Bar:
    """One bar in bytes. Sizes become known as transfers begin; files not yet begun count as their mean."""

    def __init__(self, display, count):
        self.display, self.count, self.sizes = display, count, {}
        self.task = display.add_task(f"0/{count} files", total=None)
        self.finished, self.lock = 0, threading.Lock()

    def begin(self, path, received, size):
        """`received` bytes are here from before and not part of the transfer."""
        with self.lock:
            self.sizes.setdefault(path, max(size - received, 0))
            total = sum(self.sizes.values()) * self.count / len(self.sizes)
            self.display.update(self.task, total=total)

    def advance(self, count):
        self.display.advance(self.task, count)

    def end(self):
        with self.lock:
            self.finished += 1
            self.display.update(self.task, description=f"{self.finished}/{self.count} files")


def _fetch(url, path, headers, bar, stop):
    """Fetch one file with retries; returns None, or why it failed."""
    part = path.with_name(f"{path.name}.part")
    if stop.is_set():
        return "not tried"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The part itself is locked and then renamed, so that no lock files are left over.
        with open(part, "ab+") as file, locked(file, stop):
            if path.exists():  # another process was faster; this part is a new, empty file
                part.unlink(missing_ok=True)
            else:
                _fetch_part(url, file, headers, path, bar, stop)
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, path)
        bar.end()
    except (OSError, TryAgain) as error:  # requests' exceptions are OSErrors too
        return str(error)
    return None


def _fetch_part(url, file, headers, path, bar, stop):
    failures = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            return _attempt(url, file, headers, path, bar, stop)
        except PASSING_FAULTS as error:
            again = TryAgain(f"connection to {url} broke ({error})")
        except TryAgain as error:
            again = error
        failures = 1 if file.seek(0, os.SEEK_END) > before else failures + 1
        if failures > RETRIES or stop.wait(max(again.wait, BACKOFF_SECONDS * 2 ** (failures - 1))):
            raise again


def _attempt(url, file, headers, path, bar, stop):
    """One request for what `file` lacks. Returns when it is whole; raises TryAgain, or OSError for good."""
    start = file.seek(0, os.SEEK_END)
    headers = headers | {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file itself
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code in (408, 429) or response.status_code >= 500:
            wait = response.headers.get("Retry-After", "")
            wait = min(int(wait), 300) if wait.isdigit() else 0  # it can be a date, which is not worth it
            raise TryAgain(f"HTTP {response.status_code} from {url}", wait)
        if response.status_code != 416:  # 416: there is nothing after `start`, the part is whole or wrong
            response.raise_for_status()
        if start and response.status_code == 200:  # the server does not know ranges
            file.truncate(0)
            start = 0
        size, sha256 = _expected(response)
        if response.status_code == 416 and size is None:
            file.truncate(0)
            raise TryAgain(f"{url} does not have byte {start:,}")
        if response.status_code != 416:
            bar.begin(path, start, size or start)
            for block in response.iter_content(BLOCK):
                file.write(block)
                bar.advance(len(block))
                if stop.is_set():
                    raise TryAgain("stopped")
    _verify(file, url, size, sha256)


def _expected(response):
    """(size, SHA-256) of the whole file as the server states them; None for what it does not state."""
    stated = CaseInsensitiveDict(response.headers)
    for hop in response.history:  # the hub says it where it redirects to the storage
        stated.update({name: value for name, value in hop.headers.items() if "x-linked" in name.lower()})
    length = stated.get("Content-Length", "") if response.status_code == 200 else ""
    size = stated.get("X-Linked-Size") or stated.get("Content-Range", "").rpartition("/")[2] or length
    sha256 = stated.get("X-Linked-ETag", "").strip('"').lower()
    return int(size) if size.isdigit() else None, sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else None


def _verify(file, url, size, sha256):
    """Raise TryAgain unless the file has this size and hash; drop bytes that more bytes cannot mend."""
    received = file.seek(0, os.SEEK_END)
    if size is not None and received < size:
        raise TryAgain(f"{url} ended after {received:,} of {size:,} bytes")
    file.seek(0)
    got = hashlib.file_digest(file, "sha256").hexdigest()
    if received == (size or received) and got == (sha256 or got):
        return
    file.truncate(0)
    expected = f"{size or received:,} bytes with SHA-256 {sha256 or 'of any value'}"
    raise TryAgain(f"expected {expected} from {url}, got {received:,} bytes with {got}")


@contextlib.contextmanager
def locked(file, stop=None):
    """
    Hold the lock of an open file, or of a folder's descriptor, against other processes and threads.

    The kernel frees it however the process ends. Raises TryAgain when the event `stop` is set meanwhile.
    """
    while True:  # polling, so that a waiting thread can be told to give up
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if (stop or threading.Event()).wait(0.1):
                raise TryAgain("stopped") from None
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
