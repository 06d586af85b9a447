"""What a request may look like. Every limit of the server is here, and so is every complaint about a request."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TEMPERATURE = (0.0, 2.0)
TOP_K = (1, 200)
MAX_TOKENS = (1, 4096)
SEED = (0, 2**63 - 1)
RENDER_CHARS = 200_000
SHOWN_TOKENS = 256  # of a conversation, in one answer to /focus/text


@dataclass(frozen=True)
class Limits:
    """Of one conversation, in messages and characters; an assistant's message is bounded by the conversation only."""

    messages: int = 500
    message_chars: int = 8000
    conversation_chars: int = 32000

    @property
    def render_chars(self) -> int:
        """Of all texts in one /render request: more than the longest answer, and no more than is soon done."""
        return min(2 * self.conversation_chars, RENDER_CHARS)

    @property
    def body_bytes(self) -> int:
        """Of a request, before it is parsed: JSON spells a character with at most 12 bytes."""
        return 12 * max(self.conversation_chars, self.render_chars) + 256 * self.messages


@dataclass(frozen=True)
class Defaults:
    """For what a request leaves open."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512


class ApiError(Exception):
    """An answer other than 200, with a sentence for people and, for OpenAI clients, a code and the parameter."""

    def __init__(self, status, message, code=None, param=None, retry_after=None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


Temperature = Annotated[float, Field(ge=TEMPERATURE[0], le=TEMPERATURE[1], allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=TOP_K[0], le=TOP_K[1])]
MaxTokens = Annotated[int, Field(ge=MAX_TOKENS[0], le=MAX_TOKENS[1])]


class Strict(BaseModel):
    """Nothing is converted ("1" is no number) and nothing unknown is passed over."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Part(Strict):
    type: Literal["text", "python", "python_output"]
    text: str


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


# What cannot be guessed: 22 characters can hold 128 bits
ConversationId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{22,64}$")]


class ChatRequest(Strict):
    """POST /chat/completions"""

    messages: list[Message]
    temperature: Temperature | None = None
    top_k: TopK | None = None
    max_tokens: MaxTokens | None = None
    seed: Annotated[int, Field(ge=SEED[0], le=SEED[1])] | None = None
    conversation: ConversationId | None = None
    focus: bool | None = None


class FocusRequest(Strict):
    """POST /focus"""

    conversation: ConversationId


class TextRequest(FocusRequest):
    """POST /focus/text: tokens from `start` on, `end` not included."""

    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=0)]


class RenderRequest(Strict):
    """POST /render"""

    texts: list[str]


def check_conversation(messages: list[dict], limits: Limits):
    """ApiError (400) unless these {"role", "content"} are a conversation that the assistant is to go on with."""

    def refuse(message):
        raise ApiError(400, message, code="invalid_messages", param="messages")

    if not messages:
        refuse("messages is empty: expected at least one message, by the user")
    if len(messages) > limits.messages:
        refuse(f"too many messages: at most {limits.messages} are taken, got {len(messages)}. Start a new chat")
    total = 0
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    first = len(messages) - len(turns)
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role != "assistant" and not isinstance(content, str):
            refuse(f"messages.{i}.content: expected a string, for only the assistant's messages have parts")
        chars = len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
        if role != "assistant":  # the assistant may have said nothing, and may have been long
            if not content.strip():
                refuse(f"messages.{i}.content is empty")
            if chars > limits.message_chars:
                refuse(f"messages.{i}.content is too long: at most {limits.message_chars} characters, got {chars}")
        total += chars
        expected = "system" if i < first else "user" if (i - first) % 2 == 0 else "assistant"
        if role != expected:
            refuse(
                f"messages.{i}.role: expected {expected!r}, got {role!r}. User and assistant take turns, "
                "beginning with the user; one system message may come first"
            )
    if messages[-1]["role"] != "user":
        refuse(f"the last message must be the user's, got {messages[-1]['role']!r}")
    if total > limits.conversation_chars:
        refuse(
            f"the conversation is too long: at most {limits.conversation_chars} characters in all, got {total}. "
            "Start a new chat"
        )


def check_texts(texts: list[str], limits: Limits):
    """ApiError (400) unless these may be rendered in one request."""
    if len(texts) > limits.messages:
        raise ApiError(400, f"too many texts: at most {limits.messages} are taken, got {len(texts)}", param="texts")
    total = sum(map(len, texts))
    if total > limits.render_chars:
        raise ApiError(
            400, f"texts are too long: at most {limits.render_chars} characters in all, got {total}", param="texts"
        )


def room(prompt_tokens: int, max_tokens: int, context_length: int | None, fits: bool = True) -> int:
    """
    How many tokens may be generated after a prompt. ApiError (400) if there is no room for any.

    context_length: of prompt and answer together, None where sessions summarize what is old. fits: whether a
    session can hold the prompt.

    The one place that knows that a context is finite.
    """
    if not fits:
        raise ApiError(
            400,
            f"the conversation has {prompt_tokens} tokens, too many even for summaries of them to fit into this "
            "server's working context: start a new chat",
            code="context_length_exceeded",
            param="messages",
        )
    if context_length is None:
        return max_tokens
    if prompt_tokens >= context_length:
        raise ApiError(
            400,
            f"the conversation has {prompt_tokens} tokens and this model's context holds {context_length}, the answer "
            "included: start a new chat or shorten the messages",
            code="context_length_exceeded",
            param="messages",
        )
    return min(max_tokens, context_length - prompt_tokens)


def explain(errors: list[dict]) -> tuple[str, str | None]:
    """(sentence, parameter) of the first of pydantic's errors that helps."""
    # Of a list that may also be a string, the complaints are about the list
    error = next((e for e in errors if e["type"] != "string_type" or not isinstance(e["input"], list)), errors[0])
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']}", None
    # Without the body itself and the branches of a union, such as "list[Part]"
    names = [str(part) for part in error["loc"] if part not in ("body", "str") and re.fullmatch(r"\w+", str(part))]
    value, where = error.get("input"), ".".join(names)
    simple = value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 40)
    got = f", got {value!r}"[:60] if simple and error["type"] not in ("missing", "extra_forbidden") else ""
    return f"{where or 'body'}: {error['msg']}{got}", where or None
