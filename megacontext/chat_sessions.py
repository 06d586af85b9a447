"""
The sessions of a chat server's worker: a bounded number, one per conversation, each of which can be recreated.

A conversation is identified by a name from its client, or else by its tokens: a prompt without a name continues the
unnamed session whose last prompt is the longest prefix of it. A named session serves that name only. Tokens of the
session that are not in the new prompt are dropped before anything is read, so no session can reveal another
conversation. Its levels of detail stay, so an unnamed answer may depend slightly on what others with the same beginning
asked. A new session evicts the least recently used one; that conversation is read again at its next turn, or continued
from disk, where a KeptChats stores named conversations.

A worker has one thread, and a session answers one job at a time: further jobs of its conversation wait for it, even if
other workers are free.
"""

import threading
import time
from array import array
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from megacontext import streams
from megacontext.kept_chats import KeptChats
from megacontext.look import look
from megacontext.session import MCSession
from megacontext.working_context import smallest_length
from nanochat.serving.job import FocusState, Job

KEPT_EDITS = 200  # newest refocuses with edits, per conversation


@dataclass(eq=False)
class Held:
    """A session, with copies of its contents that other threads can read."""

    session: MCSession = None
    conversation: str | None = None
    job: Job | None = None  # the job that is being answered, if any
    prompt: array = field(default_factory=lambda: array("i"))  # of the last job
    answer: list[int] = field(default_factory=list)  # to that prompt
    state: dict | None = None  # the last focus state that was sent
    edits: deque = field(default_factory=lambda: deque(maxlen=KEPT_EDITS))  # see `ChatSessions.edits`
    used: float = 0.0  # time of the last job's start, by time.monotonic()
    num_tokens: int = 0
    num_bytes: int = 0
    is_kept: bool = False  # on disk, for after a restart
    forgotten: bool = False  # to be deleted once it has answered

    def tokens(self, start, end):
        n = len(self.prompt)
        return [*self.prompt[start:end], *self.answer[max(0, start - n) : max(0, end - n)]]


class ChatSessions:
    """
    The sessions of one worker of a WorkerPool.

    make_session(seed=…, on_update=…) -> MCSession; config: that of the sessions, resolved. on_update(session,
    entries_read, watch): called at each update of a session, see MCSession. kept: storage of named conversations
    across restarts, or None. past: Arrays of the tokens that precede all conversations.
    """

    def __init__(self, make_session, config, limit, on_update=None, kept: KeptChats | None = None, past=None):
        self.make_session, self.config, self.limit, self.on_update = make_session, config, limit, on_update
        self.kept, self.past = kept, past
        self.held = []  # least recently used first
        self.evicted = 0
        self.lock = threading.Lock()  # guards `held`

    @contextmanager
    def serve(self, job):
        """The session that answers a job, reserved for it until the end of the `with`."""
        held = self._take(job)
        try:
            yield held.session
            if held.session.num_tokens > held.num_tokens:
                self._tell(held)  # the final state, which may lie between two refocuses
            held.forgotten |= not held.session.num_tokens  # its first prompt was cancelled
            if held.is_kept and not held.forgotten:
                if job.ids:  # else the prompt may have been cancelled
                    held.session.note(job.prompt + job.ids)
                self.kept.save(held.conversation, held.session, held.session.focus_state(), list(held.edits))
        except BaseException:  # the state of the session is undefined
            self._drop(held)
            raise
        with self.lock:
            held.job = None
            if held.forgotten:
                self._forget(held)

    def _take(self, job):
        """The session for this job, now the most recently used."""
        prompt = array("i", job.prompt)
        with self.lock:
            held = self._find(prompt, job.conversation, idle=True)
            new = held is None
            if held:
                self.held.remove(held)
            else:
                if len(self.held) == self.limit:
                    unused = next(held for held in self.held if held.job is None)
                    self.held.remove(unused)
                    unused.session.close()
                    self.evicted += 1
                held = Held(conversation=job.conversation)
            held.job, held.prompt, held.answer, held.used = job, prompt, job.ids, time.monotonic()
            self.held.append(held)
        if new:  # without the lock: a long conversation may have many gists to compute
            try:
                self._make_session(held)
            except BaseException:
                with self.lock:
                    self.held.remove(held)
                raise
        return held

    def _make_session(self, held):
        options = {"seed": held.job.sampling.seed, "on_update": partial(self._on_update, held)}
        store = self.kept.open(held.conversation) if self.kept and held.conversation else None
        with ExitStack() as stack:  # closes the store if making the session fails
            if store:
                stack.callback(store.close)
                record, held.is_kept = self._record(held.conversation), True
                options |= {"store": store, "state": record.get("session")}
                held.edits.extend(record.get("edits", ()))
            held.session = self.make_session(**options)
            stack.pop_all()

    def _find(self, prompt, conversation, idle=False):
        """The Held of a conversation, or of the one that this prompt continues; idle: only if it is not answering."""
        held = [held for held in self.held if held.job is None or not idle]
        if conversation:
            return next((one for one in held if one.conversation == conversation), None)
        known = [one for one in held if not one.conversation and prompt[: len(one.prompt)] == one.prompt]
        return max(known, key=lambda held: len(held.prompt), default=None)

    def _drop(self, held):
        with self.lock:
            self.held.remove(held)
        held.session.close()

    def _on_update(self, held, session, entries_read, watch):
        """At each prefill and refocus."""
        if self.on_update:
            self.on_update(session, entries_read, watch)
        held.job.compacted |= session.context.coarsest > 0
        changes = session.focus.records[0].changes
        if changes:
            told = {"time": round(time.time(), 1), "num_tokens": session.num_tokens}
            held.edits.append(told | {"changes": [list(change) for change in changes]})
        self._tell(held)

    def _tell(self, held):
        held.num_tokens = held.session.num_tokens
        held.num_bytes = sum(held.session.memory().values())
        if held.job.focus:
            held.state = held.session.focus_state()
            held.job.emit(FocusState(held.state))

    # -----------------------------------------------------------------------------------------------------
    # From any thread

    def last_used(self, conversation, prompt=()) -> float:
        """Last use of the session that this conversation or prompt continues, by time.monotonic(); 0.0 if none."""
        with self.lock:
            held = self._find(array("i", prompt), conversation)
            return held.used if held else 0.0

    def answering(self, conversation) -> bool:
        """Whether an answer is being generated in this conversation."""
        with self.lock:
            held = self._find(array("i"), conversation)
            return held is not None and held.job is not None

    def free(self) -> bool:
        """Whether one more job can start now: not if all sessions are answering."""
        with self.lock:
            return len(self.held) < self.limit or any(held.job is None for held in self.held)

    def fits(self, num_tokens) -> bool:
        """Whether a session can hold this many tokens, besides the past."""
        num_tokens += self.past.rows("tokens") if self.past else 0
        smallest = smallest_length(num_tokens, self.config.block_size, self.config.allocator_recent_tokens)
        return smallest <= self.config.budget_of_a_refocus

    def describe(self) -> dict:
        """The sessions' part of GET /config."""
        return {
            **({"kept": True} if self.kept else {}),
            **({"past": self.past.rows("tokens")} if self.past else {}),
            "budget": self.config.allocator_soft_max,
            "block_size": self.config.block_size,
            "sessions": self.limit,
            "refocus_interval": self.config.mc_infer_refocus_interval,
        }

    def stats(self) -> dict:
        """The sessions' part of GET /stats."""
        kept = {"kept": self.kept.stats()} if self.kept else {}
        with self.lock:
            return {
                "held": len(self.held),
                "limit": self.limit,
                "evicted": self.evicted,
                "tokens": sum(held.num_tokens for held in self.held),
                "bytes": sum(held.num_bytes for held in self.held),
                **kept,
            }

    def _record(self, conversation):
        return self.kept.record(conversation) if self.kept else {}

    def focus(self, conversation) -> dict | None:
        """The last focus state that was sent in this conversation, or None."""
        with self.lock:
            held = self._find(array("i"), conversation)
        return held.state if held else self._record(conversation).get("view")

    def edits(self, conversation) -> list[dict]:
        """
        The edits of the newest refocuses, oldest first: time (seconds since 1970), num_tokens at that time, changes
        (first block, number of blocks, old and new level).
        """
        with self.lock:
            held = self._find(array("i"), conversation)
            return list(held.edits) if held else self._record(conversation).get("edits", [])

    def look(self, conversation, question) -> list | None:
        """
        Blocks that may contain the answer to a question, see look.look; None if there is no such conversation. Only for
        the worker's thread.
        """
        with self.lock:
            held = self._find(array("i"), conversation)
        if held:
            return look(held.session, question)
        store = self.kept.read(conversation) if self.kept else None
        if store is None:
            return None
        session = self.make_session(store=store)
        try:
            return look(session, question)
        finally:
            session.close()

    def tokens(self, conversation, start, end) -> list[int] | None:
        """
        Tokens [start, end) of past and conversation, fewer if it ends before; None if there is no such conversation.
        """
        n = self.past.rows("tokens") if self.past else 0
        before = streams.token_ids(self.past, start, min(end, n)) if start < n else []
        with self.lock:
            held = self._find(array("i"), conversation)
            own = held.tokens(max(0, start - n), max(0, end - n)) if held else None
        if own is None and self.kept:
            own = self.kept.tokens(conversation, start, end)
        return own if own is None else before + own

    def forget(self, conversation):
        """Delete a conversation: now, or after the answer that is being generated."""
        with self.lock:
            held = self._find(array("i"), conversation)
            if held and held.job:
                held.forgotten = True
                return
            if held:
                self._forget(held)
        if self.kept:
            self.kept.delete(conversation)

    def _forget(self, held):
        self.held.remove(held)
        held.session.close()
        if held.is_kept:
            self.kept.delete(held.conversation)
