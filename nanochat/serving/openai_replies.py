"""
The responses of OpenAI's API, whole and streamed, from the events of jobs.

The calls of the model's own calculator and their results are left out of the text, but counted in `usage`.
"""

import time
import uuid

from nanochat.serving.job import Done, Failed, Piece
from nanochat.serving.schema import ApiError
from nanochat.serving.transport import PING, EventStream, sse, unless_gone


def error_body(status, message, code=None, param=None) -> dict:
    """An error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ChatShape:
    """The JSON format of chat completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"
    first = ({"role": "assistant", "content": ""},)  # deltas at the beginning of each streamed choice

    def message(self, text):
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text):
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, tokenizer, tokens):
        def entry(id, logprob):
            raw = tokenizer.id_to_bytes(id)
            return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

        said = [token for token in tokens if token.id not in tokenizer.special_ids]
        content = [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*other) for other in token.top]} for token in said
        ]
        return {"content": content, "refusal": None}


class TextShape:
    """The JSON format of text completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"
    first = ()

    def message(self, text):
        return {"text": text}

    delta = message

    def logprobs(self, tokenizer, tokens):
        def name(id):
            raw = tokenizer.id_to_bytes(id)
            text = raw.decode("utf-8", "replace")
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if "\ufffd" in text else text

        def likeliest(token):
            return {name(id): value for id, value in [*token.top, (token.id, token.logprob)]}

        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.logprob is None else likeliest(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class Reply:
    """Builds the response to a request from the events of its jobs (n consecutive jobs per prompt)."""

    def __init__(self, service, jobs, shape, model, body):
        self.service, self.jobs, self.shape, self.body = service, jobs, shape, body
        self.tokenizer = service.pool.tokenizer
        self.head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.id}

    async def give(self, request):
        """The response, streamed if requested. The jobs are cancelled when the client disconnects."""
        if self.body.stream:
            return EventStream(self._stream(), on_end=lambda: self.service.cancel(self.jobs))
        try:
            return await unless_gone(request.receive, self._whole())
        finally:
            self.service.cancel(self.jobs)

    def _usage(self):
        prompt = sum(len(job.prompt) for job in self.jobs[:: self.body.n or 1])
        answer = sum(len(job.ids) for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _choice(self, job, content, tokens, reason):
        logprobs = None if job.logprobs is None or tokens is None else self.shape.logprobs(self.tokenizer, tokens)
        return {"index": job.index, **content, "logprobs": logprobs, "finish_reason": reason}

    async def _bits(self):
        """Yield (job, text, its Tokens or None, finish reason or None), or None for a ping. Raises ApiError."""
        async for pair in self.service.events(self.jobs):
            match pair:
                case job, Piece(kind="text", text=text, tokens=tokens):
                    yield job, text, tokens, None
                case job, Done(reason):
                    yield job, "", None, reason
                case _, Failed(message):
                    raise ApiError(500, message)
                case _:
                    yield None

    async def _whole(self):
        found = {job: ("", [], None) for job in self.jobs}
        async for bit in self._bits():
            if bit:
                job, *more = bit
                text, tokens, _ = found[job]
                found[job] = text + more[0], tokens + (more[1] or []), more[2]
        choices = [self._choice(job, self.shape.message(text), *rest) for job, (text, *rest) in found.items()]
        return {**self.head, "object": self.shape.whole, "choices": choices, "usage": self._usage()}

    async def _stream(self):
        head = {**self.head, "object": self.shape.chunk}
        extra = {"usage": None} if self.body.with_usage else {}
        try:
            for job in self.jobs:
                for delta in self.shape.first:
                    yield sse({**head, "choices": [self._choice(job, {"delta": delta}, None, None)], **extra})
            async for bit in self._bits():
                if bit is None:
                    yield PING
                    continue
                job, text, *rest = bit
                yield sse({**head, "choices": [self._choice(job, self.shape.delta(text), *rest)], **extra})
            if self.body.with_usage:
                yield sse({**head, "choices": [], "usage": self._usage()})
        except ApiError as error:
            yield sse(error_body(error.status, error.message))
        yield b"data: [DONE]\n\n"


class ResponseShape(ChatShape):
    prefix = "resp"


class ResponseReply(Reply):
    """A Reply in the format of /v1/responses."""

    def _part(self, text):
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, status, parts):
        id = self.head["id"].replace("resp", "msg")
        return {"id": id, "type": "message", "role": "assistant", "status": status, "content": parts}

    def _response(self, status, text=None):
        """The response, without output as long as there is no text."""
        usage = self._usage()
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "model": self.head["model"],
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [] if text is None else [self._item(status, [self._part(text)])],
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "usage": None
            if text is None
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    async def _whole(self):
        *_, response = [event async for event in self._events() if event]
        return response["response"]

    async def _events(self):
        """Yield the events of the response, the last one with all of it; None for a ping. Raises ApiError."""
        place = {"item_id": self._item("", [])["id"], "output_index": 0, "content_index": 0}
        for status in ("created", "in_progress"):
            yield {"type": f"response.{status}", "response": self._response("in_progress")}
        yield {"type": "response.output_item.added", "output_index": 0, "item": self._item("in_progress", [])}
        yield {"type": "response.content_part.added", **place, "part": self._part("")}
        said, status = "", "incomplete"
        async for bit in self._bits():
            if bit is None:
                yield None
                continue
            _, text, _, reason = bit
            said += text
            status = "completed" if reason == "stop" else "incomplete"
            if text:
                yield {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []}
        yield {"type": "response.output_text.done", **place, "text": said, "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": self._part(said)}
        response = self._response(status, said)
        yield {"type": "response.output_item.done", "output_index": 0, "item": response["output"][0]}
        yield {"type": f"response.{status}", "response": response}

    async def _stream(self):
        number = 0
        try:
            async for event in self._events():
                yield PING if event is None else sse({**event, "sequence_number": number}, event["type"])
                number += event is not None
        except ApiError as error:
            failed = {"type": "error", "code": None, "message": error.message, "param": None}
            yield sse({**failed, "sequence_number": number}, "error")
