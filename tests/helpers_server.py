"""Chat servers for tests: with scripted engines or tiny models behind them, and a client's side of the interface."""

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import httpx
import torch

from megacontext.arrays import Arrays
from megacontext.chat_sessions import ChatSessions
from megacontext.config import MCConfig
from megacontext.kept_chats import KeptChats
from megacontext.networks import MCNetworks
from megacontext.session import MCSession
from megacontext.streams import open_store
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.serving.app import create_app
from nanochat.serving.schema import Limits
from nanochat.serving.transport import Server, open_socket
from nanochat.serving.worker_pool import ServedModel, WorkerPool
from tests.helpers import until

USER = [{"role": "user", "content": "hi"}]
MODEL = ServedModel("sft", "d1", 7)


# ---------------------------------------------------------------------------------------------------------
# Scripted engines, and a server in a thread


@dataclass
class Script:
    """
    Stands in for an Engine: says `text` (a str, or ids), over and over, up to max_tokens; then, unless endless, ends.

    `go` holds it back before the first token, and `each` before every other one; `fault` is raised after `fault_at`.
    """

    tokenizer: object
    text: object = "Hello there."
    go: threading.Event = None
    each: float = 0.0
    endless: bool = False
    fault: Exception = None
    fault_at: int = 0
    context: int = 4096
    prompts: list = field(default_factory=list)
    settings: list = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def model(self):
        return SimpleNamespace(
            config=SimpleNamespace(sequence_len=self.context), get_device=lambda: torch.device("cpu")
        )

    def batch(self):
        return ScriptBatch(self)

    def generate(self, tokens, max_tokens, **settings):
        self.prompts.append(tokens)
        self.settings.append(settings)
        self.closed.clear()
        self.started.set()
        try:
            assert self.go is None or self.go.wait(30)
            ids = self.tokenizer.encode(self.text) if isinstance(self.text, str) else list(self.text)
            if not self.endless:
                ids.append(self.tokenizer.encode_special("<|assistant_end|>"))
            for i in range(max_tokens if self.endless else min(max_tokens, len(ids))):
                if self.fault and i == self.fault_at:
                    raise self.fault
                yield [ids[i % len(ids)]], [1]
                time.sleep(self.each)
        finally:
            self.closed.set()


class ScriptBatch:
    """Stands in for a Batch: each stream of it is a generator of the script, of which a step takes one token."""

    def __init__(self, script):
        self.script, self.streams = script, {}

    def add(self, prompt, max_tokens, sampling, session=None, with_logits=False):
        stream = type("Stream", (), {"ended": None})()
        self.streams[stream] = self.script.generate(prompt, max_tokens, **vars(sampling))
        return stream

    def remove(self, stream):
        if stream in self.streams:
            self.streams.pop(stream).close()

    def step(self):
        news = []
        for stream, columns in list(self.streams.items()):
            try:
                news.append((stream, next(columns)[0][0], None))
            except StopIteration:
                stream.ended = "length"
                news.append((stream, None, None))
            except Exception as error:  # as Batch does, it ends this stream alone
                stream.ended = error
                news.append((stream, None, None))
        return news


@contextlib.contextmanager
def serving(
    *engines, queue_size=64, batch_size=8, drain_seconds=30.0, sndbuf=None, model=MODEL, sessions=(), **options
):
    """A running server with these engines. Yields .url, .pool, .server, .client and .port."""
    pool = WorkerPool(queue_size, batch_size=batch_size)
    app = create_app(pool, **options)
    server = Server(app, pool, drain_seconds)
    listener = open_socket("127.0.0.1", 0)
    if sndbuf:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    if engines:
        pool.start(engines, model, sessions)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            until(lambda: server.started)
            yield SimpleNamespace(url=url, port=port, pool=pool, server=server, client=client, thread=thread)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def events(lines):
    """The JSON values of server-sent events; pings left out."""
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def ask(server, messages=USER, path="/chat/completions", **options):
    response = server.client.post(path, json={"messages": messages, **options})
    assert response.status_code == 200, response.text
    return events(response.text.split("\n"))


def said(replies):
    return "".join(event["token"] for event in replies if "token" in event)


def totals(server):
    return server.client.get("/stats").json()["totals"]


def is_idle(server):
    return server.pool.is_idle()


def send_raw(server, body, path="/chat/completions"):
    """A raw connection that has sent a request and read nothing yet."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def in_background(function, *args, **kwargs):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args, **kwargs)))
    thread.start()
    return thread, results


def tool_script(tokenizer):
    special = tokenizer.encode_special
    call = [special("<|python_start|>"), *tokenizer.encode("17+25"), special("<|python_end|>")]
    result = [special("<|output_start|>"), *tokenizer.encode("42"), special("<|output_end|>")]
    return Script(tokenizer, [*tokenizer.encode("So: "), *call, *result, *tokenizer.encode("It is 42.")])


def chat(**changes):
    return {"messages": USER, **changes}


# ---------------------------------------------------------------------------------------------------------
# A tiny model of random weights with --mc

K, CONTEXT = 4, 64
SETTINGS = MCConfig(block_size=K, allocator_recent_tokens=8, mc_infer_refocus_interval=4, mc_aux_dtype="fp32")
BUDGET = SETTINGS.resolve(CONTEXT).allocator_soft_max
LIMITS = Limits(20_000, 2_000_000, 2_000_000)


def tiny(tokenizer):
    """(engine, networks, resolved config); the same each time. With top_k, it ends no answer before max_tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(CONTEXT, tokenizer.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=16)).eval()
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    with torch.no_grad():
        model.lm_head.weight[[tokenizer.encode_special(token) for token in tokenizer.get_special_tokens()]] = 0
    torch.nn.init.normal_(model.transformer.h[0].attn.c_proj.weight, std=0.5)
    networks = MCNetworks(16, 1, SETTINGS.resolve(CONTEXT)).eval()
    with torch.no_grad():
        for p in networks.lensnet.parameters():
            p.add_(torch.randn_like(p))
    return Engine(model, tokenizer), networks, SETTINGS.resolve(CONTEXT)


def gist_key(tokenizer, networks="n"):
    """Of the tiny model: see streams.gist_key_of."""
    facts = {"tokenizer": tokenizer.checksum(), "vocab_size": tokenizer.get_vocab_size(), "model": "m"}
    return {**facts, "networks": networks, "n_embd": 16, "key_size": 72, "block_size": K}


class Watched(MCSession):
    """Adds itself to the sessions `made`, and says when two jobs are in it at a time."""

    def __init__(self, *args, made, **kwargs):
        super().__init__(*args, **kwargs)
        self.inside, self.fault = threading.Lock(), None
        made.append(self)

    def reading(self, tokens, part):
        if self.fault:
            raise self.fault
        parts = super().reading(tokens, part)
        while (one := self._alone(next, parts))[1] is None:
            yield one
        yield one

    def enter(self, ids):
        return self._alone(super().enter, ids)

    def _alone(self, method, argument):
        assert self.inside.acquire(blocking=False), "two at once"
        try:
            return method(argument)
        finally:
            self.inside.release()


def _about(make, folder, key, **options):
    store = open_store(folder, key)
    return make(store=store, past=store.count(0), **options)


@contextlib.contextmanager
def serving_mc(
    tokenizer,
    workers=1,
    limit=8,
    model=MODEL,
    on_update=None,
    on_end=None,
    queue_size=64,
    batch_size=4,
    keep_in=None,
    bounds=None,
    about=None,
):
    """
    A running server. Yields .url, .client, .pool, .sessions (of each worker) and .made (sessions ever made).

    keep_in: a folder for conversations that outlive it. about: a stream's folder, the past of all conversations.
    """
    made, pool = [], WorkerPool(queue_size, on_end, batch_size)
    server = Server(create_app(pool, LIMITS), pool)
    listener = open_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    engines, kept = [], []
    for _ in range(workers):
        engine, networks, config = tiny(tokenizer)
        make = partial(Watched, engine.model, networks, config, decoder=engine.decoder, made=made)
        if about:
            make = partial(_about, make, about, gist_key(tokenizer))
        engines.append(engine)
        on_disk = KeptChats(keep_in, gist_key(tokenizer), **(bounds or {})) if keep_in else None
        past = Arrays(about) if about else None
        kept.append(ChatSessions(make, config, limit, on_update, on_disk, past))
    pool.start(engines, model, kept)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            until(lambda: server.started)
            yield SimpleNamespace(url=url, client=client, pool=pool, sessions=kept, made=made)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        for session in made:  # as the end of a process does
            session.close()
        assert not thread.is_alive()
