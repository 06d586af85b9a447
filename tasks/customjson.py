"""Conversations from a file of one's own: one JSON array of {"role": …, "content": …} a line."""

import json
from pathlib import Path

from nanochat.common import UserError
from tasks.common import Task


class CustomJSON(Task):
    """
    The conversations of a JSONL file, checked when it is opened.

    After an optional system message, messages alternate between user and assistant, and end with the assistant.
    Raises UserError naming file and line.
    """

    def __init__(self, filepath, **slicing):
        super().__init__(**slicing)
        path = Path(filepath)
        if not path.exists():
            raise UserError(
                f"expected conversations in {path}, there is no such file: `python -m dev.gen_synthetic_data` writes"
                " identity_conversations.jsonl; or put your own there, one JSON array of {role, content} a line"
            )
        lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
        self.conversations = [_parse(line, f"{path}:{number}") for number, line in lines if line.strip()]
        if not self.conversations:
            raise UserError(f"expected conversations, one a line, {path} has none: write it again")

    def num_examples(self):
        return len(self.conversations)

    def get_example(self, index):
        return {"messages": self.conversations[index]}


def _parse(line, place) -> list[dict]:
    try:
        messages = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: expected a JSON array of messages, got broken JSON ({error}): mend it") from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{place}: expected a JSON array of messages, got {line.strip()[:80]!r}: mend it")
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(f"{place}: expected roles user, assistant, user, …, assistant, got {roles}: mend it")
    for message in messages:
        if not isinstance(message.get("content"), str) or not message["content"]:
            raise UserError(f"{place}: expected text as the content, got {message.get('content')!r}: mend it")
    return messages
