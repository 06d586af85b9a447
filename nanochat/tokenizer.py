"""
The tokenizer: byte-pair encoding in the style of GPT-4, with special tokens for chats and tool calls.

Trained by our `rustbpe`, run by tiktoken. The chat format is defined here only, from conversations to ids and from ids
to text; models of transformers have others, see pretrained.py.
"""

import base64
import codecs
import hashlib
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
import tiktoken
import torch

import rustbpe
from nanochat.common import UserError, atomic_write, encodable, get_base_dir

SPECIAL_TOKENS = [
    "<|bos|>",  # at the beginning of each document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls a tool
    "<|python_end|>",
    "<|output_start|>",  # the tool's result
    "<|output_end|>",
]

# GPT-4's pattern, but with numbers split after two digits instead of three: three-digit tokens would waste a small
# vocabulary. `rustbpe` knows it and runs a faster form of it.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s+"""
)

# Unicode white space without line ends. In patterns like GPT-4's, a run of it that is not followed by a line end is a
# word of its own, except for its last character.
BLANKS = re.compile(r"[\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
LONG_RUN = 100_000  # characters; tiktoken's regular expressions fail at several times as many

BPE_FILE = "bpe.json"  # our format: plain data without code
PICKLE_FILE = "tokenizer.pkl"  # nanochat's format
BYTES_FILE = "token_bytes.pt"


class ChatTokenizer:
    """What all tokenizers have: encoding of batches, and the chat format."""

    def get_bos_token_id(self) -> int:
        return self.encode_special("<|bos|>")

    @property
    def turn_ends(self) -> frozenset[int]:
        """Ids that end the assistant's turn: <|assistant_end|>, and <|bos|>, with which another document begins."""
        return frozenset((self.encode_special("<|assistant_end|>"), self.get_bos_token_id()))

    @cached_property
    def special_ids(self) -> dict[int, str]:
        """The ids of the special tokens, with their names."""
        return {self.encode_special(token): token for token in self.get_special_tokens()}

    def _as_id(self, token) -> int:
        return token if isinstance(token, int) else self.encode_special(token)

    def encode(self, text, prepend=None, append=None, num_threads=8):
        """
        Token ids of a str, or a list of such lists for a list of str. The names of special tokens in a text are
        encoded as ordinary text. prepend, append: an id or the name of a special token, to put around each text.
        """
        if not isinstance(text, str | list):
            raise TypeError(f"encode takes a str or a list of str, got {type(text).__name__}")
        before = [] if prepend is None else [self._as_id(prepend)]
        after = [] if append is None else [self._as_id(append)]
        if isinstance(text, str):
            return [*before, *self._encode(text), *after]
        return [[*before, *ids, *after] for ids in self._encode_batch(text, num_threads)]

    def __call__(self, *args, **kwargs):
        return self.encode(*args, **kwargs)

    def decode_bytes(self, ids) -> bytes:
        return b"".join(map(self.id_to_bytes, ids))

    def render_conversation(self, conversation, max_tokens=2048):
        """
        A chat as (ids, mask): mask 1 on the tokens that the assistant must produce, 0 elsewhere. Cut at max_tokens.

        conversation: {"messages": [{"role": …, "content": str or list of parts}, …]}, alternating between user and
        assistant, with an optional system message first, which is merged into the first user message. A part is
        {"type": "text" | "python" | "python_output", "text": str}; only assistants have parts. An assistant's message
        of weight 0 need not be produced.
        """
        ids, mask = [self.get_bos_token_id()], [0]

        def add(before, text, after, trained):
            tokens = self.encode(text, prepend=before, append=after)
            ids.extend(tokens)
            mask.extend([trained] * len(tokens))

        for message in _checked_messages(conversation):
            content = message["content"]
            if message["role"] == "user":
                add("<|user_start|>", content, "<|user_end|>", 0)
                continue
            produced = message.get("weight", 1)
            add("<|assistant_start|>", "", None, 0)
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                before, after, trained = PART_TOKENS[part["type"]]
                add(before, part["text"], after, trained * produced)
            add(None, "", "<|assistant_end|>", produced)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation):
        """Ids of a chat up to the assistant's next message; a final message by the assistant is left out."""
        messages = conversation["messages"]
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("expected a user message for the assistant to answer, got none")
        return self._with_turn_begun(messages)

    def _with_turn_begun(self, messages):
        ids, _ = self.render_conversation({"messages": messages}, max_tokens=None)
        return [*ids, self.encode_special("<|assistant_start|>")]


# part type → (token before, token after, mask). The assistant does not produce the tool's output.
PART_TOKENS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def _checked_messages(conversation):
    """The messages with a system message merged into the first user message; ValueError if they are malformed."""
    messages = conversation["messages"]
    if messages and messages[0]["role"] == "system":
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise ValueError("expected a user message after the system message")
        first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        messages = [first, *messages[2:]]
    if not messages:
        raise ValueError("expected at least one message, got none")
    for i, message in enumerate(messages):
        expected = "user" if i % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise ValueError(f"message {i}: expected role {expected!r}, got {message['role']!r}")
        content = message["content"]
        if expected == "user" and not isinstance(content, str):
            raise ValueError(f"message {i}: a user's content is a str, got {type(content).__name__}")
        for part in content if isinstance(content, list) else []:
            if part["type"] not in PART_TOKENS:
                raise ValueError(f"message {i}: part type is one of {list(PART_TOKENS)}, got {part['type']!r}")
    return messages


# ---------------------------------------------------------------------------------------------------------
# And back: ids as text to be shown


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
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.kind, self.closing, self.ended = "text", None, False

    def push(self, id) -> list[tuple[str, str]]:
        """The pieces that this id completes."""
        token, self.ended = self.tokenizer.special_ids.get(id), id in self.ends
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
    special, pieces = tokenizer.special_ids, []
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


# ---------------------------------------------------------------------------------------------------------


class RustBPETokenizer(ChatTokenizer):
    """Merges learned by `rustbpe`, applied by tiktoken."""

    def __init__(self, enc: tiktoken.Encoding, bos_token="<|bos|>"):
        self.enc = enc
        self.bos_token = bos_token

    @classmethod
    def from_ranks(cls, pattern, mergeable_ranks):
        """mergeable_ranks: {bytes: rank}. The special tokens get the ids after the last merge, in order."""
        specials = {token: len(mergeable_ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        return cls(
            tiktoken.Encoding("rustbpe", pat_str=pattern, mergeable_ranks=mergeable_ranks, special_tokens=specials)
        )

    @classmethod
    def train_from_iterator(cls, text_iterator, vocab_size, progress=None):
        """vocab_size counts bytes, merges and special tokens. progress(stage, done, total) is called repeatedly."""
        merges_and_bytes = vocab_size - len(SPECIAL_TOKENS)
        if merges_and_bytes < 256:
            raise UserError(
                f"vocab_size must be at least {256 + len(SPECIAL_TOKENS)} (the bytes and the special tokens), "
                f"got {vocab_size}"
            )
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(text_iterator, merges_and_bytes, pattern=SPLIT_PATTERN, progress=progress)
        return cls.from_ranks(trainer.get_pattern(), dict(trainer.get_mergeable_ranks()))

    @classmethod
    def from_pretrained(cls, name):
        """One of the encodings that tiktoken has, such as "gpt2" or "cl100k_base"."""
        return cls(tiktoken.get_encoding(name), bos_token="<|endoftext|>")

    @classmethod
    def from_directory(cls, folder):
        """From bpe.json or nanochat's tokenizer.pkl. No code in these files is run."""
        folder = Path(folder)
        if (folder / BPE_FILE).exists():
            name, pattern, ranks, specials = _read_bpe_json(folder / BPE_FILE)
        elif (folder / PICKLE_FILE).exists():
            name, pattern, ranks, specials = _read_encoding_pickle(folder / PICKLE_FILE)
        else:
            raise UserError(
                f"no tokenizer in {folder} (expected {BPE_FILE} or {PICKLE_FILE}): run python -m scripts.tok_train"
            )
        try:
            return cls(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials))
        except ValueError as error:
            raise UserError(
                f"the tokenizer in {folder} has an invalid split pattern ({error}): get it again"
            ) from error

    def save(self, folder):
        """Write bpe.json, and tokenizer.pkl for nanochat."""
        folder, enc = Path(folder), self.enc
        ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
        data = {
            "name": enc.name,
            "pattern": enc._pat_str,
            "special_tokens": enc._special_tokens,
            "tokens": [base64.b64encode(token).decode() for token, _ in ranks],
        }
        with atomic_write(folder / PICKLE_FILE) as file:
            pickle.dump(enc, file)
        with atomic_write(folder / BPE_FILE, "w") as file:
            json.dump(data, file, ensure_ascii=False)

    def checksum(self) -> str:
        """SHA-256 of the split pattern, the merges and the special tokens: equal for equal encodings."""
        ranks, specials = self.enc._mergeable_ranks, self.enc._special_tokens
        parts = [self.enc._pat_str, sorted(ranks.items(), key=lambda item: item[1]), sorted(specials.items())]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def get_vocab_size(self) -> int:
        return self.enc.n_vocab

    def get_special_tokens(self) -> set[str]:
        return self.enc.special_tokens_set

    def id_to_bytes(self, token_id) -> bytes:
        """The raw bytes of one token, which can be a part of a character."""
        return self.enc.decode_single_token_bytes(token_id)

    @lru_cache(maxsize=64)  # noqa: B019 (a tokenizer lives as long as the program)
    def encode_special(self, token) -> int:
        return self.enc.encode_single_token(token)

    def get_bos_token_id(self) -> int:
        return self.encode_special(self.bos_token)

    def _encode(self, text):
        return self._ids(text).tolist()

    def _encode_batch(self, texts, num_threads):
        return [ids.tolist() for ids in self.encode_to_numpy(texts, num_threads)]

    def encode_to_numpy(self, texts, num_threads=8) -> list[np.ndarray]:
        """Ids (uint32) of each text, without Python integers: several times faster than `encode`."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self._ids, texts))

    def _ids(self, text):
        try:
            return self.enc.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._ids(encodable(text))
        except ValueError:  # a run of blanks too long for tiktoken's regular expressions
            return self._ids_around_runs(text)

    def _ids_around_runs(self, text):
        """The same ids, with long runs of blanks encoded separately. Raises UserError if that is not enough."""
        ids, start, encode = [], 0, partial(self.enc.encode, disallowed_special=())
        try:
            for run in BLANKS.finditer(text):
                if run.end() - run.start() >= LONG_RUN and text[run.end() : run.end() + 1] not in ("\r", "\n"):
                    end = run.end() - (run.end() < len(text))  # the last one belongs to the word after it
                    ids += encode(text[start : run.start()])
                    ids += self.enc._encode_single_piece(text[run.start() : end])
                    start = end
            ids += encode(text[start:])
        except ValueError as error:
            raise UserError(
                f"expected a text that can be split into words, got one of {len(text):,} characters that begins "
                f"{text[:60]!r} ({error}): shorten its longest run of blanks, or remove the text"
            ) from error
        return np.array(ids, dtype=np.uint32)

    def encode_rendered(self, text) -> list[int]:
        """Ids of a text in which the names of special tokens are these tokens, as `decode` writes a chat."""
        return self.enc.encode(text, allowed_special="all")

    def decode(self, ids) -> str:
        return self.enc.decode(ids)

    def decode_bytes(self, ids) -> bytes:
        return self.enc.decode_bytes(ids)


def _read_bpe_json(path):
    try:
        data = json.loads(path.read_text("utf-8"))
        ranks = {base64.b64decode(token, validate=True): i for i, token in enumerate(data["tokens"])}
        if len(ranks) != len(data["tokens"]):
            raise ValueError("a token occurs twice")
        return data["name"], data["pattern"], ranks, data["special_tokens"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run python -m scripts.tok_train") from error


class _EncodingState:
    """Replaces tiktoken.Encoding while unpickling: it only stores the state."""

    state = None

    def __setstate__(self, state):
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    """Allows only the class that nanochat's tokenizer.pkl contains; any other could run code."""

    def find_class(self, module, name):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingState
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no tokenizer needs")


def _read_encoding_pickle(path):
    """(name, pattern, ranks, special tokens) of a pickled tiktoken.Encoding. UserError if it is anything else."""
    try:
        with open(path, "rb") as file:
            state = _EncodingUnpickler(file).load().state
        name, pattern = state["name"], state["pat_str"]
        ranks, specials = state["mergeable_ranks"], state["special_tokens"]
        good = (
            isinstance(name, str)
            and isinstance(pattern, str)
            and all(type(token) is bytes and type(rank) is int for token, rank in ranks.items())
            and all(type(token) is str and type(rank) is int for token, rank in specials.items())
        )
        if not good:
            raise ValueError("its fields have unexpected types")
        ids = [*ranks.values(), *specials.values()]
        if sorted(ids) != list(range(len(ids))) or any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError("its tokens are not numbered from 0 on, or lack single bytes")  # tiktoken would panic
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a pickled tiktoken.Encoding, and nothing in it was run ({error}): "
            "get the right file, or train a tokenizer with python -m scripts.tok_train"
        ) from error
    return name, pattern, ranks, specials


def byte_letters() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's): itself if printable, or another."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = (byte for byte in range(256) if byte not in seen)
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


# ---------------------------------------------------------------------------------------------------------


def get_tokenizer() -> RustBPETokenizer:
    """The tokenizer in the base folder."""
    return RustBPETokenizer.from_directory(get_base_dir() / "tokenizer")


def count_token_bytes(tokenizer: RustBPETokenizer) -> torch.Tensor:
    """Bytes of each token, int32 [vocab], counted from its raw bytes; 0 for special tokens."""
    special, V = tokenizer.special_ids, tokenizer.get_vocab_size()
    return torch.tensor([0 if i in special else len(tokenizer.id_to_bytes(i)) for i in range(V)], dtype=torch.int32)


def get_token_bytes(device="cpu") -> torch.Tensor:
    """
    Bytes of each token of the base folder's tokenizer, int32 [vocab], for bits per byte.

    Counted anew: token_bytes.pt is for nanochat, and one that nanochat wrote has wrong entries.
    """
    return count_token_bytes(get_tokenizer()).to(device)
