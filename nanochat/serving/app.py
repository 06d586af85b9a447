"""The application: the page, its endpoints, and what both kinds of clients share. See scripts/chat_web.py."""

import asyncio
import base64
import hashlib
import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat.common import UserError
from nanochat.markdown import render_markdown
from nanochat.serving import openai_api, schema
from nanochat.serving.job import Done, Failed, Focus, Piece
from nanochat.serving.schema import ApiError, Defaults, Limits
from nanochat.serving.service import Service
from nanochat.serving.transport import PING, EventStream, Gate, sse
from nanochat.streaming import readable

FOLDER = Path(__file__).parent.parent
OPENAI_PREFIX = "/v1"
BASE_URL = f"The base URL of OpenAI's clients ends in {OPENAI_PREFIX} here."
PUBLIC = {"/", "/logo.svg", "/health", "/openapi.json"}  # what can be read without a key
FOCUS_VIEW = "<!-- focus_view.html -->"  # where the page has that file


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


class AsciiJSON(JSONResponse):
    """ASCII: what is quoted from a request may not be Unicode text."""

    def render(self, content):
        return json.dumps(content, allow_nan=False).encode()


def _complain(status, message, code=None, param=None, headers=None):
    """The answer to a request that cannot be served, in a form that nanochat's clients and OpenAI's both read."""
    return AsciiJSON({**openai_api.error_body(status, message, code, param), "detail": message}, status, headers)


def create_app(
    pool, limits=None, defaults=None, api_key="", origins=(), page=None, logo=None, ping_seconds=10.0, body_seconds=30.0
):
    """
    The ASGI application.

    api_key: what clients must have to do more than look at the page; empty if nothing. origins: of browsers' pages
    that may ask, beside its own. page, logo: files to serve instead of nanochat's own.

    Raises UserError when a file is missing.
    """
    limits, defaults = limits or Limits(), defaults or Defaults()
    service = Service(pool, limits, defaults, ping_seconds)
    page_text, logo_text = _read(page or FOLDER / "ui.html"), _read(logo or FOLDER / "logo.svg")
    page_text = page_text.replace(FOCUS_VIEW, _read(FOLDER / "focus_view.html"))
    app = FastAPI(
        title="nanochat",
        servers=[{"url": "."}],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would not know the scheme, nor the path, of a proxy
        default_response_class=AsciiJSON,
    )

    @app.exception_handler(ApiError)
    async def on_api_error(request, error):
        return _complain(error.status, error.message, error.code, error.param, error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request, error):
        message, param = schema.explain(error.errors())
        return _complain(400, message, "invalid_value", param)

    @app.exception_handler(HTTPException)
    async def on_http_error(request, error):
        there = ", ".join(f"{OPENAI_PREFIX}{route.path}" for route in openai_router.routes)
        message = f"{request.method} {request.url.path[:80]} is not here. {BASE_URL} There are {there}."
        return _complain(error.status_code, message, "not_found", headers=error.headers)

    @app.exception_handler(Exception)
    async def on_fault(request, error):  # logged, with its traceback, by uvicorn
        return _complain(500, "the server made a mistake; its log says more")

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
        return AsciiJSON(status, 200 if ready else 503)

    @app.get("/stats")
    async def get_stats():
        return {**pool.stats(), "passed_over": dict(service.passed_over)}

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
        turns = service.conversation(body.messages)
        most = defaults.max_tokens if body.max_tokens is None else body.max_tokens
        options = {"conversation": body.conversation, "focus": bool(body.focus)}
        jobs = await service.submit(body, lambda: [service.render(turns)], most, **options)
        return EventStream(_native_stream(service, jobs), on_end=lambda: service.cancel(jobs))

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

    openai_router = openai_api.create_router(service)
    app.include_router(openai_router, prefix=OPENAI_PREFIX)
    gate = Gate(app, limits.body_bytes, _complain, body_seconds, api_key, PUBLIC)
    if not origins:
        return gate
    return CORSMiddleware(
        gate, origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=["Retry-After"]
    )


async def _native_stream(service, jobs):
    async for pair in service.events(jobs):
        match pair and pair[1]:
            case None:
                yield PING
            case Piece(kind=kind, text=text, worker=worker):
                yield sse({"token": text, "gpu": worker} | ({} if kind == "text" else {"kind": kind}))
            case Focus(state):
                yield sse({"focus": state}, event="focus")
            case Done(reason):
                yield sse({"done": True, "finish_reason": reason})
            case Failed(message):
                yield sse({"error": message})
