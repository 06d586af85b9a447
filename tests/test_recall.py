"""Recall documents: every answer follows from one earlier fact, at a distance that is drawn as wanted."""

import itertools
import json
import math
import random
import re
import time
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset, recall, samples
from nanochat.common import UserError
from nanochat.dataset import Config, get_data_dir, iter_documents, list_row_groups, main
from nanochat.recall import FACTS, KEY_FILE, LEXICON, Sizes, recall_document, recall_documents
from nanochat.tokenizer import RustBPETokenizer, count_token_bytes

SMALL = {"recall_documents": 60, "recall_chars": 2000, "recall_questions": 4, "recall_tables": 1}


def believed(text):
    """What a reader of the text knows of (attribute, name): each value that was stated, before any question of it."""
    known = {}
    for line in text.splitlines():
        if line.startswith("What is"):
            continue
        if match := re.fullmatch(r"The (\w+) of (\w+) is (\w+)\.", line):
            known.setdefault((match[1], match[2]), []).append(match[3])
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
    known = believed(text)
    assert all(len(values) == 1 for values in known.values())  # one right answer, and it is stated once
    asked = re.findall(r"What is the (\w+) of (\w+)\? The \1 of \2 is (\w+)\.", text)
    assert text.count("What") == len(asked) == len(questions) == sizes.questions + sizes.tables
    assert len(set(asked)) == len(asked)
    for (attribute, name, value), question in zip(asked, questions, strict=True):  # in the text's order
        assert known[attribute, name] == [value]
        assert question.attribute == attribute
        assert question.kind == ("fact" if attribute in FACTS else "table")
        assert cut(text, question.question) == f"What is the {attribute} of {name}?"
        assert cut(text, question.answer) == f" {value}"
        assert text[: question.answer[0]].endswith(f"? The {attribute} of {name} is")
        row = rf"- {name}, (\w+, )?{value}(, \w+)?"
        wanted = f"The {attribute} of {name} is {value}." if question.kind == "fact" else row
        assert re.fullmatch(wanted, cut(text, question.fact))
        assert text[: question.question[0]].count(cut(text, question.fact)) == 1
        assert question.distance == question.answer[0] - question.fact[0] >= sizes.min_distance
    assert text.isascii()
    assert text.endswith(".\n")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_question_is_answered_by_one_earlier_fact(data):
    draw = data.draw
    counts = {name: draw(st.integers(0, 8), name) for name in ("questions", "tables", "distractors")}
    counts |= {"chars": draw(st.integers(3000, 9000)), "words": draw(st.integers(3, 40))}
    counts["min_distance"] = draw(st.integers(128, 1000))
    counts["max_distance"] = draw(st.sampled_from([-1, counts["min_distance"], 2000]))
    if draw(st.booleans()):
        counts["depth"] = draw(st.floats(0, 0.3))
    sizes = Sizes(**counts)
    text, questions = recall_document(random.Random(draw(st.integers(0, 99))), **counts)
    check(text, questions, sizes)
    assert len(believed(text)) == sizes.questions + sizes.distractors + 2 * recall.ROWS * sizes.tables
    assert sizes.chars - 60 <= len(text) <= sizes.chars + 1000
    everyday = {word for line in text.splitlines() for word in re.findall(r"\w+", line) if word in LEXICON_SET}
    assert len(everyday) <= sizes.words


LEXICON_SET = set(LEXICON)


def test_words_have_one_meaning():
    groups = [recall.NAMES, recall.CITIES, recall.FOODS, recall.COLOURS, LEXICON]
    everything = [word.lower() for group in groups for word in group]
    assert len(set(everything)) == len(everything)
    assert not {"the", "of", "is", "what", "table", "name"} & set(everything)


def test_a_document_keeps_to_its_own_words():
    used = []
    for text, _ in recall_documents(0, 6, chars=6000):
        found = set(re.findall(r"\w+", text)) & LEXICON_SET
        assert len(found) == Sizes.words
        first = set(re.findall(r"\w+", text[: len(text) // 2])) & LEXICON_SET
        assert first == found  # the beginning tells which words the rest is made of
        used.append(found)
    assert max(len(a & b) for a, b in itertools.combinations(used, 2)) < 6


def test_distances_are_log_uniform():
    low, high = 150, 12_000
    sizes = {"chars": 20_000, "min_distance": low, "max_distance": high}
    logs = np.sort(
        [
            (math.log(question.distance) - math.log(low)) / (math.log(high) - math.log(low))
            for _, questions in recall_documents(0, 60, **sizes)
            for question in questions
        ]
    )
    assert len(logs) == 60 * 16
    assert logs[-1] < 1.03
    assert np.abs(logs - np.linspace(0, 1, len(logs))).max() < 0.07  # Kolmogorov–Smirnov


def test_facts_lie_where_they_are_wanted():
    for depth in (0, 0.25, 0.9, 1):
        sizes = {"chars": 30_000, "questions": 3, "tables": 1, "depth": depth}
        for text, questions in recall_documents(1, 3, **sizes):
            check(text, questions, Sizes(**sizes))
            for question in questions:
                assert abs(question.fact[0] - depth * len(text)) < 400
                assert len(text) - question.answer[1] < 400  # asked for at the end
    sizes = {"chars": 30_000, "tables": 0, "depth": 0.5, "min_distance": 7000, "max_distance": 7000}
    for text, questions in recall_documents(1, 3, **sizes):
        assert all(7000 <= question.distance < 7900 for question in questions)
        assert all(abs(question.fact[0] - depth_of(text, 0.5)) < 900 for question in questions)
        assert len(text) > 29_900  # everyday sentences follow


def depth_of(text, depth):
    return depth * len(text)


def test_long_documents_are_quick():
    started = time.process_time()
    text, questions = next(recall_documents(0, 1, chars=1_000_000, questions=100, tables=10))
    assert len(text) > 999_000
    assert max(question.distance for question in questions) > 300_000
    assert time.process_time() - started < 5


def test_seeds():
    def texts(*args, **sizes):
        return [text for text, _ in recall_documents(*args, **sizes)]

    assert texts(3, 5) == texts(3, 8)[:5]  # the first ones of more
    streams = [texts(seed, 20, split) for seed in (3, 4) for split in ("train", "val", "eval")]
    lines = [{line for text in stream for line in text.splitlines() if " code " in line} for stream in streams]
    for a, b in itertools.combinations(range(len(streams)), 2):
        assert set(streams[a]).isdisjoint(streams[b])
        assert len(lines[a] & lines[b]) < 4  # by chance, 200 codes in each among 640,000


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"questions": -1}, "0 or more questions, got -1"),
        ({"tables": 17}, "at most 16 tables"),
        ({"questions": 100, "distractors": 100, "chars": 10**6}, "at most 192 questions and distractors together"),
        ({"words": 2}, "3 to .* words"),
        ({"words": 5000}, "3 to .* words"),
        ({"min_distance": 127}, "min_distance of 128"),
        ({"min_distance": 500, "max_distance": 400}, r"max_distance of 500 \(min_distance\) or more, or -1, got 400"),
        ({"max_distance": 0}, "max_distance"),
        ({"chars": 1500}, "at least .* chars for 12 questions, 4 tables and 12 distractors, got 1500"),
        ({"chars": 5000, "max_distance": 5000}, "at least 5200 chars for such distances"),
        ({"depth": 1.5}, "depth from 0 to 1"),
        ({"depth": 0.9, "max_distance": 1000}, "questions fit in 4000 chars, got 1000 and 0.9"),
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
    sizes = {"chars": 2000, "questions": 4, "tables": 1}
    assert texts("train") == [text for text, _ in recall_documents(5, 60, "train", **sizes)]
    assert len(list_row_groups("train")) >= 8
    val = list(recall_documents(5, 3, "val", **sizes))
    assert texts("val") == [text for text, _ in val]
    key = read_key()
    assert [(entry["index"], entry["text"]) for entry in key] == list(enumerate(texts("val")))
    for entry, (_, questions) in zip(key, val, strict=True):
        asked = [recall.Question(**{k: v for k, v in q.items() if k != "distance"}) for q in entry["questions"]]
        assert [json.loads(json.dumps(asdict(q))) for q in asked] == [
            json.loads(json.dumps(asdict(q))) for q in questions
        ]
        assert [q["distance"] for q in entry["questions"]] == [q.distance for q in questions]
    record = json.loads((get_data_dir() / "source.json").read_text())
    assert record["source"] == "recall"
    assert (record["seed"], record["documents"], record["sizes"]["chars"]) == (5, 60, 2000)
    assert record["train"]["documents"] == 60
    assert record["val"]["documents"] == 3
    assert [len(prompt) for prompt in samples.prompts()] == [40] * len(texts("val")[:7])


def test_made_once(base_dir, capsys):
    options = {"source": "recall", **SMALL}
    main(Config(**options))
    before = {path: path.stat().st_mtime_ns for path in get_data_dir().iterdir()}
    main(Config(**options))
    assert "reusing" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in get_data_dir().iterdir()} == before
    for other in ({"seed": 1}, {"recall_documents": 61}, {"recall_max_distance": 1000}):
        with pytest.raises(UserError, match="recall documents made with other options"):
            main(Config(**options | other))
    with pytest.raises(UserError, match="from source 'recall' already"):
        main(Config(source="stdlib"))
    assert {path: path.stat().st_mtime_ns for path in get_data_dir().iterdir()} == before
    for lost in (KEY_FILE, dataset.shard_name(0), dataset.shard_name(dataset.VAL_SHARD)):
        content = (get_data_dir() / lost).read_bytes()
        (get_data_dir() / lost).unlink()
        main(Config(**options))
        assert (get_data_dir() / lost).read_bytes() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall_documents": 0}, "1 or more documents"),
        ({"recall_chars": 100}, "at least .* chars"),
        ({"num_files": 0}, "-n 1 or more"),
    ],
)
def test_options_that_cannot_be(base_dir, options, message):
    with pytest.raises(UserError, match=message):
        main(Config(source="recall", **SMALL | options))
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
