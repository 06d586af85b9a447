"""
Workers: a thread per device, each with its own model, and one bounded queue in front of them all.

The answers that a worker generates share the steps of its model. No client can block a worker: events wait in the job's
own queue, whose length max_tokens bounds, and a cancelled job ends before the next step.
"""

import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import zip_longest

import torch

from nanochat.serving.job import Answer, Done, Failed, Outbox, ranked, score_prompt

logger = logging.getLogger(__name__)
MAX_RETRY_AFTER = 60  # seconds
MAX_CALLS = 8  # that wait for one worker


class Unavailable(Exception):
    """No worker can take this job now; try again after `retry_after` seconds."""

    def __init__(self, message, retry_after):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class ServedModel:
    """Identifies the model that is served; `id` is its name for OpenAI clients."""

    source: str
    model_tag: str
    step: int

    @property
    def id(self) -> str:
        return f"nanochat-{self.source}-{self.model_tag}"


class Worker:
    """
    One engine, the sessions of its conversations if it keeps any, and the jobs that it is answering, at most `size`.

    For the worker's thread only, except the numbers in /stats. ended(job, reason, seconds): called at the end of each
    job, with "stop", "length", "cancelled" or "failed". sessions: see WorkerPool.start.
    """

    def __init__(self, number, engine, size, ended, sessions=None):
        self.number, self.engine, self.size, self.ended, self.sessions = number, engine, size, ended, sessions
        self.device = engine.model.get_device()
        self.batch = None
        self.scoring = deque()  # what `_score` yields of those answers whose prompt comes first
        self.making = {}  # stream → Answer
        self.calls = deque()  # (function, Future) for `step` to call
        self.jobs = []  # of all these
        self.served = self.failed = 0
        self.outbox = Outbox()

    def load(self):
        """The worker with the smallest load takes a job that any could take."""
        return len(self.jobs), self.served + self.failed

    def can_take(self) -> bool:
        return len(self.jobs) < self.size and (self.sessions is None or self.sessions.free())

    def holds(self, job) -> bool:
        """Whether it has the conversation of this name: no other worker may have it then."""
        return bool(job.conversation and self.sessions and self.sessions.last_used(job.conversation))

    def begin(self, job):
        """Start on an answer; nothing is computed yet. Whatever goes wrong with it costs this job, never the worker."""
        job.outbox = self.outbox
        answer = Answer(job, self.engine.tokenizer, self.number)
        if job.score:
            self.scoring.append(self._score(answer))
        else:
            self._add(answer)
            self.outbox.send()

    def _add(self, answer, scored=()):
        """Add an answer to the batch, unless it has no tokens to generate: then only its prompt is repeated."""
        job = answer.job
        try:
            if job.echo_from is not None:
                answer.echo(scored)
            if not job.max_tokens:
                self._end(answer, answer.end())
                return
            session = answer.context.enter_context(self.sessions.serve(job)) if self.sessions else None
            if self.batch is None:
                self.batch = self.engine.batch()
            with_logits = job.logprobs is not None
            stream = self.batch.add(job.prompt, job.max_tokens, job.sampling, session, with_logits)
            self.making[stream] = answer
        except Exception as error:
            self._end(answer, error)

    def _score(self, answer):
        """Yield after each part of a prompt whose own probabilities are asked for, then let its answer begin."""
        job = answer.job
        parts = score_prompt(self.engine, job.prompt, job.logprobs or 0)
        try:
            while (tokens := next(parts)) is None:
                yield
                if job.cancelled:
                    self._end(answer, "cancelled")
                    return
        except Exception as error:
            self._end(answer, error)
            return
        self._add(answer, tokens)

    def step(self):
        """One waiting call, then a step of all answers, whose events are sent at its end."""
        if self.calls:
            function, future = self.calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # whoever asked hears of it
                    future.set_exception(error)
        if self.scoring:  # a part of one prompt, the prompts in turn
            parts = self.scoring.popleft()
            if next(parts, "done") is None:
                self.scoring.append(parts)
        try:
            for stream in [stream for stream, answer in self.making.items() if answer.job.cancelled]:
                self.batch.remove(stream)
                self._end(self.making.pop(stream), "cancelled")
            for stream, id, logits in self.batch.step() if self.making else ():
                self._take(stream, id, logits)
        except Exception as error:  # nobody knows what the batch holds
            self.batch = None
            for stream in list(self.making):
                self._end(self.making.pop(stream), error)
        self.outbox.send()

    def _take(self, stream, id, logits):
        """Handle the result of a step for one answer: a token, or its end, or both."""
        answer, why, rank = self.making[stream], stream.ended, ()
        try:
            if logits is not None:
                [rank] = ranked(logits, torch.tensor([id], device=logits.device), answer.job.logprobs)
            if id is not None:
                why = answer.take(id, *rank) or why
            if why == "length":
                why = answer.end()
        except Exception as error:
            why = error
        if why is not None:
            self.batch.remove(stream)
            self._end(self.making.pop(stream), why)

    def _end(self, answer, why):
        """The end of one answer. why: "stop", "length", "cancelled", or an exception."""
        job, error = answer.job, why if isinstance(why, Exception) else None
        try:
            answer.context.__exit__(type(error) if error else None, error, None)
        except Exception as fault:
            error = error or fault
        if error:
            logger.error("worker %d failed on a request", self.number, exc_info=error)
            why = "failed"
        self.ended(self, job, why, time.monotonic() - answer.started)
        if not job.cancelled:
            job.emit(Failed("the model failed on this request") if error else Done(why))


class WorkerPool:
    """
    state: "loading" until `start`, then "ready", "draining" after `drain`, and "closed".

    batch_size: answers that a worker makes at once. on_end(job, outcome): called by the worker when it is done with a
    job; outcome: "stop", "length", "cancelled" or "failed".
    """

    def __init__(self, queue_size=64, on_end=None, batch_size=1):
        self.queue_size, self.on_end, self.batch_size = queue_size, on_end, batch_size
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
        Begin to work, one thread per engine; they hold the same model.

        sessions: a megacontext.chat_sessions.ChatSessions per engine, for contexts that outlive an answer; none for
        contexts that end with it. Their `serve` and `look` are for the worker's thread only.
        """
        cores = max(1, torch.get_num_threads() // len(engines))
        with self.changed:
            self.model = model
            both = zip_longest(engines, sessions)
            self.workers = [Worker(i, e, self.batch_size, self._ended, s) for i, (e, s) in enumerate(both)]
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
        """Maximum number of tokens of prompt and answer together, unless sessions allow more."""
        return self.workers[0].engine.model.config.sequence_len

    @property
    def sessions(self) -> list:
        """One per worker, or none at all."""
        return [worker.sessions for worker in self.workers if worker.sessions]

    @property
    def limit(self) -> int:
        """Jobs that may be waiting or running."""
        return self.queue_size + self.batch_size * len(self.workers)

    @property
    def available(self) -> int:
        """Workers that have nothing to do."""
        return sum(not worker.jobs for worker in self.workers)

    def _running(self):
        return [job for worker in self.workers for job in worker.jobs]

    def _check_open(self, new=1):
        self.check_ready()
        if len(self.waiting) + len(self._running()) + new > self.limit:
            self.totals["requests"] += new
            self.totals["rejected"] += new
            wait = math.ceil(self.seconds * (len(self.waiting) + 1) / (self.limit - self.queue_size))
            raise Unavailable(
                f"the server is busy: {len(self.waiting)} requests are waiting already", min(wait, MAX_RETRY_AFTER)
            )

    def check_ready(self):
        """Unavailable while the model is loading and after `drain`."""
        if self.state != "ready":
            doing = "still loading the model" if self.state == "loading" else "shutting down"
            raise Unavailable(f"the server is {doing}: try again later", 5)

    def check_open(self):
        """Raise Unavailable if `submit` would refuse now: a cheap check before a prompt is rendered."""
        with self.changed:
            self._check_open()

    def submit(self, jobs):
        """Queue jobs, all of them or none. Raises Unavailable."""
        homes = self.workers if len(self.workers) > 1 else []
        for job in jobs:
            used = {w: w.sessions.last_used(job.conversation, job.prompt) for w in homes if w.sessions}
            job.home = max((w for w in used if used[w]), key=used.get, default=None)
        with self.changed:
            self._check_open(len(jobs))
            self.totals["requests"] += len(jobs)
            self.waiting.extend(jobs)
            self.changed.notify_all()

    def call(self, sessions, function) -> Future:
        """The result of function(), called in the thread of the worker with these sessions. Raises Unavailable."""
        [worker] = [worker for worker in self.workers if worker.sessions is sessions]
        with self.changed:
            self.check_ready()
            if len(worker.calls) >= MAX_CALLS:
                raise Unavailable("the server is busy: others are searching", 5)
            future = Future()
            worker.calls.append((function, future))
            self.changed.notify_all()
        return future

    def cancel(self, job):
        """Cancel a job. No effect if it has ended."""
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
            return not self.waiting and not self._running()

    def abort(self, message):
        """End all jobs, telling their clients why."""
        with self.changed:
            self.totals["cancelled"] += len(self.waiting)
            for job in [*self._running(), *self.waiting]:
                if not job.cancelled:
                    job.cancelled, job.outbox = True, None
                    job.emit(Failed(message))
            self.waiting.clear()

    def close(self):
        """Stop the threads and wait for them: for running jobs, unless `abort` came before, for the next token."""
        with self.changed:
            self.state = "closed"
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def stats(self) -> dict:
        """What GET /stats answers."""
        told = [(worker, worker.sessions.stats() if worker.sessions else None) for worker in self.workers]
        with self.changed:
            workers = [
                {
                    "gpu_id": worker.number,
                    "device": str(worker.device),
                    "busy": bool(worker.jobs),
                    "answers": len(worker.jobs),
                    "served": worker.served,
                    "failed": worker.failed,
                    **({"sessions": sessions} if sessions else {}),
                }
                for worker, sessions in told
            ]
            return {
                "state": self.state,
                "workers": workers,
                "total_workers": len(workers),
                "available_workers": self.available,
                "busy_workers": len(workers) - self.available,
                "queue": {"length": len(self.waiting), "limit": self.queue_size},
                "totals": dict(self.totals),
                "uptime_seconds": round(time.monotonic() - self.started, 3),
            }

    def _next(self, worker):
        """
        The first waiting job for this worker: one whose conversation it holds, or that no worker holds while this one
        has the least to do. A job waits while another one of its conversation is being answered.
        """
        answering = {job.conversation for job in self._running()} if self.sessions else ()
        for job in self.waiting:
            if job.conversation and job.conversation in answering:
                continue
            homes = [other for other in self.workers if other.holds(job)] or self.workers
            able = [other for other in homes if other.can_take()]
            home = job.home if job.home in able else min(able, key=Worker.load, default=None)
            if worker is home:
                return job
        return None

    def _work(self, worker, cores):
        if worker.device.type == "cuda":
            torch.cuda.set_device(worker.device)  # a thread's own setting
        elif len(self.workers) > 1:
            torch.set_num_threads(cores)  # workers on the CPU share its cores
        while self._begin(worker):
            worker.step()

    def _begin(self, worker) -> bool:
        """Start all jobs for this worker, waiting for one if it has none. False when the pool has ended."""
        while True:
            with self.changed:
                self.changed.wait_for(
                    lambda: worker.jobs or worker.calls or self._next(worker) or self.state == "closed"
                )
                job = self._next(worker)
                if job is None:
                    return bool(worker.jobs or worker.calls)
                self.waiting.remove(job)
                worker.jobs.append(job)
                self.changed.notify_all()  # others may have the least to do now
            worker.begin(job)

    def _ended(self, worker, job, why, seconds):
        outcome = "completed" if why in ("stop", "length") else why
        with self.changed:
            self.totals[outcome] += 1
            self.totals["tokens"] += len(job.ids)
            worker.served += outcome == "completed"
            worker.failed += outcome == "failed"
            worker.jobs.remove(job)
            self.seconds += 0.2 * (seconds - self.seconds)
            self.changed.notify_all()
        if self.on_end:
            try:
                self.on_end(job, why)
            except Exception:  # whoever counts answers must not end them
                logger.exception("what happens after an answer failed")
