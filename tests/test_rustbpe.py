"""The Rust trainer against an obvious one, Hugging Face's trainer and tiktoken's encoder."""

import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

import rustbpe
from nanochat.tokenizer import SPLIT_PATTERN
from tests import reference_bpe

DEFAULT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Few distinct characters, so that pairs repeat, tie and overlap; of each class that the pattern
# tells apart, of one to four bytes, and some that share bytes with others.
ALPHABET = "aab sS'lve12½\n\r\t!._\u00a0\u0085\u2028\u001céèſ漢字🎉🎊\u0301"
crowded_texts = st.lists(st.text(ALPHABET, max_size=40), max_size=8)
repetitive_texts = st.lists(
    st.lists(st.sampled_from(["a", "aa", "aaa", "ab", "aba", "é", "漢", " "]), max_size=12).map("".join),
    max_size=6,
)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


def train(texts, vocab_size=300, **options):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    return tokenizer


def learnt(tokenizer):
    """The tokens after the 256 bytes, in order."""
    return [token for token, _ in tokenizer.get_mergeable_ranks()[256:]]


def standard_library(*names):
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / f"{name}.py").read_text("utf-8") for name in names]


@pytest.fixture(scope="module")
def sources():
    return standard_library("argparse", "ast", "difflib", "inspect", "pickle", "subprocess", "tarfile", "typing")


# --- the merges -------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(texts=crowded_texts | repetitive_texts, vocab_size=st.integers(256, 330))
def test_merges_equal_the_reference(texts, vocab_size):
    tokenizer = train(texts, vocab_size)
    assert learnt(tokenizer) == reference_bpe.train(texts, vocab_size)


def test_merges_equal_the_reference_on_real_text(sources):
    texts = [sources[0][:30_000]]
    assert learnt(train(texts, 450)) == reference_bpe.train(texts, 450)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "expected"),
    [
        pytest.param([], 300, [], id="no texts"),
        pytest.param(["", "", ""], 300, [], id="empty texts"),
        pytest.param(["a"], 300, [], id="one byte"),
        pytest.param(["abcabc"], 256, [], id="no merges wanted"),
        pytest.param(["ab"], 257, [b"ab"], id="one merge"),
        pytest.param(["abc"], 10_000, [b"ab", b"abc"], id="more wanted than there are"),
        # Three places of (a, a) in "aaaa" but two merges; then (aa, aa).
        pytest.param(["aaaa"], 300, [b"aa", b"aaaa"], id="overlaps"),
        # "aaa" has (a, a) twice, "bc" once; the odd a stays at the end.
        pytest.param(["aaa", "bc"], 300, [b"aa", b"bc", b"aaa"], id="odd overlap"),
        # All pairs occur once: the lowest left id first, then the lowest right id.
        pytest.param(["cd", "ab", "ac"], 300, [b"ab", b"ac", b"cd"], id="ties by pair"),
        # (a, b) and (c, d) tie at two and come before (e, f); new tokens have higher ids than bytes.
        pytest.param(["cd", "ab", "ef", "cd", "ab"], 300, [b"ab", b"cd", b"ef"], id="ties below a winner"),
        pytest.param(["abz", "cd"], 300, [b"ab", b"cd", b"abz"], id="new ids sort last"),
        # é is C3 A9 and è is C3 A8: the most frequent pair cuts characters in two.
        pytest.param(
            ["éé", "éé", "è"],
            258,
            [b"\xc3\xa9", b"\xc3\xa9\xc3\xa9"],
            id="multi-byte characters",
        ),
        pytest.param(
            ["aé", "aè", "aê"],
            257,
            [b"a\xc3"],
            id="half a character",
        ),
    ],
)
def test_small_cases(texts, vocab_size, expected):
    tokenizer = train(texts, vocab_size)
    assert learnt(tokenizer) == expected == reference_bpe.train(texts, vocab_size)
    assert tokenizer.vocab_size == 256 + len(expected)


def test_ranks_begin_with_the_bytes_and_are_distinct(sources):
    ranks = train(sources, 2000).get_mergeable_ranks()
    assert ranks[:256] == [(bytes([i]), i) for i in range(256)]
    assert [rank for _, rank in ranks] == list(range(2000))
    assert len(dict(ranks)) == 2000


def test_training_again_starts_afresh():
    tokenizer = train(["abab"])
    tokenizer.train_from_iterator(["cd"], 300, pattern=r"\w+")
    assert learnt(tokenizer) == [b"cd"]
    assert tokenizer.get_pattern() == r"\w+"


# --- independence of batches and threads ------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(texts=crowded_texts, buffer_size=st.integers(1, 10))
def test_buffer_size_does_not_matter(texts, buffer_size):
    assert learnt(train(texts, 300, buffer_size=buffer_size)) == learnt(train(texts, 300))


def test_thread_count_and_hash_seeds_do_not_matter():
    # The seeds of Rust's hash tables differ between these processes without being asked to.
    script = (
        "import sys, pathlib, rustbpe\n"
        "lines = pathlib.Path(sys.argv[1]).read_text('utf-8').splitlines(keepends=True)\n"
        "tokenizer = rustbpe.Tokenizer()\n"
        "tokenizer.train_from_iterator(lines, 1500, buffer_size=int(sys.argv[2]))\n"
        "sys.stdout.write(repr(tokenizer.get_mergeable_ranks()))\n"
    )
    path = Path(sysconfig.get_paths()["stdlib"]) / "inspect.py"
    digests = set()
    for threads, buffer_size in [(1, 8192), (1, 100), (2, 8192), (3, 7), (16, 1000)]:
        run = subprocess.run(
            [sys.executable, "-c", script, path, str(buffer_size)],
            env=os.environ | {"RAYON_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            check=True,
        )
        digests.add(hashlib.sha256(run.stdout).hexdigest())
    assert len(digests) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_training_works_in_a_forked_child():
    script = (
        "import os, rustbpe\n"
        "rustbpe.Tokenizer().train_from_iterator(['ab'] * 100, 300)\n"
        "if child := os.fork():\n"
        "    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "tokenizer = rustbpe.Tokenizer()\n"
        "tokenizer.train_from_iterator(['ab'] * 100, 300)\n"
        "os._exit(0 if tokenizer.vocab_size == 257 else 1)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=20)


# --- the pattern ------------------------------------------------------------------------------------


def test_default_pattern():
    assert rustbpe.Tokenizer().get_pattern() == DEFAULT_PATTERN
    assert train(["ab"]).get_pattern() == DEFAULT_PATTERN
    assert train(["ab"], pattern=DEFAULT_PATTERN).get_pattern() == DEFAULT_PATTERN


@pytest.mark.parametrize("pattern", [DEFAULT_PATTERN, SPLIT_PATTERN], ids=["GPT-4", "ours"])
@settings(max_examples=300, deadline=None)
@given(text=any_text | st.text(ALPHABET, max_size=80))
def test_the_simplified_pattern_equals_the_pattern(pattern, text):
    # In parentheses the pattern is no longer recognized and runs as it stands. Counting
    # one text often and learning all there is shows every cut: whole words become tokens.
    regex = train([text], 2000, pattern=f"(?:{pattern})")
    assert learnt(train([text], 2000, pattern=pattern)) == learnt(regex)


@pytest.mark.parametrize("pattern", [DEFAULT_PATTERN, SPLIT_PATTERN], ids=["GPT-4", "ours"])
def test_the_simplified_pattern_knows_every_range_of_characters(pattern):
    """Both ends of each, in places where the class shows: after a letter, digit, quote, space, and before them."""
    kinds = [unicodedata.category(chr(i)) for i in range(sys.maxunicode + 1)]
    ends = {i for edge in range(1, len(kinds)) if kinds[edge - 1] != kinds[edge] for i in (edge - 1, edge)}
    characters = [chr(i) for i in sorted(ends) if kinds[i] != "Cs"]
    assert len(characters) > 4000
    texts = [f"a{c}a1{c}1'{c}!{c} {c}  {c}\n{c}12{c}34" for c in characters]
    for start in range(0, len(texts), 100):
        some = texts[start : start + 100]
        regex = train(some, 100_000, pattern=f"(?:{pattern})")
        assert learnt(train(some, 100_000, pattern=pattern)) == learnt(regex)


def test_words_are_not_merged_across():
    tokens = learnt(train(["I'll don't  x1234\n\n yes!!\n"] * 3, 1000))
    # The words whose bytes are merged entirely: of two bytes or more.
    assert {b"'ll", b" don", b"'t", b" x", b"123", b"\n\n", b" yes", b"!!\n"} <= set(tokens)
    assert not any(b"34" in token or b"n'" in token for token in tokens)


def test_custom_pattern_leaves_out_what_it_does_not_match():
    tokenizer = train(["ab-ab-ab"], 300, pattern=r"[a-z]+")
    assert learnt(tokenizer) == [b"ab"]
    assert tokenizer.encode("ab-ab") == [256, 256]
    assert learnt(train(["abab"], 300, pattern=r"")) == []


# --- other implementations --------------------------------------------------------------------------


def byte_of_character():
    """How Hugging Face writes bytes as characters: the printable ones as themselves, the rest from
    U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


# Its trainer numbers the bytes in the order of those characters.
HF_ALPHABET = [byte for _, byte in sorted(byte_of_character().items())]


def hf_train(texts, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(DEFAULT_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    byte = byte_of_character()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [bytes(byte[c] for c in left + right) for left, right in merges]


def test_merges_equal_hugging_face_where_ids_sort_alike(sources):
    # Both break ties by the ids of the pair, but number the bytes differently, so on ordinary text
    # tied merges come in another order and then differ for good. Bytes that both sort alike are
    # those that Hugging Face writes as themselves: all of them printable, so no space and no
    # newline. On text of only these the two must agree on every merge.
    alike = [byte for character, byte in byte_of_character().items() if ord(character) == byte]

    def keep(character):
        return character if set(character.encode()) <= set(alike) else {" ": "§"}.get(character, "")

    lines = [line for source in sources for line in source.splitlines()]
    texts = ["".join(map(keep, line)) for line in [*lines, "naïve café, ünïcödé"]]
    assert sum(map(len, texts)) > 300_000
    ours, theirs = learnt(train(texts, 4000)), hf_train(texts, 4000)
    assert len(ours) == 4000 - 256
    assert ours == theirs


def test_reference_equals_hugging_face_with_its_order_of_bytes(sources):
    # The other half of the argument, on ordinary text with spaces and newlines: give the reference,
    # which the Rust trainer equals, Hugging Face's numbering, and it learns the same merges.
    texts = [sources[1][:12_000], "Ça va? 漢字 漢字 🎉\n" * 5]
    assert reference_bpe.train(texts, 500, HF_ALPHABET) == hf_train(texts, 500)


@pytest.fixture(scope="module")
def trained(sources):
    return train([*sources, "Übergrößenträger 漢字 e\u0301 🎉🎊 ½ ſ'ſ"], 3000)


@pytest.fixture(scope="module")
def encoding(trained):
    return tiktoken.Encoding(
        name="test",
        pat_str=trained.get_pattern(),
        mergeable_ranks=dict(trained.get_mergeable_ranks()),
        special_tokens={},
    )


@settings(max_examples=400, deadline=None)
@given(text=any_text | st.text(ALPHABET + "def return self:()", max_size=80))
def test_tiktoken_encodes_alike(trained, encoding, text):
    tokens = trained.encode(text)
    assert tokens == encoding.encode_ordinary(text)
    assert encoding.decode(tokens) == text


def test_tiktoken_encodes_alike_on_real_text(trained, encoding, sources):
    for text in [*sources, "a" * 3000, " " * 3000, "\n" * 3000]:
        assert trained.encode(text) == encoding.encode_ordinary(text)


def test_untrained_tokenizer_encodes_bytes():
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.get_mergeable_ranks() == [(bytes([i]), i) for i in range(256)]
    assert tokenizer.encode("hé!") == list("hé!".encode())


# --- progress, interruption, threads ----------------------------------------------------------------


def slow_to_merge(length=400_000):
    """A single long word: every merge walks through most of it, seconds of work for 8,000 merges."""
    return "".join(random.Random(0).choices("abcdefghijklmnop", k=length))


def test_progress_is_reported_within_bounds():
    calls = []

    def texts():
        for _ in range(20):
            time.sleep(0.01)  # so that there is time for reports
            yield "some words to count"
        yield slow_to_merge()

    train(texts(), 1000, progress=lambda *call: calls.append((time.monotonic(), *call)))
    stages = {stage: [call for call in calls if call[1] == stage] for stage in ("count", "merge")}
    assert sum(map(len, stages.values())) == len(calls)
    assert len(stages["count"]) > 2
    assert len(stages["merge"]) > 2
    assert all(total == 0 for *_, total in stages["count"][:-1])
    assert all(total == 1000 - 256 for *_, total in stages["merge"])
    for stage, total in [("count", 21), ("merge", 1000 - 256)]:
        done = [done for _, _, done, _ in stages[stage]]
        assert done == sorted(done)
        assert stages[stage][-1][2:] == (total, total)
        times = [at for at, *_ in stages[stage][:-1]]
        assert all(after - before > 0.03 for before, after in itertools.pairwise(times))


def test_progress_ends_at_what_was_done_when_pairs_run_out():
    calls = []
    train(["abc"], 5000, progress=lambda *call: calls.append(call))
    assert calls[-2:] == [("count", 1, 1), ("merge", 2, 2)]


@pytest.mark.parametrize("stage", ["count", "merge"])
def test_what_progress_raises_ends_training(stage):
    tokenizer = train(["abab"])
    before = tokenizer.get_mergeable_ranks()

    def stop(at, done, total):
        if at == stage:
            raise KeyboardInterrupt("enough")

    with pytest.raises(KeyboardInterrupt, match="enough"):
        tokenizer.train_from_iterator(["xyxy"], 300, pattern=r"\w+", progress=stop)
    assert tokenizer.get_mergeable_ranks() == before
    assert tokenizer.get_pattern() == DEFAULT_PATTERN


def test_what_the_iterator_raises_ends_training():
    def texts():
        yield "xyxy"
        raise LookupError("no more shards")

    tokenizer = train(["abab"])
    with pytest.raises(LookupError, match="no more shards"):
        tokenizer.train_from_iterator(texts(), 300)
    assert learnt(tokenizer) == [b"ab", b"abab"]


def test_the_tokenizer_is_usable_while_it_is_trained():
    tokenizer = train(["abab"])
    seen = []
    tokenizer.train_from_iterator(["cd"], 300, progress=lambda *_: seen.append(tokenizer.encode("ab")))
    assert seen == [[256], [256]]
    assert learnt(tokenizer) == [b"cd"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_a_signal_ends_merging():
    def interrupt(*_):
        raise KeyboardInterrupt

    text = slow_to_merge()
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            train([text], 60_000)
        assert time.monotonic() - started < 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_other_threads_run_during_training():
    turns, done = 0, threading.Event()

    def take_turns():
        nonlocal turns
        while not done.wait(0.005):
            turns += 1

    thread = threading.Thread(target=take_turns)
    text = slow_to_merge()
    thread.start()
    before = turns
    try:
        train([text], 1200)
        assert turns - before > 5
    finally:
        done.set()
        thread.join()


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(vocab_size=255), ValueError, "expected 256 .* got 255"),
        (dict(vocab_size=-1), ValueError, "expected 256 .* got -1"),
        (dict(vocab_size=2**40), ValueError, "got 1099511627776"),
        (dict(vocab_size=300.5), TypeError, "float"),
        (dict(buffer_size=0), ValueError, "buffer_size: expected at least 1, got 0"),
        (dict(pattern="(unclosed"), ValueError, "pattern: "),
        (dict(iterator=["a", "b", 3]), TypeError, "item 2: expected str, got int"),
        (dict(iterator=[b"bytes"]), TypeError, "item 0: expected str, got bytes"),
        (dict(iterator=["a", "\ud800"]), ValueError, "item 1: .* surrogate"),
        (dict(iterator="a text, not a list of texts"), TypeError, "got a single str"),
        (dict(iterator=None), TypeError, "not iterable"),
        (dict(progress=3), TypeError, "not callable"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    tokenizer = train(["abab"])
    with pytest.raises(error, match=message):
        tokenizer.train_from_iterator(**(dict(iterator=["xy"], vocab_size=300) | arguments))
    assert learnt(tokenizer) == [b"ab", b"abab"]


def test_the_position_of_a_bad_item_counts_all_batches():
    with pytest.raises(TypeError, match=re.escape("item 25: expected str, got NoneType")):
        train(["a"] * 25 + [None], buffer_size=10)


def test_a_pattern_that_backtracks_without_end_is_an_error():
    with pytest.raises(ValueError, match="pattern: "):
        train(["a" * 50], pattern=r"(a|a)*\1b")


def test_a_lone_surrogate_cannot_be_encoded():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        rustbpe.Tokenizer().encode("\ud800")
