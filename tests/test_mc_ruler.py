"""RULER's tasks: true answers, unique keys, the length; an oracle that is right, a reader that saw nothing."""

import json
import re

import pytest

from megacontext.evaluation.ruler import NOISE, TASKS, question, recall_tasks, ruler, share_said
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.recall import LEXICON
from scripts import mc_eval

LINES = [f"line {i} of a text that stands for essays." for i in range(50)]
ALL = TASKS | recall_tasks()


class Characters:
    """A token per character."""

    def get_bos_token_id(self):
        return 0

    def encode(self, text, prepend=None):
        return ([] if prepend is None else [prepend]) + list(map(ord, text))

    def decode(self, ids):
        return "".join(map(chr, ids))


def asked(name, length=6000, index=0, seed=0):
    return question(name, ALL[name], length, index, Characters(), LINES, seed)


def solve(prompt):
    """The answers, found in the prompt by what each task says in words."""
    if found := re.search(r"special magic numbers? for (\S+) mentioned in the provided text (?:is|are)$", prompt):
        return re.findall(rf"magic numbers for {found[1]} is: (\d+)\.", prompt)
    if found := re.search(r"They fed (\w+)$", prompt):
        return re.findall(rf"They fed {found[1]} (\w+)\.", prompt)
    prompt = prompt[prompt.rindex("Memorize") :]
    if found := re.search(r"assigned the value (\d+), they are:$", prompt):
        values = [found[1]]
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt):
            values += [name] * (value in values)
        return values[1:]
    words = re.findall(r"\d+\. ([a-z]+)", prompt)
    return sorted(set(words), key=words.count)[-10:]


@pytest.mark.parametrize("name", ALL)
def test_answers_are_what_the_text_says(name):
    for index in range(5):
        one = asked(name, index=index)
        assert sorted(solve(one.prompt)) == sorted(one.answers)
        assert len(set(one.answers)) == len(one.answers)
        expected = {"niah_multivalue": 4, "vt": 5, "cwe": 10}.get(name, 1)
        assert len(one.answers) == expected


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("length", [2500, 6000, 40000])
def test_the_length_is_met(name, length):
    one = asked(name, length)
    used = 1 + len(one.prompt) + one.new_tokens
    unit = {"cwe": 60, "vt": 90, "niah_single_1": 90}.get(name, 60)  # of the haystack, in characters, and a half more
    assert length - 2 * unit < used <= length


def test_the_same_seed_asks_the_same():
    for name in ALL:
        assert asked(name) == asked(name)
        assert len({asked(name, index=index, seed=seed).prompt for index in (0, 1) for seed in (0, 1)}) == 4


def test_haystacks():
    one = asked("niah_single_1")
    lines = one.prompt.splitlines()
    assert lines[0].startswith("A special magic number is hidden within the following text. Make sure to memorize it.")
    assert {line for line in lines[1:-1] if "magic" not in line} == {NOISE}
    assert sum("One of the special magic numbers for" in line for line in lines) == 1
    many = [asked("niah_multikey_1", index=i).prompt.splitlines() for i in range(20)]
    assert all(line in LINES for prompt in many for line in prompt[1:-1] if "magic" not in line)
    for prompt in many:
        keys = re.findall(r"numbers for (\S+) is:", "\n".join(prompt))
        assert len(keys) == len(set(keys)) == 4
    places = [next(i for i, line in enumerate(prompt) if "magic numbers for" in line) for prompt in many]
    assert len(set(places)) > 10  # anywhere
    assert asked("niah_multivalue").prompt.startswith("Some special magic numbers are hidden")


def test_recall_documents_without_questions():
    one = question("recall_single", recall_tasks(ask=False)["recall_single"], 3000, 0, Characters(), LINES)
    assert "What did they" not in one.prompt
    assert re.search(r"\nThey fed \w+$", one.prompt)
    assert solve(one.prompt) == one.answers


def test_more_words_than_there_are():
    one = asked("cwe", 150_000)
    prompt = one.prompt[one.prompt.rindex("Memorize") :]
    words = re.findall(r"\d+\. ([a-z]+)", prompt)
    assert set(words) <= set(LEXICON)
    assert min(map(words.count, one.answers)) > max(words.count(word) for word in set(words) - set(one.answers))


def test_an_oracle_is_right_and_who_saw_nothing_is_not():
    tokenizer = Characters()

    def oracle(ids, new_tokens):
        assert ids[0] == 0
        return " " + " ".join(solve(tokenizer.decode(ids[1:]))).upper()

    readers = {
        "full": lambda ids, n: oracle(ids, n) if len(ids) < 5000 else None,
        "focus": oracle,
        "gists": lambda ids, n: "The grass is green.",
    }
    rows = ruler(tokenizer, readers, [1000, 4000, 9000], 3, LINES, ALL)
    assert {row["task"] for row in rows} == set(ALL)
    for row in rows:
        assert row["focus"] == 1
        assert row["gists"] == 0
        assert row["full"] == (1 if row["tokens"] < 5000 else None)
        assert row["samples"] == 3
    assert ("cwe", 1000) not in {(row["task"], row["tokens"]) for row in rows}  # it does not fit
    with pytest.raises(UserError, match="--ruler_lengths: expected lengths that a task fits into, got 100, 200"):
        ruler(tokenizer, readers, [100, 200], 3, LINES)


def test_a_part_of_the_answers_counts():
    assert share_said("They are ABC and def.", ["abc", "xyz", "DEF", "q1"]) == 0.5


def test_script(mc_trained, capsys):
    options = ["--model_tag=mc", "--sequences=4", "--device_batch_size=4", "--ratios=2", "--probe_steps=0"]
    options += ["--ruler_lengths=300,1500", "--ruler_samples=1", "--ruler_words=recall", "--past=1,3"]
    mc_eval.main(parse(mc_eval.Config, [*options, "--device_type=cpu", "--dtype=fp32"]))
    assert "| task |" in capsys.readouterr().out
    figures = json.loads((mc_trained / "mc_eval" / "base_mc_000006.json").read_text())
    rows = {(row["task"], row["tokens"]): row for row in figures["ruler"]}
    assert set(rows) == {(task, tokens) for task in recall_tasks() for tokens in (300, 1500)}
    for (_, tokens), row in rows.items():
        assert (row["full"] is None) == (tokens > 640)  # ten times the length of the training
        assert 0 <= row["gists"] <= 1
        assert 0 <= row["focus"] <= 1
    assert [row["past"] for row in figures["past"]] == [64, 192]
    assert "RULER: answers found" in (mc_trained / "report" / "megacontext-evaluation-base.md").read_text()
