"""The chat server over real sockets: a tiny model or scripted engines behind it, faulty clients in front of it."""

import asyncio
import contextlib
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict

import httpx
import openai
import pytest
import torch

from nanochat import checkpoint_manager
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.sampling import Sampling
from nanochat.serving.page import page_files
from nanochat.serving.schema import Limits
from nanochat.serving.transport import Gate, PatientProtocol, open_socket
from nanochat.tokenizer import stream_parts
from scripts import chat_web
from tests.helpers import ROOT, until, write_tokenizer
from tests.helpers_server import (
    MODEL,
    USER,
    Script,
    ask,
    chat,
    events,
    in_background,
    is_idle,
    said,
    send_raw,
    serving,
    tool_script,
    totals,
)


@pytest.fixture(scope="module")
def engine(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    return Engine(model.eval(), tokenizer)


def post_json(server, path, body):
    """As httpx would, but NaN and halves of characters are let through."""
    return server.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


# ---------------------------------------------------------------------------------------------------------
# The page and its headers


def test_page(serve, engine):
    """Its files as they are in the repository; nothing that is written in the page runs."""
    server = serve(engine)
    response = server.client.get("/")
    assert response.content == (ROOT / "nanochat" / "ui.html").read_bytes()
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert {policy[name] for name in ("default-src", "base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    kinds = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
    for path in (ROOT / "nanochat" / "ui").iterdir():
        response = server.client.get(f"/ui/{path.name}")
        assert (response.content, response.headers["content-type"]) == (path.read_bytes(), kinds[path.suffix])
    assert server.client.get("/logo.svg").headers["content-type"] == "image/svg+xml"
    for path in ("/ui", "/ui/", "/ui/../ui.html", "/ui/%2e%2e/gpt.py", "/ui.html", "/gpt.py"):
        assert server.client.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/", "/logo.svg", "/health", "/stats", "/config", "/v1/models", "/nothing", "/docs"])
def test_security_headers(serve, engine, path):
    response = serve(engine).client.get(path)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"] or path == "/logo.svg"
    assert "unsafe" not in response.headers["content-security-policy"] or path == "/logo.svg"
    assert response.status_code == (404 if path in ("/nothing", "/docs") else 200)


def test_the_page_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the page .*ui\.html"):
        page_files(tmp_path)


def test_render(serve, engine):
    server = serve(engine)
    response = post_json(server, "/render", {"texts": ["**a**", "<script>alert(1)</script>", "\ud800"]})
    assert response.json()["html"][0] == "<p><strong>a</strong></p>\n"
    assert "<script" not in response.json()["html"][1]
    for texts, message in [
        (["a"] * 501, "texts: List should have at most 500 items"),
        (["a" * 32_001] * 2, "at most 64000 characters"),
    ]:
        response = server.client.post("/render", json={"texts": texts})
        assert response.status_code == 400
        assert message in response.json()["detail"]


# ---------------------------------------------------------------------------------------------------------
# The native API


def test_answer_of_a_model(serve, engine, tokenizer):
    """What is streamed is what the engine generates, with the same seed; without one, answers differ."""
    server = serve(engine)
    prompt = tokenizer.render_for_completion({"messages": USER})
    columns = engine.generate(prompt, max_tokens=20, temperature=0.9, top_k=40, seed=5)
    expected = [text for kind, text in stream_parts(tokenizer, columns) if kind == "text"]
    replies = ask(server, temperature=0.9, top_k=40, seed=5, max_tokens=20)
    assert "".join(event["token"] for event in replies[:-1] if "kind" not in event) == "".join(expected)
    assert all(event["gpu"] == 0 for event in replies[:-1])
    assert replies[-1]["done"] is True
    assert len({said(ask(server, temperature=2, max_tokens=20)) for _ in range(4)}) > 1


def test_defaults_are_used(serve, tokenizer):
    script = Script(tokenizer)
    server = serve(script)
    assert said(ask(server)) == "Hello there."
    assert script.settings[0]["temperature"] == 0.8
    assert script.settings[0]["top_k"] == 50
    ask(server, temperature=0, top_k=1, seed=3, max_tokens=None)
    assert script.settings[1] == vars(Sampling(temperature=0, top_k=1, seed=3))
    assert script.settings[0]["seed"] != 3


def test_stop_and_length(serve, tokenizer):
    server = serve(Script(tokenizer, "abc"))
    replies = ask(server)
    assert said(replies) == "abc"
    assert replies[-1] == {"done": True, "finish_reason": "stop"}
    replies = ask(server, max_tokens=2)
    assert said(replies) == "ab"
    assert replies[-1] == {"done": True, "finish_reason": "length", "limit": "max_tokens"}


def test_context(serve, tokenizer):
    """The answer ends where the context does; a conversation that fills it alone is refused."""
    script = Script(tokenizer, "x", endless=True, context=40)
    server = serve(script)
    replies = ask(server, [{"role": "user", "content": "y" * 29}])
    assert len(script.prompts[0]) == 33
    assert said(replies) == "x" * 7
    assert replies[-1] == {"done": True, "finish_reason": "length", "limit": "context"}
    ask(server, [{"role": "user", "content": "y" * 35}])
    response = server.client.post("/chat/completions", json={"messages": [{"role": "user", "content": "y" * 36}]})
    assert response.status_code == 400
    assert "has 40 tokens and this model's context holds 40" in response.json()["detail"]
    assert "new chat" in response.json()["detail"]


def test_tool_calls_are_marked(serve, tokenizer):
    said_by_kind = {}
    for event in ask(serve(tool_script(tokenizer)))[:-1]:
        kind = event.get("kind", "text")
        said_by_kind[kind] = said_by_kind.get(kind, "") + event["token"]
    assert said_by_kind == {"text": "So: It is 42.", "python": "17+25", "python_output": "42"}


def test_characters_split_across_tokens(serve, tokenizer):
    text = "é漢字🙂 ∀ ok"
    ids = [tokenizer.encode(bytes([byte]).decode("latin-1"))[0] for byte in b"a"]  # a byte has one token
    ids = [next(i for i in range(256) if tokenizer.id_to_bytes(i) == bytes([byte])) for byte in text.encode()]
    replies = ask(serve(Script(tokenizer, ids)))
    assert said(replies) == text
    assert all("\ufffd" not in event.get("token", "") for event in replies)


def test_conversation_reaches_the_model(serve, tokenizer):
    script = Script(tokenizer, context=10_000)
    server = serve(script)
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2."}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": ""},  # it may have said nothing
        {"role": "user", "content": "?"},
    ]
    ask(server, messages)
    assert script.prompts[0] == tokenizer.render_for_completion({"messages": messages})
    ask(server, [*USER, {"role": "assistant", "content": "a" * 9000}, *USER])  # what it wrote is taken back


def test_special_tokens_in_a_message_stay_text(serve, tokenizer):
    script = Script(tokenizer)
    names = "".join(sorted(tokenizer.get_special_tokens()))
    messages = [
        {"role": "system", "content": names},
        {"role": "user", "content": f"a{names}b"},
        {"role": "assistant", "content": [{"type": "text", "text": names}]},
        {"role": "user", "content": names},
    ]
    ask(serve(script), messages)
    special = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
    found = [tokenizer.decode([i]) for i in script.prompts[0] if i in special]
    user, assistant = ["<|user_start|>", "<|user_end|>"], ["<|assistant_start|>", "<|assistant_end|>"]
    assert found == ["<|bos|>", *user, *assistant, *user, "<|assistant_start|>"]


def test_information(serve, engine):
    server = serve(engine, engine)
    assert server.client.get("/health").json() == {
        "status": "ok",
        "ready": True,
        "num_gpus": 2,
        "available_workers": 2,
    }
    assert server.client.get("/config").json() == {
        "model": "d1",
        "source": "sft",
        "step": 7,
        "context_length": 64,
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
    ask(server, max_tokens=5)
    stats = server.client.get("/stats").json()
    assert [worker["device"] for worker in stats["workers"]] == ["cpu", "cpu"]
    assert sum(worker["served"] for worker in stats["workers"]) == 1
    assert stats["totals"]["requests"] == stats["totals"]["completed"] == 1
    assert 1 <= stats["totals"]["tokens"] <= 5
    assert stats["queue"] == {"length": 0, "limit": 64}
    assert (stats["total_workers"], stats["available_workers"], stats["busy_workers"]) == (2, 2, 0)
    assert [worker["gpu_id"] for worker in stats["workers"]] == [0, 1]
    assert stats["uptime_seconds"] > 0


def test_while_loading(serve):
    server = serve()
    response = server.client.get("/health")
    assert response.status_code == 503
    assert response.json() == {"status": "loading", "ready": False, "num_gpus": 0, "available_workers": 0}
    assert server.client.get("/").status_code == 200
    for path in ("/config", "/v1/models"):
        assert server.client.get(path).status_code == 503
    response = server.client.post("/chat/completions", json={"messages": USER})
    assert response.status_code == 503
    assert "still loading" in response.json()["detail"]
    assert int(response.headers["retry-after"]) > 0


# ---------------------------------------------------------------------------------------------------------
# Requests that are refused


def spoken(*roles, content="hi"):
    return {"messages": [{"role": role, "content": content} for role in roles]}


def said_in_parts(*parts):
    return {"messages": [{"role": "user", "content": [*parts]}]}


BAD = [
    ([], "body: .*dictionary"),
    ({}, "messages: Field required"),
    (chat(max_tokens=-2), "max_tokens: .* (1|-1), got -2"),
    (chat(max_tokens=0), "max_tokens: .* 1.* got 0"),
    (chat(max_tokens=1.5), "max_tokens: .*integer"),
    (chat(max_tokens="5"), "max_tokens: .*integer"),
    (chat(max_tokens=True), "max_tokens: .*integer"),
    (chat(top_k=-2), "top_k: .* (1|-1), got -2"),
    (chat(temperature=-0.1), "temperature: .* 0, got -0.1"),
    (chat(temperature=2.1), "temperature: .* 2, got 2.1"),
    (chat(temperature="hot"), "temperature: .*number, got 'hot'"),
    (chat(temperature=True), "temperature: .*number, got True"),
    (chat(temperature=float("nan")), "temperature: .*finite number, got nan"),
    (chat(temperature=float("inf")), "temperature: .*finite number, got inf"),
    (chat(top_p=1.1), "top_p: .* 1, got 1.1"),
    (chat(min_p=-1), "min_p: .* 0, got -1"),
    (chat(repetition_penalty=0), "repetition_penalty: .* 0.01, got 0"),
    (chat(presence_penalty=2.5), "presence_penalty: .* 2, got 2.5"),
    (chat(frequency_penalty=float("nan")), "frequency_penalty: .*finite"),
    (chat(logit_bias={"5": 101}), "logit_bias.5: .* 100, got 101"),
    (chat(logit_bias={"300": 1}), "logit_bias: '300' is no token id below 300"),
    (chat(logit_bias={"-1": 1}), "logit_bias: '-1' is no token id"),
    (chat(stop=["a" * 10_001]), "stop: at most 10000 characters"),
    (chat(stop=5), "stop: .*string"),
    (chat(seed="x"), "seed: .*integer"),
    (chat(messages=[]), "messages are empty"),
    (chat(messages={}), "messages: .*list"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages.0.content: .*string, got 5"),
    (chat(messages=[{"role": "user"}]), "messages are empty"),
    (spoken("user", "system", content=" \n"), "messages are empty"),
    (spoken("oracle"), "messages.0.role: .*got 'oracle'"),
    (spoken("\ud800"), "messages.0.role"),
    (said_in_parts({"type": "image_url", "image_url": {}}), "messages.0.content: .* text only.*image_url"),
    (said_in_parts({"type": []}), "messages.0.content: this model reads text only"),
    (said_in_parts({"type": "text"}), "messages.0.content: expected a string"),
    (said_in_parts({"type": "python", "text": "1+1"}), "only the assistant's messages"),
    (spoken("user", content="a" * 8001), "messages.0.content is too long: at most 8000 characters, got 8001"),
    (spoken("user", *["assistant", "user"] * 250), "too many messages: at most 500 are taken, got 501"),
    (spoken("user", *["assistant", "user"] * 2, content="a" * 6500), "at most 32000 characters in all, got 32500"),
]
NATIVE_ONLY = [
    (chat(max_tokens=10**9), "max_tokens: .* 4096, got 1000000000"),
    (chat(top_k=0), "top_k: .* 1, got 0"),
    (chat(top_k=201), "top_k: .* 200, got 201"),
    (chat(conversation="short"), "conversation: "),
]


@pytest.fixture(scope="module")
def refusing(tokenizer):
    """One server for all requests that are to be refused: none of them may reach the engine."""
    script = Script(tokenizer)
    with serving(script) as server:
        yield server
        assert not script.prompts
        assert totals(server)["requests"] == 0


@pytest.mark.parametrize(("body", "message"), BAD + NATIVE_ONLY)
def test_refused(refusing, body, message):
    response = post_json(refusing, "/chat/completions", body)
    assert response.status_code == 400
    assert re.search(message, response.json()["detail"]), response.json()
    assert len(response.json()["detail"]) < 300
    assert response.json()["error"]["message"] == response.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"{'a': 1}", b"\xff\xfe", b"[" * 50_000, b'{"a": ' + b"1" * 5000 + b"}"])
@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions", "/render"])
def test_not_json(refusing, path, body):
    response = refusing.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json().get("detail") or response.json()["error"]["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_only_json_is_taken(refusing, kind):
    headers = {"Content-Type": kind} if kind else {}
    response = refusing.client.post("/chat/completions", content=json.dumps(chat()).encode(), headers=headers)
    assert response.status_code == 415
    assert "expected Content-Type: application/json" in response.json()["detail"]


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions", "/render", "/nothing"])
@pytest.mark.parametrize("chunked", [False, True])
def test_oversize(refusing, path, chunked):
    limit = Limits().body_bytes
    content = (b"[" * 65_536 for _ in range(limit // 65_536 + 1)) if chunked else b"[" * (limit + 1)
    response = refusing.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert str(limit) in response.text
    assert {"error", "detail"} == set(response.json())


def test_oversize_is_refused_before_it_is_sent(refusing):
    """A client that asks first (Expect: 100-continue) does not send its gigabyte at all."""
    with socket.create_connection(("127.0.0.1", refusing.port), timeout=10) as connection:
        connection.sendall(
            b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/chat/completions", 405),
        ("GET", "/nothing", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/models", 404),  # a base URL without /v1
        ("POST", "/completions", 404),
        ("POST", "/v1/v1/chat/completions", 404),
        ("POST", "/v1/chat/completions/chat/completions", 404),
        ("POST", "/v1/embeddings", 404),
        ("OPTIONS", "/v1/models", 405),
    ],
)
def test_what_is_not_here(refusing, method, path, status):
    """Each kind of client can show its user what there is instead."""
    response = refusing.client.request(method, path, json={} if method == "POST" else None)
    assert response.status_code == status
    assert f"{method} {path} does not exist" in response.json()["detail"]
    assert "base URL that ends in /v1" in response.json()["error"]["message"]
    assert "/v1/chat/completions, /v1/completions" in response.json()["error"]["message"]


def test_an_openai_client_at_the_native_address(refusing):
    response = post_json(refusing, "/chat/completions", chat(model="x", stream=True))
    assert response.status_code == 404
    assert "base URL that ends in /v1" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/logo.svg", "/health", "/stats", "/v1/models", "/openapi.json", "/nothing"])
def test_head_is_get_without_a_body(refusing, path):
    got, head = refusing.client.get(path), refusing.client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_no_redirects(refusing):
    """They would have to know the scheme and the path of a proxy. A slash too many does no harm."""
    for path in ("/v1/models/", "//v1//models", "/health/"):
        assert refusing.client.get(refusing.url + path, follow_redirects=False).status_code == 200


# ---------------------------------------------------------------------------------------------------------
# A key, and browsers' pages of other origins

NEED_KEY = [
    ("POST", path)
    for path in ("/chat/completions", "/v1/chat/completions", "/v1/completions", "/render", "/focus", "/no")
] + [("GET", path) for path in ("/config", "/stats", "/v1/models", "/v1/models/x", "/nothing")]


def test_a_key(serve, tokenizer):
    """Without it nothing is told but the page and whether the server is well; the wrong one says what is expected."""
    script = Script(tokenizer)
    server = serve(script, api_key="s3cret")
    for path in ("/", "/logo.svg", "/health", "/openapi.json"):
        assert server.client.get(path).status_code == 200
    wrong = [{}, {"Authorization": "s3cret"}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Basic s3cret"}]
    for method, path in NEED_KEY:
        body = {"json": chat()} if method == "POST" else {}
        for headers in [*wrong, {"Authorization": b"Bearer \xe9"}]:
            response = server.client.request(method, path, headers=headers, **body)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert "Authorization: Bearer" in response.json()["detail"]
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "s3cret" not in response.text
        right = server.client.request(method, path, headers={"Authorization": "bearer s3cret"}, **body)
        assert right.status_code != 401
    assert len(script.prompts) == 2  # with the key only


def test_a_key_for_openai(serve, tokenizer):
    server = serve(Script(tokenizer), api_key="s3cret")
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret") as client:
        assert client.chat.completions.create(model=MODEL.id, messages=USER).choices[0].message.content


def test_where_the_key_comes_from(tmp_path, monkeypatch):
    assert chat_web.read_key("") == ""
    monkeypatch.setenv("NANOCHAT_API_KEY", "from-the-environment")
    assert chat_web.read_key("") == "from-the-environment"
    assert chat_web.read_key("given") == "given"
    (tmp_path / "key").write_text("in-a-file\n")
    assert chat_web.read_key(f"@{tmp_path}/key") == "in-a-file"
    (tmp_path / "empty").write_text("\n")
    for option, message in [
        ("a b", "must be ASCII without spaces"),
        ("schlüssel", "must be ASCII"),
        (f"@{tmp_path}/empty", "must be ASCII"),
        (f"@{tmp_path}/none", "cannot read the key from .*none"),
    ]:
        with pytest.raises(UserError, match=message):
            chat_web.read_key(option)


@pytest.mark.parametrize("origins", [[], ["https://chat.example.org", "http://localhost:3000"], ["*"]])
def test_pages_of_other_origins(serve, tokenizer, origins):
    """They are let in if they are named, with a preflight, and told of errors too; by default no one is."""
    server = serve(Script(tokenizer), origins=origins, api_key="s3cret")
    for origin in ("https://chat.example.org", "https://evil.example"):
        headers = {"Origin": origin, "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
        preflight = server.client.options("/v1/models", headers=headers | {"Access-Control-Request-Method": "POST"})
        refused = server.client.get("/v1/models", headers=headers)
        answer = server.client.get("/v1/models", headers=headers | {"Authorization": "Bearer s3cret"})
        assert (refused.status_code, answer.status_code) == (401, 200)
        allowed = origin in origins or "*" in origins
        for response in (preflight, refused, answer):
            assert (response.headers.get("access-control-allow-origin") in (origin, "*")) == allowed
            assert "access-control-allow-credentials" not in response.headers
        assert (preflight.status_code == 200) == allowed
        assert not allowed or "x-stainless-os" in preflight.headers["access-control-allow-headers"]


def test_origins_as_an_option():
    assert chat_web.read_origins("") == []
    assert chat_web.read_origins("https://a.example, http://localhost:3000") == [
        "https://a.example",
        "http://localhost:3000",
    ]
    assert chat_web.read_origins("*") == ["*"]
    for wrong in ("a.example", "https://a.example/path", "file:///x"):
        with pytest.raises(UserError, match="takes origins such as"):
            chat_web.read_origins(wrong)


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
def test_frames_are_ascii(serve, tokenizer, path):
    """Whatever a client takes for the end of a line, a frame is one."""
    text = "a\u2028b\u2029c\x85d\x1ee é"
    response = serve(Script(tokenizer, text)).client.post(path, json=chat(stream=True) if "v1" in path else chat())
    assert response.content.isascii()
    frames = [
        json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: {")
    ]
    pieces = (frame.get("token") or frame.get("choices", [{}])[0].get("delta", {}).get("content") for frame in frames)
    assert "".join(piece or "" for piece in pieces) == text


def test_slow_senders_are_cut_off(serve, tokenizer, monkeypatch):
    """A head that never ends is dropped; a body that never ends is answered 408. Neither costs a worker."""
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.3)
    monkeypatch.setattr(Gate, "body_seconds", 0.3)
    server = serve(Script(tokenizer))
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address, timeout=10) as silent, socket.create_connection(address, timeout=10) as head:
        head.sendall(b"POST /chat/comp")
        body = send_raw(server, b"{" + b" " * 100)
        body.close()
        with socket.create_connection(address, timeout=10) as body:
            body.sendall(
                b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            assert body.recv(1000).startswith(b"HTTP/1.1 408")
        for connection in (silent, head):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1000) == b""
    ask(server)


# ---------------------------------------------------------------------------------------------------------
# The queue, clients that leave, engines that fail


@pytest.mark.parametrize("batch_size", [1, 4])
def test_full_queue(serve, tokenizer, batch_size):
    go = threading.Event()
    server = serve(Script(tokenizer, go=go), queue_size=2, batch_size=batch_size)
    connections = [send_raw(server, chat()) for _ in range(batch_size + 2)]  # two more than are answered at once
    until(lambda: server.pool.totals["requests"] == batch_size + 2)
    assert server.client.get("/health").json()["available_workers"] == 0
    response = server.client.post("/chat/completions", json=chat())
    assert response.status_code == 503
    assert "busy" in response.json()["detail"]
    assert 1 <= int(response.headers["retry-after"]) <= 60
    response = server.client.post("/v1/chat/completions", json=chat(model=MODEL.id))
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"
    assert int(response.headers["retry-after"]) >= 1
    go.set()
    for connection in connections:
        received = b""
        while b'"done": true' not in received:
            more = connection.recv(10_000)
            assert more
            received += more
        connection.close()
    assert said(ask(server)) == "Hello there."
    counts = totals(server)
    assert (counts["requests"], counts["completed"], counts["rejected"]) == (batch_size + 5, batch_size + 3, 2)


def test_without_a_queue(serve, tokenizer):
    go = threading.Event()
    server = serve(Script(tokenizer, go=go), queue_size=0, batch_size=1)
    with send_raw(server, chat()):
        until(lambda: not is_idle(server))
        assert server.client.post("/chat/completions", json=chat()).status_code == 503
        go.set()
        until(lambda: is_idle(server))
    assert said(ask(server)) == "Hello there."


@pytest.mark.parametrize("api", ["native", "openai", "openai stream"])
@pytest.mark.parametrize(
    ("moment", "batch_size"),
    [("queued", 1), ("before the first token", 1), ("before the first token", 8), ("mid-stream", 1), ("mid-stream", 8)],
)
def test_the_client_leaves(serve, tokenizer, api, moment, batch_size):
    """At whatever moment: the worker is free soon, the generator is closed, and the next client is served."""
    go = threading.Event()
    script = Script(tokenizer, "x", go=go, each=0.002, endless=True)
    server = serve(script, batch_size=batch_size)
    path = "/chat/completions" if api == "native" else "/v1/chat/completions"
    body = chat(max_tokens=4096) | ({} if api == "native" else {"model": MODEL.id, "stream": "stream" in api})
    leaving = send_raw(server, body, path)
    assert script.started.wait(10)
    if moment == "queued":
        second = send_raw(server, body, path)
        until(lambda: server.pool.stats()["queue"]["length"] == 1)
        second.close()
        until(lambda: server.pool.stats()["queue"]["length"] == 0)
        assert server.pool.totals["cancelled"] == 1
    if moment == "mid-stream":
        go.set()
        if api == "openai":
            until(lambda: len(server.pool.workers[0].jobs[0].ids) > 5)
        else:
            received = b""
            while received.count(b"data: ") < 3:
                received += leaving.recv(10_000)
    leaving.close()
    until(lambda: all(job.cancelled for job in server.pool.workers[0].jobs))
    go.set()
    until(lambda: is_idle(server))
    assert script.closed.is_set()
    assert len(script.prompts) == 1  # what left the queue was never begun
    script.endless = False
    assert said(ask(server)) == "x"
    counts = totals(server)
    assert (counts["completed"], counts["failed"]) == (1, 0)
    assert counts["cancelled"] == counts["requests"] - 1
    assert counts["tokens"] < 3000


@pytest.mark.parametrize("batch_size", [1, 8])
def test_slow_reader(serve, tokenizer, monkeypatch, batch_size):
    """One who takes nothing holds no worker, nor those whose answers share its steps, and is cut off after a while."""
    monkeypatch.setattr(PatientProtocol, "send_seconds", 3.0)  # far longer than the answer takes
    script = Script(tokenizer, "é", endless=True)  # six characters in JSON
    server = serve(script, sndbuf=4096, batch_size=batch_size)
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    reader.connect(("127.0.0.1", server.port))
    body = json.dumps(chat(model=MODEL.id, stream=True, max_tokens=2000, n=8)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
    reader.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert script.started.wait(10)
    assert said(ask(server, max_tokens=6)) == "ééé"
    until(lambda: server.pool.totals["completed"] == 9)  # the answers are made, though nobody has read them
    until(lambda: len(server.server.server_state.connections) == 1)  # the other client's is left
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while some := reader.recv(10_000):
            received += some
    assert 1000 < len(received) < 40_000
    assert b"[DONE]" not in received
    reader.close()
    script.endless = False
    assert said(ask(server)) == "é"


@pytest.mark.parametrize("fault_at", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_worker_survives_a_fault(serve, tokenizer, caplog, fault_at, batch_size):
    script = Script(tokenizer, "some words", fault=RuntimeError("out of memory"), fault_at=fault_at)
    server = serve(script, batch_size=batch_size)
    secret = "the user's secret"
    with caplog.at_level(logging.INFO):
        replies = ask(server, [{"role": "user", "content": secret}])
        assert said(replies) == "some words"[:fault_at]
        assert replies[-1] == {"error": "the model failed on this request"}
        body = {"model": MODEL.id, "messages": [{"role": "user", "content": secret}]}
        response = server.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        chunks = events(server.client.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n")[:-3])
        assert chunks[-1]["error"]["message"] == "the model failed on this request"
    assert caplog.text.count("RuntimeError: out of memory") == 3
    assert "Traceback" in caplog.text
    assert secret not in caplog.text
    script.fault = None
    assert said(ask(server)) == "some words"
    stats = server.client.get("/stats").json()
    assert stats["workers"][0] == {
        "gpu_id": 0,
        "device": "cpu",
        "busy": False,
        "answers": 0,
        "served": 1,
        "failed": 3,
    }
    assert stats["totals"]["failed"] == 3


def test_pings_while_nothing_happens(serve, tokenizer):
    go = threading.Event()
    server = serve(Script(tokenizer, go=go), ping_seconds=0.02)
    with server.client.stream("POST", "/chat/completions", json=chat()) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
        go.set()
        assert said(events(lines)) == "Hello there."


def test_two_workers_work_at_once(serve, tokenizer):
    """Each of the two answers only ends after both have begun."""
    first, second = Script(tokenizer), Script(tokenizer)
    first.go, second.go = second.started, first.started
    server = serve(first, second)
    threads = [in_background(httpx.post, f"{server.url}/chat/completions", json=chat(), timeout=30) for _ in range(2)]
    for thread, _ in threads:
        thread.join(30)
    replies = [events(results[0].text.split("\n")) for _, results in threads]
    assert [said(events_of_one) for events_of_one in replies] == ["Hello there."] * 2
    assert {events_of_one[0]["gpu"] for events_of_one in replies} == {0, 1}


def test_log(serve, tokenizer, caplog):
    server = serve(Script(tokenizer))
    with caplog.at_level(logging.INFO):
        ask(server, [{"role": "user", "content": "a secret"}])
        server.client.get("/%0Aforged%20line")
        server.client.get("/health")
        until(lambda: "forged" in caplog.text)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("nanochat.serving")]
    assert re.fullmatch(r"POST /chat/completions 200 \d+\.\d\ds", lines[0])
    assert lines[1].startswith("GET /%0Aforged%20line 404")
    assert len(lines) == 2
    assert "secret" not in caplog.text


# ---------------------------------------------------------------------------------------------------------
# A thousand at once


async def one_of_many(port, request, leave_after):
    """(status, whole answer, has Retry-After) of one request; None if it left after so many seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(leave_after):
            received = await reader.read()
    except TimeoutError:
        return None
    finally:
        writer.transport.abort()
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), b'"finish_reason": "stop"' in body, b"retry-after: " in head


async def many(port, request, leave_after):
    return await asyncio.gather(*(one_of_many(port, request, seconds) for seconds in leave_after))


@pytest.fixture
def many_files():
    """Two thousand connections, both ends, in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("impatient", [False, True])
def test_a_thousand_at_once(serve, tokenizer, impatient, batch_size, many_files):
    """Each is answered in full or told when to come back; afterwards every worker is free and the counts add up."""
    server = serve(*(Script(tokenizer, each=0.0005) for _ in range(4)), queue_size=64, batch_size=batch_size)
    body = json.dumps(chat()).encode()
    head = f"POST /chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
    leave_after = [0.001 * (i % 500) if impatient and i % 2 else 50 for i in range(1000)]
    results = asyncio.run(many(server.port, request, leave_after))
    until(lambda: is_idle(server))
    complete = results.count((200, True, False))
    refused = results.count((503, False, True))
    left = results.count(None)
    assert complete + refused + left == 1000, set(results)
    assert complete >= (1 if impatient else 64 + 4 * batch_size)
    assert refused > 0
    assert (left > 0) == impatient
    counts = totals(server)
    assert counts["failed"] == 0
    assert counts["requests"] == counts["completed"] + counts["cancelled"] + counts["rejected"]
    if not impatient:
        assert (counts["completed"], counts["rejected"], counts["cancelled"]) == (complete, refused, 0)
    assert server.client.get("/health").json()["available_workers"] == 4
    until(lambda: len(server.server.server_state.connections) <= 1)  # our own keep-alive one
    assert said(ask(server)) == "Hello there."


# ---------------------------------------------------------------------------------------------------------
# The end of a server, and its beginning


def taken(server):
    """Requests that run or wait."""
    stats = server.pool.stats()
    return sum(worker["answers"] for worker in stats["workers"]) + stats["queue"]["length"]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_draining(serve, tokenizer, batch_size):
    """After a signal: no new chat, health says so, what runs and what waits is finished, then the server ends."""
    go = threading.Event()
    server = serve(Script(tokenizer, go=go), batch_size=batch_size)
    asking = [in_background(httpx.post, f"{server.url}/chat/completions", json=chat(), timeout=30) for _ in range(2)]
    until(lambda: taken(server) == 2)
    server.server.handle_exit(signal.SIGTERM, None)
    until(lambda: server.pool.state == "draining")
    response = server.client.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "draining")
    response = server.client.post("/chat/completions", json=chat())
    assert response.status_code == 503
    assert "shutting down" in response.json()["detail"]
    assert response.headers["retry-after"]
    go.set()
    for thread, results in asking:
        thread.join(30)
        assert said(events(results[0].text.split("\n"))) == "Hello there."
    server.thread.join(10)
    assert not server.thread.is_alive()


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("signals", [1, 2])
def test_the_end_of_patience(serve, tokenizer, signals, batch_size):
    """Answers that outlast the drain time, or a second signal, end with an error that says why."""
    script = Script(tokenizer, "x", endless=True, each=0.01)
    server = serve(script, batch_size=batch_size, drain_seconds=0.2 if signals == 1 else 60)
    asking = [
        in_background(httpx.post, f"{server.url}/chat/completions", json=chat(max_tokens=4096), timeout=30)
        for _ in range(2)
    ]
    until(lambda: taken(server) == 2)
    for _ in range(signals):
        server.server.handle_exit(signal.SIGINT, None)
    for thread, results in asking:
        thread.join(30)
        assert events(results[0].text.split("\n"))[-1] == {"error": "the server is shutting down"}
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert script.closed.is_set()


def save_tiny_model(base_dir, tokenizer):
    """A model that, at temperature 0, says the same byte for ever."""
    write_tokenizer(tokenizer, base_dir)
    config = GPTConfig(sequence_len=4096, vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
    model = GPT(config)
    model.init_weights()
    folder = checkpoint_manager.checkpoint_root("sft") / "d1"
    checkpoint_manager.save_checkpoint(folder, 3, model.state_dict(), meta_data={"model_config": asdict(config)})


def test_the_whole_program(base_dir, tokenizer):
    """Started as people do, asked, and told to end in the middle of an answer, which it finishes."""
    save_tiny_model(base_dir, tokenizer)
    command = [
        sys.executable,
        "-m",
        "scripts.chat_web",
        "-p",
        "0",
        "--device_type=cpu",
        "-d",
        "fp32",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        shown = ""
        while "key " not in shown:
            line = process.stdout.readline()
            assert line, shown
            shown += line
        assert "sft/d1, step 3: " in shown
        assert "context 4096 tokens, on cpu" in shown
        assert "500 messages, 8,000 characters per message, 32,000 in all, 64 waiting requests" in shown
        assert "key     none (--api_key): anyone who can reach this address can use the model" in shown
        url = re.search(r"page +(http://127\.0\.0\.1:\d+)/\n", shown)[1]
        with httpx.Client(base_url=url, timeout=60) as client:
            assert "<title>" in client.get("/").text
            assert client.get("/health").status_code == 200
            body = chat(temperature=0, max_tokens=1000)
            with client.stream("POST", "/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = events(lines)
        assert rest[-1] == {"done": True, "finish_reason": "length", "limit": "max_tokens"}
        assert len(said(rest)) > 500
        assert process.wait(30) == 0, process.stdout.read()
        assert "Traceback" not in process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "--dtype must be auto, bf16 or fp32, got 'fp8'"),
        ({"source": "best"}, "source must be one of base, mid, sft, rl, got 'best'"),
        ({"device_type": "abacus"}, "device_type 'abacus' is not available"),
        ({"api_key": "a b"}, "API key must be ASCII without spaces"),
        ({"allow_origin": "everyone"}, "--allow_origin takes origins such as"),
        ({"host": "256.256.256.256"}, "cannot listen on 256.256.256.256"),
        ({}, "no complete checkpoint in .*chatsft_checkpoints"),
    ],
)
def test_mistakes_at_the_start(base_dir, options, message):
    with pytest.raises(UserError, match=message):
        chat_web.main(chat_web.Config(**{"port": 0, "device_type": "cpu", "host": "127.0.0.1", **options}))


def test_port_in_use(base_dir):
    with open_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} \(it is in use\): choose another --port"):
            chat_web.main(chat_web.Config(port=port, device_type="cpu", host="127.0.0.1"))
