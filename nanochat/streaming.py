"""Convert generated token ids to displayable text: whole characters, with tool calls and their results separated."""

import codecs
from itertools import groupby

from nanochat.tokenizer import PART_TOKENS

# token that begins a part → (type of the part, token that ends it)
PARTS = {start: (kind, end) for kind, (start, end, _) in PART_TOKENS.items() if start}


class Parts:
    """
    Converts the ids of an assistant's turn to (type, text) pieces, one id at a time.

    type: "text", "python" or "python_output". Bytes of an incomplete character wait until it is complete; at the end of
    a part they become "\\ufffd". Unexpected special tokens are left out.
    kind: the type of the current part; ended: whether the turn is over.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.ends = tokenizer, tokenizer.turn_ends
        self.special = {tokenizer.encode_special(token): token for token in tokenizer.get_special_tokens()}
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.kind, self.closing, self.ended = "text", None, False

    def push(self, id) -> list[tuple[str, str]]:
        """The pieces that this id completes."""
        token, self.ended = self.special.get(id), id in self.ends
        if token is None and not self.ended:
            text = self.decoder.decode(self.tokenizer.id_to_bytes(id))
            return [(self.kind, text)] if text else []
        if not (self.ended or token in PARTS or token == self.closing):
            return []
        rest = self.close()
        self.decoder.reset()
        self.kind, self.closing = PARTS.get(token, ("text", None))
        return rest

    def close(self) -> list[tuple[str, str]]:
        """The rest, at the end of the ids."""
        rest = self.decoder.decode(b"", final=True)
        return [(self.kind, rest)] if rest else []


def stream_parts(tokenizer, columns):
    """Yield the (type, text) pieces of the first row of `Engine.generate`, up to the end of the turn."""
    parts = Parts(tokenizer)
    for column, _ in columns:
        yield from parts.push(column[0])
        if parts.ended:
            return
    yield from parts.close()


SPEAKERS = {"<|user_start|>": "You: ", "<|assistant_start|>": "Answer: ", "<|output_start|>": " = "}


def readable(tokenizer, ids):
    """Part of a conversation as text: speakers are named in words, other special tokens become spaces."""
    special = {tokenizer.encode_special(token): token for token in tokenizer.get_special_tokens()}
    pieces = []
    for is_special, group in groupby(ids, special.__contains__):
        if is_special:
            pieces += [SPEAKERS.get(special[id], " ") for id in group]
        else:  # characters that are cut at the edges are left out
            pieces.append(b"".join(map(tokenizer.id_to_bytes, group)).decode("utf-8", errors="ignore"))
    return "".join(pieces).strip()


def join_parts(pieces):
    """The content of an assistant's message from (type, text) pieces: a str, or a list of parts if it has tools."""
    parts = []
    for kind, text in pieces:
        if parts and parts[-1]["type"] == kind:
            parts[-1]["text"] += text
        else:
            parts.append({"type": kind, "text": text})
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
