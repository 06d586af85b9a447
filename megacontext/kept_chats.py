"""
Conversations that outlive the server: one stream each, in a folder named by a hash of the conversation's secret name.

Folder names do not reveal the secret names, and a name gives access to its own conversation only. Several workers may
share one object; each conversation is written by one session at a time.
"""

import hashlib
import logging
import os
import threading
import time
from contextlib import closing, nullcontext, suppress
from pathlib import Path

from megacontext import streams
from megacontext.arrays import Arrays, Damaged
from nanochat.common import UserError

logger = logging.getLogger(__name__)


class KeptChats:
    """
    gist_key: see streams.gist_key_of. count, gigabytes, days: limits; the least recently used conversations beyond them
    are deleted whenever a new one is created.
    """

    def __init__(self, root, gist_key, device="cpu", count=1000, gigabytes=10.0, days=30.0):
        self.root = streams.private_folder(Path(root))
        self.gist_key, self.device = gist_key, device
        self.count, self.bytes, self.seconds = count, 1e9 * gigabytes, 86400 * days
        self.lock = threading.Lock()  # guards creating, measuring and deleting folders
        self._measured = {}  # folder → (last use when it was measured, its bytes)
        self.refused = 0  # answers that could not be written

    def _folder(self, name) -> Path:
        return self.root / hashlib.sha256(name.encode()).hexdigest()[:40]

    def open(self, name):
        """
        The store for a session of this conversation, empty for a new one; None if it cannot be opened, because the disk
        is full or another session has it.
        """
        folder = self._folder(name)
        try:
            with self.lock:
                if not folder.exists():
                    self._make_room()
                    streams.create_stream(folder, self.gist_key)
            store = streams.open_store(folder, self.gist_key, self.device, write=True)
        except Damaged as error:  # the client may still have all of it
            logger.error("a conversation is set aside: %s", error)
            folder.rename(folder.with_name(f"{folder.name}-damaged-{time.time_ns()}"))
            return self.open(name)
        except UserError as error:
            logger.error("a conversation is not kept: %s", error)
            return None
        return store

    def read(self, name):
        """The store of a conversation, read-only, for one without a session; None if there is no such conversation."""
        folder = self._folder(name)
        return streams.open_store(folder, self.gist_key, self.device) if folder.exists() else None

    def save(self, name, session, view, edits=()):
        """Write the session's tokens and gists, and its state, view and edits for `record`."""
        try:
            session.tree.store.commit(focus={"session": session.state(), "view": view, "edits": edits})
            os.utime(self._folder(name))  # see _sizes
        except (UserError, OSError) as error:  # the client has its answer; saving the next one may succeed
            self.refused += 1
            logger.error("an answer is not kept: %s", error)

    def record(self, name) -> dict:
        """
        What `save` wrote beside the tokens: "session", its state; "view", the focus at the end of the last answer;
        "edits", see ChatSessions.edits. Empty if there is no such conversation.
        """
        with self._tokens(name) as tokens:
            return tokens.facts.get("focus", {}) if tokens else {}

    def tokens(self, name, start, end) -> list[int] | None:
        """Tokens [start, end) of a conversation, fewer if it ends before; None if there is no such conversation."""
        with self._tokens(name) as tokens:
            return streams.token_ids(tokens, start, end) if tokens else None

    def _tokens(self, name):
        """A context manager that gives the Arrays of a conversation's tokens, None if they are missing or damaged."""
        folder = self._folder(name)
        try:
            return closing(Arrays(folder))
        except Damaged as error:
            if folder.exists():
                logger.error("a conversation cannot be shown: %s", error)
            return nullcontext()

    def delete(self, name):
        """Delete a conversation. Raises UserError while a session has it."""
        with self.lock:
            if self._folder(name).exists():
                streams.delete_stream(self._folder(name))

    def folders(self) -> list[Path]:
        """The folders of all conversations, the least recently used first."""
        with self.lock:
            return list(self._sizes())

    def stats(self):
        with self.lock:
            sizes = self._sizes()
        return {"kept": len(sizes), "bytes": sum(size for _, size in sizes.values()), "refused": self.refused}

    def _sizes(self) -> dict[Path, tuple[float, int]]:
        """Folder → (time of last use, bytes), least recently used first; measured again only if used since."""
        found = {}
        for folder in (path for path in self.root.iterdir() if path.name[0] != "."):
            with suppress(FileNotFoundError):  # another server has just deleted it
                used = folder.stat().st_mtime  # `save` notes it, and whoever opens it makes files in it
                measured, size = self._measured.get(folder, (None, 0))
                found[folder] = used, size if used == measured else streams.size_of(folder)
        self._measured = dict(sorted(found.items(), key=lambda item: item[1]))
        return self._measured

    def _make_room(self):
        sizes = self._sizes()
        count, size = len(sizes) + 1, sum(size for _, size in sizes.values())
        for folder, (used, its) in sizes.items():
            if count <= self.count and size <= self.bytes and time.time() - used <= self.seconds:
                break
            try:
                streams.delete_stream(folder)
                count, size = count - 1, size - its
            except (UserError, FileNotFoundError):  # in use; another server was faster
                continue
