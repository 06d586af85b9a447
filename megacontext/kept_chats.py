"""
Conversations that outlive the server: a stream each, in a folder named by a hash of the conversation's secret name.

The folder reveals no names, and a name gives access to its own conversation only. Several workers may share one object;
each conversation is written by one session at a time.
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
    gist_key: see streams.gist_key_of. count, gigabytes, days: limits of what is kept; beyond them the least recently
    used conversations are deleted when one is created.
    """

    def __init__(self, root, gist_key, device="cpu", count=1000, gigabytes=10.0, days=30.0):
        self.root = streams.private_folder(Path(root))
        self.gist_key, self.device = gist_key, device
        self.count, self.bytes, self.seconds = count, 1e9 * gigabytes, 86400 * days
        self.lock = threading.Lock()  # guards the making, measuring and deleting of folders
        self._measured = {}  # folder → when it was used then, and its bytes
        self.refused = 0  # answers that the disk did not take

    def _folder(self, name) -> Path:
        return self.root / hashlib.sha256(name.encode()).hexdigest()[:40]

    def open(self, name):
        """
        The store with which a session continues, an empty one for a new conversation; None if the disk is full or
        another session has the conversation.
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
        """The store of a conversation that no session has, to be read only; None where there is none."""
        folder = self._folder(name)
        return streams.open_store(folder, self.gist_key, self.device) if folder.exists() else None

    def save(self, name, session, view, edits=()):
        """Keep what the session holds, and its state, view and edits for `record`."""
        try:
            session.tree.store.commit(focus={"session": session.state(), "view": view, "edits": edits})
            os.utime(self._folder(name))  # see _sizes
        except (UserError, OSError) as error:  # the answer has been given; the next one may find room
            self.refused += 1
            logger.error("an answer is not kept: %s", error)

    def record(self, name) -> dict:
        """
        What `save` kept with the tokens: "session", its state; "view", the focus at the end of the last answer;
        "edits", see ChatSessions.edits. Empty where there is no such conversation.
        """
        with self._tokens(name) as tokens:
            return tokens.facts.get("focus", {}) if tokens else {}

    def tokens(self, name, start, end) -> list[int] | None:
        """Some tokens of a conversation, so far as they are there; None where there is no such conversation."""
        with self._tokens(name) as tokens:
            return streams.token_ids(tokens, start, end) if tokens else None

    def _tokens(self, name):
        """A context with the Arrays of a conversation's tokens; with None where they are missing or damaged."""
        folder = self._folder(name)
        try:
            return closing(Arrays(folder))
        except Damaged as error:
            if folder.exists():
                logger.error("a conversation cannot be shown: %s", error)
            return nullcontext()

    def delete(self, name):
        """Raises UserError while a session has it."""
        with self.lock:
            if self._folder(name).exists():
                streams.delete_stream(self._folder(name))

    def folders(self) -> list[Path]:
        """Of all conversations, the least recently used first."""
        return list(self._sizes())

    def stats(self):
        with self.lock:
            sizes = self._sizes()
        return {"kept": len(sizes), "bytes": sum(size for _, size in sizes.values()), "refused": self.refused}

    def _sizes(self) -> dict[Path, tuple[float, int]]:
        """Of each conversation the time of its last use, the oldest first, and its bytes; measured if used since."""
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
