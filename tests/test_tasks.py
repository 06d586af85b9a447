"""Tasks, on small files of the datasets' own schemas."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dev import gen_synthetic_data
from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.configurator import parse
from scripts.chat_sft import METRICS
from tasks import hub, mixtures, words
from tasks.arc import ARC
from tasks.arithmetic import STORIES, Arithmetic, pair_split
from tasks.common import NumberTask, Task, TaskMixture, TaskSequence, last_text, number_after, render_mc
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, solution_parts
from tasks.humaneval import HumanEval, extract_imports, extract_program
from tasks.mmlu import MMLU
from tasks.recall_chats import LINES, Recall
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tests.helpers import ROOT

# Rows as the hub has them.
ROWS = {
    ("allenai/ai2_arc", "ARC-Easy"): {
        "id": "q1",
        "question": "What is hot?",
        "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    ("cais/mmlu", "all"): {
        "question": "What is 1 + 1?",
        "subject": "elementary_mathematics",
        "choices": ["1", "2", "3", "4"],
        "answer": 1,
    },
    ("openai/gsm8k", "main"): {
        "question": "Natalia has 48 clips and sells half of them, then 2 more. How many are left?",
        "answer": "Half is 48/2=<<48/2=24>>24.\nThen 24-2=<<24-2=22>>22 are left.\n#### 22",
    },
    ("HuggingFaceTB/smol-smoltalk", "default"): {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
        ],
        "source": "everyday",
    },
    ("openai/openai_humaneval", "openai_humaneval"): {
        "task_id": "HumanEval/0",
        "prompt": "from typing import List\n\n\ndef half(x):\n    return x / 2\n\n\n"
        'def halves(xs: List[float]):\n    """Half of each."""\n',
        "canonical_solution": "    return [half(x) for x in xs]\n",
        "test": "def check(candidate):\n    assert candidate([2, 4]) == [half(2), half(4)]\n"
        "    assert candidate([]) == []\n",
        "entry_point": "halves",
    },
}
ROWS["allenai/ai2_arc", "ARC-Challenge"] = ROWS["allenai/ai2_arc", "ARC-Easy"]
ROWS["cais/mmlu", "auxiliary_train"] = {"train": ROWS["cais/mmlu", "all"]}


@pytest.fixture
def local_hub(base_dir):
    """Every dataset, with 30 rows a split; returns where they are."""
    for (repo, config), row in ROWS.items():
        folder = base_dir / "task_data" / repo.replace("/", "__") / config
        folder.mkdir(parents=True)
        for split in ("train", "test", "validation"):
            pq.write_table(pa.Table.from_pylist([row] * 30), folder / f"{split}.parquet")
    return base_dir / "task_data"


@pytest.fixture
def shards(base_dir):
    """A training text with 400 words, and identity conversations."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(400)]
    (base_dir / "base_data").mkdir(parents=True)
    for shard in range(2):
        texts = [f"def {word}(): return {word}  # CamelCase {word}_x {word}" for word in vocabulary]
        pq.write_table(pa.table({"text": texts}), base_dir / "base_data" / f"shard_{shard:05d}.parquet")
    gen_synthetic_data.main(gen_synthetic_data.Config(num=300))
    return vocabulary


class Numbers(Task):
    def __init__(self, size, **slicing):
        super().__init__(**slicing)
        self.size = size

    def num_examples(self):
        return self.size

    def get_example(self, index):
        return index


def check_conversation(conversation):
    messages = conversation["messages"]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    assert turns == ["user", "assistant"] * (len(turns) // 2)
    assert turns
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            assert content
            continue
        assert message["role"] == "assistant"
        kinds = [part["type"] for part in content]
        assert set(kinds) <= {"text", "python", "python_output"}
        for i, part in enumerate(content):
            assert part["text"]
            if part["type"] == "python":
                assert kinds[i + 1] == "python_output"
                assert calculate(part["text"]) == content[i + 1]["text"]


def answer_text(conversation):
    """The reference answer as it would be decoded, special tokens included."""
    tokens = {
        "text": "{}",
        "python": "<|python_start|>{}<|python_end|>",
        "python_output": "<|output_start|>{}<|output_end|>",
    }
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(tokens[part["type"]].format(part["text"]) for part in content)


class TestCommon:
    @given(
        size=st.integers(0, 30),
        start=st.integers(0, 40),
        length=st.none() | st.integers(0, 40),
        step=st.integers(1, 7),
    )
    def test_slicing_is_that_of_a_list(self, size, start, length, step):
        stop = None if length is None else start + length
        task = Numbers(size, start=start, stop=stop, step=step)
        assert [task[i] for i in range(len(task))] == list(range(size))[start:stop:step]
        with pytest.raises(IndexError):
            task[len(task)]

    @pytest.mark.parametrize("slicing", [{"start": -1}, {"step": 0}, {"start": 3, "stop": 2}])
    def test_bad_slices(self, slicing):
        with pytest.raises(ValueError, match="expected 0 <= start <= stop"):
            Numbers(5, **slicing)

    def test_mixture(self):
        a, b = Numbers(50), Numbers(30, start=10)
        mixture = TaskMixture([a, b, b])
        items = [mixture[i] for i in range(len(mixture))]
        assert sorted(items) == sorted(list(range(50)) + 2 * list(range(10, 30)))
        assert items != sorted(items)
        assert items == list(TaskMixture([a, b, b]))
        assert [TaskMixture([a, b, b], stop=7)[i] for i in range(7)] == items[:7]

    def test_sequence(self):
        sequence = TaskSequence([Numbers(3), Numbers(0), Numbers(2)])
        assert [sequence[i] for i in range(len(sequence))] == [0, 1, 2, 0, 1]

    def test_render_mc(self):
        prompt = render_mc("Why?", ["A", "B"], ["this", "that"])
        assert prompt == (
            "Multiple Choice question: Why?\n- this=A\n- that=B\n\nRespond only with the letter of the correct answer."
        )
        with pytest.raises(ValueError, match="shorter|longer"):
            render_mc("Why?", ["A", "B"], ["this"])

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("#### 12", 12),
            ("####12.", 12),
            ("#### -1,234.50 apples", -1234.5),
            ("#### 1\nno, #### 2", 2),
            ("#### none", None),
            ("12", None),
            ("#### ", None),
            ("#### ١٢", None),
        ],
    )
    def test_number_after(self, text, number):
        assert number_after("####", text) == number


class TestHub:
    def test_rows_come_in_a_fixed_permutation(self, base_dir):
        for suffix, write in ((".jsonl", self.write_jsonl), (".parquet", pq.write_table)):
            path = base_dir / "task_data" / f"a__{suffix[1:]}" / "c" / f"train{suffix}"
            path.parent.mkdir(parents=True)
            write(pa.table({"i": range(1000)}), path)
            rows = hub.load_split(f"a/{suffix[1:]}", "c", "train", ["i"])
            assert [row["i"] for row in rows] == list(np.random.default_rng(42).permutation(1000))

    def write_jsonl(self, table, path):
        path.write_text("\n".join(map(json.dumps, table.to_pylist())))

    def test_jsonl(self, base_dir):
        path = base_dir / "task_data" / "a__b" / "c" / "train.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text('{"x": "one\u2028line", "y": [{"z": "1"}]}\n\n{"x": "2"}\n', encoding="utf-8")
        rows = hub.load_split("a/b", "c", "train", ["x"])
        assert sorted(row["x"] for row in rows) == ["2", "one\u2028line"]
        with pytest.raises(UserError, match="train.jsonl: expected columns w"):
            hub.load_split("a/b", "c", "train", ["w"])
        path.write_text('{"x": "é"}', encoding="utf-16")
        assert list(hub.load_split("a/b", "c", "train")) == [{"x": "é"}]
        path.write_text('{"x": "1"}\n{"x": "é"}', encoding="cp1252")
        with pytest.raises(UserError, match=r"train.jsonl:2: expected UTF-8"):
            hub.load_split("a/b", "c", "train")
        for content in ('{"x": 1}\n{', '{"x": 1}\n[1]', "\n"):
            path.write_text(content)
            with pytest.raises(UserError, match="expected rows in .*train.jsonl, cannot read it"):
                hub.load_split("a/b", "c", "train")

    def test_broken_parquet(self, local_hub):
        path = local_hub / "openai__gsm8k" / "main" / "train.parquet"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match="train.parquet, cannot read it .*Parquet"):
            GSM8K("main", "train")

    def test_wrong_schema(self, local_hub):
        pq.write_table(pa.table({"text": ["x"]}), local_hub / "openai__gsm8k" / "main" / "train.parquet")
        with pytest.raises(UserError, match="no question, answer there"):
            GSM8K("main", "train")

    @pytest.mark.usefixtures("base_dir")
    def test_no_network(self):
        with pytest.raises(UserError, match="cannot get it .*Offline") as error:
            GSM8K("main", "train")
        assert "openai__gsm8k/main/train.parquet" in str(error.value)
        assert "--tasks local" in str(error.value)

    @pytest.mark.usefixtures("base_dir")
    def test_what_the_hub_is_asked_for(self, monkeypatch):
        asked = []

        def answer(*args, **options):
            asked.append((args, options))
            return datasets.Dataset.from_list([ROWS["openai/gsm8k", "main"]])

        monkeypatch.setattr(datasets, "load_dataset", answer)
        assert len(GSM8K("main", "test")) == 1
        assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


@pytest.mark.usefixtures("local_hub")
class TestHubTasks:
    @pytest.mark.parametrize(
        "make",
        [
            lambda **s: ARC("ARC-Easy", "train", **s),
            lambda **s: ARC("ARC-Challenge", "test", **s),
            lambda **s: MMLU("all", "test", **s),
            lambda **s: MMLU("auxiliary_train", "train", **s),
            lambda **s: GSM8K("main", "train", **s),
            lambda **s: SmolTalk("test", **s),
            HumanEval,
        ],
    )
    def test_conversations(self, make):
        task = make()
        assert len(task) == 30
        assert len(make(start=5, stop=20, step=2)) == 8
        for i in range(30):
            conversation = task[i]
            if not isinstance(task, GSM8K):  # its authors' results are not always Python's
                check_conversation(conversation)
            if task.eval_type == "categorical":
                right = conversation["messages"][-1]["content"]
                assert right in conversation["letters"]
                assert [task.evaluate(conversation, c) for c in conversation["letters"]].count(True) == 1
                assert task.evaluate(conversation, right)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: ARC("ARC-Hard", "train"),
            lambda: ARC("ARC-Easy", "trian"),
            lambda: MMLU("all", "train"),
            lambda: MMLU("auxiliary_train", "test"),
            lambda: GSM8K("main", "validation"),
            lambda: SmolTalk("validation"),
            lambda: SpellingBee(1, "val"),
            lambda: Arithmetic(1, "val"),
            lambda: Recall(1, "val"),
        ],
    )
    def test_unknown_names(self, make):
        with pytest.raises(ValueError, match="split"):
            make()

    def test_arc_prompt(self):
        prompt = ARC("ARC-Easy", "test")[0]["messages"][0]["content"]
        assert "- ice=1\n- fire=2\n- snow=3\n" in prompt

    def test_gsm8k(self):
        task = GSM8K("main", "test")
        conversation = task[0]
        assert [(part["type"], part["text"]) for part in conversation["messages"][1]["content"]] == [
            ("text", "Half is 48/2="),
            ("python", "48/2"),
            ("python_output", "24"),
            ("text", "24.\nThen 24-2="),
            ("python", "24-2"),
            ("python_output", "22"),
            ("text", "22 are left.\n#### 22"),
        ]
        for answer, right in [("#### 22", 1), ("so 22.0\n#### 22.00", 1), ("22", 0), ("#### 23", 0), ("", 0)]:
            assert task.evaluate(conversation, answer) == bool(right)
            assert task.reward(conversation, answer) == right

    def test_gsm8k_sums_that_are_none(self):
        assert [part["type"] for part in solution_parts("a << b <<1+1=2>>2 >> c #### 2")] == [
            "text",
            "python",
            "python_output",
            "text",
        ]

    def test_humaneval_parts(self):
        prompt = ROWS["openai/openai_humaneval", "openai_humaneval"]["prompt"]
        assert extract_imports(prompt) == "from typing import List"
        assert (
            extract_imports("# x\nimport a\n\nfrom b import c\ndef f():\n    import d\n") == "import a\nfrom b import c"
        )
        assert extract_program("Sure:\n```python\nx = 1\n\ny = 2\n```\nDone. ```z```") == "x = 1\n\ny = 2"
        assert extract_program("```\nx = 1\n```") == "x = 1"
        assert extract_program("```py\nx = 1") == "x = 1"  # the answer was cut off
        assert extract_program("x = 1") == "x = 1"

    @pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
    def test_humaneval_scores(self):
        task = HumanEval()
        conversation = task[0]
        assert task.evaluate(conversation, answer_text(conversation))
        good = "```python\ndef halves(xs: List[float]):\n    return [x / 2 for x in xs]\n```"
        assert task.evaluate(conversation, good)
        assert not task.evaluate(conversation, good.replace("/ 2", "/ 3"))
        assert not task.evaluate(conversation, good.replace("def", "import sys; sys.exit(0)\ndef"))
        assert not task.evaluate(conversation, "I do not know.")
        assert not task.evaluate(conversation, "")


class TestCustomJSON:
    def test_reads(self, tmp_path):
        path = tmp_path / "c.jsonl"
        turn = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]
        system = [{"role": "system", "content": "s"}]
        path.write_text("\n".join(json.dumps(m, ensure_ascii=False) for m in (turn, system + turn + turn)) + "\n\n")
        task = CustomJSON(path)
        assert [task[i]["messages"] for i in range(len(task))] == [turn, system + turn + turn]

    def test_files_as_people_have_them(self, tmp_path):
        """Byte order marks, arrays over many lines, OpenAI's and ShareGPT's form: the same conversations."""
        talks = [
            [{"role": "user", "content": "née?"}, {"role": "assistant", "content": 'yes\n"]'}],
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "1"},
                {"role": "assistant", "content": "2"},
            ],
        ]
        openai = [{"messages": [{**message, "name": "x"} for message in talk], "id": 7} for talk in talks]
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        sharegpt = [
            {"id": "a", "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in talk]}
            for talk in talks
        ]
        path = tmp_path / "c.json"
        for form in (talks, openai, sharegpt):
            lines = [json.dumps(talk, ensure_ascii=False) for talk in form]
            pretty = json.dumps(form, ensure_ascii=False, indent=2)
            one_after_the_other = "\n".join(json.dumps(talk, indent=2) for talk in form)
            for text in ("\n".join(lines), "\r\n".join(lines), ",\n".join(lines), f"[{','.join(lines)}]", pretty):
                for encoding in ("utf-8", "utf-8-sig", "utf-16"):
                    path.write_bytes(text.encode(encoding))
                    assert [example["messages"] for example in CustomJSON(path)] == talks
            path.write_text(one_after_the_other)
            assert [example["messages"] for example in CustomJSON(path)] == talks

    def test_a_message_of_weight_0_is_not_learned(self, tmp_path, tokenizer):
        """As in OpenAI's files; its tokens are read, and those of the others are learned as ever."""
        talk = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
        weighed = [{**talk[0], "weight": 0}, {**talk[1], "weight": 0}, talk[2], {**talk[3], "weight": 1}]
        path = tmp_path / "c.jsonl"
        path.write_text(f"{json.dumps(talk)}\n{json.dumps({'messages': weighed})}\n")
        (ids, mask), (same, learned) = map(tokenizer.render_conversation, CustomJSON(path))
        assert same == ids
        second = ids.index(tokenizer.encode_special("<|assistant_end|>")) + 1
        assert sum(mask[:second]) > 10
        assert learned == [0] * second + mask[second:]
        path.write_text(json.dumps([*talk[:3], {**talk[3], "weight": 0.5}]))
        with pytest.raises(UserError, match=r"c\.jsonl:1: expected a weight of 0 or 1, got 0.5: make it"):
            CustomJSON(path)

    def test_what_is_not_clear_is_named(self, tmp_path):
        path = tmp_path / "c.jsonl"
        talk = json.dumps(
            [{"role": "user", "content": "née"}, {"role": "assistant", "content": "x"}], ensure_ascii=False
        )
        path.write_bytes(f"{talk.replace('née', 'a')}\n{talk}".encode("cp1252"))
        with pytest.raises(UserError, match=r"c\.jsonl:2: expected UTF-8, got the byte 0xe9.*iconv"):
            CustomJSON(path)
        wrong = [{"role": "user", "content": "a"}, {"role": "tool", "content": "x"}]
        path.write_text(
            json.dumps([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], wrong], indent=1)
        )
        with pytest.raises(UserError, match=r"c\.jsonl:12: expected roles.*'tool'"):
            CustomJSON(path)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "broken JSON"),
            ("{}", "JSON array"),
            ("[1]", "JSON array"),
            ("[]", "expected roles"),
            ('[{"role": "user", "content": "a"}]', "expected roles"),
            ('[{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]', "expected roles"),
            ('[{"role": "system", "content": "a"}]', "expected roles"),
            ('[{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]', "expected text"),
            ('[{"role": "user", "content": "a"}, {"role": "assistant"}]', "expected text"),
            ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]', "expected text"),
            ('[{"content": "a"}, {"role": "assistant", "content": "b"}]', "expected roles"),
            ("[" * 100_000, "broken JSON"),
        ],
    )
    def test_bad_lines(self, tmp_path, line, message):
        path = tmp_path / "c.jsonl"
        path.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n' + line)
        with pytest.raises(UserError, match=f"c.jsonl:2: .*{message}"):
            CustomJSON(path)

    def test_no_file_and_empty_file(self, tmp_path):
        with pytest.raises(UserError, match="dev.gen_synthetic_data"):
            CustomJSON(tmp_path / "none.jsonl")
        (tmp_path / "c.jsonl").write_text("\n")
        with pytest.raises(UserError, match="has none"):
            CustomJSON(tmp_path / "c.jsonl")


class TestIdentity:
    def test_file(self, base_dir, capsys):
        gen_synthetic_data.main(gen_synthetic_data.Config(num=700, name="Ada"))
        path = base_dir / "identity_conversations.jsonl"
        assert str(path) in capsys.readouterr().out
        task = CustomJSON(path)
        lines = path.read_text().splitlines()
        assert len(task) == len(set(lines)) == 700
        text = "\n".join(lines)
        assert text.count("Ada") > 200
        assert "nanochat." not in text.replace("Karpathy's nanochat.", "")
        assert "{" not in text.replace('{"role"', "")
        assert any(len(task[i]["messages"]) >= 6 for i in range(700))

    def test_deterministic(self):
        generate = gen_synthetic_data.generate
        assert generate(50, 1, "x") == generate(60, 1, "x")[:50] != generate(50, 2, "x")

    @pytest.mark.parametrize("options", [{"num": 0}, {"num": 10**9}, {"name": " "}, {"name": "{x}"}])
    @pytest.mark.usefixtures("base_dir")
    def test_bad_options(self, options):
        with pytest.raises(UserError, match=f"(--{(name := next(iter(options)))}: expected|expected --{name})"):
            gen_synthetic_data.main(parse(gen_synthetic_data.Config, [f"--{name}={options[name]}"]))


class TestSpelling:
    @pytest.mark.parametrize("kind", [SpellingBee, SimpleSpelling])
    @pytest.mark.usefixtures("shards")
    def test_conversations(self, kind):
        task = kind(300, "train", words="text")
        for i in range(len(task)):
            check_conversation(task[i])
            assert task.evaluate(task[i], answer_text(task[i]))
            assert not task.evaluate(task[i], "no idea #### 99")
        assert [task[i] for i in range(20)] == [kind(20, "train", words="text")[i] for i in range(20)]
        assert len({str(task[i]) for i in range(300)}) > 200

    @pytest.mark.usefixtures("shards")
    def test_counts_letters(self):
        task = SpellingBee(300, "test", words="text")
        for i in range(len(task)):
            question, answer = (message["content"] for message in task[i]["messages"])
            word, letter = re.fullmatch(r"'([a-z]+)'\.count\('([a-z])'\)", answer[1]["text"]).groups()
            assert word in question
            assert answer[0]["text"].startswith(f"{word}: {','.join(word)}\n")
            assert f"{word[-1]}{word.count(letter)}\n" in answer[0]["text"]
            assert answer[-1]["text"].endswith(f"#### {word.count(letter)}")

    @pytest.mark.usefixtures("shards")
    def test_splits_share_no_word(self):
        train, test = (set(SpellingBee(1, split, words="text").words) for split in ("train", "test"))
        assert train.isdisjoint(test)
        assert 0 < len(test) < len(train)

    def test_words_of_the_text(self, shards, base_dir):
        found = words.word_list("text")
        assert set(found) == {*(word for word in shards if len(word) >= 3), "def", "return"}
        assert found[:2] == ["def", "return"] or found[0] in shards  # the most frequent first
        kept = base_dir / "words_from_text.txt"
        assert words.word_list("text") == kept.read_text().split()
        kept.write_text("old")
        assert words.word_list("text") == ["old"]
        record = base_dir / "base_data" / "source.json"
        record.write_text("{}")  # the text is another one now
        os.utime(record, ns=(kept.stat().st_mtime_ns + 1_000_000,) * 2)
        assert words.word_list("text") == found

    @pytest.mark.usefixtures("shards")
    def test_large_list_is_not_to_be_had(self, capsys):
        assert words.word_list("large") == words.word_list("text")
        assert "spelling tasks use words of the training text" in capsys.readouterr().out

    def test_large_list_is_here(self, base_dir, capsys):
        base_dir.mkdir()
        (base_dir / "words_alpha.txt").write_bytes(b"apple\r\npear\r\n\r\nnot-a-word\r\n")
        assert words.word_list("large") == ["apple", "pear"]
        assert capsys.readouterr().out.strip() == ""

    @pytest.mark.usefixtures("base_dir")
    def test_no_text_at_all(self):
        with pytest.raises(UserError, match="nanochat.dataset"):
            words.word_list("text")

    def test_text_without_words(self):
        with pytest.raises(words.NoWords, match="expected words"):
            words.words_of_text([["X_Y 123"]])
        with pytest.raises(words.NoWords, match="expected enough words"):
            words.split_words([], "test")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("Он пошёл домой, ёлка — это x1 зелёная. Дом_ дом2", {"пошёл", "домой", "ёлка", "это", "зелёная"}),
            ("我们今天去公园。天气很好，我们很高兴！", {"我们今天去公园", "天气很好", "我们很高兴"}),
            ("नमक और कमल हैं", {"नमक", "कमल"}),  # without the words that need vowel signs
            ("Der Igel läuft über die Straße", {"läuft", "über", "die"}),
        ],
    )
    def test_words_of_other_scripts(self, text, expected):
        assert set(words.words_of_text([[text]])) == expected

    @pytest.mark.parametrize("text", ["слово", "词汇表"], ids=["Russian", "Chinese"])
    def test_spelling_in_other_scripts(self, base_dir, text):
        (base_dir / "words_from_text.txt").parent.mkdir(parents=True)
        chars = sorted(set(text))
        vocabulary = ["".join(random.Random(i).choices(chars, k=3 + i % 5)) for i in range(90)]
        (base_dir / "words_from_text.txt").write_text("\n".join(vocabulary), "utf-8")
        for kind in (SpellingBee, SimpleSpelling):
            task = kind(200, "train", words="text")
            for i in range(len(task)):
                check_conversation(task[i])
                assert task.evaluate(task[i], answer_text(task[i]))
        counts = [SpellingBee(200, "train", words="text")[i]["messages"][1]["content"][1]["text"] for i in range(200)]
        assert all(re.fullmatch(rf"'[{text}]+'\.count\('[{text}]'\)", call) for call in counts)


class TestArithmetic:
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_conversations(self, split):
        task = Arithmetic(2000, split, two_steps=0.2)
        kinds = set()
        for i in range(len(task)):
            conversation = task[i]
            check_conversation(conversation)
            question = conversation["messages"][0]["content"]
            call, output, answer = (part["text"] for part in conversation["messages"][1]["content"])
            numbers = re.findall("[0-9]+", question)
            assert numbers == re.findall("[0-9]+", call), "the operands come in the question's order"
            assert re.fullmatch("[0-9]+", output), "no negative results and no fractions"
            assert answer == f"The answer is {output}."
            assert pair_split(int(numbers[0]), int(numbers[1])) == split
            if any(symbol in question for symbol in "+*/"):
                assert call.replace("//", "/") in question, "the sum is copied as it stands"
            kinds.update(re.findall("[-+*/]+", call))
            kinds.add(len(numbers))
        assert kinds == {"+", "-", "*", "//", 2, 3}

    def test_deterministic_and_sliced(self):
        task, again = Arithmetic(50, "train"), Arithmetic(80, "train", start=10)
        assert [task[i] for i in range(10, 50)] == [again[i] for i in range(40)]
        assert len({str(task[i]) for i in range(50)}) > 45

    def test_no_test_sum_in_training(self):
        def pairs(split):
            task = Arithmetic(5000, split)
            questions = [task[i]["messages"][0]["content"] for i in range(len(task))]
            return {tuple(sorted(re.findall("[0-9]+", question))) for question in questions}

        train, test = pairs("train"), pairs("test")
        assert train.isdisjoint(test)
        assert len(test) > 300

    def test_evaluate_and_reward(self):
        task = Arithmetic(100, "test")
        for i in range(100):
            conversation = task[i]
            result = int(conversation["messages"][1]["content"][1]["text"])
            right, wrong = answer_text(conversation), f"The answer is {result + 1}."
            assert task.evaluate(conversation, right)
            assert (task.reward(conversation, right), task.reward(conversation, wrong)) == (1.0, 0.0)
            assert not task.evaluate(conversation, right.split("The answer")[0]), "the tool's output is no answer"
            assert not task.evaluate(conversation, f"The answer is {result}5.")

    def test_stories_name_their_numbers_in_order(self):
        for stories in STORIES.values():
            for story in stories:
                assert story.index("{a}") < story.index("{b}")

    def test_a_reference_without_a_number_is_a_fault(self):
        with pytest.raises(ValueError, match="no number"):
            NumberTask().evaluate({"messages": [{"role": "assistant", "content": "x"}]}, "#### 1")


class TestRecall:
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_what_was_told_decides(self, split):
        task = Recall(40, split, chars=2000)
        for i in range(len(task)):
            conversation = task[i]
            check_conversation(conversation)
            messages = [message["content"] for message in conversation["messages"]]
            *before, question, answer = messages
            leading, _, value = answer.rpartition(" ")
            lines = [line for text in before for line in text.splitlines()]
            told = [line for line in lines if line.startswith(leading)]
            assert set(told) == {answer}, "the fact was told, and no other of the name"
            assert leading.split()[-1] in question
            if split == "test":
                assert len(told) == 1, "never asked for before"
                text = "\n".join(lines)
                assert len(text) - text.index(answer) > len(text) / 4, "and long ago"
                names = [line for line in lines if line.startswith(leading.rsplit(" ", 1)[0])]
                assert len(names) >= 5, "among others"
            assert all(1 <= len(text.splitlines()) <= LINES[1] for text in messages)
            assert task.evaluate(conversation, answer)
            assert task.evaluate(conversation, f"'{value[:-1]}', I think! Not London, salt or an ant.")
            assert not task.evaluate(conversation, "I see.")
            others = {"salt", "London", "ant"} - {value.rstrip(".")}
            assert not any(task.evaluate(conversation, f"It was {other}, or: {answer}") for other in others)

    def test_splits_differ_and_repeat(self):
        train, test = Recall(20, "train"), Recall(20, "test")
        assert [train[i] for i in range(5)] == [Recall(20, "train")[i] for i in range(5)]
        assert all(train[i] != test[i] for i in range(20))
        lengths = [sum(len(m["content"]) for m in train[i]["messages"]) for i in range(20)]
        assert min(lengths) < 2000 < 4000 < max(lengths)

    def test_too_short(self):
        with pytest.raises(ValueError, match="1200 or more"):
            Recall(1, "train", chars=1000)


class TestMixtures:
    def test_recall(self):
        mid, mid_val, sft, sft_val = (
            make("recall") for make in (mixtures.mid_mixture, mixtures.mid_val, mixtures.sft_mixture, mixtures.sft_val)
        )
        assert (len(mid), len(sft)) == (mixtures.SIZES["mid"]["recall"], mixtures.SIZES["sft"]["recall"])
        assert sft[0] != mid[0]
        assert mid_val[0] == sft_val[0] == mixtures.eval_tasks("recall")["Recall"]()[0]

    @pytest.mark.usefixtures("shards")
    def test_memory_is_local_and_recall(self):
        for make, stage in ((mixtures.mid_mixture, "mid"), (mixtures.sft_mixture, "sft"), (mixtures.mid_val, "val")):
            both, local = make("memory"), {str(example) for example in make("local")}
            others = [example for example in both if str(example) not in local]
            assert len(both) == len(make("local")) + len(others)
            assert len(others) == mixtures.SIZES[stage]["memory"]
            assert all("They " in last_text(example) for example in others)
            assert max(sum(len(m["content"]) for m in example["messages"]) for example in others) < 2400
        assert mixtures.sft_val("memory")[7] == mixtures.mid_val("memory")[7]

    @pytest.mark.usefixtures("shards")
    def test_local(self):
        stages = [mixtures.mid_mixture, mixtures.mid_val, mixtures.sft_mixture, mixtures.sft_val]
        mid, mid_val, sft, sft_val = [make("local") for make in stages]
        for task, sizes in [(mid, mixtures.SIZES["mid"]), (sft, mixtures.SIZES["sft"])]:
            generated = sizes["sums"] + sizes["spelling"] + sizes["counting"]
            assert len(task) == generated + 300 * sizes["identity"]
        for task in (mid, mid_val, sft, sft_val):
            for i in range(0, len(task), 97):
                check_conversation(task[i])
        identity = CustomJSON(mixtures.get_base_dir() / "identity_conversations.jsonl")
        own = {str(identity[i]) for i in range(len(identity))}
        seen = [{str(task[i]) for i in range(len(task))} - own for task in (mid, sft)]
        assert len(seen[0] & seen[1]) < 0.5 * len(seen[1]), "the procedural examples of the stages differ"

    @pytest.mark.usefixtures("local_hub")
    def test_text_without_words_leaves_spelling_out(self, shards, base_dir, capsys):
        for shard in (base_dir / "base_data").glob("*.parquet"):
            pq.write_table(pa.table({"text": ["12 34", "X"]}), shard)
        mid = mixtures.mid_mixture("local")
        assert len(mid) == mixtures.SIZES["mid"]["sums"] + 300 * mixtures.SIZES["mid"]["identity"]
        assert len(mixtures.sft_val("local")) == mixtures.SIZES["val"]["sums"]
        assert list(mixtures.eval_tasks("local")) == ["Arithmetic"]
        assert len(mixtures.sft_mixture("full")) == 4 * 30 + 300
        assert "spelling is left out: expected words of 3 to 12 letters" in capsys.readouterr().out

    @pytest.mark.usefixtures("shards", "local_hub")
    def test_full(self):
        assert len(mixtures.mid_mixture("full")) == 3 * 30 + 2 * 300 + 200_000 + 80_000
        assert len(mixtures.mid_val("full")) == 3 * 30
        assert len(mixtures.sft_mixture("full")) == 4 * 30 + 300 + 600
        assert len(mixtures.sft_val("full")) == 30

    @pytest.mark.parametrize("which", ["full", "local", "recall", "memory"])
    @pytest.mark.usefixtures("shards", "local_hub")
    def test_eval_tasks(self, which):
        tasks = mixtures.eval_tasks(which)
        assert set(METRICS[which]) <= set(tasks) <= set(mixtures.BASELINES)
        for name, make in tasks.items():
            task = make(stop=10)
            assert len(task) == 10
            assert (task.eval_type == "categorical") == (mixtures.BASELINES[name] == 0.25)

    @pytest.mark.usefixtures("shards")
    def test_full_without_the_hub_stops_at_once(self):
        for make in (mixtures.mid_mixture, mixtures.mid_val, mixtures.sft_mixture, mixtures.sft_val):
            with pytest.raises(UserError, match="--tasks local"):
                make("full")

    def test_renders(self, tokenizer, shards):
        mixture = mixtures.sft_mixture("local")
        for i in range(0, len(mixture), 101):
            ids, mask = tokenizer.render_conversation(mixture[i])
            assert len(ids) == len(mask)
            assert 0 < sum(mask) < len(mask)


def test_no_task_names_this_machine():
    for path in Path(mixtures.__file__).parent.glob("*.py"):
        assert str(ROOT) not in path.read_text("utf-8")
