"""chat_web with --mc, over real sockets, on a tiny model of random weights: a session per conversation, never two's."""

import contextlib
import dataclasses
import gc
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import pytest
import torch

from megacontext.inference import MCInference
from megacontext.kept_chats import KeptChats
from megacontext.session import MCSession
from megacontext.streams import gist_sets, missing_gists
from megacontext.telemetry.events import tell_session
from nanochat import checkpoint_manager as cm
from nanochat.common import UserError
from nanochat.serving.schema import Limits
from nanochat.serving.worker_pool import ServedModel, WorkerPool
from nanochat.tokenizer import readable, stream_parts
from scripts import chat_web
from tests.helpers import Told, until, write_tokenizer
from tests.helpers_server import BUDGET, CONTEXT, MODEL, K, Script, ask, events, said, serving, serving_mc, tiny


@pytest.fixture
def serve(tokenizer):
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving_mc(tokenizer, **options))


def name(i):
    return f"conversation-number-{i:04}"


def user(text):
    return {"role": "user", "content": text}


class Chat:
    """A client's side of one conversation. named: with a name and the focus, as the page; else as OpenAI's clients."""

    def __init__(self, server, i=0, named=True, **options):
        self.server, self.i, self.messages = server, i, []
        self.options = {"temperature": 0, "max_tokens": 24, **options}
        if named:
            self.options |= {"conversation": name(i), "focus": True}

    def say(self, text):
        """The answer, as text; .states: the focus events beside it."""
        self.messages.append(user(text))
        replies = ask(self.server, self.messages, **self.options)
        self.states = [reply["focus"] for reply in replies if "focus" in reply]
        self.end = replies[-1]
        self.messages.append({"role": "assistant", "content": said(replies)})
        return said(replies)

    def fact(self, turn):
        return f"In turn {turn} the secret of {self.i} is {self.i * 7919 + turn}. " * 2


# ---------------------------------------------------------------------------------------------------------
# A session per conversation


def test_far_beyond_the_context(serve, tokenizer):
    """Ten times the context; never above the budget; the session reads only what is new."""
    server = serve()
    chat = Chat(server)
    for turn in range(16):
        chat.say(chat.fact(turn))
        assert chat.end["done"]
        for state in chat.states:
            assert state["entries"] <= state["budget"] == BUDGET
    assert chat.states[-1]["num_tokens"] > 10 * CONTEXT
    assert len(server.made) == 1
    worker = server.client.get("/stats").json()["workers"][0]
    stats = worker["sessions"]
    assert (stats["held"], stats["limit"], stats["evicted"]) == (1, 8, 0)
    assert stats["tokens"] == chat.states[-1]["num_tokens"] == server.made[0].num_tokens
    assert stats["bytes"] == sum(server.made[0].memory().values()) > 0
    mc = server.client.get("/config").json()["mc"]
    assert mc == {"budget": BUDGET, "block_size": K, "sessions": 8, "refocus_interval": 4}


@pytest.mark.parametrize("named", [True, False])
def test_conversations_never_mix(serve, named):
    """Chats that take turns get, token for token, what each gets on a server of its own."""
    server = serve()
    chats = [Chat(server, i, named) for i in range(3)]
    together = [[chat.say(chat.fact(turn)) for chat in chats] for turn in range(5)]
    assert len(server.made) == 3
    for i in range(3):
        own = Chat(serve(), i, named)
        alone = [own.say(own.fact(turn)) for turn in range(5)]
        assert alone == [answers[i] for answers in together]
    assert len({answers for turn in together for answers in turn}) > 3, "else it says nothing"


def test_a_session_holds_its_own_tokens_only(serve, tokenizer):
    """Whatever is asked in whatever order: what a session holds is its conversation, to the token."""
    server = serve(limit=2)
    chats = [Chat(server, i, named=i % 2 == 0) for i in range(4)]
    for turn, i in enumerate([0, 1, 0, 2, 3, 1, 0, 2, 2, 3, 0]):
        chats[i].say(chats[i].fact(turn))
        held = server.sessions[0].held[-1]
        session = held.session
        ids = session.tree.store.get(0, torch.arange(session.num_tokens)[None])[0].tolist()
        prompt = tokenizer.render_for_completion({"messages": chats[i].messages})
        assert ids[: len(prompt)] == prompt
        assert ids[len(prompt) :] == held.answer[: len(ids) - len(prompt)]
        pieces = stream_parts(tokenizer, (([id], [1]) for id in held.answer))
        assert "".join(text for kind, text in pieces if kind == "text") == chats[i].messages[-1]["content"]
        assert len(server.sessions[0].held) <= 2


def test_how_a_conversation_is_recognized(serve):
    server = serve()
    sessions = server.sessions[0]

    def made_by(action):
        before = len(server.made)
        action()
        return len(server.made) - before

    plain = Chat(server, 1, named=False)
    assert made_by(lambda: plain.say("Hello")) == 1
    assert made_by(lambda: plain.say("And now?")) == 0
    other = Chat(server, 2, named=False)
    assert made_by(lambda: other.say("Good day")) == 1, "all that they share is how chats begin"
    assert made_by(lambda: plain.say("Still there?")) == 0
    regenerated = Chat(server, 1, named=False)
    regenerated.messages = plain.messages[:-2]
    assert made_by(lambda: regenerated.say("Still there?")) == 0
    mine = Chat(server, 3)
    assert made_by(lambda: mine.say("Hello")) == 1, "what has a name goes on with nothing else"
    mine.messages = []
    assert made_by(lambda: mine.say("From the beginning")) == 0, "however its beginning is edited"
    without = Chat(server, 3, named=False)
    assert made_by(lambda: without.say("From the beginning")) == 1, "nor can it be had without its name"
    assert len(sessions.held) == 4


def test_eviction_loses_nothing(serve, tokenizer):
    """A bounded number; who was away comes back with all of it, and short chats answer as if they had never gone."""
    server, roomy = serve(limit=2), serve(limit=8)
    for target in (server, roomy):
        target.chats = [Chat(target, i, max_tokens=4) for i in range(5)]
        target.answers = [chat.say(f"Fact {chat.i}") for _ in range(2) for chat in target.chats]
    assert server.answers == roomy.answers
    sessions = server.sessions[0]
    assert len(sessions.held) == 2
    assert sessions.stats()["evicted"] == 8
    assert server.client.get("/stats").json()["workers"][0]["sessions"]["held"] == 2
    long = Chat(server, 9)
    for turn in range(6):
        long.say(long.fact(turn))
        server.chats[turn % 5].say("Now me")
        server.chats[(turn + 1) % 5].say("And me")  # so that `long` is gone
    long.say("Do you remember?")
    prompt = tokenizer.render_for_completion({"messages": long.messages[:-1]})
    assert long.states[0]["num_tokens"] == len(prompt) > 4 * CONTEXT
    assert long.states[0]["entries"] <= BUDGET
    assert sum(session.tree is not None for session in [held.session for held in sessions.held]) == 2


def test_two_workers(serve):
    """A turn goes to the worker that has the conversation, and waits for it if need be."""
    server = serve(workers=2)
    chats = [Chat(server, i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for turn in range(3):
            list(pool.map(lambda chat, turn=turn: chat.say(chat.fact(turn)), chats))
        list(pool.map(lambda turn: Chat(server, 0).say(chats[0].fact(turn)), range(4)))
    assert all(sessions.held for sessions in server.sessions)
    assert len(server.made) == 4, "none is read by two"


def test_a_worker_that_answers_in_a_conversation_keeps_it(serve, tmp_path):
    """A message that comes meanwhile waits for it, although another worker is free: it would not have the files."""
    server = serve(workers=2, keep_in=tmp_path / "kept")
    with ThreadPoolExecutor(2) as pool:
        pool.submit(Chat(server, max_tokens=400).say, "Hello")
        until(lambda: any(sessions.held for sessions in server.sessions))
        Chat(server).say("Hello again")
    assert len(server.made) == 1
    assert [held.is_kept for sessions in server.sessions for held in sessions.held] == [True]


# ---------------------------------------------------------------------------------------------------------
# What may go wrong


def test_a_client_that_leaves(serve):
    """Cancelled in the middle, the session goes on from there; the answer is that of one that never left."""
    server = serve()
    chat = Chat(server)
    chat.say("Hello")
    body = {"messages": [*chat.messages, user("Go on")], **chat.options, "max_tokens": 4000}
    with server.client.stream("POST", "/chat/completions", json=body) as response:
        lines = response.iter_lines()
        while "token" not in next(lines):
            pass
    until(server.pool.is_idle)
    assert server.pool.totals["cancelled"] == 1
    assert len(server.sessions[0].held) == 1
    chat.say("Are you still there?")
    assert chat.end["done"]
    assert len(server.made) == 1
    assert server.made[0].tree is not None


BLANKS = [" " * 1_000_000 + "x", "x" + " " * 1_000_000 + "\n"]


@pytest.mark.parametrize("text", BLANKS, ids=["before a word", "before a line's end"])
def test_a_run_of_a_million_blanks(serve, text):
    """Is read as any text, in seconds; the model is told of all of it."""
    server = serve()
    began = time.monotonic()
    assert len(said(ask(server, [user(text)], max_tokens=9))) > 1
    assert time.monotonic() - began < 60  # a loaded machine was seen to need more than 20
    [held] = server.sessions[0].held
    assert server.pool.tokenizer.decode(held.prompt.tolist()).count(" ") == 1_000_000


@pytest.mark.parametrize(("path", "more"), [("/chat/completions", {}), ("/v1/chat/completions", {"model": MODEL.id})])
def test_a_text_that_the_tokenizer_cannot_take(serve, path, more, monkeypatch):
    server = serve()
    fault = UserError("expected a text that can be split into words: shorten it")
    monkeypatch.setattr(server.pool.tokenizer, "render_for_completion", Mock(side_effect=fault), raising=True)
    response = server.client.post(path, json={"messages": [user("hi")], **more})
    assert response.status_code == 400
    assert str(fault) in response.text
    assert server.pool.is_idle()


def test_a_fault_costs_the_session_and_no_more(serve):
    server = serve()
    chat = Chat(server)
    chat.say("Hello")
    server.made[0].fault = RuntimeError("out of memory")
    replies = ask(server, [*chat.messages, user("And?")], **chat.options)
    assert replies[-1] == {"error": "the model failed on this request"}
    assert server.made[0].tree is None
    assert server.sessions[0].held == []
    chat.say("Hello again")
    assert chat.end["done"]
    assert len(server.made) == 2


def test_while_every_session_is_busy(serve):
    """With a single one, a second conversation waits for the worker, is served, and the first comes back."""
    server = serve(limit=1)
    chats = [Chat(server, i, max_tokens=60) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for turn in range(3):
            list(pool.map(lambda chat, turn=turn: chat.say(chat.fact(turn)), chats))
    assert all(chat.end["done"] for chat in chats)
    assert len(server.sessions[0].held) == 1
    assert sum(session.tree is not None for session in server.made) == 1


def test_too_long_even_for_summaries(serve):
    """Of 64 entries, 8 recent tokens and 4 until the next refocus leave room for millions; of 14, for next to none."""
    server = serve()
    sessions = server.sessions[0]
    assert sessions.fits(3_000_000)
    sessions.config = dataclasses.replace(sessions.config, allocator_soft_max=14)
    response = server.client.post("/chat/completions", json={"messages": [user("long " * 2000)]})
    assert response.status_code == 400
    assert "too many even for summaries" in response.json()["detail"]


# ---------------------------------------------------------------------------------------------------------
# The side channel


def test_focus_is_told_to_who_asks(serve):
    """As events of their own in the native stream: at the prefill, at each refocus, at the end; never in /v1."""
    server = serve()
    body = {"messages": [user("Hello there. " * 20)], "temperature": 0, "max_tokens": 21}
    response = server.client.post("/chat/completions", json={**body, "conversation": name(0), "focus": True})
    lines = response.text.split("\n")
    states = [event["focus"] for event in events(lines) if "focus" in event]
    assert lines.count("event: focus") == len(states)
    first = next(i for i, event in enumerate(events(lines)) if "token" in event)
    assert "focus" in events(lines)[0], "before the first word"
    assert first == 1
    numbers = [state["num_tokens"] for state in states]
    assert numbers == sorted(numbers)
    assert 1 + 20 // 4 <= len(states) <= 22, "the prompt, then 20 tokens read, a refocus each 4 at least"
    for state in states:
        assert sum(blocks for _, blocks in state["lod"]) == -(-state["num_tokens"] // K)
        assert state["block_size"] == K
    assert server.client.post("/focus", json={"conversation": name(0)}).json() == {"focus": states[-1]}
    for focus in ({}, {"focus": False}):
        replies = ask(server, body["messages"], conversation=name(1), max_tokens=8, **focus)
        assert not any("focus" in reply for reply in replies)
    v1 = {"model": MODEL.id, "messages": body["messages"], "max_tokens": 12, "stream": True}
    text = server.client.post("/v1/chat/completions", json=v1).text
    assert "focus" not in text
    assert text.endswith("data: [DONE]\n\n")


def test_text_of_a_block(serve, tokenizer):
    server = serve()
    chat = Chat(server, max_tokens=40)
    chat.say("The first fact is 1234. " * 6)

    def text(start, end, i=0):
        body = {"conversation": name(i), "spans": [[start, end]]}
        return server.client.post("/focus/text", json=body).json()["texts"][0]

    prompt = tokenizer.render_for_completion({"messages": chat.messages})
    for block in range(len(prompt) // K):
        assert text(block * K, (block + 1) * K) == readable(tokenizer, prompt[block * K : (block + 1) * K])
    assert text(0, 5).startswith("You: Th")
    held = server.sessions[0].held[0]
    assert text(0, 10**9) == readable(tokenizer, [*prompt, *held.answer][:256])
    assert text(len(prompt) - 1, len(prompt) + 5).startswith("Answer:"), "what is being said, too"
    assert text(10**6, 10**6 + 4) == ""
    assert text(0, 4, i=1) is None
    assert server.client.post("/focus", json={"conversation": name(1)}).json() == {"focus": None}
    for who, spans in (("", []), ("short", [[0, 4]]), (name(0), [[1]]), (name(0), [[-1, 4]])):
        body = {"conversation": who, "spans": spans}
        assert server.client.post("/focus/text", json=body).status_code == 400
    assert server.client.post("/focus", json={"conversation": "../" * 10}).status_code == 400


def test_without_mc_there_is_nothing_of_it(tokenizer):
    with serving(Script(tokenizer)) as server:
        replies = ask(server, conversation=name(0), focus=True)
        assert said(replies) == "Hello there."
        assert not any("focus" in reply for reply in replies)
        assert "mc" not in server.client.get("/config").json()
        assert "sessions" not in server.client.get("/stats").json()["workers"][0]
        for path, more in (("/focus", {}), ("/focus/text", {"spans": [[0, 1]]})):
            response = server.client.post(path, json={"conversation": name(0), **more})
            assert response.status_code == 404
            assert "without --mc" in response.json()["detail"]


def test_size_of_an_event_is_bounded_by_the_budget(tokenizer):
    """At 300,000 tokens as at 1,000: what is told grows with the entries, not with the stream."""
    engine, networks, config = tiny(tokenizer)
    sizes = []
    for n in (1_000, 300_000):
        session = MCSession(engine.model, networks, config, decoder=engine.decoder)
        session.prefill(torch.randint(0, 255, (n,)).tolist())
        sizes.append(len(json.dumps(session.focus_state())))
    assert max(sizes) < 40 * CONTEXT


# ---------------------------------------------------------------------------------------------------------
# Telemetry, and the program


def test_what_spans_tell(serve):
    told, jobs = Told(), []
    server = serve(on_update=partial(tell_session, told), on_end=lambda job, outcome: jobs.append((job, outcome)))
    chat = Chat(server, max_tokens=2)
    chat.say("Hi")
    until(lambda: jobs)
    names = {event for event, _ in told.events}
    assert names == {"mc_tree_snapshot", "working_context_snapshot", "focus_allocator", "inference_update"}
    chat.say(chat.fact(0) * 3)
    until(lambda: len(jobs) == 2)
    compacted = [chat_web.chat_attributes(*job, "m")["gen_ai.conversation.compacted"] for job in jobs]
    assert compacted == [False, True]


def save(base_dir, tokenizer, tag, mc):
    engine, networks, config = tiny(tokenizer)
    folder = cm.checkpoint_root("sft") / tag
    facts = {"model_config": dataclasses.asdict(engine.model.config)}
    if mc:
        facts["megacontext"] = dataclasses.asdict(config)
    networks = networks.state_dict() if mc else None
    cm.save_checkpoint(folder, 3, engine.model.state_dict(), None, facts, companion_data=networks)


@pytest.fixture
def checkpoints(base_dir, tokenizer):
    write_tokenizer(tokenizer, base_dir)
    save(base_dir, tokenizer, "mc", True)
    save(base_dir, tokenizer, "plain", False)


def config_of(**options):
    return chat_web.Config(port=0, host="127.0.0.1", device_type="cpu", dtype="fp32", **options)


def test_mistakes(checkpoints):
    with pytest.raises(UserError, match=r"plain, step 3 .*has no GistNet.*scripts\.mc_train"):
        chat_web.main(config_of(model_tag="plain", mc=True))
    with pytest.raises(UserError, match="--stream: expected --mc with it"):
        chat_web.main(config_of(model_tag="mc", stream="library"))
    options = MCInference(mc_tree="disk")
    with pytest.raises(UserError, match="--stream: expected --mc_tree=ram"):
        chat_web.main(config_of(model_tag="mc", mc=True, stream="library", megacontext=options))
    options = MCInference(allocator_soft_max=12)
    with pytest.raises(UserError, match="--allocator_soft_max: expected at least"):
        chat_web.main(config_of(model_tag="mc", mc=True, megacontext=options))


def test_limits_grow_with_mc():
    assert chat_web.limits_of(config_of()) == Limits(500, 8000, 32000)
    assert chat_web.limits_of(config_of(mc=True)) == Limits(20_000, 2_000_000, 2_000_000)
    assert chat_web.limits_of(config_of(max_conversation_chars=90)) == Limits(500, 90, 90)
    assert chat_web.limits_of(config_of(mc=True, max_conversation_chars=90)) == Limits(20_000, 90, 90)


def test_loading(checkpoints):
    config = config_of(model_tag="mc", mc=True, mc_sessions=3)
    engine, served, sessions = chat_web.load(config, torch.device("cpu"), None)
    assert served == ServedModel("sft", "mc", 3)
    assert sessions.limit == 3
    pool = WorkerPool()
    pool.start([engine], served, [sessions])
    shown = chat_web.describe(config, pool, chat_web.limits_of(config), 80, "")
    pool.close()
    assert (
        f"focus   a working context of {BUDGET} entries, blocks of 4 tokens, 3 conversations in memory per worker"
        in shown
    )
    assert "2,000,000 in all" in shown
    config = config_of(model_tag="mc")
    assert chat_web.load(config, torch.device("cpu"), None)[2] is None


def test_conversations_of_another_model_get_their_gists_in_the_background(checkpoints, base_dir):
    config = config_of(model_tag="mc", mc=True, megacontext=MCInference(mc_tree="disk"))
    kept = chat_web.load(config, torch.device("cpu"))[2].kept
    older = KeptChats(kept.root, kept.gist_key | {"model": "older"})
    store = older.open(name(1))
    store.append(0, torch.arange(50)[None])
    store.append(1, torch.ones(1, 12, 16))
    store.commit()
    store.close()
    [folder] = kept.folders()
    assert missing_gists(folder, kept.gist_key) == 12
    chat_web.load(config, torch.device("cpu"))
    until(lambda: missing_gists(folder, kept.gist_key) == 0)
    assert len(gist_sets(folder)) == 2


# ---------------------------------------------------------------------------------------------------------
# Many at once


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def chat_for(server, i, end, turns):
    """Turns of one conversation until `end`; begun anew after so many, for ever the same work."""
    with httpx.Client(base_url=server.url, timeout=120, verify=False) as client:
        mine = SimpleNamespace(client=client)
        number, done = i, 0
        while time.monotonic() < end:
            chat = Chat(mine, number, named=i % 2 == 0, temperature=1, seed=1, max_tokens=12)
            for turn in range(turns):
                chat.say(chat.fact(turn))
                done += 1
                if chat.states:
                    prompt_end = chat.states[-1]["num_tokens"]
                    body = {"conversation": name(number), "spans": [[0, min(prompt_end, 40)]]}
                    [text] = client.post("/focus/text", json=body).json()["texts"]
                    assert text is None or text.startswith(f"You: {chat.fact(0)}"[:30])
                if time.monotonic() > end:
                    break
            number += 100
        return done


def test_twenty_at_once(serve):
    """Bounded sessions, bounded memory, nobody sees anyone else's words."""
    server = serve(limit=8, queue_size=64)
    with ThreadPoolExecutor(20) as pool:
        sizes = []
        for _ in range(3):
            end = time.monotonic() + 2
            done = sum(pool.map(lambda i, end=end: chat_for(server, i, end, turns=4), range(20)))
            gc.collect()
            sizes.append(resident())
            assert done >= 20
            assert len(server.sessions[0].held) <= 8
    assert sizes[2] - sizes[1] < 30e6, sizes
    assert server.pool.totals["failed"] == 0
    assert sum(session.tree is not None for session in server.made) <= 8
