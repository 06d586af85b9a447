"""A BPE trainer with nothing clever in it, as an oracle for the Rust one.

Every round counts all pairs afresh. The words are cut by the standard library's `re`, whose syntax
has possessive quantifiers since Python 3.11 but no `\\p{…}`, and whose `\\s` takes in four control
characters that Unicode does not call white space; so those classes are spelled out here.
"""

import functools
import itertools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def _category(initial: str) -> str:
    """The inside of a character class for all code points whose category begins with `initial`."""
    code_points = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] == initial]
    return "".join(f"\\U{c:08x}" for c in code_points)


@functools.cache
def _pattern() -> re.Pattern:
    letter, number, space = _category("L"), _category("N"), WHITE_SPACE
    return re.compile(
        r"'(?i:[sdmt]|ll|ve|re)"
        rf"|[^\r\n{letter}{number}]?+[{letter}]+"
        rf"|[{number}]{{1,3}}"
        rf"| ?[^{space}{letter}{number}]++[\r\n]*"
        rf"|[{space}]*[\r\n]"
        rf"|[{space}]+(?![^{space}])"
        rf"|[{space}]+"
    )


def split(text: str) -> list[str]:
    words = _pattern().findall(text)
    assert "".join(words) == text, "the default pattern leaves nothing out"
    return words


def train(texts: Iterable[str], vocab_size: int, alphabet: Sequence[int] = range(256)) -> list[bytes]:
    """The learnt tokens in order. `alphabet[i]` is the byte with id i: ids break ties."""
    tokens = [bytes([byte]) for byte in alphabet]
    id_of = {byte: i for i, byte in enumerate(alphabet)}
    words = Counter(tuple(id_of[b] for b in word.encode()) for text in texts for word in split(text))
    while len(tokens) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new_words = Counter()
        for word, count in words.items():
            new_words[merge(word, best, len(tokens))] += count
        words = new_words
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens[256:]


def merge(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """`word` with `pair` replaced by `new`, from left to right and without overlap."""
    merged, i = [], 0
    while i < len(word):
        found = word[i : i + 2] == pair
        merged.append(new if found else word[i])
        i += 2 if found else 1
    return tuple(merged)
