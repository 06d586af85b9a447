"""What a stream on disk costs as it grows: reading it in, opening it, tokens, memory. For dev/bench.py stream."""

import itertools
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch

from megacontext import streams
from megacontext.lensnet import KEY
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
ROUNDS = 7


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


def at_length(length, folder, gist_key, make_session, engine):
    """
    Milliseconds to open a stream, which is cut to this length for its reader alone, and to give a first token; mean and
    median milliseconds per token after that; memory.
    """
    started = time.perf_counter()
    store = streams.open_store(folder, gist_key)
    opened, level = time.perf_counter() - started, 0
    while store.count(level):
        store.truncate(level, length // store.block_size**level)
        level += 1
    session = make_session(store=store, past=length)
    times, prompt = [time.perf_counter()], engine.tokenizer.encode("What was that?", prepend="<|bos|>")
    for _ in engine.generate(prompt, max_tokens=ANSWER, temperature=0, session=session):
        times.append(time.perf_counter())
    assert len(times) == ANSWER + 1, "the answer ended early"
    steps = [after - before for before, after in itertools.pairwise(times[1:])]
    edits, (own, files) = session.focus.records[0].edits, memory()
    session.close()
    return {
        "open_ms": 1000 * opened,
        "first_token_ms": 1000 * (times[1] - times[0]),
        "token_ms": 1000 * sum(steps) / len(steps),
        "median_ms": 1000 * median(steps),
        "edits": edits,
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
            width = n_embd + KEY if level == 1 else n_embd
            store.append(level, torch.randn(1, nodes - store.count(level), width))
            level, nodes = level + 1, nodes // store.block_size
        store.commit()


def read_in(tree, documents, tokenizer, length):
    """Read texts until the stream is so long. Returns figures: seconds in all and of the parts, tokens per second."""
    store, before = tree.store, tree.num_tokens
    tree.gist_fn, store.commit = Timed(tree.gist_fn), Timed(store.commit)
    tokenizer.encode_to_numpy = Timed(tokenizer.encode_to_numpy)
    started = time.perf_counter()
    for _ in streams.ingest(tree, documents, tokenizer, commit_seconds=0.5):
        if tree.num_tokens >= length:
            break
    store.commit()
    seconds = time.perf_counter() - started
    parts = {"tokenizer": tokenizer.encode_to_numpy, "gistnet": tree.gist_fn, "disk": store.commit}
    row = {"seconds": seconds, "tokens_per_second": (tree.num_tokens - before) / seconds}
    return row | {name: part.seconds for name, part in parts.items()}


def bench_stream(config, show):
    """Make a stream of config.stream_tokens; then a row per length, each ten times the one before, up to that: the
    least of several rounds."""
    device = compute_init(config.device_type)[-1]
    texts = list(stdlib_documents(stdlib_files()[:400], {}))
    tokenizer = RustBPETokenizer.train_from_iterator(iter(texts), config.vocab_size)
    gpt = GPTConfig.from_depth(config.depth, config.max_seq_len, tokenizer.get_vocab_size())
    model = GPT(gpt).to(device)
    model.init_weights()
    mc = config.megacontext.resolve(config.max_seq_len)
    networks = MCNetworks(gpt.n_embd, mc).to(device).eval()
    with torch.no_grad():
        for parameter in networks.lensnet.parameters():  # untrained, it would have no wishes and nothing to edit
            parameter.add_(0.1 * torch.randn_like(parameter))
    reader, engine = Reader(model.eval(), networks, mc), Engine(model, tokenizer)
    gist_key = {"tokenizer": tokenizer.checksum(), "vocab_size": config.vocab_size, "n_embd": gpt.n_embd}
    gist_key |= {"block_size": mc.block_size, "model": "random", "networks": "random"}
    make_session = partial(MCSession, model, networks, mc, decoder=Decoder(model))

    folder = Path(tempfile.mkdtemp(prefix="stream-", dir=streams.streams_dir())) / "stream"
    streams.create_stream(folder, gist_key)
    store = streams.open_store(folder, gist_key, device, write=True)
    with torch.no_grad():
        if config.stream_filled:
            fill(store, config.stream_tokens, config.vocab_size, gpt.n_embd)
        else:
            tree = MegaContextTree(reader.node, mc.block_size, store, reader.embed)
            show("reading in", [read_in(tree, itertools.cycle(texts), tokenizer, config.stream_tokens)])
    lengths = [10**i for i in range(5, 12) if 10**i <= store.count(0)]
    size = streams.size_of(folder) / store.count(0)
    store.close()
    measure = partial(at_length, folder=folder, gist_key=gist_key, make_session=make_session, engine=engine)
    measure(lengths[0])  # to warm up
    rounds = [[measure(length) for length in lengths] for _ in range(ROUNDS)]  # in turn: the machine's moods are shared
    shutil.rmtree(folder.parent)
    rows = []
    for length, *figures in zip(lengths, *rounds, strict=True):
        best = {key: min(one[key] for one in figures) for key in figures[0]}
        best |= {key: figures[-1][key] for key in ("memory", "memory_files")}  # in the first ones it still grows
        best = {key: round(value, 3) for key, value in best.items()}
        rows.append({"tokens": length, "bytes_per_token": round(size, 3), **best})
    show("a stream on disk", rows)
    return rows
