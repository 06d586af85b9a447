"""
Conversations from a file of one's own: one per line, or all in one JSON array, which may be spread over lines.

A conversation is an array of {"role": …, "content": …}; or, as OpenAI and ShareGPT have it, an object with such an
array under "messages" or "conversations". "from" and "value" may stand for "role" and "content", "human" for "user",
and "gpt" for "assistant". An assistant's message with "weight": 0, as OpenAI has it, is context only: finetuning does
not learn it. (Midtraining predicts every token, whoever says it.)
"""

import json
import re
from pathlib import Path

from nanochat.common import UserError
from nanochat.sources import read_text
from tasks.common import Task

SEPARATORS = re.compile(r"[\s,\]]*")
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}


class CustomJSON(Task):
    """
    The conversations of a file, checked when it is opened.

    After an optional system message, messages alternate between user and assistant, and end with the assistant.
    Raises UserError naming file and line.
    """

    def __init__(self, filepath, **slicing):
        super().__init__(**slicing)
        path = Path(filepath)
        if not path.exists():
            raise UserError(
                f"expected conversations in {path}, there is no such file: `python -m dev.gen_synthetic_data` writes"
                " identity_conversations.jsonl; or put your own there, one JSON array of {role, content} per line"
            )
        self.conversations = [_messages(value, place) for value, place in _values(read_text(path), path)]
        if not self.conversations:
            raise UserError(f"expected conversations, one per line, {path} has none: write it again")

    def num_examples(self):
        return len(self.conversations)

    def get_example(self, index):
        return {"messages": self.conversations[index]}


def _values(text, path):
    """Yield (JSON value, its file and line) of each conversation, in an array or not."""
    decoder, line, end = json.JSONDecoder(), 1, 0
    while (start := SEPARATORS.match(text, end).end()) < len(text):
        line += text.count("\n", end, start)
        place = f"{path}:{line}"
        try:
            value, after = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{place}: expected a JSON array of messages, got broken JSON ({error}): mend it"
            ) from error
        if isinstance(value, list) and value and all(isinstance(item, list) or _nested(item) for item in value):
            after = start + 1  # the array of all
        else:
            yield value, place
        line += text.count("\n", start, after)
        end = after


def _nested(value):
    return value.get("messages", value.get("conversations")) if isinstance(value, dict) else None


def _messages(value, place) -> list[dict]:
    given = _nested(value) or value
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise UserError(f"{place}: expected a JSON array of messages, got {json.dumps(value)[:80]}: mend it")
    roles = [str(message.get("role", message.get("from"))) for message in given]
    roles = [ROLES.get(role, role) for role in roles]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(f"{place}: expected roles user, assistant, user, …, assistant, got {roles}: mend it")
    messages = []
    for role, message in zip(roles, given, strict=True):
        content = message.get("content", message.get("value"))
        if not isinstance(content, str) or not content:
            raise UserError(f"{place}: expected text as the content, got {content!r}: mend it")
        messages.append({"role": role, "content": content})
        weight = message.get("weight", 1)
        if role == "assistant" and weight != 1:
            if weight != 0:
                raise UserError(f"{place}: expected a weight of 0 or 1, got {weight!r}: make it one of them")
            messages[-1]["weight"] = 0
    return messages
