"""
OpenAI's API, `/v1/chat/completions`, `/v1/completions`, `/v1/responses` and `/v1/models`: requests and endpoints.

A request is refused only if ignoring a parameter would change the meaning of the answer; other unknown parameters are
ignored and counted. Parameters that OpenAI does not have (top_k, min_p, repetition_penalty) are named as in vLLM.
"""

import time
from functools import partial
from itertools import chain
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from nanochat.serving import schema
from nanochat.serving.openai_replies import ChatShape, Reply, ResponseReply, ResponseShape, TextShape
from nanochat.serving.schema import ApiError, ConversationId, Message

COMPLETION_TOKENS = 16  # max_tokens of /v1/completions by default, as at OpenAI
TopLogprobs = Annotated[int, Field(ge=0, le=20)]

NO_GRAMMAR = "this server has no constrained decoding"
NO_TOOLS = "this model can call no tools except its own calculator"
REFUSED = {  # parameter → (values that have no effect, why other values are refused)
    "response_format": (({"type": "text"},), NO_GRAMMAR),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ((), NO_GRAMMAR)),
    **dict.fromkeys(("structured_outputs", "json_schema", "grammar"), ((), NO_GRAMMAR)),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
    "modalities": ((["text"],), "this server generates text only"),
    "audio": ((), "this server generates text only"),
    "previous_response_id": ((), "this server keeps no responses: name a conversation, or send all of it as input"),
    "suffix": (("",), "this server continues text, it does not insert"),
    "use_beam_search": ((False,), "this server samples, it has no beam search"),
}


class ConversationObject(BaseModel):
    id: ConversationId


class OpenAIRequest(schema.Request):
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    # Its secret name: what the server keeps under it comes before the messages of the request, as in /v1/responses
    conversation: ConversationId | ConversationObject | None = None

    @property
    def conversation_name(self) -> str | None:
        return getattr(self.conversation, "id", self.conversation)

    @property
    def with_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def check(self):
        """Raise ApiError (400) for parameters that are refused."""
        if self.conversation and (self.n or 1) > 1:
            raise ApiError(400, "n: a conversation goes on with one answer", "unsupported_value", "n")
        for name, (neutral, reason) in REFUSED.items():
            value = self.model_extra.get(name)
            if value is not None and value not in neutral:
                known = f": only {' or '.join(map(repr, neutral))} is supported" if neutral else ""
                raise ApiError(400, f"{name}: {reason}{known}", "unsupported_value", name)


class ChatCompletionRequest(OpenAIRequest):
    """POST /v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: Annotated[int, Field(ge=-1)] | None = None  # newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    def check(self):
        super().check()
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise ApiError(400, f"{name}: expected 1 or more, or -1 for what is left, got 0", param=name)


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    best_of: int | None = None

    def check(self):
        super().check()
        if self.best_of not in (None, self.n or 1):
            raise ApiError(
                400, "best_of must equal n: this server returns all answers that it generates", param="best_of"
            )

    @property
    def is_text(self) -> bool:
        """Whether the prompts are text, which is preceded by a <|bos|> that clients do not see."""
        return isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], str))

    def prompts(self, tokenizer, limits) -> list[list[int]]:
        """Token ids of each prompt: of text after <|bos|>, or as given. Raises ApiError (400)."""
        alone = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        prompts = [self.prompt] if alone else self.prompt
        if sum(map(len, prompts)) > limits.conversation_chars:
            raise ApiError(400, f"prompt: at most {limits.conversation_chars} characters in all", param="prompt")
        ids = [tokenizer.encode(p, prepend="<|bos|>") if isinstance(p, str) else p for p in prompts]
        if not ids or not all(ids):
            raise ApiError(400, "prompt is empty: expected text, ids, or a list of several", param="prompt")
        V = tokenizer.get_vocab_size()
        if not all(0 <= id < V for id in chain.from_iterable(ids)):
            raise ApiError(400, f"prompt: expected ids from 0 to {V - 1}", param="prompt")
        return ids


class ResponseRequest(OpenAIRequest):
    """POST /v1/responses"""

    input: str | list[Message]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: dict[str, Any] | None = None

    def check(self):
        super().check()
        if (self.text or {}).get("format") not in (None, {"type": "text"}):
            raise ApiError(400, f"text.format: {NO_GRAMMAR}", "unsupported_value", "text.format")

    def messages(self) -> list[Message]:
        before = [Message(role="system", content=self.instructions)] if self.instructions else []
        said = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [*before, *said]


def create_router(service):
    router = APIRouter()
    created = int(time.time())

    def card(model):
        return {"id": model.id, "object": "model", "created": created, "owned_by": "nanochat"}

    def known(name):
        model = service.model()
        if name not in (None, model.id):
            raise ApiError(404, f"there is no model {name[:60]!r} here, only {model.id!r}", "model_not_found", "model")
        return model

    def prompts_of(conversation, messages):
        """The function that makes the prompt of a chat: these messages, after what is kept of the conversation."""
        if conversation:
            return lambda: [service.go_on(conversation, messages)]
        turns = schema.turns(messages, service.limits)
        return lambda: [service.render(turns)]

    @router.get("/models")
    async def models():
        return {"object": "list", "data": [card(service.model())]}

    @router.get("/models/{name}")
    async def one_model(name: str):
        return card(known(name))

    @router.post("/chat/completions")
    async def complete_chat(body: ChatCompletionRequest, request: Request):
        body.check()
        model, conversation = known(body.model), body.conversation_name
        prompts = prompts_of(conversation, body.messages)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        options = {"logprobs": logprobs, "conversation": conversation}
        jobs = await service.submit(body, prompts, most, body.n or 1, **options)
        return await Reply(service, jobs, ChatShape(), model, body).give(request)

    @router.post("/completions")
    async def complete_text(body: CompletionRequest, request: Request):
        body.check()
        model, score = known(body.model), bool(body.echo) and body.logprobs is not None
        most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        echo_from = int(body.is_text) if body.echo else None
        options = {"param": "prompt", "logprobs": body.logprobs, "echo_from": echo_from, "score": score}
        prompts = partial(body.prompts, service.pool.tokenizer, service.limits)
        jobs = await service.submit(body, prompts, most, body.n or 1, **options)
        return await Reply(service, jobs, TextShape(), model, body).give(request)

    @router.post("/responses")
    async def respond(body: ResponseRequest, request: Request):
        body.check()
        model, conversation = known(body.model), body.conversation_name
        prompts = prompts_of(conversation, body.messages())
        options = {"param": "input", "conversation": conversation}
        jobs = await service.submit(body, prompts, body.max_output_tokens, **options)
        return await ResponseReply(service, jobs, ResponseShape(), model, body).give(request)

    return router
