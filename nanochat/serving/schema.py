"""The schemas of requests, with all limits of their content and the error messages about it."""

import re
import secrets
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanochat.sampling import Sampling

TEMPERATURE = (0.0, 2.0)
TOP_K = (1, 200)
MAX_TOKENS = (1, 4096)
RENDER_CHARS = 64_000  # of all texts in one /render request: more than the longest answer
STOP_CHARS = 10_000  # of all stop strings together


@dataclass(frozen=True)
class Limits:
    """Limits of a conversation, in messages and characters; only the total limits the assistant's messages."""

    messages: int = 500
    message_chars: int = 8000
    conversation_chars: int = 32000

    @property
    def body_bytes(self) -> int:
        """Limit of a request's body before parsing: JSON encodes a character in at most 12 bytes."""
        return 12 * max(self.conversation_chars, RENDER_CHARS) + 256 * self.messages


@dataclass(frozen=True)
class Defaults:
    """Values for fields that a request omits."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512


class ApiError(Exception):
    """An answer other than 200, with a sentence for people and, for OpenAI clients, a code and the parameter."""

    def __init__(self, status, message, code=None, param=None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


# ---------------------------------------------------------------------------------------------------------
# Bodies


def number(low, high):
    return Annotated[float, Field(ge=low, le=high, allow_inf_nan=False)]


class Message(BaseModel):
    """A message as clients send it, possibly with further fields. `turns` normalizes a list of them."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[str | dict[str, Any]] | None = None


class Request(BaseModel):
    """Fields of every request for an answer. Unknown fields are ignored and counted."""

    model_config = ConfigDict(strict=True, extra="allow")
    temperature: number(*TEMPERATURE) | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    top_p: number(0, 1) | None = None
    min_p: number(0, 1) | None = None
    repetition_penalty: number(0.01, 100) | None = None
    presence_penalty: number(-2, 2) | None = None
    frequency_penalty: number(-2, 2) | None = None
    logit_bias: dict[str, number(-100, 100)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=-1)] | None = None

    def sampling(self, defaults: Defaults, vocab_size: int) -> Sampling:
        """Sampling settings of the first answer, with a random seed if none is given. Raises ApiError (400)."""
        names = {field.name for field in fields(Sampling)}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        chosen = {"temperature": defaults.temperature, "top_k": defaults.top_k, "seed": secrets.randbits(63)} | given
        chosen["top_k"] = max(0, chosen["top_k"])  # −1 means "off" too
        chosen["top_p"] = max(1e-9, chosen.get("top_p", 1.0))  # 0 means the best token only
        chosen["logit_bias"] = {}
        for key, bias in (self.logit_bias or {}).items():
            if not re.fullmatch(r"\d{1,9}", key) or int(key) >= vocab_size:
                raise ApiError(400, f"logit_bias: {key[:20]!r} is no token id below {vocab_size}", param="logit_bias")
            chosen["logit_bias"][int(key)] = bias
        return Sampling(**chosen)

    def stops(self) -> list[str]:
        """The stop strings that are not empty. Raises ApiError (400) if they are too long."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if sum(map(len, stop)) > STOP_CHARS:
            raise ApiError(400, f"stop: at most {STOP_CHARS} characters in all", param="stop")
        return [text for text in stop if text]


# What cannot be guessed: 22 characters can hold 128 bits
ConversationId = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_-]{22,64}$")]


class ChatRequest(Request):
    """POST /chat/completions"""

    messages: list[Message]
    top_k: Annotated[int, Field(ge=TOP_K[0], le=TOP_K[1])] | None = None
    max_tokens: Annotated[int, Field(ge=MAX_TOKENS[0], le=MAX_TOKENS[1])] | None = None
    conversation: ConversationId | None = None
    focus: bool | None = None


# ---------------------------------------------------------------------------------------------------------
# Conversations

TOOL_PARTS = ("python", "python_output")  # calls and results of the model's own calculator, in answers of this server
# Type of a part → its field
TEXTS = {"refusal": "refusal"} | dict.fromkeys(("text", "input_text", "output_text", *TOOL_PARTS), "text")


def turns(messages: list[Message], limits: Limits) -> list[dict]:
    """
    Normalize messages to alternating {"role": "user" or "assistant", "content"}, beginning with the user.

    All roles except the assistant's (system, developer, user, tool, function) become the user's; consecutive messages
    of one role are merged; an empty user message is inserted before a conversation that begins with the assistant's.
    Raises ApiError (400) for messages without text, with too much text, or with other content than text.
    """

    def refuse(message):
        raise ApiError(400, message, code="invalid_messages", param="messages")

    if len(messages) > limits.messages:
        refuse(f"too many messages: at most {limits.messages} are taken, got {len(messages)}. Start a new chat")
    result, total = [], 0
    for i, message in enumerate(messages):
        role = "assistant" if message.role == "assistant" else "user"
        parts = _parts(message, role, lambda text, i=i: refuse(f"messages.{i}.content: {text}"))
        chars = sum(len(part["text"]) for part in parts)
        if role == "user" and chars > limits.message_chars:  # what the assistant wrote may have been long
            refuse(f"messages.{i}.content is too long: at most {limits.message_chars} characters, got {chars}")
        total += chars
        if result and result[-1]["role"] == role:
            parts = _merged(result.pop()["content"], parts)
        result.append({"role": role, "content": parts})
    if total > limits.conversation_chars:
        refuse(
            f"the conversation is too long: at most {limits.conversation_chars} characters in all, got {total}. "
            "Start a new chat"
        )
    if not any(part["text"].strip() for turn in result for part in turn["content"]):
        refuse("messages are empty: expected at least one with text")
    if result[0]["role"] == "assistant":
        result.insert(0, {"role": "user", "content": []})
    return [{**turn, "content": _joined(turn["content"])} for turn in result]


def _merged(first, second):
    between = [{"type": "text", "text": "\n\n"}] if first and second else []
    return [*first, *between, *second]


def _parts(message, role, refuse):
    """The content of a message as a list of {"type", "text"}."""
    content = message.content
    parts = []
    for part in [content] if isinstance(content, str) else content or []:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = str(part.get("type"))
        if kind not in TEXTS:
            refuse(f"this model reads text only, got a part of type {kind!r}"[:100])
        if kind in TOOL_PARTS and role != "assistant":
            refuse("only the assistant's messages have calculator parts")
        text = part.get(TEXTS[kind])
        if not isinstance(text, str):
            refuse(f"expected a string as the text of a part, got {text!r}"[:100])
        if text or kind in TOOL_PARTS:
            parts.append({"type": kind if kind in TOOL_PARTS else "text", "text": text})
    return parts


def _joined(parts):
    """Parts as the tokenizer expects them: a string, or a list if it includes the calculator."""
    return parts if any(part["type"] in TOOL_PARTS for part in parts) else "".join(part["text"] for part in parts)


def room(prompt_tokens: int, max_tokens: int | None, context_length: int | None, fits=True, param="messages") -> int:
    """
    How many of max_tokens (None or −1: all) fit after a prompt. Raises ApiError (400) if none do.

    context_length: of prompt and answer together, None where sessions compress older tokens. fits: whether a session
    can hold the prompt. param: the name of the prompt in error messages.

    The only place that limits the length of a conversation to the context.
    """
    most = MAX_TOKENS[1] if max_tokens in (None, -1) else min(max_tokens, MAX_TOKENS[1])
    complaint = None
    if not fits:
        complaint = ", too many even for summaries of them to fit into this server's working context"
    elif context_length is not None and prompt_tokens + min(most, 1) > context_length:
        complaint = f" and this model's context holds {context_length}, the answer included"
    if complaint:
        raise ApiError(
            400,
            f"the conversation has {prompt_tokens} tokens{complaint}: start a new chat or shorten the messages",
            code="context_length_exceeded",
            param=param,
        )
    return most if context_length is None else min(most, context_length - prompt_tokens)


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
