"""From generated ids to text as it can be shown: whole characters, tool calls and their answers told apart."""

import codecs
from itertools import groupby

PARTS = {  # a token that begins a part → (the part's type, as in a conversation; the token that ends it)
    "<|python_start|>": ("python", "<|python_end|>"),
    "<|output_start|>": ("python_output", "<|output_end|>"),
}


def stream_parts(tokenizer, columns):
    """
    Yield (type, text) of the first row of `Engine.generate`, up to the end of the assistant's turn.

    type: "text", "python" or "python_output". Bytes that are not yet a whole character wait for the rest of it;
    at the end of a part, what is left of them becomes "\\ufffd". Special tokens that do not fit are left out.
    """
    special = {tokenizer.encode_special(token): token for token in tokenizer.get_special_tokens()}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    kind, closing = "text", None
    for column, _ in columns:
        token = special.get(column[0])
        if token is None:
            text = decoder.decode(tokenizer.id_to_bytes(column[0]))
            if text:
                yield kind, text
            continue
        if token in PARTS or token == closing or token in ("<|assistant_end|>", "<|bos|>"):
            rest = decoder.decode(b"", final=True)
            if rest:
                yield kind, rest
            decoder.reset()
            kind, closing = PARTS.get(token, ("text", None))
        if token in ("<|assistant_end|>", "<|bos|>"):
            return
    rest = decoder.decode(b"", final=True)
    if rest:
        yield kind, rest


SPEAKERS = {"<|user_start|>": "You: ", "<|assistant_start|>": "Answer: ", "<|output_start|>": " = "}


def readable(tokenizer, ids):
    """Any stretch of a conversation as text: who speaks in words, other special tokens as spaces."""
    special = {tokenizer.encode_special(token): token for token in tokenizer.get_special_tokens()}
    pieces = []
    for is_special, group in groupby(ids, special.__contains__):
        if is_special:
            pieces += [SPEAKERS.get(special[id], " ") for id in group]
        else:  # characters that lie across the edges are left out
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
