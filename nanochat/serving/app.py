"""
The ASGI application: turns requests into jobs for the workers and their events into responses; the page's endpoints.

See scripts/chat_web.py for a list of all endpoints.
"""

import asyncio
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

from fastapi import Body, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat.common import UserError
from nanochat.markdown import render_markdown
from nanochat.sampling import row_seed
from nanochat.serving import explore, openai_api, schema
from nanochat.serving.job import Done, Failed, FocusState, Job, Piece
from nanochat.serving.openai_replies import error_body
from nanochat.serving.page import page_files
from nanochat.serving.schema import ApiError, Defaults, Limits
from nanochat.serving.transport import PING, EventStream, Gate, sse
from nanochat.serving.worker_pool import Unavailable, WorkerPool

OPENAI_PREFIX = "/v1"
BASE_URL = f"For OpenAI's API, set a base URL that ends in {OPENAI_PREFIX}."
COUNTED_NAMES = 200  # of ignored parameters; further names are counted together


@dataclass(frozen=True)
class Service:
    """What the page's and OpenAI's endpoints share. Its methods raise Unavailable if the pool does."""

    pool: WorkerPool
    limits: Limits
    defaults: Defaults
    ping_seconds: float = 10.0
    ignored: Counter = field(default_factory=Counter)  # name of an unknown parameter → number of requests with it

    async def submit(self, request: schema.Request, prompts, max_tokens, n=1, param="messages", **job) -> list[Job]:
        """
        Queue n jobs for each prompt of `prompts()` (lists of ids) and return them. They share one queue of events.

        prompts is called in a thread. max_tokens: None and −1 mean all that fits. param: name of the prompt in error
        messages. job: further fields of Job. Raises ApiError or Unavailable; then none is queued.
        """
        for name in request.model_extra:
            self.ignored[name[:60] if len(self.ignored) < COUNTED_NAMES else "others"] += 1
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
        self.pool.submit(jobs)
        return jobs

    def cancel(self, jobs):
        for job in jobs:
            self.pool.cancel(job)

    async def events(self, jobs):
        """Yield (job, event) until all these jobs are done, and None after each `ping_seconds` without an event."""
        running = len(jobs)
        while running:
            try:
                async with asyncio.timeout(self.ping_seconds):
                    pair = await jobs[0].events.get()
            except TimeoutError:
                yield None
                continue
            running -= isinstance(pair[1], Done | Failed)
            yield pair

    def render(self, turns) -> list[int]:
        """Token ids of a conversation for the assistant to answer, or, if the last turn is its own, to continue."""
        conversation = {"messages": turns}
        if turns[-1]["role"] == "user":
            return self.pool.tokenizer.render_for_completion(conversation)
        return self.pool.tokenizer.render_conversation(conversation, max_tokens=None)[0][:-1]

    def go_on(self, conversation, messages) -> list[int]:
        """
        Token ids of a stored conversation with these messages appended; an unknown name begins a new one. Raises
        ApiError: 400 if the server stores none, 409 while an answer is being generated in it.
        """
        sessions = self.sessions_of(conversation) if self.pool.sessions else None
        if sessions is None or not sessions.describe().get("kept"):
            raise ApiError(
                400,
                "conversation: this server keeps none; start it with --mc --mc_tree disk, or send all messages",
                "unsupported_value",
                "conversation",
            )
        if sessions.answering(conversation):
            raise ApiError(409, "conversation: its last answer is still being made: wait for it", None, "conversation")
        said, turns = sessions.tokens(conversation, 0, 2**62), schema.turns(messages, self.limits)
        if not said:
            return self.render(turns)
        before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]  # in place of what was said
        begun, _ = self.pool.tokenizer.render_conversation({"messages": before}, max_tokens=None)
        end = begun[-1:] * (said[-1] != begun[-1])
        return said + end + self.render([*before, *turns])[len(begun) :]

    def sessions_of(self, conversation):
        """The ChatSessions of the last worker that answered in a conversation. ApiError (404) without --mc."""
        if not self.pool.sessions:
            raise ApiError(404, "this server keeps no sessions: it runs without --mc")
        return max(self.pool.sessions, key=lambda sessions: sessions.last_used(conversation))

    def model(self):
        """The ServedModel, once it is loaded."""
        self.pool.check_ready()
        return self.pool.model


class AsciiJSON(JSONResponse):
    """JSON in ASCII: text quoted from a request may include surrogates, which cannot be encoded."""

    def render(self, content):
        return json.dumps(content, allow_nan=False).encode()


def _complain(status, message, code=None, param=None, headers=None):
    """An error response in the formats of nanochat's and of OpenAI's clients."""
    return AsciiJSON({**error_body(status, message, code, param), "detail": message}, status, headers)


def create_app(pool, limits=None, defaults=None, api_key="", origins=(), ping_seconds=10.0):
    """
    The ASGI application.

    api_key: required for everything except the page's files and /health; empty for none. origins: origins of other web
    pages that may send requests.

    Raises UserError if a file of the page is missing.
    """
    limits, defaults, files = limits or Limits(), defaults or Defaults(), page_files()
    service = Service(pool, limits, defaults, ping_seconds)
    app = FastAPI(
        title="nanochat",
        servers=[{"url": "."}],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # redirects would lose the scheme and path prefix of a proxy
        default_response_class=AsciiJSON,
    )

    @app.exception_handler(ApiError)
    async def on_api_error(request, error):
        return _complain(error.status, error.message, error.code, error.param)

    @app.exception_handler(Unavailable)
    async def on_unavailable(request, error):
        return _complain(503, str(error), "unavailable", headers={"Retry-After": str(error.retry_after)})

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request, error):
        message, param = schema.explain(error.errors())
        return _complain(400, message, "invalid_value", param)

    @app.exception_handler(HTTPException)
    async def on_http_error(request, error):
        there = ", ".join(f"{OPENAI_PREFIX}{route.path}" for route in openai_router.routes)
        message = f"{request.method} {request.url.path[:80]} does not exist. {BASE_URL} It has {there}."
        return _complain(error.status_code, message, "not_found", headers=error.headers)

    @app.exception_handler(Exception)
    async def on_fault(request, error):  # logged, with its traceback, by uvicorn
        return _complain(500, "the server made a mistake; its log says more")

    for path, (content, headers) in files.items():
        app.router.add_route(path, Response(content, headers=headers), ["GET"], include_in_schema=False)

    @app.get("/health")
    async def health():
        ready = pool.state == "ready"
        status = {
            "status": "ok" if ready else pool.state,
            "ready": ready,
            "num_gpus": len(pool.workers),
            "available_workers": pool.available,
        }
        return AsciiJSON(status, 200 if ready else 503)

    @app.get("/stats")
    async def get_stats():
        return {**await asyncio.to_thread(pool.stats), "ignored_parameters": dict(service.ignored)}

    @app.get("/config")
    async def config():
        model = service.model()
        return {
            "model": model.model_tag,
            "source": model.source,
            "step": model.step,
            "context_length": pool.context_length,
            **asdict(defaults),
            "limits": {
                "messages": limits.messages,
                "message_chars": limits.message_chars,
                "conversation_chars": limits.conversation_chars,
                "temperature": schema.TEMPERATURE,
                "top_k": schema.TOP_K,
                "max_tokens": schema.MAX_TOKENS,
            },
            **({"mc": pool.sessions[0].describe()} if pool.sessions else {}),
        }

    @app.post("/chat/completions")
    async def chat(body: schema.ChatRequest):
        if "model" in body.model_extra:
            raise ApiError(404, BASE_URL, "not_found")
        turns = schema.turns(body.messages, limits)
        most = defaults.max_tokens if body.max_tokens is None else body.max_tokens
        options = {"conversation": body.conversation, "focus": bool(body.focus)}
        jobs = await service.submit(body, lambda: [service.render(turns)], most, **options)
        return EventStream(_native_stream(service, jobs, most), on_end=lambda: service.cancel(jobs))

    app.include_router(explore.create_router(service))

    @app.post("/forget")
    async def forget(conversation: explore.Name):
        if pool.sessions:
            await asyncio.to_thread(service.sessions_of(conversation).forget, conversation)
        return {}

    rendering = asyncio.Semaphore(1)  # it holds the interpreter, which the workers need too

    @app.post("/render")
    async def render(texts: Annotated[list[str], Body(embed=True, strict=True, max_length=500)]):
        if sum(map(len, texts)) > schema.RENDER_CHARS:
            raise ApiError(400, f"texts: at most {schema.RENDER_CHARS} characters in all", param="texts")
        async with rendering:
            return {"html": [await asyncio.to_thread(render_markdown, text) for text in texts]}

    openai_router = openai_api.create_router(service)
    app.include_router(openai_router, prefix=OPENAI_PREFIX)
    gate = Gate(app, limits.body_bytes, _complain, api_key, {*files, "/health", "/openapi.json"})
    if not origins:
        return gate
    return CORSMiddleware(
        gate, origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=["Retry-After"]
    )


async def _native_stream(service, jobs, most):
    """The events of one job, of which at most `most` tokens were requested."""
    async for pair in service.events(jobs):
        match pair and pair[1]:
            case None:
                yield PING
            case Piece(kind=kind, text=text, worker=worker):
                yield sse({"token": text, "gpu": worker} | ({} if kind == "text" else {"kind": kind}))
            case FocusState(state):
                yield sse({"focus": state}, event="focus")
            case Done("length"):
                limit = "max_tokens" if len(jobs[0].ids) >= most else "context"
                yield sse({"done": True, "finish_reason": "length", "limit": limit})
            case Done(reason):
                yield sse({"done": True, "finish_reason": reason})
            case Failed(message):
                yield sse({"error": message})
