"""
Downloads from the Hugging Face hub and other servers, by huggingface_hub, which resumes interrupted transfers, checks
sizes, and obeys rate limits. Hashes are checked here.
"""

import hashlib
import os
import shutil
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

from rich import progress

from nanochat.common import atomic_write, locked

RETRIES = 5  # of a server that is out of order
BACKOFF_SECONDS = 1.0  # before the first retry; doubles with each
# A wrong hash; and after a fault in one thread, huggingface_hub closes the connections that others are about to use
BY_CHANCE = RuntimeError, AttributeError


def fetch(url: str, path: Path) -> str | None:
    """Fetch a URL to a path, unless the file exists; returns the reason of a failure, or None."""
    from huggingface_hub.file_download import http_get  # here: it is slow to import, and seldom needed

    def transfer():
        with atomic_write(path) as file:
            http_get(url, file, displayed_filename=path.name)

    with locked(path.parent):
        return None if path.exists() else _attempts(transfer)


def fetch_from_hub(repo: str, names: list[str], folder: Path, workers: int) -> dict[str, str]:
    """
    Fetch files of a dataset on the hub to a locked folder, in order; returns the failures: name -> reason.

    If the first `workers` files all fail, the hub counts as unreachable and the rest is not tried.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # one bar is enough
    failed, done, incoming = {}, 0, folder / ".incoming"

    def transfer(name):
        path = Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=incoming))  # which checks its size
        expected = get_hf_file_metadata(hf_hub_url(repo, name, repo_type="dataset")).etag
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if len(expected) == len(digest) and expected != digest:  # small files have another kind of hash
            path.unlink()
            raise RuntimeError(f"expected a file with the SHA-256 {expected}, got {digest}")
        os.replace(path, folder / name)

    def attempt(name):
        return name, _attempts(lambda: transfer(name))

    shutil.rmtree(incoming, ignore_errors=True)  # what killed processes left
    try:
        with ThreadPool(workers) as pool:  # its threads are no reason to wait after Ctrl-C
            for name, reason in progress.track(pool.imap_unordered(attempt, names), "downloading", len(names)):
                if reason is None:
                    done += 1
                    continue
                failed[name] = reason
                if not done and len(failed) == workers:
                    return failed | {name: "not tried" for name in names if name not in failed}
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return failed


def _attempts(transfer) -> str | None:
    """Call transfer() until it succeeds or a retry cannot help; returns the reason of a failure, or None."""
    from huggingface_hub.errors import HTTPError

    for attempt in range(RETRIES + 1):
        try:
            transfer()
            return None
        except (OSError, HTTPError, *BY_CHANCE) as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if attempt == RETRIES or not (status >= 500 or isinstance(error, BY_CHANCE)):
                return str(error.__cause__ or error).partition("\n")[0]  # huggingface_hub says it in its cause
            time.sleep(BACKOFF_SECONDS * 2**attempt)
