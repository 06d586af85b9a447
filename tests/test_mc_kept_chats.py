"""Conversations that a server keeps on disk: they continue after a restart, and only their name gives access."""

import contextlib
import os
import stat
import threading
import time
from functools import partial
from types import SimpleNamespace

import openai
import pytest

from megacontext import streams
from megacontext.arrays import FILE, Arrays
from megacontext.chat_sessions import ChatSessions
from megacontext.kept_chats import KeptChats
from megacontext.session import MCSession
from nanochat.common import UserError
from nanochat.sampling import Sampling
from tests.helpers_server import CONTEXT, ask, gist_key, said, serving_mc, tiny


def name(i):
    return f"conversation-number-{i:04}"


def fact(i, turn):
    return f"In turn {turn} the secret of {i} is {i * 7919 + turn}. " * 2


class Chat:
    """A client's side, as the page has it: it sends all messages each time."""

    def __init__(self, i):
        self.i, self.messages, self.answers = i, [], []

    def say(self, server, turn):
        self.messages.append({"role": "user", "content": fact(self.i, turn)})
        options = {"conversation": name(self.i), "focus": True, "temperature": 0, "max_tokens": 20}
        replies = ask(server, self.messages, **options)
        self.answers.append(said(replies))
        self.messages.append({"role": "assistant", "content": self.answers[-1]})


@pytest.fixture
def serve(tokenizer, tmp_path):
    @contextlib.contextmanager
    def start(**options):
        with serving_mc(tokenizer, keep_in=tmp_path / "kept", **options) as server:
            yield server

    return start


def kept(tmp_path, tokenizer, **bounds):
    return KeptChats(tmp_path / "kept", gist_key(tokenizer), **bounds)


def test_chats_go_on_after_restarts_as_if_there_had_been_none(serve, tokenizer):
    chats, others = [Chat(i) for i in range(3)], [Chat(i) for i in range(3)]
    with serving_mc(tokenizer) as server:  # in memory
        for turn in range(6):
            for chat in others:
                chat.say(server, turn)
    for turn in range(6):
        with serve() as server:
            for chat in chats:
                chat.say(server, turn)
                session = server.sessions[0].held[-1].session
                assert session.num_tokens > turn * CONTEXT // 3
    assert [chat.answers for chat in chats] == [chat.answers for chat in others]


def job(prompt, ids=(), seed=0):
    more = {"sampling": Sampling(seed=seed), "focus": False, "compacted": False}
    return SimpleNamespace(prompt=prompt, ids=list(ids), conversation=name(1), **more)


def test_others_need_not_wait_until_a_session_is_made(tokenizer, tmp_path):
    """Of a long conversation gists may have to be made first. What fails leaves nothing behind, on the disk neither."""
    engine, networks, config = tiny(tokenizer)
    told = []

    def make_session(**options):
        telling = threading.Thread(target=lambda: told.append(chats.stats()["held"]), daemon=True)
        telling.start()
        telling.join(10)
        if len(told) == 1:
            raise MemoryError("on purpose")
        return MCSession(engine.model, networks, config, **options)

    chats = ChatSessions(make_session, config, 8, kept=kept(tmp_path, tokenizer))
    with pytest.raises(MemoryError), chats.serve(job([65] * 9)):
        pass
    assert chats.held == []
    with chats.serve(job([65] * 9, seed=7)) as session:
        assert session.seed == 7
        session.prefill([65] * 9)
    assert told == [1, 1]
    assert chats.held[0].is_kept
    session.close()


@pytest.mark.parametrize("known", [0, 300])
def test_a_message_that_is_given_up_is_not_kept_in_part(tokenizer, tmp_path, known):
    """Neither in memory nor on disk, although a long one has been committed by then; a new conversation is deleted."""
    engine, networks, config = tiny(tokenizer)
    disk = kept(tmp_path, tokenizer)
    chats = ChatSessions(partial(MCSession, engine.model, networks, config), config, 8, kept=disk)
    text = list(range(65, 97)) * 2000

    if known:
        with chats.serve(job(text[:known], [7])) as session:
            session.prefill(text[:known])
    with chats.serve(job(text)) as session:
        parts = session.reading(text, 1000)
        while session.num_tokens < 40_000:
            next(parts)
        assert len(disk.tokens(name(1), 0, 2**40)) > 16_000
        parts.close()
    assert disk.tokens(name(1), 0, 2**40) == (text[:known] if known else None)
    assert len(chats.held) == (1 if known else 0)
    for held in chats.held:
        held.session.close()


def test_what_was_kept_is_not_read_again(serve, monkeypatch):
    chat = Chat(1)
    with serve() as server:
        for turn in range(5):
            chat.say(server, turn)
    with serve() as server:
        appended = []
        append = streams.DiskStore.append

        def note(store, level, values):
            appended.append(values.size(1) if level == 0 else 0)
            append(store, level, values)

        monkeypatch.setattr(streams.DiskStore, "append", note)
        chat.say(server, 5)
        [session] = [held.session for held in server.sessions[0].held]
        assert sum(appended) < 150 < session.num_tokens


def test_eviction_from_memory_and_two_workers(serve):
    chats = [Chat(i) for i in range(4)]
    with serve(limit=1, workers=2) as server:
        for turn in range(4):
            for chat in chats:
                chat.say(server, turn)
    alone = [Chat(i) for i in range(4)]
    with serve() as server:
        for chat in alone:
            chat.i += 100
            chat.say(server, 0)
        stats = server.client.get("/stats").json()["workers"][0]["sessions"]["kept"]
        assert stats["kept"] == 8
        assert stats["refused"] == 0


def test_files_are_private_and_tell_no_names(serve, tmp_path):
    with serve() as server:
        Chat(5).say(server, 0)
        paths = list((tmp_path / "kept").rglob("*"))
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o600}
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o700}
        assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
        for path in paths:
            assert name(5) not in str(path)
            assert path.is_dir() or name(5).encode() not in path.read_bytes()


def test_another_name_gives_nothing_and_deleting_deletes(serve, tmp_path):
    with serve() as server:
        Chat(1).say(server, 0)

    def text(server, i):
        body = {"conversation": name(i), "spans": [[0, 1000]]}
        return server.client.post("/focus/text", json=body).json()["texts"][0]

    with serve() as server:
        assert fact(1, 0)[:20] in text(server, 1)  # before anything else was asked
        assert server.client.post("/focus", json={"conversation": name(1)}).json()["focus"]["num_tokens"] > 50
        assert text(server, 2) is None
        assert server.client.post("/focus", json={"conversation": name(2)}).json()["focus"] is None
        Chat(2).say(server, 0)
        assert len(list((tmp_path / "kept").iterdir())) == 2
        for i in (1, 2, 3):
            assert server.client.post("/forget", json={"conversation": name(i)}).json() == {}
            assert text(server, i) is None
        assert not list((tmp_path / "kept").iterdir())
        assert not server.sessions[0].held


def test_deleting_finds_the_worker(serve, tmp_path):
    """Whichever of two has the conversation, and with it the files."""
    with serve(workers=2) as server:
        for i in range(4):
            Chat(i).say(server, 0)
        assert all(sessions.held for sessions in server.sessions)
        for i in range(4):
            assert server.client.post("/forget", json={"conversation": name(i)}).status_code == 200
        assert not list((tmp_path / "kept").iterdir())
        assert not any(sessions.held for sessions in server.sessions)


def test_openai_clients_name_a_conversation_and_send_only_what_is_new(serve):
    def turn_of(server, i, turn):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        messages = [{"role": "user", "content": fact(7, turn)}]
        options = {"temperature": 0, "max_tokens": 20, "extra_body": {"conversation": name(i), "top_k": 50}}
        reply = client.chat.completions.create(model="nanochat-sft-d1", messages=messages, **options)
        return reply.choices[0].message.content, reply.usage.prompt_tokens

    with serve() as server:
        expected = [turn_of(server, 7, turn) for turn in range(3)]
    found = []
    for turn in range(3):
        with serve() as server:
            found.append(turn_of(server, 8, turn))
    assert found == expected
    assert found[2][1] > found[1][1] + 30 > found[0][1] + 60
    with serve() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        ask = {"model": "nanochat-sft-d1", "conversation": {"id": name(8)}, "max_output_tokens": 16}
        assert client.responses.create(input="And?", **ask).usage.input_tokens > found[2][1]
        body = {"messages": [{"role": "user", "content": "hi"}], "conversation": name(8)}
        refused = server.client.post("/v1/chat/completions", json=body | {"n": 2})
        assert "goes on with one answer" in refused.json()["error"]["message"]
        refused = server.client.post("/v1/chat/completions", json=body | {"conversation": "guessable"})
        assert refused.status_code == 400
        [held] = server.sessions[0].held
        held.job = SimpleNamespace(focus=False)  # of which a part would be taken for its answer
        refused = server.client.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (409, "conversation")
        held.job = None


def test_a_server_that_keeps_nothing_says_so(tokenizer):
    with serving_mc(tokenizer) as server:
        body = {"messages": [{"role": "user", "content": "hi"}], "conversation": name(1)}
        response = server.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert "start it with --mc --mc_tree disk" in response.json()["error"]["message"]


def test_bounds_of_count_size_and_age(serve, tmp_path, tokenizer):
    def left():
        return {i for i in range(20) if kept(tmp_path, tokenizer).record(name(i))}

    with serve(bounds={"count": 3}, limit=1) as server:
        for i in range(5):
            Chat(i).say(server, 0)
        assert left() == {2, 3, 4}
    size = kept(tmp_path, tokenizer).stats()["bytes"]
    with serve(bounds={"gigabytes": 0.7 * size / 1e9}, limit=1) as server:
        Chat(5).say(server, 0)
        assert left() == {3, 4, 5}
    for folder in (tmp_path / "kept").iterdir():
        os.utime(folder, (time.time() - 7200, time.time() - 7200))
    with serve(bounds={"days": 1 / 24}) as server:
        Chat(6).say(server, 0)
        assert left() == {6}


def test_what_is_kept_is_measured_once(serve, monkeypatch):
    """A thousand conversations take 0.13 s to measure: not at each new one, nor whenever somebody asks for /health."""
    measured, size_of = [], streams.size_of
    monkeypatch.setattr(streams, "size_of", lambda folder: measured.append(folder) or size_of(folder))
    with serve() as server:
        for i in range(6):
            Chat(i).say(server, 0)
        assert len(measured) <= 2 * 6  # not 0 + 1 + … + 5
        asked = server.client.get("/stats").json()["workers"][0]["sessions"]["kept"]
        assert asked["bytes"] == sum(map(size_of, server.sessions[0].kept.folders()))
        measured.clear()
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/stats").json()["workers"][0]["sessions"]["kept"] == asked
        assert not measured


def test_damage_costs_the_memory_and_not_the_chat(serve, tmp_path, caplog):
    chat = Chat(1)
    with serve() as server:
        for turn in range(3):
            chat.say(server, turn)
    [folder] = (tmp_path / "kept").iterdir()
    (folder / FILE).write_bytes(b"no database")
    with serve() as server:
        assert server.client.post("/focus", json={"conversation": name(1)}).json()["focus"] is None
        assert "cannot be shown" in caplog.text
        chat.say(server, 4)
        assert server.sessions[0].held[0].is_kept
    assert "is set aside" in caplog.text
    assert len(list((tmp_path / "kept").iterdir())) == 2
    (folder / FILE).unlink()
    with serve() as server:
        chat.say(server, 5)
        assert server.sessions[0].held[0].is_kept
        assert server.client.get("/stats").json()["workers"][0]["sessions"]["kept"]["kept"] == 3


def test_a_disk_that_refuses_costs_no_answer(serve, tmp_path, monkeypatch, caplog):
    chat = Chat(1)
    with serve() as server:
        chat.say(server, 0)

        def refuse(*args, **kwargs):
            raise UserError("no space")

        monkeypatch.setattr(streams.DiskStore, "commit", refuse)
        chat.say(server, 1)
        assert "an answer is not kept: no space" in caplog.text
        monkeypatch.undo()
        chat.say(server, 2)
        stats = server.client.get("/stats").json()["workers"][0]["sessions"]["kept"]
        assert stats["refused"] == 1
        tokens = server.sessions[0].held[0].session.num_tokens
    [folder] = (tmp_path / "kept").iterdir()
    assert Arrays(folder).rows("tokens") == tokens
