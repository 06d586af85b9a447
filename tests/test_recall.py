"""Recall documents: every answer follows from one earlier fact, at a distance that is drawn as wanted."""

import itertools
import json
import random
import re
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset, ranges, recall, samples
from nanochat.common import UserError
from nanochat.dataset import Config, get_data_dir, iter_documents, list_row_groups, main
from nanochat.recall import COLUMNS, FACTS, KEY_FILE, LEXICON, VERBS, Sizes, recall_document, recall_documents
from nanochat.tokenizer import RustBPETokenizer, count_token_bytes

SMALL = {"recall_documents": 60, "recall_chars": 2000, "recall_questions": 4}
WORDS = set(LEXICON)
TOLD = {told: attribute for attribute, (_, told) in VERBS.items()}


def believed(text):
    """What a reader of the text knows of (attribute, name): each value that was stated, before any question of it."""
    known = {}
    for line in text.splitlines():
        if line.startswith("What did"):
            continue
        if match := re.fullmatch(r"They (\w+) (\w+) (\w+)\.", line):
            known.setdefault((TOLD[match[1]], match[2]), []).append(match[3])
        elif line.startswith("Table: name, "):
            columns = line.removeprefix("Table: name, ").split(", ")
        elif line.startswith("- "):
            name, *values = line[2:].split(", ")
            for column, value in zip(columns, values, strict=True):
                known.setdefault((column, name), []).append(value)
    return known


def cut(text, span):
    return text[slice(*span)]


def check(text, questions, sizes):
    """Compare with what a reader finds who knows nothing but the forms of the sentences."""
    known = believed(text)
    assert all(len(values) == 1 for values in known.values())  # one right answer, and it is stated once
    asked = re.findall(r"What did they \w+ (\w+)\? They (\w+) \1 (\w+)\.\n", text)
    assert text.count("What") == len(asked) == len(questions) == sizes.times * (sizes.questions + sizes.tables)
    assert set(Counter(asked).values()) <= {sizes.times}
    for (name, told, value), question in zip(asked, questions, strict=True):  # in the order of the text
        attribute = TOLD[told]
        assert known[attribute, name] == [value]
        assert question.attribute == attribute
        assert question.kind == ("fact" if attribute in FACTS else "table")
        assert cut(text, question.question) == f"What did they {VERBS[attribute][0]} {name}?"
        assert cut(text, question.answer) == f" {value}"
        assert text[: question.answer[0]].endswith(f"? They {told} {name}")
        row = f"- {name}, {value}, \\w+" if attribute == "colour" else f"- {name}, \\w+, {value}"
        fact = f"They {told} {name} {value}." if question.kind == "fact" else row
        assert re.fullmatch(fact, cut(text, question.fact))
        assert text.index(cut(text, question.fact)) == question.fact[0]
        assert question.distance == question.answer[0] - question.fact[0] >= sizes.min_distance
    assert text.isascii()
    assert text.endswith(".\n")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_every_question_is_answered_by_one_earlier_fact(data):
    draw = data.draw
    options = {name: draw(st.integers(-1, 8), name) for name in ("questions", "tables", "distractors")}
    options |= {"chars": draw(st.integers(6000, 9000)), "words": draw(st.integers(3, 40))}
    options["times"] = draw(st.integers(1, 3))
    least = 32 if options["tables"] == 0 else 128
    options["min_distance"] = draw(st.integers(least, 1000))
    options["max_distance"] = draw(st.sampled_from([-1, options["min_distance"], 2000]))
    sizes = Sizes(**options)
    text, questions = recall_document(random.Random(draw(st.integers(0, 99))), **options)
    check(text, questions, sizes)
    assert len(believed(text)) == sizes.questions + sizes.distractors + 2 * recall.ROWS * sizes.tables
    assert sizes.chars - 60 <= len(text) <= sizes.chars + 100 * (len(questions) + 2)
    assert len(set(re.findall(r"\w+", text)) & WORDS) <= sizes.words


def test_names_are_used_again_only_when_there_are_no_more():
    text, _ = next(recall_documents(0, 1, questions=20, tables=5, distractors=29, chars=10_000))
    assert {name for _, name in believed(text)} == set(recall.NAMES)
    text, questions = next(recall_documents(0, 1, questions=96, tables=0, distractors=96, chars=50_000))
    check(text, questions, Sizes(questions=96, tables=0, distractors=96, chars=50_000))
    assert len(believed(text)) == 192  # every attribute of every name


def test_words_have_one_meaning():
    groups = [recall.NAMES, *FACTS.values(), *COLUMNS.values(), LEXICON]
    everything = [word.lower() for group in groups for word in group]
    assert len(set(everything)) == len(everything)
    assert not {"the", "of", "is", "what", "table", "name"} & set(everything)


def test_a_document_keeps_to_its_own_words():
    used = []
    for text, _ in recall_documents(0, 6, chars=20_000):
        found = set(re.findall(r"\w+", text)) & WORDS
        assert len(found) == Sizes.words
        first = set(re.findall(r"\w+", text[: len(text) // 2])) & WORDS
        assert first == found  # the beginning tells which words the rest is made of
        used.append(found)
    assert max(len(a & b) for a, b in itertools.combinations(used, 2)) < 6


def test_distances_are_log_uniform():
    low, high = 150, 12_000
    documents = recall_documents(0, 40, chars=20_000, questions=20, min_distance=low, max_distance=high)
    distances = sorted(question.distance for _, questions in documents for question in questions)
    assert len(distances) > 1000
    assert distances[0] >= low
    assert distances[-1] < high + 300
    parts = np.log(np.array(distances) / low) / np.log(high / low)
    assert np.abs(parts - np.linspace(0, 1, len(parts))).max() < 0.08  # Kolmogorov–Smirnov


def test_long_documents_are_quick():
    started = time.process_time()
    text, questions = next(recall_documents(0, 1, chars=1_000_000))
    assert 999_900 < len(text) < 1_001_000
    assert len(questions) > 100
    assert max(question.distance for question in questions) > 300_000
    assert time.process_time() - started < 5


def test_seeds():
    def texts(*args, **sizes):
        return [text for text, _ in recall_documents(*args, **sizes)]

    assert texts(3, 5) == texts(3, 8)[:5]
    streams = [texts(seed, 20, split) for seed in (3, 4) for split in ("train", "val", "eval")]
    opening = [{text.partition("?")[0] for text in stream} for stream in streams]
    for a, b in itertools.combinations(opening, 2):
        assert a.isdisjoint(b)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"questions": -2}, "0 or more questions, or -1 for what suits, got -2"),
        ({"tables": 22}, "at most 21 tables, got 22"),
        (
            {"questions": 100, "distractors": 100, "chars": 10**6},
            "at most 192 questions and distractors, got 200",
        ),
        ({"words": 2}, "3 to .* words"),
        ({"words": 5000}, "3 to .* words"),
        ({"times": 0}, "1 or more times, got 0"),
        ({"min_distance": 127}, "min_distance of 128"),
        ({"min_distance": 31, "tables": 0}, "min_distance of 32"),
        ({"min_distance": 500, "max_distance": 400}, r"max_distance of 500 \(min_distance\) or more, or -1, got 400"),
        ({"max_distance": 0}, "max_distance"),
        ({"questions": 60}, "at least .* characters for 60 questions, 2 tables and 5 distractors, got 4000"),
        ({"chars": 5000, "max_distance": 5000}, "at least 5100 characters for the distances, got 5000"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(UserError, match=message):
        Sizes(**sizes)
    with pytest.raises(UserError, match=message):
        next(recall_documents(0, 1, **sizes))


# ---------------------------------------------------------------------------------------------------------
# Shards


def read_key():
    return [json.loads(line) for line in (get_data_dir() / KEY_FILE).read_text("utf-8").splitlines()]


def texts(split):
    return [text for group in iter_documents(split) for text in group]


def test_shards_and_their_key(base_dir, capsys):
    main(Config(source="recall", seed=5, **SMALL))
    assert "60 documents" in capsys.readouterr().out
    sizes = {"chars": 2000, "questions": 4}
    assert texts("train") == [text for text, _ in recall_documents(5, 60, "train", **sizes)]
    assert len(list_row_groups("train")) >= 8
    val = list(recall_documents(5, 3, "val", **sizes))
    assert texts("val") == [text for text, _ in val]
    key = read_key()
    assert [(entry["index"], entry["text"]) for entry in key] == list(enumerate(texts("val")))
    for entry, (_, questions) in zip(key, val, strict=True):
        for found, question in zip(entry["questions"], questions, strict=True):
            assert found.pop("distance") == question.distance
            assert recall.Question(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}) == question
    record = json.loads((get_data_dir() / "source.json").read_text())
    assert record["source"] == "recall"
    assert (record["seed"], record["documents"], record["sizes"]["chars"]) == (5, 60, 2000)
    assert record["train"]["documents"] == 60
    assert record["val"]["documents"] == 3
    assert samples.prompts()[0] == texts("val")[0][:40]


def test_made_once(base_dir, capsys):
    options = {"source": "recall", **SMALL}
    main(Config(**options))
    before = {path: path.stat().st_mtime_ns for path in get_data_dir().iterdir()}
    main(Config(**options))
    assert "reusing" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in get_data_dir().iterdir()} == before
    for other in ({"seed": 1}, {"recall_documents": 61}, {"recall_max_distance": 1000}):
        with pytest.raises(UserError, match="documents made with other options"):
            main(Config(**options | other))
    with pytest.raises(UserError, match="from source 'recall' already"):
        main(Config(source="stdlib"))
    assert {path: path.stat().st_mtime_ns for path in get_data_dir().iterdir()} == before
    for lost in (KEY_FILE, dataset.shard_name(0), dataset.shard_name(dataset.VAL_SHARD)):
        content = (get_data_dir() / lost).read_bytes()
        (get_data_dir() / lost).unlink()
        main(Config(**options))
        assert (get_data_dir() / lost).read_bytes() == content


def from_command_line(config):
    ranges.check(config)
    main(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall_documents": 0}, "--recall_documents: expected 1 or more"),
        ({"recall_chars": 100}, "at least .* characters"),
        ({"num_files": 0}, "--num_files: expected "),
    ],
)
def test_options_that_cannot_be(base_dir, options, message):
    with pytest.raises(UserError, match=message):
        from_command_line(Config(source="recall", **SMALL | options))
    assert not list(get_data_dir().glob("*.parquet"))


# ---------------------------------------------------------------------------------------------------------
# Tokens


def test_tokens_of_a_span():
    documents = list(recall_documents(0, 20))
    tokenizer = RustBPETokenizer.train_from_iterator([text for text, _ in documents], 512)
    token_bytes = count_token_bytes(tokenizer)
    for text, questions in documents[:5]:
        for prepend in (None, tokenizer.get_bos_token_id()):
            ids = tokenizer.encode(text, prepend=prepend)
            spans = [q.answer for q in questions] + [q.fact for q in questions]
            tokens = recall.token_spans(ids, token_bytes, spans)
            answers = tokens[: len(questions)]
            for (first, last), question in zip(answers, questions, strict=True):
                # An answer begins and ends where a token does, so that the text before it can be a prompt.
                assert tokenizer.decode(ids[first:last]) == cut(text, question.answer)
                assert tokenizer.encode(text[: question.answer[0]], prepend=prepend) == ids[:first]
            for (first, last), question in zip(tokens[len(questions) :], questions, strict=True):
                assert cut(text, question.fact) in tokenizer.decode(ids[first:last])
                assert cut(text, question.fact) not in tokenizer.decode(ids[first + 1 : last])
                assert cut(text, question.fact) not in tokenizer.decode(ids[first : last - 1])
