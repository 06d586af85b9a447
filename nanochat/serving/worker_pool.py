"""
Workers: a thread a device, each with its own model, and one bounded queue in front of them all.

Nothing that a client does holds a worker: what is made waits in the job's own queue, which max_tokens bounds, and a
job that was cancelled ends at the next token.
"""

import contextlib
import logging
import math
import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch

from nanochat.serving.answer import Answer, ranked, score
from nanochat.serving.job import Done, Failed, Job, Scored

logger = logging.getLogger(__name__)
MAX_RETRY_AFTER = 60  # seconds


class Unavailable(Exception):
    """No worker can take this job now; try again after `retry_after` seconds."""

    def __init__(self, message, retry_after):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class ServedModel:
    """Which model it is; `id` is what OpenAI clients ask for."""

    source: str
    model_tag: str
    step: int

    @property
    def id(self) -> str:
        return f"nanochat-{self.source}-{self.model_tag}"


class Sessions(Protocol):
    """Contexts of one worker that outlive an answer; only `serve` is for the worker's thread alone."""

    def serve(self, job: Job) -> AbstractContextManager:
        """The session that the Engine answers this job with; it is the job's until the end of the `with`."""

    def last_used(self, conversation: str | None, prompt: list[int] = ()) -> float:
        """When what this conversation, or this prompt, goes on with was used, by time.monotonic(); 0.0 if never."""

    def fits(self, num_tokens: int) -> bool:
        """Whether a session can hold so many tokens."""

    def describe(self) -> dict:
        """What GET /config tells of them."""

    def stats(self) -> dict:
        """What GET /stats tells of them."""

    def focus(self, conversation: str) -> dict | None:
        """The Focus that was told last in this conversation; None where there is none."""

    def tokens(self, conversation: str, start: int, end: int) -> list[int] | None:
        """Some tokens of a conversation, so far as they are there; None where there is no such conversation."""


class Worker:
    """One engine, the sessions of its conversations if it keeps any, and the numbers that /stats shows of it."""

    def __init__(self, number, engine, sessions: Sessions | None = None):
        self.number, self.engine, self.sessions = number, engine, sessions
        self.device = engine.model.get_device()
        self.job = None
        self.served = self.failed = 0

    def answer(self, job):
        """Generate, handing pieces to the job; returns the finish reason, or None if the job was cancelled."""
        if self.sessions is None:
            return self._answer(job)
        with self.sessions.serve(job) as session:
            return self._answer(job, session=session)

    def _answer(self, job, **options):
        if job.score:
            job.emit(Scored(score(self.engine, job.prompt, job.logprobs or 0)))
        answer, rank = Answer(job, self.engine.tokenizer, self.number), ()

        def on_logits(logits, ids):
            nonlocal rank
            [rank] = ranked(logits, ids, job.logprobs)

        if job.logprobs is not None:
            options["on_logits"] = on_logits
        columns = self.engine.generate(job.prompt, max_tokens=job.max_tokens, **vars(job.sampling), **options)
        # Closed here and now: a generator that is merely dropped keeps its cache until it is collected
        with contextlib.closing(columns):
            for column, _ in columns:
                if job.cancelled:
                    return None
                if reason := answer.take(column[0], *rank):
                    return reason
        return answer.end()


class WorkerPool:
    """
    state: "loading" until `start`, then "ready", "draining" after `drain`, and "closed".

    on_end(job, outcome): called by the worker when it is done with a job; outcome: "stop", "length", "cancelled" or
    "failed".
    """

    def __init__(self, queue_size=64, on_end=None):
        self.queue_size, self.on_end = queue_size, on_end
        self.state = "loading"
        self.model = None
        self.workers = []
        self.waiting = deque()
        self.changed = threading.Condition()  # guards everything here
        self.totals = dict.fromkeys(("requests", "completed", "cancelled", "rejected", "failed", "tokens"), 0)
        self.threads = []
        self.seconds = 1.0  # that an answer takes, a running mean
        self.started = time.monotonic()

    def start(self, engines, model: ServedModel, sessions=()):
        """
        Begin to work, one thread an engine; they hold the same model.

        sessions: Sessions for each engine; none for contexts that are gone after an answer.
        """
        cores = max(1, torch.get_num_threads() // len(engines))
        with self.changed:
            self.model = model
            self.workers = [Worker(i, *both) for i, both in enumerate(zip_longest(engines, sessions))]
            if self.state == "loading":  # else it is to end before it began
                self.state = "ready"
        for worker in self.workers:
            name = f"worker-{worker.number}"
            self.threads.append(threading.Thread(target=self._work, args=(worker, cores), name=name))
            self.threads[-1].start()

    @property
    def tokenizer(self):
        return self.workers[0].engine.tokenizer

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together, where no sessions make more of it."""
        return self.workers[0].engine.model.config.sequence_len

    @property
    def sessions(self) -> list[Sessions]:
        """One a worker, or none."""
        return [worker.sessions for worker in self.workers if worker.sessions]

    def _idle(self):
        return sum(worker.job is None for worker in self.workers)

    def _check_open(self):
        self.check_ready()
        if len(self.waiting) >= self.queue_size + self._idle():
            self.totals["requests"] += 1
            self.totals["rejected"] += 1
            wait = math.ceil(self.seconds * (len(self.waiting) + 1) / len(self.workers))
            raise Unavailable(
                f"the server is busy: {len(self.waiting)} requests are waiting already", min(wait, MAX_RETRY_AFTER)
            )

    def check_ready(self):
        """Unavailable while the model is loading and after `drain`."""
        if self.state != "ready":
            doing = "still loading the model" if self.state == "loading" else "shutting down"
            raise Unavailable(f"the server is {doing}: try again later", 5)

    def check_open(self):
        """Unavailable if `submit` would refuse just now: a cheap question before a prompt is made."""
        with self.changed:
            self._check_open()

    def submit(self, job):
        """Queue a job. Raises Unavailable."""
        homes = self.workers if len(self.workers) > 1 else []
        used = {w: w.sessions.last_used(job.conversation, job.prompt) for w in homes if w.sessions}
        job.home = max((w for w in used if used[w]), key=used.get, default=None)
        with self.changed:
            self._check_open()
            self.totals["requests"] += 1
            self.waiting.append(job)
            self.changed.notify_all()

    def cancel(self, job):
        """Nobody waits for this job any more. Does nothing if it has ended."""
        with self.changed:
            job.cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)
                self.totals["cancelled"] += 1

    def drain(self):
        """Take no more jobs; those that are queued or running go on."""
        with self.changed:
            self.state = "draining"

    def is_idle(self) -> bool:
        with self.changed:
            return not self.waiting and self._idle() == len(self.workers)

    def abort(self, message):
        """End all jobs, telling their clients why."""
        with self.changed:
            running = [worker.job for worker in self.workers if worker.job and not worker.job.cancelled]
            self.totals["cancelled"] += len(self.waiting)
            for job in [*running, *self.waiting]:
                job.cancelled = True
                job.emit(Failed(message))
            self.waiting.clear()

    def close(self):
        """Stop the threads and wait for them: for a running job, unless `abort` came before, for the next token."""
        with self.changed:
            self.state = "closed"
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def stats(self) -> dict:
        """What GET /stats answers."""
        with self.changed:
            workers = [
                {
                    "gpu_id": worker.number,
                    "device": str(worker.device),
                    "busy": worker.job is not None,
                    "served": worker.served,
                    "failed": worker.failed,
                    **({"sessions": worker.sessions.stats()} if worker.sessions else {}),
                }
                for worker in self.workers
            ]
            return {
                "state": self.state,
                "workers": workers,
                "total_workers": len(workers),
                "available_workers": self._idle(),
                "busy_workers": len(workers) - self._idle(),
                "queue": {"length": len(self.waiting), "limit": self.queue_size},
                "totals": dict(self.totals),
                "uptime_seconds": round(time.monotonic() - self.started, 3),
            }

    def _next(self, worker):
        """The first waiting job that is not better left to another worker, idle and with its conversation at hand."""
        return next((job for job in self.waiting if job.home in (None, worker) or job.home.job), None)

    def _work(self, worker, cores):
        if worker.device.type == "cuda":
            torch.cuda.set_device(worker.device)  # a thread's own setting
        elif len(self.workers) > 1:
            torch.set_num_threads(cores)  # workers on the CPU share its cores
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._next(worker) or self.state == "closed")
                job = worker.job = self._next(worker)
                if job is None:
                    return
                self.waiting.remove(job)
                self.changed.notify_all()  # what was left to this worker is now for whoever is idle
            start = time.monotonic()
            try:
                reason = worker.answer(job)
                event, outcome = Done(reason), "completed" if reason else "cancelled"
            except Exception:  # of whatever kind: it costs this job, never the worker
                logger.exception("worker %d failed on a request", worker.number)
                reason, event, outcome = None, Failed("the model failed on this request"), "failed"
            with self.changed:
                self.totals[outcome] += 1
                self.totals["tokens"] += job.tokens
                worker.served += outcome == "completed"
                worker.failed += outcome == "failed"
                worker.job = None
                self.seconds += 0.2 * (time.monotonic() - start - self.seconds)
                unheard = job.cancelled
            if not unheard:
                job.emit(event)
            if self.on_end:
                try:
                    self.on_end(job, reason or outcome)
                except Exception:  # whoever counts answers must not end them
                    logger.exception("what happens after an answer failed")
