"""Round trips, the chat format, safe loading, bytes per token."""

import json
import pickle

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    RustBPETokenizer,
    count_token_bytes,
)
from tests.helpers import TEXT


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode([text, text]) == [ids, ids]
    assert [array.tolist() for array in tokenizer.encode_to_numpy([text], num_threads=2)] == [ids]
    assert b"".join(tokenizer.id_to_bytes(i) for i in ids) == text.encode()


def test_sizes_and_special_tokens(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert [tokenizer.encode_special(t) for t in SPECIAL_TOKENS] == list(range(291, 300))
    assert tokenizer.get_special_tokens() == set(SPECIAL_TOKENS)
    assert tokenizer.get_bos_token_id() == 291
    assert tokenizer.decode([291]) == "<|bos|>"


def test_special_tokens_in_text_stay_text(tokenizer):
    special = {tokenizer.encode_special(t) for t in SPECIAL_TOKENS}
    text = "a <|assistant_start|> b <|bos|>"
    for ids in (tokenizer.encode(text), tokenizer.encode([text])[0], tokenizer.encode_to_numpy([text])[0].tolist()):
        assert not special & set(ids)
        assert tokenizer.decode(ids) == text


def test_prepend_and_append(tokenizer):
    plain = tokenizer.encode("hi")
    bos = tokenizer.get_bos_token_id()
    assert tokenizer("hi", prepend="<|bos|>", append=5) == [bos, *plain, 5]
    assert tokenizer.encode(["hi"], prepend=bos) == [[bos, *plain]]
    with pytest.raises(TypeError, match="a str or a list of str, got bytes"):
        tokenizer.encode(b"hi")


@pytest.mark.parametrize("text", ["a{}b", "\n{}!\n{}"])
def test_a_million_blanks_are_text_too(tokenizer, text):
    text = text.replace("{}", " " * 1_000_000)
    with pytest.raises(ValueError, match="stack"):  # what tiktoken does with it
        tokenizer.enc.encode(text)
    ids = tokenizer.encode(text)
    assert tokenizer.encode([text]) == [ids]
    assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=" \t\n\r\xa0\u2003\x1c\x85a1'!é"), st.integers(2, 4))
def test_long_runs_apart_give_the_same_tokens(tokenizer, text, length):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.tokenizer.LONG_RUN", length)
        assert tokenizer._ids_around_runs(text).tolist() == tokenizer.enc.encode_ordinary(text)


def test_a_text_that_cannot_be_cut_is_named(tokenizer):
    enc = tiktoken.Encoding(
        "x", pat_str=r"(\w|\s)+(?!\S)|\S", mergeable_ranks=tokenizer.enc._mergeable_ranks, special_tokens={}
    )
    with pytest.raises(UserError, match=r"2,000,000 characters that begins 'ababab.*remove the text"):
        RustBPETokenizer(enc).encode("ab" * 1_000_000)


def test_half_a_surrogate_pair_is_encoded(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode_to_numpy(["\ud83d\ude00"])[0].tolist() == tokenizer.encode("😀")


def test_vocab_size_too_small():
    with pytest.raises(UserError, match="at least 265 .* got 264"):
        RustBPETokenizer.train_from_iterator(["x"], 264)


def test_bytes_of_tokens_are_those_of_the_raw_bytes(tokenizer):
    counts = count_token_bytes(tokenizer).tolist()
    assert counts[:256] == [1] * 256  # also those that are no character by themselves
    assert counts[291:] == [0] * 9
    text = "naïve 你好 🌍 def double(x)"
    assert sum(counts[i] for i in tokenizer.encode(text)) == len(text.encode())


# ---------------------------------------------------------------------------------------------------------
# Files


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bpe.json", "tokenizer.pkl"]
    by_nanochat = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert isinstance(by_nanochat, tiktoken.Encoding)
    assert by_nanochat.name == "rustbpe"
    text = "".join(TEXT)
    for remove in (None, "bpe.json"):  # without our file, nanochat's is read
        if remove:
            (tmp_path / remove).unlink()
        loaded = RustBPETokenizer.from_directory(tmp_path)
        assert loaded.encode(text) == tokenizer.encode(text) == by_nanochat.encode_ordinary(text)
        assert loaded.get_special_tokens() == tokenizer.get_special_tokens()


class Evil:
    def __reduce__(self):
        return (print, ("this pickle was executed",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"an": "ordinary dict"}),
        pickle.dumps(tiktoken.Encoding)[:-1],
        b"",
        b"not a pickle",
    ],
)
def test_foreign_pickle_is_refused_without_running_it(content, tmp_path, capsys):
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(UserError, match="is not a pickled tiktoken.Encoding, and nothing in it was run"):
        RustBPETokenizer.from_directory(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_pickle_by_name_is_refused(tmp_path):
    class ByName:  # what tiktoken writes for its own encodings: loading it would fetch a vocabulary
        def __reduce__(self):
            return (object.__new__, (tiktoken.Encoding,), "gpt2")

    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(ByName(), protocol=2))
    with pytest.raises(UserError, match="nothing in it was run"):
        RustBPETokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda s: s[: len(s) // 2], lambda s: "{}", lambda s: s.replace('"AA=="', '"AQ=="', 1)]
)
def test_damaged_bpe_json(damage, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "bpe.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match="bpe.json is damaged"):
        RustBPETokenizer.from_directory(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="run python -m scripts.tok_train"):
        RustBPETokenizer.from_directory(tmp_path)


def test_json_holds_plain_data(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    data = json.loads((tmp_path / "bpe.json").read_text())
    assert data["pattern"] == SPLIT_PATTERN
    assert len(data["tokens"]) == 291


# ---------------------------------------------------------------------------------------------------------
# Chat

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 3 + 4?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see: "},
                {"type": "python", "text": "3 + 4"},
                {"type": "python_output", "text": "7"},
                {"type": "text", "text": "It is 7."},
            ],
        },
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ]
}


def test_render_conversation(tokenizer):
    expected = []  # (text or special token, mask)
    expected += [
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("Be brief.\n\nWhat is 3 + 4?", 0),
        ("<|user_end|>", 0),
    ]
    expected += [("<|assistant_start|>", 0), ("Let me see: ", 1)]
    expected += [("<|python_start|>", 1), ("3 + 4", 1), ("<|python_end|>", 1)]
    expected += [("<|output_start|>", 0), ("7", 0), ("<|output_end|>", 0)]
    expected += [("It is 7.", 1), ("<|assistant_end|>", 1)]
    expected += [("<|user_start|>", 0), ("Thanks", 0), ("<|user_end|>", 0)]
    expected += [("<|assistant_start|>", 0), ("Bye", 1), ("<|assistant_end|>", 1)]
    ids, mask = [], []
    for text, trained in expected:
        part = [tokenizer.encode_special(text)] if text in SPECIAL_TOKENS else tokenizer.encode(text)
        ids += part
        mask += [trained] * len(part)
    assert tokenizer.render_conversation(CHAT) == (ids, mask)
    assert tokenizer.render_conversation(CHAT, max_tokens=10) == (ids[:10], mask[:10])
    cut = len(tokenizer.encode("Bye")) + 1
    assert tokenizer.render_for_completion(CHAT) == ids[:-cut]
    asked = {"messages": CHAT["messages"][:-1]}
    assert tokenizer.render_for_completion(asked) == ids[:-cut]
    assert len(CHAT["messages"]) == 5  # left as it was


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "at least one message"),
        ([{"role": "system", "content": "x"}], "a user message after the system message"),
        ([{"role": "assistant", "content": "x"}], "message 0: expected role 'user', got 'assistant'"),
        ([{"role": "user", "content": "x"}] * 2, "message 1: expected role 'assistant', got 'user'"),
        ([{"role": "user", "content": ["x"]}], "a user's content is a str, got list"),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": [{"type": "image", "text": ""}]},
            ],
            "part type is one of .* got 'image'",
        ),
    ],
)
def test_bad_conversations(messages, error, tokenizer):
    with pytest.raises(ValueError, match=error):
        tokenizer.render_conversation({"messages": messages})


def test_nothing_to_complete(tokenizer):
    with pytest.raises(ValueError, match="a user message for the assistant to answer"):
        tokenizer.render_for_completion({"messages": [{"role": "assistant", "content": "x"}]})
