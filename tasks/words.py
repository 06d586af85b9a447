"""Lists of words for the spelling tasks."""

from collections import Counter
from zlib import crc32

import regex

from nanochat.common import UserError, atomic_write, get_base_dir, print0
from nanochat.dataset import get_data_dir, iter_documents
from nanochat.download import fetch

LARGE_LIST = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
# Lower-case letters, or letters of a script without cases; without marks, so that a letter is a character
WORD = regex.compile(r"(?<![\p{L}\p{M}\p{N}_])[\p{Ll}\p{Lo}]{3,12}(?![\p{L}\p{M}\p{N}_])")
MAX_CHARS = 30_000_000  # of training text that are read for words
MAX_WORDS = 20_000
TEST_SHARE = 10  # one word in ten


class NoWords(UserError):
    """The training text has no words to spell, or too few of them."""


def word_list(source: str) -> list[str]:
    """
    source "large": 370,000 English words (dwyl/english-words), fetched once; when that fails, the words of the training
    text, and a line that says so. source "text": the words of the training text, the most frequent first.

    Raises NoWords.
    """
    if source not in ("large", "text"):
        raise ValueError(f"expected words 'large' or 'text', got {source!r}")
    if source == "large":
        path = get_base_dir() / "words_alpha.txt"
        reason = None
        if not path.exists():
            reason = fetch(LARGE_LIST, path)
        if reason is None:
            return [word for word in path.read_text(encoding="utf-8").split() if regex.fullmatch("[a-z]+", word)]
        print0(f"spelling tasks use words of the training text: the large word list is not here ({reason})")
    path, record = get_base_dir() / "words_from_text.txt", get_data_dir() / "source.json"
    if not path.exists() or (record.exists() and record.stat().st_mtime > path.stat().st_mtime):  # of other text
        words = words_of_text(iter_documents("train"))
        with atomic_write(path, "w") as file:
            file.write("\n".join(words))
    return path.read_text(encoding="utf-8").split()


def words_of_text(batches) -> list[str]:
    """The words in batches of texts that are written in small letters, the most frequent first."""
    counts, chars = Counter(), 0
    for texts in batches:
        for text in texts:
            counts.update(WORD.findall(text))
            chars += len(text)
        if chars > MAX_CHARS:
            break
    if not counts:
        raise NoWords("expected words of 3 to 12 letters in the training text, found none")
    return sorted(counts, key=lambda word: (-counts[word], word))[:MAX_WORDS]


def split_words(words, split: str) -> list[str]:
    """The words of one split: their hash decides, so that no word of "test" is in "train"."""
    chosen = [word for word in words if (crc32(word.encode()) % TEST_SHARE == 0) == (split == "test")]
    if not chosen:
        raise NoWords(f"expected enough words for a {split} split, got {len(words)}: use more training text")
    return chosen
