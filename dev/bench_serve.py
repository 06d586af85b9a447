"""What a chat server's worker gives to one, 8 and 32 clients at once, over real sockets, without and with --mc."""

import asyncio
import json
import multiprocessing
import time
from functools import partial

import torch

from megacontext.chat_sessions import ChatSessions
from megacontext.config import MCConfig
from megacontext.networks import MCNetworks
from megacontext.session import MCSession
from nanochat.common import compute_init, resolve_dtype
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.serving.app import create_app
from nanochat.serving.transport import Server, open_socket
from nanochat.serving.worker_pool import ServedModel, WorkerPool
from nanochat.sources import stdlib_documents, stdlib_files
from nanochat.tokenizer import RustBPETokenizer

CLIENTS = (1, 8, 32)


def serve(config, mc, batch_size, connection):
    """A server of a random model that never ends its turn; sends its port, and ends when it gets a word."""
    *_, device = compute_init(config.device_type)
    tokenizer = RustBPETokenizer.train_from_iterator(stdlib_documents(stdlib_files(), {}), config.vocab_size)
    model = GPT(GPTConfig.from_depth(config.depth, config.max_seq_len, config.vocab_size)).to(device).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    with torch.no_grad():  # never among the 50 likeliest
        model.lm_head.weight[[tokenizer.encode_special(token) for token in tokenizer.get_special_tokens()]] = 0
    engine, sessions = Engine(model, tokenizer, resolve_dtype(config.dtype, device.type)), []
    if mc:
        settings = MCConfig().resolve(config.max_seq_len)
        networks = MCNetworks(model.config.n_embd, settings).to(device).eval()
        make_session = partial(MCSession, model, networks, settings, decoder=engine.decoder)
        sessions = [ChatSessions(make_session, settings, max(CLIENTS))]
    pool = WorkerPool(max(CLIENTS), batch_size=batch_size)
    server = Server(create_app(pool), pool)
    with open_socket("127.0.0.1", 0) as listener:
        pool.start([engine], ServedModel("sft", "bench", 0), sessions)
        connection.send(listener.getsockname()[1])
        server.on_tick = partial(_end_at_a_word, server, connection, server.on_tick)
        server.run(sockets=[listener])


async def _end_at_a_word(server, connection, on_tick, counter):
    server.should_exit |= connection.poll()
    return await on_tick(counter)


async def answer(port, number, config):
    """Seconds until the first token and until the last of one answer."""
    text = " ".join(f"Number {number} of {i}: what comes next?" for i in range(config.prompt_tokens // 10))
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": config.new_tokens, "seed": number}
    data = json.dumps({**body, "temperature": 1.0, "top_k": 50}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    started, first, received = time.perf_counter(), None, b""
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    while piece := await reader.read(65536):
        if first is None and b"data: " in piece:
            first = time.perf_counter() - started
        received = (received + piece)[-200:]
    writer.close()
    if b'"finish_reason": "length"' not in received:
        raise RuntimeError(f"an answer did not end as it should: {received!r}")
    return first, time.perf_counter() - started


async def answers(port, clients, config):
    return await asyncio.gather(*(answer(port, number, config) for number in range(clients)))


def bench_serve(config, show):
    """`bench.py serve`: a row for each number of clients, with answers one after another and with shared steps."""
    context, rows = multiprocessing.get_context("spawn"), []
    for mc in (False, True):
        for batch_size in (1, max(CLIENTS)):
            connection, other = context.Pipe()
            process = context.Process(target=serve, args=(config, mc, batch_size, other))
            process.start()
            other.close()  # so that its end is noticed here
            port = connection.recv()
            asyncio.run(answers(port, 2, config))  # warm-up
            alone = None
            for clients in CLIENTS:
                best = None
                for _ in range(config.repeat):
                    started = time.perf_counter()
                    times = asyncio.run(answers(port, clients, config))
                    seconds = time.perf_counter() - started
                    if best is None or seconds < best[0]:
                        best = seconds, sorted(first for first, _ in times)
                rate = clients * config.new_tokens / best[0]
                alone = alone or rate
                rows.append(
                    {
                        "context": "--mc" if mc else "plain",
                        "steps": "shared" if batch_size > 1 else "by turns",
                        "clients": clients,
                        "tokens/s": rate,
                        "times one": rate / alone,
                        "tokens/s each": rate / clients,
                        "TTFT ms, median": 1e3 * best[1][clients // 2],
                        "TTFT ms, last": 1e3 * best[1][-1],
                    }
                )
            connection.send("end")
            process.join(60)
    show(
        f"serve: depth {config.depth}, T {config.max_seq_len}, vocabulary {config.vocab_size:,}, "
        f"{config.new_tokens} tokens per answer, {config.dtype}",
        rows,
    )
