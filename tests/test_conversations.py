"""Packed and padded batches of conversations, scoring, and streamed text."""

import itertools

import pytest
import torch

from nanochat.common import UserError
from nanochat.conversations import PackedConversations, pad_rows, padded_batches
from nanochat.tokenizer import join_parts, stream_parts
from tasks.common import Task
from tasks.scoring import chat_core, evaluate, pass_at_k


def conversations(count):
    return [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "x " * (i % 7) + "ok"}]}
        for i in range(count)
    ]


def test_packed_is_one_stream(tokenizer):
    data = conversations(5)
    stream = [t for c in data * 4 for t in tokenizer.render_conversation(c, max_tokens=None)[0]]
    loader = PackedConversations(data, tokenizer, B=2, T=8)
    got = []
    for _ in range(6):
        x, y = next(loader)
        assert x.shape == y.shape == (2, 8)
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
        got += x.flatten().tolist()
    assert got == stream[: len(got)]


def test_packed_goes_on_from_its_state(tokenizer):
    data = conversations(6)
    loader = PackedConversations(data, tokenizer, 2, 8)
    next(loader)
    state = loader.state_dict()
    after = [next(loader) for _ in range(3)]
    again = PackedConversations(data, tokenizer, 2, 8, state=state)
    for x, y in after:
        a, b = next(again)
        assert torch.equal(x, a)
        assert torch.equal(y, b)


def test_progress_reaches_one_after_a_pass(tokenizer, monkeypatch):
    data = conversations(9)
    seen = []
    real = tokenizer.render_conversation
    for rank in range(2):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        loader = PackedConversations(data, tokenizer, 1, 8)
        monkeypatch.setattr(tokenizer, "render_conversation", lambda c, **k: (seen.append(id(c)), real(c, **k))[1])
        assert loader.progress == 0
        while loader.progress < 1:
            next(loader)
        monkeypatch.setattr(tokenizer, "render_conversation", real)
    assert {id(c) for c in data} <= set(seen)  # every one was seen by some rank
    monkeypatch.setenv("WORLD_SIZE", "10")
    with pytest.raises(UserError, match="too few for 10 processes"):
        PackedConversations(data, tokenizer, 1, 8)


def test_padded_rows_predict_the_assistant_only(tokenizer):
    data = conversations(7)
    batches = padded_batches(data, tokenizer, B=3, T=64)
    assert [len(x) for x, _ in batches] == [3, 3, 1]
    for number, conversation in enumerate(data):
        ids, mask = tokenizer.render_conversation(conversation)
        x, y = (t[number % 3].tolist() for t in batches[number // 3])
        expected = [token if m else -1 for token, m in zip(ids[1:], mask[1:], strict=True)]
        assert x[: len(ids) - 1] == ids[:-1]
        assert y[: len(ids) - 1] == expected
        assert set(y[len(ids) - 1 :]) <= {-1}


def test_rows_of_nothing():
    x, y = pad_rows([([5], [0]), ([5, 6], [0, 1])], pad_id=9)
    assert x.tolist() == [[9], [5]]
    assert y.tolist() == [[-1], [6]]


def test_long_conversations_are_cut(tokenizer):
    data = [{"messages": [{"role": "user", "content": "a " * 50}, {"role": "assistant", "content": "b"}]}]
    ((x, y),) = padded_batches(data, tokenizer, 1, T=16)
    assert x.shape == (1, 16)
    assert (y == -1).all()


# ---------------------------------------------------------------------------------------------------------
# Scoring


def test_pass_at_k_against_counting():
    for n, right, k in itertools.product([1, 4, 5], range(6), range(1, 6)):
        if right > n or k > n:
            continue
        answers = [i < right for i in range(n)]
        draws = list(itertools.combinations(answers, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_chat_core():
    assert chat_core({"MMLU": 0.25, "GSM8K": 0.0}) == 0
    assert chat_core({"MMLU": 1.0, "GSM8K": 1.0}) == 1
    assert chat_core({"MMLU": 0.625, "GSM8K": 0.5}) == pytest.approx(0.5)


class Letters(Task):
    eval_type = "categorical"

    def num_examples(self):
        return 10

    def get_example(self, index):
        question = {"role": "user", "content": f"{'long ' * (index % 3)}{index}"}
        answer = {"role": "assistant", "content": "AB"[index % 2]}
        return {"messages": [question, answer], "letters": ("A", "B")}

    def evaluate(self, conversation, assistant_response):
        return assistant_response == conversation["messages"][-1]["content"]


class Oracle(torch.nn.Module):
    """Logits that favour another letter after each prompt, and a third token over both."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def get_device(self):
        return torch.device("cpu")

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, self.tokenizer.get_vocab_size())
        for row, sequence in enumerate(ids.tolist()):
            end = sequence.index(self.tokenizer.encode_special("<|assistant_start|>"))
            number = int(self.tokenizer.decode(sequence[:end]).split("<|user_start|>")[1].split("<|")[0].split()[-1])
            letter = "AB"[number % 2] if number < 7 else "BA"[number % 2]
            logits[row, end, self.tokenizer.encode(letter)[0]] = 1.0
            logits[row, end, 3] = 5.0
        return logits


@pytest.mark.parametrize("batch_size", [1, 4])
def test_categorical(tokenizer, batch_size):
    score = evaluate(Letters(), Oracle(tokenizer), tokenizer, batch_size=batch_size, keep=[2, 8])
    assert (score.passed, score.total) == (7, 10)
    questions = [conversation["messages"][0]["content"] for conversation, _, _ in score.samples]
    assert [int(question.split()[-1]) for question in questions] == [2, 8]
    assert evaluate(Letters(), Oracle(tokenizer), tokenizer, max_problems=5).accuracy == 1
    with pytest.raises(UserError, match="at least one problem"):
        evaluate(Letters(), Oracle(tokenizer), tokenizer, max_problems=0)


# ---------------------------------------------------------------------------------------------------------
# Streaming


def pieces(tokenizer, ids):
    return list(stream_parts(tokenizer, ([[i], [1]] for i in ids)))


def test_characters_wait_until_they_are_whole(tokenizer):
    ids = tokenizer.encode("a 🙂é!")
    assert len(ids) > 6  # its characters are split over tokens
    parts = pieces(tokenizer, ids)
    assert "".join(text for _, text in parts) == "a 🙂é!"
    assert all("\ufffd" not in text for _, text in parts)
    assert pieces(tokenizer, ids[:3])[-1] == ("text", "\ufffd")


def test_tools_are_told_apart(tokenizer):
    special = tokenizer.encode_special
    call = [special("<|python_start|>"), *tokenizer.encode("1+1"), special("<|python_end|>")]
    output = tokenizer.encode("2", prepend="<|output_start|>", append="<|output_end|>")
    ids = [*tokenizer.encode("So "), *call, *output, *tokenizer.encode("is it."), special("<|assistant_end|>"), 65]
    content = join_parts(pieces(tokenizer, ids))
    assert content == [
        {"type": "text", "text": "So "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "is it."},
    ]
    assert join_parts([]) == ""
    assert join_parts([("text", "a"), ("text", "b")]) == "ab"
