"""The chat page in a real browser, against a small server that speaks the interface and does what a test asks of it."""

import contextlib
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import expect

from nanochat.markdown import render_markdown
from nanochat.serving.page import page_files
from tests.helpers_browser import ask, finished
from tests.helpers_server import Script, serving

FILES = page_files()
CONFIG = {
    "model": "d4",
    "source": "sft",
    "step": 600,
    "context_length": 1024,
    "temperature": 0.8,
    "top_k": 50,
    "max_tokens": 512,
    "limits": {
        "messages": 500,
        "message_chars": 8000,
        "conversation_chars": 32000,
        "temperature": [0, 2],
        "top_k": [1, 200],
        "max_tokens": [1, 4096],
    },
}


@dataclass
class Reply:
    """What the server answers to one request: a stream of (kind, text) pieces, or a refusal."""

    pieces: list = field(default_factory=list)
    delay: float = 0.0  # seconds between two pieces
    end: str = "stop"  # "stop", "length", "error" (a fault is sent) or "drop" (the connection just ends)
    limit: str = "max_tokens"  # where the end is "length"
    status: int = 200
    detail: object = None
    headers: dict = field(default_factory=dict)


def say(text, **options):
    return Reply([("text", piece) for piece in re.findall(r"\S*\s*", text) if piece], **options)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status, kind, body, **headers):
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, value, status=200, **headers):
        self.reply(status, "application/json", json.dumps(value).encode(), **headers)

    def do_GET(self):
        if self.path in FILES:
            content, headers = FILES[self.path]
            self.reply(200, None, content, **headers)
        elif self.path == "/config":
            self.json(CONFIG)
        else:
            self.json({"detail": "Not found"}, 404)

    def do_POST(self):
        stub = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/render":
            stub.renders.append(time.monotonic())
            if stub.render is None:
                return self.json({"detail": "no renderer"}, 500)
            return self.json({"html": [stub.render(text) for text in body["texts"]]})
        stub.requests.append(body)
        reply = stub.replies.popleft() if stub.replies else say(f"You said: {body['messages'][-1]['content']}")
        if reply.status != 200:
            return self.json({"detail": reply.detail}, reply.status, **reply.headers)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream(reply)
        except (BrokenPipeError, ConnectionResetError):
            stub.left.set()

    def stream(self, reply):
        self.wfile.write(b": ping\n\n")
        for kind, text in reply.pieces:
            event = {"token": text, "gpu": 0} | ({} if kind == "text" else {"kind": kind})
            self.event(event)
            time.sleep(reply.delay)
        if reply.end == "error":
            self.event({"error": "The worker failed: out of memory."})
        elif reply.end != "drop":
            self.event({"done": True, "finish_reason": reply.end, "limit": reply.limit})

    def event(self, value):
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())


class Stub(ThreadingHTTPServer):
    daemon_threads = True

    def reset(self):
        self.replies, self.requests, self.renders = deque(), [], []
        self.render, self.left = render_markdown, threading.Event()

    def handle_error(self, request, client_address):
        pass  # a browser that closes its connections

    def __call__(self, *replies):
        self.replies.extend(replies)


@pytest.fixture(scope="module")
def server():
    with Stub(("127.0.0.1", 0), Handler) as server:
        server.reset()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def visit(server, open_page):
    """Open the page of the small server."""
    server.reset()

    def visit(base_url=f"http://127.0.0.1:{server.server_port}", **options):
        return open_page(base_url, **options)

    return visit


def answer(page):
    return page.locator(".answer").last


def rendered(page):
    finished(page)
    expect(page.locator(".tail:not(:empty)")).to_have_count(0)


def entries(page):
    return page.locator("#history .open")


def choose(page, title, action):
    """An action of the menu of a conversation."""
    page.locator(".entry", has_text=title).hover()
    page.get_by_role("button", name=f"More for “{title}”").click()
    page.get_by_role("menuitem", name=action).click()


def shown(page):
    """The answer that is shown last."""
    return page.locator(".version.shown").last


def test_first_screen_and_a_streamed_answer(visit, server):
    page = visit()
    expect(page.locator("#greeting")).to_have_text("d4")
    expect(page.locator("#model small")).to_have_text("sft · step 600")
    expect(page.locator("#input")).to_be_focused()
    assert page.locator("#suggestions button").count() == 4
    server(say("one **two** three four five six seven eight nine ten", delay=0.12))
    page.get_by_role("button", name="Who are you?").click()
    body = shown(page).locator(".body")
    lengths = set()
    while page.locator(".running").count():
        lengths.add(len(body.inner_text()))
        page.wait_for_timeout(60)
    assert len(lengths) >= 6, "the text grows while it streams"
    expect(body).to_have_text("one two three four five six seven eight nine ten")
    expect(body.locator("strong")).to_have_text("two")
    expect(page.locator("#live")).to_contain_text("nine ten")
    expect(page.locator("#input")).to_be_focused()
    gaps = [b - a for a, b in zip(server.renders, server.renders[1:], strict=False)]
    assert gaps
    assert min(gaps) > 0.14, "rendering is throttled"
    sent = server.requests[0]
    assert sent["messages"] == [{"role": "user", "content": "Who are you?"}]
    assert (sent["temperature"], sent["top_k"], sent["max_tokens"]) == (0.8, 50, 512)


def test_without_mc_there_is_no_focus(visit, server):
    page = visit()
    ask(page, "Hello")
    finished(page)
    assert page.locator("#focus:visible").count() == 0
    assert server.requests[0].keys() == {"messages", "temperature", "top_k", "max_tokens"}


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_keeps_what_came(visit, server, way):
    page = visit()
    server(say("word " * 200, delay=0.03))
    ask(page, "Go on")
    expect(shown(page).locator(".body")).to_contain_text("word word word")
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(shown(page).locator(".note")).to_have_text("Stopped.Continue")
    finished(page)
    assert server.left.wait(3), "the server sees that nobody listens"
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("Next")
    page.keyboard.press("Enter")
    expect(shown(page).locator(".body")).to_have_text("You said: Next")
    roles = [message["role"] for message in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.requests[1]["messages"][1]["content"].startswith("word word")


def test_regenerate_and_edit(visit, server):
    page = visit()
    server(say("first"), say("second"), say("third"), say("fourth"))
    ask(page, "One?")
    expect(shown(page).locator(".body")).to_have_text("first")
    page.get_by_role("button", name="Answer again").click()
    expect(shown(page).locator(".body")).to_have_text("second")
    assert server.requests[0] == server.requests[1]
    ask(page, "Two?")
    expect(shown(page).locator(".body")).to_have_text("third")
    assert [m["content"] for m in server.requests[2]["messages"]] == ["One?", "second", "Two?"]

    page.locator(".said").first.hover()
    page.get_by_role("button", name="Edit the message").first.click()
    page.keyboard.press("Escape")
    expect(page.locator(".bubble").first).to_have_text("One?")
    page.get_by_role("button", name="Edit the message").first.click()
    page.get_by_role("textbox", name="Edit the message").fill("Another one?")
    page.keyboard.press("Enter")
    expect(shown(page).locator(".body")).to_have_text("fourth")
    assert server.requests[3]["messages"] == [{"role": "user", "content": "Another one?"}]
    assert page.locator(".turn").count() == 2
    expect(entries(page)).to_have_text(["Another one?"])


def test_several_answers_to_one_question(visit, server):
    """All are kept; the one that is shown is what the model is told; side by side, a click chooses."""
    page = visit()
    server(say("first"), say("second"), say("third"), say("next"), say("last"))
    ask(page, "One?")
    finished(page)
    expect(page.locator(".pager")).to_be_hidden()
    for count in (2, 3):
        page.get_by_role("button", name="Answer again").click()
        expect(page.locator(".pager .count")).to_have_text(f"{count} of {count}")
        finished(page)
    expect(page.get_by_role("button", name="The next answer")).to_be_disabled()
    for _ in range(2):
        page.get_by_role("button", name="The answer before").click()
    expect(page.get_by_role("button", name="The answer before")).to_be_disabled()
    expect(shown(page)).to_have_text("first")
    assert page.locator(".version:visible").count() == 1
    ask(page, "Two?")
    finished(page)
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["One?", "first", "Two?"]
    page.reload()
    page.locator(".answer").first.hover()
    page.get_by_role("button", name="Side by side").click()
    boxes = [version.bounding_box() for version in page.locator(".version:visible").all()[:3]]
    assert len({box["y"] for box in boxes}) == 1
    assert all(a["x"] + a["width"] <= b["x"] for a, b in pairwise(boxes))
    page.locator(".version", has_text="third").click()
    expect(page.locator(".answer").first.locator(".shown")).to_have_text("third")
    ask(page, "Three?")
    finished(page)
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["One?", "third", "Two?", "next", "Three?"]


def test_the_answer_that_is_chosen_is_in_sight(visit, server):
    """Also where not all of them fit beside each other."""
    page = visit(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    server(say("first"), say("second"), say("third"))
    ask(page, "One?")
    finished(page)
    for _ in range(2):
        page.get_by_role("button", name="Answer again").click()
        finished(page)
    page.get_by_role("button", name="Side by side").click()
    for text in ("third", "second", "first"):
        box = page.locator(".version", has_text=text).bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= 360
        page.get_by_role("button", name="The answer before").click(force=True)


def test_an_answer_that_was_cut_says_why_and_goes_on(visit, server):
    page = visit()
    server(say("one two", end="length"), say(" three", end="length", limit="context"))
    ask(page, "Count")
    expect(shown(page).locator(".note")).to_contain_text("Cut off at the length set under Settings.")
    page.get_by_role("button", name="Continue").click()
    expect(shown(page).locator(".body")).to_have_text("one two three")
    expect(shown(page).locator(".note")).to_contain_text("the conversation fills what the model can hold")
    assert [(m["role"], m["content"]) for m in server.requests[1]["messages"]] == [
        ("user", "Count"),
        ("assistant", "one two"),
    ]
    shown(page).get_by_role("button", name="New chat").click()
    expect(page.locator("#welcome")).to_be_visible()


def test_answers_of_earlier_pages_are_read(visit):
    """When there was one answer to a question, it was kept as the message itself."""
    messages = [
        {"role": "user", "content": "Old?"},
        {"role": "assistant", "parts": [{"type": "text", "text": "Yes."}], "end": "stop"},
    ]
    chat = json.dumps({"updated": 1, "messages": messages})
    page = visit(script=f"localStorage['nanochat.chat.a'] ??= {json.dumps(chat)};")
    entries(page).click()
    expect(shown(page)).to_have_text("Yes.")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".pager .count")).to_have_text("2 of 2")


@pytest.mark.parametrize("way", ["menu", "double click"])
def test_rename(visit, server, way):
    page = visit()
    ask(page, "What is a tree?")
    finished(page)
    for name, key, expected in [
        ("Trees", "Enter", "Trees"),
        ("Nothing", "Escape", "Trees"),
        ("<b>wood</b>", "Tab", "<b>wood</b>"),
        ("", "Enter", "What is a tree?"),
    ]:
        if way == "menu":
            choose(page, entries(page).inner_text(), "Rename")
        else:
            entries(page).dblclick()
        page.get_by_role("textbox", name="Name of the conversation").fill(name)
        page.keyboard.press(key)
        expect(entries(page)).to_have_text([expected])
        expect(page).to_have_title(f"{expected} · nanochat")
        page.reload()
        expect(entries(page)).to_have_text([expected])


def test_save_a_conversation_as_a_file(visit, server):
    """To read, and as the server takes it."""
    page = visit()
    pieces = [("text", "See: "), ("python", "12*3"), ("python_output", "36"), ("text", "It is **36**.")]
    server(Reply(pieces))
    ask(page, "What is 12 * 3? é")
    finished(page)
    with page.expect_download() as download:
        choose(page, "What is 12 * 3? é", "Save as Markdown")
    assert download.value.suggested_filename == "What is 12 3 é.md"
    text = Path(download.value.path()).read_text("utf-8")
    assert text.startswith("# What is 12 * 3? é\n\n**You:**\n\nWhat is 12 * 3? é\n\n**Answer:**\n\nSee: `12*3` = `36`")
    with page.expect_download() as download:
        choose(page, "What is 12 * 3? é", "Save as JSON")
    assert download.value.suggested_filename == "What is 12 3 é.json"
    messages = json.loads(Path(download.value.path()).read_text("utf-8"))["messages"]
    assert messages[0] == {"role": "user", "content": "What is 12 * 3? é"}
    assert [(part["type"], part["text"]) for part in messages[1]["content"]] == pieces


def test_commands(visit, server):
    page = visit()
    page.locator("#input").fill("/t")
    options = page.locator("#commands [role=option]:visible code")
    expect(options).to_have_text(["/temperature", "/topk"])
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    expect(page.locator("#input")).to_have_value("/topk ")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    expect(page.locator("#toast")).to_contain_text("Top-k is now 7.")
    expect(page.locator("#input")).to_have_value("")
    for text, told in [
        ("/temperature 1.5", "Temperature is now 1.5."),
        ("/temperature", "Temperature is 1.5."),
        ("/temperature 9", "Temperature is from 0 to 2, not 9."),
        ("/topk many", "Top-k is from 1 to 200, not many."),
        ("/maxtokens 64", "Max tokens is now 64."),
        ("/nonsense", "There is no /nonsense: /help lists the commands."),
    ]:
        ask(page, text)
        expect(page.locator("#toast")).to_contain_text(told)
    ask(page, "/help")
    expect(options).to_have_text(["/temperature", "/topk", "/maxtokens", "/clear", "/help"])
    ask(page, "/etc/passwd is a file")
    finished(page)
    expect(options).to_have_count(0)
    sent = server.requests[0]
    assert (sent["temperature"], sent["top_k"], sent["max_tokens"]) == (1.5, 7, 64)
    assert sent["messages"][0]["content"] == "/etc/passwd is a file"
    ask(page, "/clear")
    expect(page.locator("#welcome")).to_be_visible()
    expect(entries(page)).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(entries(page)).to_have_count(1)


def test_history_outlives_a_reload(visit, server):
    page = visit()
    ask(page, "What is\na  tree?")
    expect(shown(page).locator(".body")).to_have_text("You said: What is\na  tree?")
    finished(page)
    page.reload()
    expect(page.locator(".bubble")).to_have_text("What is\na  tree?", use_inner_text=True)
    expect(shown(page).locator(".body p")).to_contain_text("You said")
    expect(entries(page)).to_have_text(["What is a tree?"])
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "Second chat")
    finished(page)
    expect(entries(page)).to_have_text(["Second chat", "What is a tree?"])
    page.go_back()
    expect(page.locator(".bubble")).to_contain_text("tree")
    expect(page.locator("[aria-current=page]")).to_have_text("What is a tree?")
    entries(page).first.click()
    expect(page.locator(".bubble")).to_have_text("Second chat")

    choose(page, "Second chat", "Delete")
    expect(entries(page)).to_have_text(["What is a tree?"])
    expect(page.locator("#welcome")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".bubble")).to_have_text("Second chat")
    choose(page, "Second chat", "Delete")
    page.reload()
    expect(entries(page)).to_have_text(["What is a tree?"])


def test_an_answer_goes_on_while_another_chat_is_open(visit, server):
    page = visit()
    server(say("slow " * 30, delay=0.03))
    ask(page, "Slow")
    expect(shown(page).locator(".body")).to_contain_text("slow")
    page.get_by_role("button", name="New chat").first.click()
    expect(page.locator("[data-running]")).to_have_count(1)
    ask(page, "Quick")
    expect(shown(page).locator(".body")).to_have_text("You said: Quick")
    expect(page.locator("[data-running]")).to_have_count(0)
    entries(page).filter(has_text="Slow").click()
    assert shown(page).locator(".body").inner_text().count("slow") == 30


def test_a_reload_in_the_middle_keeps_what_came(visit, server):
    page = visit()
    server(say("word " * 100, delay=0.03), say("whole"))
    ask(page, "Go on")
    expect(shown(page).locator(".body")).to_contain_text("word word word")
    page.reload()
    expect(shown(page).locator(".body")).to_contain_text("word word word")
    expect(shown(page).locator(".note")).to_contain_text(re.compile("interrupted|lost"))
    page.get_by_role("button", name="Retry").click()
    expect(shown(page).locator(".body")).to_have_text("whole")


def test_two_tabs_share_the_history(visit, server):
    page = visit()
    other = page.context.new_page()
    other.goto("/")
    ask(page, "From the first tab")
    expect(entries(other)).to_have_text(["From the first tab"])
    entries(other).click()
    expect(answer(other).locator(".body")).to_have_text("You said: From the first tab")


def test_copy(visit, server):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = "Here **is** code:\n\n```python\nfor i in range(3):\n    print(i)\n```"
    server(Reply([("text", text)]))
    ask(page, "Code")
    finished(page)
    expect(page.locator(".codeblock pre")).to_have_text("for i in range(3):\n    print(i)", use_inner_text=True)
    page.get_by_role("button", name="Copy the answer").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text
    page.get_by_role("button", name="Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "for i in range(3):\n    print(i)"
    expect(page.locator(".codebar")).to_have_text("python")


def test_copy_where_there_is_no_clipboard_object(visit, server):
    page = visit(script='Object.defineProperty(navigator, "clipboard", { value: undefined });')
    ask(page, "copy me")
    finished(page)
    page.evaluate("document.addEventListener('copy', () => { window.copied = document.activeElement.value; })")
    page.get_by_role("button", name="Copy the answer").click()
    expect(page.get_by_role("button", name="Copied")).to_be_focused()
    assert page.evaluate("window.copied") == "You said: copy me"


def test_settings_are_bounded_sent_and_remembered(visit, server):
    page = visit()
    page.get_by_role("button", name="Settings").click()
    number = page.get_by_role("spinbutton")
    expect(number.nth(0)).to_have_value("0.8")
    number.nth(0).fill("1.3")
    number.nth(1).fill("900")
    number.nth(2).fill("64")
    number.nth(2).press("Tab")
    expect(number.nth(1)).to_have_value("200")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    page.reload()
    expect(page.locator("#model")).to_contain_text("d4")
    ask(page, "Hello")
    finished(page)
    sent = server.requests[0]
    assert (sent["temperature"], sent["top_k"], sent["max_tokens"]) == (1.3, 200, 64)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Back to the defaults").click()
    expect(number.nth(1)).to_have_value("50")


def test_tool_calls_are_shown_and_sent_back(visit, server):
    page = visit()
    pieces = [
        ("text", "Let me see. "),
        ("python", "12*"),
        ("python", "3"),
        ("python_output", "36"),
        ("text", "It is 36."),
    ]
    server(Reply(pieces, delay=0.02), Reply([("python", "'berry'.count('r')")], end="length"))
    ask(page, "What is 12 * 3?")
    card = page.locator(".tool")
    expect(card.locator("code")).to_have_text("12 × 3")
    expect(card.locator("output")).to_have_text("36")
    expect(shown(page).locator(".prose").last).to_have_text("It is 36.")
    finished(page)
    ask(page, "And r in berry?")
    expect(card.last.locator("code")).to_have_text("'berry'.count('r')")
    expect(card.last.locator("output")).to_have_text("no result")
    expect(shown(page).locator(".note")).to_have_text("Cut off at the length set under Settings.")
    assert server.requests[1]["messages"][1]["content"] == [
        {"type": "text", "text": "Let me see. "},
        {"type": "python", "text": "12*3"},
        {"type": "python_output", "text": "36"},
        {"type": "text", "text": "It is 36."},
    ]


def test_faults_are_said_and_can_be_tried_again(visit, server):
    page = visit(expected="status of (500|422|400|503)|Unprocessable")
    server(
        Reply(status=500, detail="The model is not loaded."),
        Reply(status=422, detail=[{"msg": "top_k must be positive"}, {"msg": "and whole"}]),
        say("It began well", end="error"),
        say("and then", end="drop"),
        say("fine"),
    )
    ask(page, "Hello")
    note = shown(page).locator(".note.error span")
    for text in (
        "The model is not loaded.",
        "top_k must be positive; and whole.",
        "The worker failed: out of memory.",
        "The connection ended before the answer was complete.",
    ):
        expect(note).to_have_text(text)
        finished(page)
        body = shown(page).locator(".body").inner_text()
        assert body == {"The w": "It began well", "The c": "and then"}.get(text[:5], "")
        page.get_by_role("button", name="Retry").click()
    expect(shown(page).locator(".body")).to_have_text("fine")
    assert page.locator(".turn").count() == 2
    assert all(request == server.requests[0] for request in server.requests)


def test_a_failed_question_is_not_part_of_the_next_request(visit, server):
    page = visit(expected="status of 500")
    server(Reply(status=500, detail="Broken."), say("fine"))
    ask(page, "First")
    expect(shown(page).locator(".note")).to_contain_text("Broken.")
    ask(page, "Second")
    expect(shown(page).locator(".body")).to_have_text("fine")
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Second"}]
    expect(page.get_by_role("button", name="Retry")).to_be_hidden()


def test_a_busy_server_names_the_wait(visit, server):
    page = visit(expected="status of 503")
    server(
        Reply(status=503, detail="the server is busy: 64 requests are waiting already", headers={"Retry-After": "2"}),
        say("now"),
    )
    ask(page, "Hello")
    expect(shown(page).locator(".note")).to_contain_text("The server is busy, try again in 2 s.")
    again = page.get_by_role("button", name="Try again")
    expect(again).to_be_disabled()
    expect(again).to_be_enabled()
    again.click()
    expect(shown(page).locator(".body")).to_have_text("now")


def test_too_long_a_conversation_offers_a_new_one(visit, server):
    page = visit(expected="status of 400")
    server(Reply(status=400, detail="The conversation has 1,400 tokens; the context holds 1,024."))
    ask(page, "One more")
    expect(shown(page).locator(".note")).to_contain_text("the context holds 1,024")
    answer(page).get_by_role("button", name="New chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#input")).to_have_value("One more")


def test_too_long_a_message_stays_in_the_composer(visit, server):
    page = visit()
    ask(page, "x" * 8001)
    expect(page.locator("#hint")).to_have_text("8,001 of 8,000 characters")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    assert server.requests == []


def test_a_server_that_is_gone(visit, server):
    page = visit(expected="ERR_(FAILED|CONNECTION)|Failed to load")
    page.route("**/chat/completions", lambda route: route.abort("connectionrefused"))
    ask(page, "Hello")
    expect(shown(page).locator(".note")).to_contain_text("The server cannot be reached.")
    page.unroute("**/chat/completions")
    page.get_by_role("button", name="Retry").click()
    expect(shown(page).locator(".body")).to_have_text("You said: Hello")


def test_without_a_renderer_the_text_stays_plain(visit, server):
    page = visit(expected="status of 500")
    server.render = None
    server(say("a **b**\n\n<b>c</b>"))
    ask(page, "Hello")
    finished(page)
    assert shown(page).locator(".body").inner_text() == "a **b**\n\n<b>c</b>"


def test_rendering_that_comes_late_changes_nothing(visit, server):
    page = visit()
    reply = say("a b c d **e**", delay=0.05)
    server(reply, reply)
    ask(page, "Hello")
    expect(shown(page).locator("strong")).to_have_text("e")
    server.render = lambda text: [time.sleep(0.6), render_markdown(text)][1]
    page.get_by_role("button", name="Answer again").click()
    finished(page)
    expect(shown(page).locator("strong")).to_have_text("e")  # it has been rendered before
    page.wait_for_timeout(900)
    assert shown(page).locator(".body").inner_text() == "a b c d e"


@pytest.mark.parametrize("fault", ["blocked", "full"])
def test_a_browser_that_keeps_nothing(visit, server, fault):
    blocked = (
        'Object.defineProperty(window, "localStorage", { get() { throw new DOMException("no", "SecurityError"); } });'
    )
    full = 'Storage.prototype.setItem = () => { throw new DOMException("no", "QuotaExceededError"); };'
    page = visit(script=blocked if fault == "blocked" else full)
    ask(page, "Hello")
    expect(shown(page).locator(".body")).to_have_text("You said: Hello")
    expect(page.locator("#toast")).to_contain_text("not being saved")
    page.get_by_role("button", name="New chat").first.click()
    entries(page).click()
    expect(shown(page).locator(".body")).to_have_text("You said: Hello")


def test_damaged_storage_is_passed_over(visit, server):
    keys = {"nanochat.chat.a": "{", "nanochat.chat.b": '{"messages":[1]}', "nanochat.settings": '{"top_k":"x"}'}
    page = visit(script=f"for (const [k, v] of Object.entries({json.dumps(keys)})) localStorage.setItem(k, v);")
    expect(entries(page)).to_have_count(0)
    ask(page, "Hello")
    finished(page)
    assert server.requests[0]["top_k"] == 50


ATTACKS = [
    "<script>window.ran.push('script')</script>",
    '<img src=x onerror="window.ran.push(1)">',
    '<svg onload="window.ran.push(2)"><script>window.ran.push(3)</script></svg>',
    "<svg><style><img src=x onerror=window.ran.push(4)></style></svg>",
    "[x](javascript:window.ran.push(5))",
    "[x](JaVa\tScRiPt:window.ran.push(6))",
    "[x](data:text/html,<script>window.ran.push(7)</script>)",
    "[x](vbscript:x) ![x](javascript:alert(1)) ![x](https://tracker.example/pixel.png)",
    "[a](<javascript:alert(8)>) <javascript:alert(9)> [![x](x)](javascript:alert(10))",
    '<a href="javascript:window.ran.push(11)">x</a><a href="&#106;avascript:alert(12)">x</a>',
    '<iframe srcdoc="<script>parent.ran.push(13)</script>"></iframe><object data="javascript:alert(14)"></object>',
    '<form action="javascript:alert(15)"><button formaction="javascript:alert(16)">x</button><input autofocus></form>',
    '<math><mtext><table><mglyph><style><img src onerror="ran.push(17)"></style></mglyph></table></mtext></math>',
    '<p style="position:fixed;inset:0" id="input" class="turn drawer">over</p><style>*{display:none}</style>',
    '<base href="https://evil.example/"><meta http-equiv="refresh" content="0;url=https://evil.example/">',
    "<details open ontoggle=window.ran.push(18)>x</details><video><source onerror=window.ran.push(19)></video>",
    "```html\n<img src=x onerror=alert(20)>\n```\n\n`<script>alert(21)</script>`",
    "> - **[x](javascript:alert(22))** <b onmouseover=alert(23)>y</b>",
    "| a |\n| - |\n| <img src=x onerror=alert(24)> |",
    "</script></textarea></title><script>window.ran.push(25)</script><!--><img src=x onerror=alert(26)>-->",
]


def audit(page):
    """Click every link; then name what should not be in the conversation."""
    page.evaluate("for (const a of document.querySelectorAll('#log a')) if (!a.href.startsWith('http')) a.click()")
    return page.evaluate("""() => {
        const banned = /^(script|style|iframe|object|img|video|form|input|base|meta|math|details)$/;
        const attribute = ({ name, value }) => /^on|^style$|^id$|^formaction|^src/.test(name)
            || (name === "href" && !/^(https?:|mailto:|#i-)/.test(value)) || (name === "class" && /drawer/.test(value));
        const faults = [];
        for (const element of document.querySelectorAll("#log *")) {
            if (banned.test(element.localName)) faults.push(element.localName);
            for (const found of [...element.attributes].filter(attribute)) faults.push(`${found.name}=${found.value}`);
        }
        return faults;
    }""")


@pytest.mark.parametrize("renderer", ["the server's", "one that escapes nothing"])
def test_no_text_becomes_code(visit, server, renderer):
    # Chromium also reports the inline handlers and styles of an inert document, which could never take effect
    inert = r"inline event handler|inline style|^(script|style)-src(-attr|-elem)? inline|base-uri|base URI"
    page = visit(expected=r"^$" if renderer == "the server's" else inert)
    if renderer != "the server's":
        server.render = lambda text: text
    text = "\n\n".join(ATTACKS)
    server(Reply([("text", attack + "\n\n") for attack in ATTACKS], delay=0.02), Reply([("python", ATTACKS[1])]))
    ask(page, text)
    rendered(page)
    assert page.locator(".bubble").text_content() == text
    assert audit(page) == []
    ask(page, "and a tool")
    expect(page.locator(".tool code")).to_have_text(ATTACKS[1])
    page.reload()
    expect(answer(page)).to_be_visible()
    rendered(page)
    assert audit(page) == []


def test_lines_stay_lines_when_they_are_rendered(visit, server):
    page = visit()
    server(Reply([("python", "1+1"), ("python_output", "2"), ("text", "\n\none\ntwo  \nthree **four**")]))
    ask(page, "Lines")
    expect(shown(page).locator("strong")).to_have_text("four")
    assert shown(page).locator(".prose").inner_text() == "one\ntwo\nthree four"


def test_links_open_elsewhere(visit, server):
    page = visit()
    server.render = lambda text: f'<p><a href="{text.strip()}">x</a></p>'
    server(say("https://example.org/a"))
    ask(page, "Link")
    link = shown(page).locator("a")
    expect(link).to_have_attribute("href", "https://example.org/a")
    expect(link).to_have_attribute("target", "_blank")
    assert {"noopener", "noreferrer"} <= set(link.get_attribute("rel").split())


def at_the_end(page, within=2):
    below = "(e => e.scrollHeight - e.scrollTop - e.clientHeight)(document.querySelector('#scroller'))"
    end = time.monotonic() + 8
    while page.evaluate(below) > within:
        assert time.monotonic() < end
        page.wait_for_timeout(20)


def test_reading_further_up_is_not_disturbed(visit, server):
    page = visit(viewport={"width": 900, "height": 420})
    server(say("line\n\n" * 40), say("more\n\n" * 60, delay=0.02))
    ask(page, "Long")
    finished(page)
    at = "document.querySelector('#scroller').scrollTop"
    at_the_end(page)
    ask(page, "Longer")
    expect(answer(page)).to_contain_text("more")
    at_the_end(page, within=100)
    page.locator("#scroller").hover()
    page.mouse.wheel(0, -600)
    jump = page.get_by_role("button", name="Jump to the latest")
    expect(jump).to_be_visible()
    page.wait_for_timeout(100)
    before = page.evaluate(at)
    page.wait_for_timeout(400)
    assert page.evaluate(at) == before, "the view stays where the reader is"
    jump.click()
    at_the_end(page, within=100)
    expect(jump).to_be_hidden()
    finished(page)
    at_the_end(page)


def test_nothing_jumps_when_an_answer_ends(visit, server):
    page = visit()
    server(say("A short answer in **one** line.", delay=0.15))
    ask(page, "Hello")
    expect(answer(page)).to_contain_text("A")
    boxes = [[], []]
    until = None
    while until is None or time.monotonic() < until:
        for box, element in zip(boxes, (page.locator(".bubble"), answer(page)), strict=True):
            box.append(element.bounding_box())
        if until is None and not page.locator(".running").count():
            until = time.monotonic() + 0.4
    assert all(box == same[0] for same in boxes for box in same)


def test_the_composer_grows_up_to_a_limit(visit, server):
    page = visit()
    field = page.locator("#input")
    low = field.bounding_box()["height"]
    field.press_sequentially("a")
    for _ in range(2):
        field.press("Shift+Enter")
    some = field.bounding_box()["height"]
    assert low < some
    field.fill("x\n" * 200)
    assert some < field.bounding_box()["height"] <= 260
    field.fill("")
    assert field.bounding_box()["height"] == low
    assert server.requests == []


def test_phone(visit, server):
    page = visit(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    server(say("W" * 300 + "\n\n```text\n" + "x" * 300 + "\n```"))
    ask(page, "M" * 300)
    rendered(page)
    wide = "[...document.querySelectorAll('html, body, #scroller')].map((e) => e.scrollWidth - e.clientWidth)"
    assert page.evaluate(wide) == [0, 0, 0]
    assert page.evaluate("(({ scrollWidth: a, clientWidth: b }) => a > b)(document.querySelector('pre'))")
    expect(page.locator("#new-chat")).to_be_hidden()
    page.get_by_role("button", name="Show the conversations").click()
    expect(entries(page)).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(entries(page)).to_be_hidden()
    page.get_by_role("button", name="Show the conversations").click()
    page.locator("#new-chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#new-chat")).to_be_hidden()


CONTRAST = """() => {
    const draw = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const probe = document.body.appendChild(document.createElement("i"));
    const luminance = (name) => {
        probe.style.color = `var(--${name})`;
        draw.fillStyle = getComputedStyle(probe).color;
        draw.fillRect(0, 0, 1, 1);
        const linear = (c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
        const [r, g, b] = [...draw.getImageData(0, 0, 1, 1).data].map((c) => linear(c / 255));
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const surfaces = { page: "text muted accent", side: "text muted", raised: "text muted", bubble: "text muted",
        hover: "text muted", accent: "on-accent", "error-page": "error",
        "code-page": "text muted code-keyword code-string code-number code-name code-type" };
    const pairs = Object.entries(surfaces).flatMap(([surface, inks]) => inks.split(" ").map((ink) => [ink, surface]));
    const ratios = pairs.map(([ink, surface]) => {
        const [low, high] = [luminance(ink), luminance(surface)].sort((a, b) => a - b);
        return [ink, surface, (high + .05) / (low + .05)];
    });
    probe.remove();
    return ratios.filter(([, , ratio]) => ratio < 4.5);
}"""


def test_light_and_dark(visit, server):
    page = visit(color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    assert page.evaluate(CONTRAST) == []
    page.get_by_role("button", name="Light colours").click()
    light = page.evaluate(colour)
    assert light == "rgb(255, 255, 255)" != dark
    assert page.evaluate(CONTRAST) == []
    page.reload()
    assert page.evaluate(colour) == light
    page.get_by_role("button", name="Dark colours").click()
    assert page.evaluate(colour) == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(colour) == light, "chosen like the system, it follows the system"


def test_everything_has_a_name_and_the_keyboard_reaches_it(visit, server):
    page = visit()
    ask(page, "Hello")
    finished(page)
    unnamed = """() => [...document.querySelectorAll("button, input, textarea, [role=region]")]
        .filter((element) => !(element.ariaLabel || element.textContent.trim() || element.labels?.length))
        .map((element) => element.outerHTML)"""
    assert page.evaluate(unnamed) == []
    reached = []
    for _ in range(30):  # from the message box once around
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent.trim()"))
    order = [
        "Hide the conversations",
        "Hello",
        "Conversation",
        "Edit the message",
        "Answer again",
        "Settings",
        "Message",
    ]
    positions = [reached.index(label, reached.index(order[0])) for label in order]
    assert positions == sorted(positions)
    page.get_by_role("button", name="Hide the conversations").click()
    expect(page.get_by_role("button", name="Show the conversations")).to_be_focused()
    expect(page.locator("#new-chat")).not_to_be_in_viewport()
    page.reload()
    expect(page.locator("#new-chat")).not_to_be_in_viewport()
    assert page.evaluate("document.querySelector('#sidebar').inert"), "the keyboard does not go where nothing is seen"


TOOL_CALL = ["I use a **tool**: ", "<|python_start|>", "12*3", "<|python_end|>"]
TOOL_CALL += ["<|output_start|>", "36", "<|output_end|>", "It is 36 \N{BANANA}."]


class Proxy(BaseHTTPRequestHandler):
    """Gives what is under /some/where/ of its own to the server at `behind`, and streams what comes back."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        if not self.path.startswith("/some/where/"):
            return self.send_error(404)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name in ("Content-Type", "Authorization")}
        request = urllib.request.Request(self.server.behind + self.path.removeprefix("/some/where"), headers=headers)
        request.method, request.data = self.command, body or None
        try:
            answer = urllib.request.urlopen(request, timeout=10)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() != "transfer-encoding":
                    self.send_header(name, value)
            self.end_headers()
            while more := answer.read1():
                self.wfile.write(more)

    do_POST = do_GET


@contextlib.contextmanager
def behind_a_proxy(url):
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.behind = url
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_port}/some/where/"
        proxy.shutdown()
        thread.join()


@pytest.mark.parametrize("key", ["", "s3cret"])
@pytest.mark.parametrize("proxy", [contextlib.nullcontext, behind_a_proxy])
def test_with_the_real_server(tokenizer, open_page, proxy, key):
    """At a root and under a path, with a key and without."""
    ids = []
    for text in TOOL_CALL:
        ids += [tokenizer.encode_special(text)] if text.startswith("<|") else tokenizer.encode(text)
    script = Script(tokenizer, ids, each=0.005, context=300)
    with serving(script, api_key=key) as server, proxy(server.url) as url:
        page = open_page(url, expected="status of 40[01]", ready=not key)
        if key:
            field = page.locator("#key-input")
            expect(page.locator("#key-dialog")).to_be_visible()
            field.fill("wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#key-note")).to_contain_text("This is not its key.")
            field.fill(key)
            page.keyboard.press("Enter")
            expect(page.locator("#key-dialog")).to_be_hidden()
            page.reload()
        expect(page.locator("#model")).to_contain_text("d1")
        expect(page.locator("#key-dialog")).to_be_hidden()
        expect(page.locator("#welcome img")).to_have_js_property("naturalWidth", 150)  # it is there
        ask(page, "What is 12 * 3?")
        expect(page.locator(".tool code")).to_have_text("12 × 3")
        expect(page.locator(".tool output")).to_have_text("36")
        expect(shown(page).locator(".prose").last).to_have_text("It is 36 \N{BANANA}.")
        expect(shown(page).locator("strong")).to_have_text("tool")
        finished(page)
        ask(page, "x" * 301)
        expect(shown(page).locator(".note")).to_contain_text("this model's context holds 300")
        answer(page).get_by_role("button", name="New chat").click()
        ask(page, "Again")
        expect(shown(page).locator(".tool output")).to_have_text("36")
        finished(page)


def test_the_page_needs_nothing_from_outside():
    texts = {path: content.decode() for path, (content, _) in FILES.items()}
    for path, text in texts.items():
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), path
        assert not re.search(r"""["'(`]/(ui|logo|config|chat|render|focus)""", text), f"{path} has an absolute address"
        assert "innerHTML" not in text
    assert not re.search(r"\s(style|on\w+)=|<style|<script>", texts["/"])
    used = {f"/{path}" for path in re.findall(r'(?:href|src)="([\w/.]+)"', texts["/"])}
    for path in [path for path in texts if path.endswith(".js")]:
        used |= {f"/ui/{name}" for name in re.findall(r'"\./(\w+\.js)"', texts[path])}
    assert used == FILES.keys() - {"/"}, "each file is used, and no other"
