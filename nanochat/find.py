"""Search for a text in tokens, however many."""

from functools import lru_cache

import numpy as np

PIECE_TOKENS = 65536  # that are made text at a time


def find_text(read, tokenizer, text, start, end):
    """
    Yields (first token, end) of each occurrence of a text that begins in tokens [start, end), ignoring the case of A–Z.

    read(start, end) -> the token ids in [start, end), fewer at the end.
    """
    needle, lengths = text.encode().lower(), _byte_lengths(tokenizer)
    for first in range(start, end, PIECE_TOKENS):
        own = min(PIECE_TOKENS, end - first)  # tokens at which a text may begin
        ids = read(first, first + own + len(needle))  # a token is one byte at the least
        if not ids:
            return
        content, ends = tokenizer.decode_bytes(ids).lower(), np.cumsum(lengths[ids])
        at = content.find(needle)
        while at >= 0:
            token, last = (int(np.searchsorted(ends, byte, side="right")) for byte in (at, at + len(needle) - 1))
            if token >= own:
                break
            yield first + token, first + last + 1
            at = content.find(needle, at + 1)


@lru_cache(maxsize=1)
def _byte_lengths(tokenizer):
    return np.array([len(tokenizer.id_to_bytes(i)) for i in range(tokenizer.get_vocab_size())])
