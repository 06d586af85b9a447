"""What a stream on disk costs as it grows: reading it in, opening it, tokens, memory. For dev/bench.py stream."""

import itertools
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import torch

from megacontext import streams
from megacontext.networks import MCNetworks
from megacontext.reader import Reader
from megacontext.session import MCSession
from megacontext.tree import MegaContextTree
from nanochat.common import compute_init
from nanochat.decode import Decoder
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.sources import stdlib_documents, stdlib_files
from nanochat.tokenizer import RustBPETokenizer

ANSWER = 512  # tokens of which the time is taken


class Timed:
    """A function that adds up the time that it takes."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - started


def memory():
    """MiB of this process: its own, and of files."""
    info = psutil.Process().memory_info()
    return (info.rss - info.shared) / 2**20, info.shared / 2**20


def at_this_length(folder, gist_key, make_session, engine):
    """Seconds to open a stream and give a first token; median and mean milliseconds per token after that; memory."""
    started = time.perf_counter()
    store = streams.open_store(folder, gist_key)
    opened = time.perf_counter() - started
    session = make_session(store=store, past=store.count(0))
    times, prompt = [time.perf_counter()], engine.tokenizer.encode("What was that?", prepend="<|bos|>")
    for _ in engine.generate(prompt, max_tokens=ANSWER, session=session):
        times.append(time.perf_counter())
    steps = sorted(after - before for before, after in itertools.pairwise(times[1:]))
    own, files = memory()
    session.close()
    return {
        "open_ms": 1000 * opened,
        "first_token_ms": 1000 * (times[1] - started - opened),
        "token_ms": 1000 * sum(steps) / len(steps),
        "median_ms": 1000 * steps[len(steps) // 2],
        "memory": own,
        "memory_files": files,
    }


def fill(store, length, vocab_size, n_embd):
    """Random tokens and gists, until the stream is as long as that."""
    while (n := store.count(0)) < length:
        N = min(length, n + 2**20)
        store.append(0, torch.randint(0, vocab_size, (1, N - n)))
        level, nodes = 1, N // store.block_size
        while nodes:
            store.append(level, torch.randn(1, nodes - store.count(level), n_embd))
            level, nodes = level + 1, nodes // store.block_size
        store.commit()


def bench_stream(config, show):
    """A row per length, ten times as long each, up to config.stream_tokens."""
    device = compute_init(config.device_type)[-1]
    texts = list(stdlib_documents(stdlib_files()[:400], {}))
    tokenizer = RustBPETokenizer.train_from_iterator(iter(texts), config.vocab_size)
    gpt = GPTConfig.from_depth(config.depth, config.max_seq_len, tokenizer.get_vocab_size())
    model = GPT(gpt).to(device)
    model.init_weights()
    mc = config.megacontext.resolve(config.max_seq_len)
    networks = MCNetworks(gpt.n_embd, mc).to(device).eval()
    reader, engine = Reader(model.eval(), networks, mc), Engine(model, tokenizer)
    gist_key = {"tokenizer": tokenizer.checksum(), "vocab_size": config.vocab_size, "n_embd": gpt.n_embd}
    gist_key |= {"block_size": mc.block_size, "model": "random", "networks": "random"}
    make_session = partial(MCSession, model, networks, mc, decoder=Decoder(model))

    folder = Path(tempfile.mkdtemp(prefix="stream-", dir=streams.streams_dir())) / "stream"
    streams.create_stream(folder, gist_key)
    store = streams.open_store(folder, gist_key, device, write=True)
    gist, store.commit = Timed(reader.gist), Timed(store.commit)
    tokenizer.encode_to_numpy = Timed(tokenizer.encode_to_numpy)
    tree = MegaContextTree(gist, mc.block_size, store, reader.embed)
    documents, rows, length = itertools.cycle(texts), [], 100_000
    spent, before = 0.0, 0
    with torch.no_grad():
        while length <= config.stream_tokens:
            row = {}
            if config.stream_filled:
                fill(store, length, config.vocab_size, gpt.n_embd)
            else:
                started = time.perf_counter()
                for _ in streams.ingest(tree, documents, tokenizer, commit_seconds=0.5):
                    if store.count(0) >= length:
                        break
                store.commit()
                took = time.perf_counter() - started
                spent += took
                row |= {"tokens_per_second": (store.count(0) - before) / took, "seconds": spent}
                row |= {"tokenizer": tokenizer.encode_to_numpy.seconds, "gistnet": gist.seconds}
                row |= {"disk": store.commit.seconds}
            n, size = store.count(0), sum(path.stat().st_size for path in folder.rglob("*.*"))
            if not rows:
                at_this_length(folder, gist_key, make_session, engine)  # to warm up
            row = {"tokens": n, "bytes_per_token": size / n, **row}
            row |= at_this_length(folder, gist_key, make_session, engine)
            rows.append({key: round(value, 3) for key, value in row.items()})
            before, length = n, length * 10
    store.close()
    shutil.rmtree(folder.parent)
    show("a stream on disk", rows)
    return rows
