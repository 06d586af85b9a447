"""OpenAI's newer API, `/v1/responses`, for text: the same answers as /v1/chat/completions in another format."""

from typing import Annotated, Any

from pydantic import Field

from nanochat.serving.openai_format import ChatShape, Reply
from nanochat.serving.openai_schema import NO_GRAMMAR, OpenAIRequest
from nanochat.serving.schema import ApiError, Message
from nanochat.serving.transport import PING, sse

NO_MEMORY = "this server keeps no responses: name a conversation, or send all of it as input"


class ResponseRequest(OpenAIRequest):
    """POST /v1/responses"""

    input: str | list[Message]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: dict[str, Any] | None = None
    previous_response_id: str | None = None

    def check(self):
        super().check()
        if self.previous_response_id is not None:
            raise ApiError(400, f"previous_response_id: {NO_MEMORY}", "unsupported_value", "previous_response_id")
        if (self.text or {}).get("format") not in (None, {"type": "text"}):
            raise ApiError(400, f"text.format: {NO_GRAMMAR}", "unsupported_value", "text.format")

    def messages(self) -> list[Message]:
        before = [Message(role="system", content=self.instructions)] if self.instructions else []
        said = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [*before, *said]


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
