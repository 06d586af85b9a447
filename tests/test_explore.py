"""Looking through a long conversation: parts, edits and searches; over HTTP and in a real browser."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from playwright.sync_api import expect

from megacontext.lensnet import KEY
from megacontext.look import look
from megacontext.session import MCSession
from megacontext.streams import create_stream, open_store
from megacontext.tree import MegaContextTree
from nanochat.find import find_text
from nanochat.tokenizer import readable
from tests.helpers import SESSION_GPT, K, disturbed_networks, make_model, session_settings
from tests.helpers_browser import ask as ask_page
from tests.helpers_browser import finished
from tests.helpers_server import ask, gist_key, serving_mc, tiny

NAME = "conversation-number-0001"


# ---------------------------------------------------------------------------------------------------------
# LensNet's answer


class Wanting:
    """A lens that wants the blocks of some tokens."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def keys(self, children, before):
        return torch.zeros(len(children), KEY)

    def asking(self, states, embeds, at):
        return states

    def wanted(self, asking, keys, beside=0.0):
        z = torch.full((1, keys.size(1)), -1.0)
        z[0, [token // K for token in self.tokens]] = 3.0
        return z


class Networks:
    def __init__(self, gistnet, lensnet):
        self.gistnet, self.lensnet = gistnet, lensnet


@pytest.mark.parametrize("tokens", [(5,), (700, 2900), (0, 1111, 2222)], ids=str)
def test_look_finds_the_blocks_that_the_lens_wants_and_changes_nothing(tokens):
    config = session_settings(allocator_soft_max=96)
    lens, model = Wanting(*tokens), make_model(SESSION_GPT).eval()
    session = MCSession(model, Networks(disturbed_networks(config).gistnet, lens), config)
    session.prefill(torch.randint(0, 290, (3001,), generator=torch.Generator().manual_seed(1)).tolist())
    before = session.state()
    places = look(session, [1, 2, 3], most=5)
    assert session.state() == before
    assert {place.block for place in places[: len(tokens)]} == {token // K for token in tokens}
    assert all(place.lod == int(session.context.lod_map[0, place.block]) for place in places)
    assert [place.score for place in places] == sorted((place.score for place in places), reverse=True)
    assert len(places) == 5


def test_look_in_a_stream_of_less_than_a_block():
    config = session_settings()
    session = MCSession(make_model(SESSION_GPT).eval(), disturbed_networks(config), config)
    assert look(session, [1]) == []
    session.prefill([1, 2])
    assert look(session, [1]) == []


# ---------------------------------------------------------------------------------------------------------
# Text


def test_text_is_found_in_pieces_and_pages(tokenizer, monkeypatch):
    monkeypatch.setattr("nanochat.find.PIECE_TOKENS", 50)
    text = "A needle, then hay. " * 60 + "ÄÖ"
    ids = tokenizer.encode(text)
    places = list(find_text(lambda a, b: ids[a:b], tokenizer, "NEEDLE", 0, 10**9))
    assert len(places) == 60
    assert all("needle" in tokenizer.decode(ids[a:b]) for a, b in places)
    middle = list(find_text(lambda a, b: ids[a:b], tokenizer, "needle", 100, 200))
    assert middle == [place for place in places if 100 <= place[0] < 200]
    assert list(find_text(lambda a, b: ids[a:b], tokenizer, "äö", 0, 10**9)) == []  # A to Z only
    assert len(list(find_text(lambda a, b: ids[a:b], tokenizer, "ÄÖ", 0, 10**9))) == 1


# ---------------------------------------------------------------------------------------------------------
# Over HTTP


def post(server, path, **body):
    answer = server.client.post(f"/focus/{path}", json={"conversation": NAME, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def talk(server, turns=4):
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"In turn {turn} the secret number is {turn * 7919}. " * 3})
        ask(server, messages, conversation=NAME, focus=True, max_tokens=24, top_k=50)
        messages.append({"role": "assistant", "content": "Yes."})


def check_looking(server, tokenizer, tokens):
    whole = readable(tokenizer, tokens)
    spans = [[0, K], [3 * K, 4 * K], [3 * K, 3 * K + 9], [10**9, 10**9 + 1]]
    assert post(server, "text", spans=spans)["texts"] == [readable(tokenizer, tokens[a:b]) for a, b in spans]
    found = post(server, "find", text="SECRET number is 7919")
    assert len(found["found"]) == whole.lower().count("secret number is 7919") == 3
    assert found["next"] is None
    for place in found["found"]:
        assert "secret number is 7919" in place["text"]
        assert "7919" in tokenizer.decode(tokens[place["start"] : place["end"]])
    places = post(server, "look", text="What was the secret number?")["found"]
    assert places == sorted(places, key=lambda place: -place["score"])
    assert all(place["block"] < len(tokens) // K for place in places)
    edits = post(server, "edits")["edits"]
    assert [edit["num_tokens"] for edit in edits] == sorted(edit["num_tokens"] for edit in edits)
    assert all(edit["changes"] and abs(time.time() - edit["time"]) < 300 for edit in edits)
    return places, edits


def test_a_conversation_at_hand_and_after_a_restart(tokenizer, tmp_path):
    with serving_mc(tokenizer, keep_in=tmp_path) as server:
        talk(server)
        tokens = server.sessions[0].tokens(NAME, 0, 10**6)
        before = check_looking(server, tokenizer, tokens)
        assert before[1]
        assert [list(c) for c in server.made[-1].focus.records[0].changes] in ([], before[1][-1]["changes"])
    with serving_mc(tokenizer, keep_in=tmp_path) as server:
        assert check_looking(server, tokenizer, tokens) == before
        assert not server.sessions[0].held
    with serving_mc(tokenizer) as server:
        talk(server)
        check_looking(server, tokenizer, server.sessions[0].tokens(NAME, 0, 10**6))


def test_pages_of_a_search(tokenizer, monkeypatch):
    monkeypatch.setattr("nanochat.serving.explore.SCANNED_TOKENS", 100)
    monkeypatch.setattr("nanochat.serving.explore.FOUND_PLACES", 2)
    with serving_mc(tokenizer) as server:
        talk(server)
        found, start, pages = [], 0, 0
        while start is not None:
            page = post(server, "find", text="secret", start=start)
            assert len(page["found"]) <= 2
            found, start, pages = found + page["found"], page["next"], pages + 1
        assert len(found) == 12
        assert len({place["start"] for place in found}) == 12
        assert pages >= 7


def test_one_search_at_a_time(tokenizer, monkeypatch):
    """Each holds the interpreter, which the workers need too."""
    searching = []

    def find_text(*_):
        searching.append(True)
        time.sleep(0.05)
        counts.append(len(searching))
        searching.pop()
        return ()

    counts, body = [], {"conversation": "conversation-number-9999", "text": "x"}
    monkeypatch.setattr("nanochat.serving.explore.find_text", find_text)
    with serving_mc(tokenizer) as server, ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda _: server.client.post("/focus/find", json=body), range(4)))
    assert [answer.json()["found"] for answer in answers] == [[]] * 4
    assert counts == [1] * 4


def test_what_is_not_there_and_what_is_too_much(tokenizer):
    with serving_mc(tokenizer) as server:
        other = {"conversation": "conversation-number-9999"}
        assert server.client.post("/focus/edits", json=other).json() == {"edits": []}
        assert server.client.post("/focus/find", json={**other, "text": "x"}).json() == {"found": [], "next": None}
        assert server.client.post("/focus/text", json={**other, "spans": [[0, 4]]}).json() == {"texts": [None]}
        assert server.client.post("/focus/look", json={**other, "text": "x"}).status_code == 404
        for path, body in [("find", {"text": ""}), ("text", {"spans": [[0, 1]] * 65}), ("look", {"text": "x" * 4001})]:
            assert server.client.post(f"/focus/{path}", json={**other, **body}).status_code == 400
        talk(server, 1)
        sessions = server.sessions[0]
        with pytest.raises(ZeroDivisionError):
            server.pool.call(sessions, lambda: 1 / 0).result(10)
        called, go_on = threading.Event(), threading.Event()
        server.pool.call(sessions, lambda: (called.set(), go_on.wait(10)))
        assert called.wait(10)
        calls = [server.pool.call(sessions, lambda: 1) for _ in range(8)]
        assert server.client.post("/focus/look", json={**other, "text": "x"}).status_code == 503
        calls[0].cancel()
        go_on.set()
        assert [call.result(10) for call in calls[1:]] == [1] * 7
        talk(server, 1)  # the worker lives


# ---------------------------------------------------------------------------------------------------------
# In a browser, a million tokens long


@pytest.fixture(scope="module")
def million(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams") / "s"
    engine, networks, config = tiny(tokenizer)
    key = gist_key(tokenizer)
    create_stream(folder, key)
    store = open_store(folder, key, write=True)
    words = [tokenizer.encode(f"Line {i} of the long story goes on. ") for i in range(200)]
    tokens = np.resize(np.concatenate(words), 1_000_000)
    needle = tokenizer.encode("The treasure lies under the old oak tree. ")
    tokens[654_321 : 654_321 + len(needle)] = needle
    reader = MCSession(engine.model, networks, config).reader
    MegaContextTree(reader.node, K, store, engine.model.embed).append(torch.tensor(tokens)[None])
    store.commit()
    store.close()
    return folder


@pytest.fixture
def visit(tokenizer, million, open_page):
    with serving_mc(tokenizer, about=million) as server:
        yield partial(open_page, server.url, script="localStorage['nanochat.settings'] ??= '{\"max_tokens\": 20}';")


def test_from_far_to_near(visit, tmp_path):
    page, sent = visit(), []
    page.on("response", lambda response: "/focus/" in response.url and sent.append(len(response.body())))
    ask_page(page, "Where is the treasure?")
    finished(page)
    page.get_by_role("button", name="Look through the conversation").click()
    rows = page.locator("#explore-list .part")
    expect(page.locator("#explore-title")).to_contain_text("In parts of")
    assert 2 <= rows.count() <= 64
    expect(rows.first).to_contain_text("Line 0 of")
    page.screenshot(path=tmp_path / "far.png")
    for _ in range(12):
        if "Block by block" in page.locator("#explore-title").inner_text():
            break
        title = page.locator("#explore-path").inner_text()
        rows.nth(1).click()
        expect(page.locator("#explore-path")).not_to_have_text(title)
        expect(page.locator("#explore-list")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#explore-title")).to_have_text("Block by block")
    place = rows.nth(1).locator(".place").inner_text()
    first, last = (int(n.replace(",", "")) for n in re.match(r"tokens ([\d,]+) – ([\d,]+)", place.strip()).groups())
    assert last - first == K - 1
    page.locator("#explore-path button").first.click()
    expect(page.locator("#explore-title")).to_contain_text("In parts of")

    page.locator("#explore-text").fill("the OLD oak")
    page.get_by_role("button", name="Find text").click()
    expect(page.locator("#explore-list mark")).to_have_text("the old oak")
    page.screenshot(path=tmp_path / "found.png")
    rows.first.click()
    expect(page.locator("#explore-title")).to_have_text("Block by block")
    expect(page.locator("#explore-list")).to_contain_text("oak")
    page.screenshot(path=tmp_path / "near.png")

    page.get_by_role("button", name="Where would the model look?").click()
    expect(page.locator("#explore-title")).to_contain_text("Where the model would look")
    expect(rows.first).to_contain_text("score")
    page.screenshot(path=tmp_path / "look.png")
    page.get_by_role("button", name="Recent edits").click()
    expect(page.locator("#explore-list .chip").first).to_contain_text(re.compile("[▲▽] tokens"))
    page.screenshot(path=tmp_path / "edits.png")
    chip = page.locator("#explore-list .chip").first
    opened = chip.inner_text()[2:]
    chip.click()
    expect(page.locator("#explore-path")).not_to_contain_text("654,336")
    expect(page.locator("#explore")).to_contain_text(opened)
    page.keyboard.press("Escape")
    expect(page.locator("#explore")).to_be_hidden()
    assert max(sent) < 100_000
