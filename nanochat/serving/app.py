"""The application: the page and its endpoints. See scripts/chat_web.py for their list."""

import asyncio
import json
from dataclasses import asdict
from functools import partial

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat.markdown import render_markdown
from nanochat.serving import explore, openai_api, schema
from nanochat.serving.job import Done, Failed, FocusState, Piece
from nanochat.serving.openai_format import error_body
from nanochat.serving.page import page_files
from nanochat.serving.schema import ApiError, Defaults, Limits
from nanochat.serving.service import Service
from nanochat.serving.transport import PING, EventStream, Gate, sse
from nanochat.streaming import readable

OPENAI_PREFIX = "/v1"
BASE_URL = f"For OpenAI's API, set a base URL that ends in {OPENAI_PREFIX}."


class AsciiJSON(JSONResponse):
    """JSON in ASCII: text quoted from a request may include surrogates, which cannot be encoded."""

    def render(self, content):
        return json.dumps(content, allow_nan=False).encode()


def _complain(status, message, code=None, param=None, headers=None):
    """An error response in the formats of nanochat's and of OpenAI's clients."""
    return AsciiJSON({**error_body(status, message, code, param), "detail": message}, status, headers)


def create_app(
    pool, limits=None, defaults=None, api_key="", origins=(), files=None, ping_seconds=10.0, body_seconds=30.0
):
    """
    The ASGI application.

    api_key: required for everything except the page's files and /health; empty for none. origins: origins of other web
    pages that may send requests. files: those of the page, in the format of page_files.

    Raises UserError if a file of the page is missing.
    """
    limits, defaults = limits or Limits(), defaults or Defaults()
    service = Service(pool, limits, defaults, ping_seconds)
    files = page_files() if files is None else files
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
        return _complain(error.status, error.message, error.code, error.param, error.headers)

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
        app.router.add_route(path, partial(_file, content, headers), ["GET"], include_in_schema=False)

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
        return {**pool.stats(), "ignored_parameters": dict(service.ignored)}

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
        return EventStream(_native_stream(service, jobs, most), on_end=lambda: service.cancel(jobs))

    @app.post("/focus")
    async def focus(body: schema.FocusRequest):
        return {"focus": service.sessions_of(body.conversation).focus(body.conversation)}

    @app.post("/focus/text")
    async def focus_text(body: schema.TextRequest):
        end = min(body.end, body.start + schema.SHOWN_TOKENS)
        ids = service.sessions_of(body.conversation).tokens(body.conversation, body.start, end)
        return {"text": None if ids is None else readable(pool.tokenizer, ids)}

    app.include_router(explore.create_router(service))

    @app.post("/forget")
    async def forget(body: schema.FocusRequest):
        for sessions in pool.sessions:
            await asyncio.to_thread(sessions.forget, body.conversation)
        return {}

    rendering = asyncio.Semaphore(1)  # it holds the interpreter, which the workers need too

    @app.post("/render")
    async def render(body: schema.RenderRequest):
        schema.check_texts(body.texts, limits)
        async with rendering:
            return {"html": [await asyncio.to_thread(render_markdown, text) for text in body.texts]}

    openai_router = openai_api.create_router(service)
    app.include_router(openai_router, prefix=OPENAI_PREFIX)
    gate = Gate(app, limits.body_bytes, _complain, body_seconds, api_key, {*files, "/health", "/openapi.json"})
    if not origins:
        return gate
    return CORSMiddleware(
        gate, origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=["Retry-After"]
    )


async def _file(content, headers, request):
    return Response(content, headers=headers)


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
                limit = "max_tokens" if jobs[0].tokens >= most else "context"
                yield sse({"done": True, "finish_reason": "length", "limit": limit})
            case Done(reason):
                yield sse({"done": True, "finish_reason": reason})
            case Failed(message):
                yield sse({"error": message})
