"""
`/v1/chat/completions` and `/v1/models`, as OpenAI's clients speak.

What cannot be honoured is refused unless it has its neutral value (n = 1, top_p = 1, no tools, …); what cannot
change an answer (user, metadata, …) is passed over. top_k is taken in addition. The model's own tool calls and
their results stay out of `content`: clients see the answer only (their tokens are counted in `usage`).
"""

import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator

from nanochat.serving.job import Done, Failed, Piece
from nanochat.serving.schema import ApiError, MaxTokens, Strict, Temperature, TopK
from nanochat.serving.transport import PING, EventStream, sse, unless_gone

STOP_CHARS = 200  # of one stop string
NEUTRAL = {  # parameter → the values that ask for nothing we cannot do
    "n": (1,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
IGNORED = {  # these cannot change an answer
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
}


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class OpenAIMessage(BaseModel):
    """Clients send back messages as they got them, with more fields; those that mean something must be empty."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    tool_calls: Annotated[list, Field(max_length=0)] | None = None
    function_call: None = None

    def as_ours(self) -> dict:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class CompletionRequest(Strict):
    model_config = ConfigDict(extra="allow")  # judged by `check_extra`

    model: str
    messages: list[OpenAIMessage]
    temperature: Temperature | None = None
    top_k: TopK | None = None
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None  # OpenAI's newer name of the same
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def as_list(cls, stop):
        stop = [stop] if isinstance(stop, str) else stop or []
        if not all(0 < len(text) <= STOP_CHARS for text in stop):
            raise ValueError(f"a stop string has 1 to {STOP_CHARS} characters")
        return stop

    def check_extra(self):
        for name, value in self.model_extra.items():
            if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
                continue
            if name in NEUTRAL:
                neutral = " or ".join(map(repr, NEUTRAL[name]))
                raise ApiError(400, f"{name}: only {neutral} is supported", "unsupported_value", name)
            raise ApiError(400, f"{name[:60]}: unknown parameter", "unknown_parameter", name[:60])
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options: only allowed with stream", "invalid_value", "stream_options")


def error_body(status, message, code=None, param=None) -> dict[str, Any]:
    """{"error": …} as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def create_router(service):
    router = APIRouter()
    created = int(time.time())

    def card(model):
        return {"id": model.id, "object": "model", "created": created, "owned_by": "nanochat"}

    def known(name):
        model = service.model()
        if name != model.id:
            raise ApiError(404, f"there is no model {name[:60]!r} here, only {model.id!r}", "model_not_found", "model")
        return model

    @router.get("/models")
    async def models():
        return {"object": "list", "data": [card(service.model())]}

    @router.get("/models/{name}")
    async def one_model(name: str):
        return card(known(name))

    @router.post("/chat/completions")
    async def complete(body: CompletionRequest, request: Request):
        body.check_extra()
        model = known(body.model)
        messages = [message.as_ours() for message in body.messages]
        seed = None if body.seed is None else body.seed % 2**63
        max_tokens = body.max_completion_tokens or body.max_tokens
        job = await service.submit(messages, body.temperature, body.top_k, max_tokens, seed, body.stop or [])
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.id}
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(_stream(service, job, head, with_usage), on_end=lambda: service.pool.cancel(job))
        try:
            return await unless_gone(request.receive, _collect(service, job, head))
        finally:
            service.pool.cancel(job)

    return router


def _usage(job):
    prompt = len(job.prompt)
    return {"prompt_tokens": prompt, "completion_tokens": job.tokens, "total_tokens": prompt + job.tokens}


async def _collect(service, job, head):
    text = ""
    while True:
        match await service.next_event(job):
            case Piece(kind="text", text=more):
                text += more
            case Done(reason):
                message = {"role": "assistant", "content": text, "refusal": None}
                choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
                return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(job)}
            case Failed(reason):
                raise ApiError(500, reason)


async def _stream(service, job, head, with_usage):
    head = {**head, "object": "chat.completion.chunk"}
    extra = {"usage": None} if with_usage else {}

    def chunk(delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sse({**head, "choices": [choice], **extra})

    yield chunk({"role": "assistant", "content": ""})
    while True:
        match await service.next_event(job):
            case Piece(kind="text", text=text):
                yield chunk({"content": text})
            case Piece() | None:
                yield PING
            case Done(reason):
                yield chunk({}, reason)
                if with_usage:
                    yield sse({**head, "choices": [], "usage": _usage(job)})
                break
            case Failed(message):
                yield sse(error_body(500, message))
                break
    yield b"data: [DONE]\n\n"
