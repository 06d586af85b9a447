"""The application: the page, its endpoints, and what both kinds of clients share. See scripts/chat_web.py."""

import asyncio
import base64
import hashlib
import json
import secrets
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from nanochat.common import UserError
from nanochat.markdown import render_markdown
from nanochat.sampling import Sampling
from nanochat.serving import openai_api, schema
from nanochat.serving.job import Done, Failed, Focus, Job, Piece
from nanochat.serving.schema import ApiError, Defaults, Limits
from nanochat.serving.transport import PING, EventStream, Gate, next_or_none, sse
from nanochat.serving.worker_pool import Unavailable, WorkerPool
from nanochat.streaming import readable

FOLDER = Path(__file__).parent.parent
OPENAI_PREFIX = "/v1"
FOCUS_VIEW = "<!-- focus_view.html -->"  # where the page has that file


@dataclass(frozen=True)
class Service:
    """What a request needs to become a job; both APIs go through `submit`."""

    pool: WorkerPool
    limits: Limits
    defaults: Defaults
    ping_seconds: float = 10.0

    async def submit(
        self,
        messages,
        temperature=None,
        top_k=None,
        max_tokens=None,
        seed=None,
        stop=(),
        conversation=None,
        focus=None,
    ) -> Job:
        """A queued job for these messages ({"role", "content"}). Raises ApiError."""

        def prompt():
            return self.pool.tokenizer.render_for_completion({"messages": messages})

        def choice(value, default):
            return default if value is None else value

        try:
            self.pool.check_open()
            schema.check_conversation(messages, self.limits)
            ids = await asyncio.to_thread(prompt)
            max_tokens = choice(max_tokens, self.defaults.max_tokens)
            sessions = self.pool.sessions
            fits = not sessions or sessions[0].fits(len(ids))
            job = Job(
                prompt=ids,
                max_tokens=schema.room(len(ids), max_tokens, None if sessions else self.pool.context_length, fits),
                sampling=Sampling(
                    temperature=choice(temperature, self.defaults.temperature),
                    top_k=choice(top_k, self.defaults.top_k),
                    seed=secrets.randbelow(schema.SEED[1]) if seed is None else seed,
                ),
                stop=list(stop),
                conversation=conversation,
                focus=bool(focus),
            )
            self.pool.submit(job)
        except Unavailable as error:
            raise ApiError(503, str(error), code="unavailable", retry_after=error.retry_after) from error
        return job

    async def next_event(self, job):
        """What becomes of a job: a Piece, Done or Failed, or None when nothing has happened for a while."""
        pair = await next_or_none(job.events, self.ping_seconds)
        return pair and pair[1]

    def sessions_of(self, conversation):
        """The Sessions of the worker that answered in a conversation last. ApiError (404) where none are kept."""
        if not self.pool.sessions:
            raise ApiError(404, "this server keeps no sessions: it runs without --mc")
        return max(self.pool.sessions, key=lambda sessions: sessions.last_used(conversation))

    def model(self):
        """The ServedModel. ApiError (503) while there is none."""
        try:
            self.pool.check_ready()
        except Unavailable as error:
            raise ApiError(503, str(error), code="unavailable", retry_after=error.retry_after) from error
        return self.pool.model


class _Inline(HTMLParser):
    """Collects the contents of <script> and <style> elements."""

    def __init__(self, page):
        super().__init__()
        self.found = {"script": [], "style": []}
        self.open = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag in self.found and not dict(attrs).get("src"):
            self.open = tag
            self.found[tag].append("")

    def handle_data(self, data):
        if self.open:
            self.found[self.open][-1] += data

    def handle_endtag(self, tag):
        if tag == self.open:
            self.open = None


def content_security_policy(page: str) -> str:
    """A policy under which exactly the scripts and styles that are written in this page run, and nothing else."""

    def sources(texts):
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        return " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"

    inline = _Inline(page).found
    return (
        f"default-src 'none'; script-src {sources(inline['script'])}; style-src {sources(inline['style'])}; "
        "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _read(path):
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the page's file {path} ({error}): restore it from the repository") from error


def _complain(path, status, message, code=None, param=None, headers=None):
    """The answer to a request that cannot be served, in the form that this path's clients know."""
    if path.startswith(OPENAI_PREFIX):
        content = openai_api.error_body(status, message, code, param)
    else:
        content = {"detail": message}
    # ASCII: what is quoted from a request may not be Unicode text
    return Response(json.dumps(content), status, headers, media_type="application/json")


def create_app(pool, limits=None, defaults=None, page=None, logo=None, ping_seconds=10.0, body_seconds=30.0):
    """
    The ASGI application. page, logo: files to serve instead of nanochat's own.

    Raises UserError when a file is missing.
    """
    limits, defaults = limits or Limits(), defaults or Defaults()
    service = Service(pool, limits, defaults, ping_seconds)
    page_text, logo_text = _read(page or FOLDER / "ui.html"), _read(logo or FOLDER / "logo.svg")
    page_text = page_text.replace(FOCUS_VIEW, _read(FOLDER / "focus_view.html"))
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def on_api_error(request, error):
        return _complain(request.url.path, error.status, error.message, error.code, error.param, error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request, error):
        message, param = schema.explain(error.errors())
        return _complain(request.url.path, 400, message, "invalid_value", param)

    @app.exception_handler(HTTPException)
    async def on_http_error(request, error):
        return _complain(request.url.path, error.status_code, error.detail, headers=error.headers)

    @app.exception_handler(Exception)
    async def on_fault(request, error):  # logged, with its traceback, by uvicorn
        return _complain(request.url.path, 500, "the server made a mistake; its log says more")

    page_headers = {"Content-Security-Policy": content_security_policy(page_text), "Cache-Control": "no-cache"}

    @app.get("/")
    async def index():
        return Response(page_text, media_type="text/html", headers=page_headers)

    @app.get("/logo.svg")
    async def get_logo():
        style = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(logo_text, media_type="image/svg+xml", headers=style)

    @app.get("/health")
    async def health():
        stats = pool.stats()
        ready = stats["state"] == "ready"
        status = {
            "status": "ok" if ready else stats["state"],
            "ready": ready,
            "num_gpus": len(stats["workers"]),
            "available_workers": stats["available_workers"],
        }
        return JSONResponse(status, 200 if ready else 503)

    @app.get("/stats")
    async def get_stats():
        return pool.stats()

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
        job = await service.submit(**body.model_dump())
        return EventStream(_native_stream(service, job), on_end=lambda: pool.cancel(job))

    @app.post("/focus")
    async def focus(body: schema.FocusRequest):
        return {"focus": service.sessions_of(body.conversation).focus(body.conversation)}

    @app.post("/focus/text")
    async def focus_text(body: schema.TextRequest):
        end = min(body.end, body.start + schema.SHOWN_TOKENS)
        ids = service.sessions_of(body.conversation).tokens(body.conversation, body.start, end)
        return {"text": None if ids is None else readable(pool.tokenizer, ids)}

    rendering = asyncio.Semaphore(1)  # it holds the interpreter, which the workers need too

    @app.post("/render")
    async def render(body: schema.RenderRequest):
        schema.check_texts(body.texts, limits)
        async with rendering:
            return {"html": [await asyncio.to_thread(render_markdown, text) for text in body.texts]}

    app.include_router(openai_api.create_router(service), prefix=OPENAI_PREFIX)
    return Gate(app, limits.body_bytes, _complain, body_seconds)


async def _native_stream(service, job):
    while True:
        match await service.next_event(job):
            case None:
                yield PING
            case Piece(kind=kind, text=text, worker=worker):
                yield sse({"token": text, "gpu": worker} | ({} if kind == "text" else {"kind": kind}))
            case Focus(state):
                yield sse({"focus": state}, event="focus")
            case Done(reason):
                yield sse({"done": True, "finish_reason": reason})
                return
            case Failed(message):
                yield sse({"error": message})
                return
