"""What both APIs of the server share: turning a request into queued jobs, and reading the events of these jobs."""

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field, replace

from nanochat.common import UserError
from nanochat.sampling import row_seed
from nanochat.serving import schema
from nanochat.serving.job import Done, Failed, Job
from nanochat.serving.schema import ApiError, Defaults, Limits
from nanochat.serving.transport import next_or_none
from nanochat.serving.worker_pool import Unavailable, WorkerPool

COUNTED_NAMES = 200  # of ignored parameters; further names are counted together


@contextlib.contextmanager
def unavailable_as_503():
    try:
        yield
    except Unavailable as error:
        raise ApiError(503, str(error), code="unavailable", retry_after=error.retry_after) from error


@dataclass(frozen=True)
class Service:
    pool: WorkerPool
    limits: Limits
    defaults: Defaults
    ping_seconds: float = 10.0
    ignored: Counter = field(default_factory=Counter)  # name of an unknown parameter → number of requests with it

    async def submit(self, request: schema.Request, prompts, max_tokens, n=1, param="messages", **job) -> list[Job]:
        """
        Queue n jobs for each prompt of `prompts()` (lists of ids) and return them. They share one queue of events.

        prompts is called in a thread. max_tokens: None and −1 mean all that fits. param: name of the prompt in error
        messages. job: further fields of Job. Raises ApiError; then no job stays queued.
        """
        for name in request.model_extra:
            self.ignored[name[:60] if len(self.ignored) < COUNTED_NAMES else "others"] += 1
        with unavailable_as_503():
            self.pool.check_open()
        sampling = request.sampling(self.defaults, self.pool.tokenizer.get_vocab_size())
        stop, events, sessions = request.stops(), asyncio.Queue(), self.pool.sessions
        context = None if sessions and not job.get("score") else self.pool.context_length
        jobs = []
        try:
            prompts = await asyncio.to_thread(prompts)
        except UserError as error:  # a text that the tokenizer cannot take
            raise ApiError(400, str(error), param=param) from error
        for prompt in prompts:
            fits = not sessions or sessions[0].fits(len(prompt))
            tokens = schema.room(len(prompt), max_tokens, context, fits, param)
            for _ in range(n):
                settings = replace(sampling, seed=row_seed(sampling.seed, len(jobs)))
                jobs.append(Job(prompt, tokens, settings, stop, index=len(jobs), events=events, **job))
        if len(jobs) > self.pool.limit:
            raise ApiError(400, f"at most {self.pool.limit} answers at once: got {len(jobs)}", param="n")
        try:
            with unavailable_as_503():
                for one in jobs:
                    self.pool.submit(one)
        except ApiError:
            self.cancel(jobs)
            raise
        return jobs

    def cancel(self, jobs):
        for job in jobs:
            self.pool.cancel(job)

    async def events(self, jobs):
        """Yield (job, event) until all these jobs are done, and None after each `ping_seconds` without an event."""
        running = len(jobs)
        while running:
            pair = await next_or_none(jobs[0].events, self.ping_seconds)
            running -= pair is not None and isinstance(pair[1], Done | Failed)
            yield pair

    def conversation(self, messages) -> list[dict]:
        return schema.turns(messages, self.limits)

    def render(self, turns) -> list[int]:
        """Token ids of a conversation for the assistant to answer, or, if the last turn is its own, to continue."""
        conversation = {"messages": turns}
        if turns[-1]["role"] == "user":
            return self.pool.tokenizer.render_for_completion(conversation)
        return self.pool.tokenizer.render_conversation(conversation, max_tokens=None)[0][:-1]

    def go_on(self, conversation, messages) -> list[int]:
        """
        Token ids of a conversation that the server keeps, with these messages after what it has; a name that it does
        not know begins a new one. Raises ApiError (400) where none are kept.
        """
        sessions = self.sessions_of(conversation) if self.pool.sessions else None
        if sessions is None or not sessions.describe().get("kept"):
            raise ApiError(
                400,
                "conversation: this server keeps none; start it with --mc --mc_tree disk, or send all messages",
                "unsupported_value",
                "conversation",
            )
        said, turns = sessions.tokens(conversation, 0, 2**62), self.conversation(messages)
        if not said:
            return self.render(turns)
        before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]  # in place of what was said
        begun, _ = self.pool.tokenizer.render_conversation({"messages": before}, max_tokens=None)
        end = begun[-1:] * (said[-1] != begun[-1])
        return said + end + self.render([*before, *turns])[len(begun) :]

    def sessions_of(self, conversation):
        """The Sessions of the worker that answered in a conversation last. ApiError (404) where none are kept."""
        if not self.pool.sessions:
            raise ApiError(404, "this server keeps no sessions: it runs without --mc")
        return max(self.pool.sessions, key=lambda sessions: sessions.last_used(conversation))

    def model(self):
        """The ServedModel. ApiError (503) while there is none."""
        with unavailable_as_503():
            self.pool.check_ready()
        return self.pool.model
