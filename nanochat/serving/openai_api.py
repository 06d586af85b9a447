"""OpenAI's API: `/v1/chat/completions`, `/v1/completions`, `/v1/responses` and `/v1/models`."""

import time
from functools import partial

from fastapi import APIRouter, Request

from nanochat.serving.openai_format import ChatShape, Reply, TextShape
from nanochat.serving.openai_responses import ResponseReply, ResponseRequest, ResponseShape
from nanochat.serving.openai_schema import ChatCompletionRequest, CompletionRequest
from nanochat.serving.schema import ApiError

COMPLETION_TOKENS = 16  # max_tokens of /v1/completions by default, as at OpenAI


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
        turns = service.conversation(messages)
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
        options = {"param": "prompt", "logprobs": body.logprobs, "score": score}
        prompts = partial(body.prompts, service.pool.tokenizer, service.limits)
        jobs = await service.submit(body, prompts, most, body.n or 1, **options)
        echo_from = int(body.is_text) if body.echo else None
        return await Reply(service, jobs, TextShape(), model, body, echo_from).give(request)

    @router.post("/responses")
    async def respond(body: ResponseRequest, request: Request):
        body.check()
        model, conversation = known(body.model), body.conversation_name
        prompts = prompts_of(conversation, body.messages())
        options = {"param": "input", "conversation": conversation}
        jobs = await service.submit(body, prompts, body.max_output_tokens, **options)
        return await ResponseReply(service, jobs, ResponseShape(), model, body).give(request)

    return router
