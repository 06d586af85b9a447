"""
Benchmarks. Each prints a table and one JSON line. Compare figures of the same run only: machines are noisy.

    python dev/bench.py train --depth 4 [--mc 1]         # training steps: tokens/s, share of the peak
    python dev/bench.py decode --depth 4                 # time to the first token and per token, memory bandwidth
    python dev/bench.py mc-infer --depth 4               # with MegaContext: per token beside plain decoding, refocus
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from rich.console import Console
from rich.table import Table

from megacontext.attach import attach
from megacontext.config import MCConfig
from megacontext.networks import MCNetworks
from megacontext.session import MCSession
from nanochat.common import autocast, compute_init, peak_flops, resolve_dtype
from nanochat.configurator import group, run
from nanochat.decode import Decoder
from nanochat.gpt import GPT, GPTConfig
from nanochat.gpus import gpu_of
from nanochat.kv_cache import CacheSession, KVCache
from nanochat.loop import accumulation_steps, maybe_compile
from nanochat.ranges import Count, Range
from nanochat.sampling import Sampler, Sampling
from nanochat.sharding import clip_gradients

GRAPHS = {"auto": None, "on": True, "off": False}  # --compile → of a Decoder


@dataclass
class Config:
    benchmark: tyro.conf.Positional[Literal["train", "decode", "mc-infer"]]
    """what to measure"""
    vocab_size: Count = 8192
    """tokens"""
    repeat: Count = 3
    """decode: repetitions; the time shown is that of the fastest"""
    device_batch_size: Count = 8
    """train: B"""
    max_seq_len: Count = 512
    """train: T; mc-infer: entries of the working context"""
    total_batch_size: Count = -1
    """train: tokens per step; -1 for B × T"""
    depth: Annotated[int, Range(1, 1000)] = 4
    """layers"""
    mc: bool = False
    """train: with MegaContext, half-way through the training"""
    steps: Count = 10
    """train: steps to measure, after 3 for warm-up"""
    prompt_tokens: Count = 64
    """decode: length of the prompt"""
    new_tokens: Count = 100
    """decode, mc-infer: tokens per row to measure, after some for warm-up"""
    stream_tokens: Count = 65536
    """mc-infer: tokens in the tree of the longer of two streams"""
    device_type: str = ""
    """cuda, cpu or mps; empty for the best available"""
    dtype: str = "auto"
    """auto, bf16 or fp32"""
    compile: Literal["auto", "on", "off"] = "auto"
    """train: compile the model, auto, on or off; decode, mc-infer: the same for CUDA graphs"""
    megacontext: Annotated[MCConfig, group] = field(default_factory=MCConfig)
    """train: these options have an effect with --mc only"""


def seconds_of(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def show(title, rows: list[dict]):
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:,.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    print(json.dumps({"benchmark": title, "rows": rows}))


def matmul_flops(device, dtype) -> float:
    """FLOP/s of this machine's matrix products: the fastest of some large ones."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def product():
        (a @ b)[0, 0].item()  # waits for the device

    product()
    return 2 * n**3 / min(seconds_of(product) for _ in range(20))


def bench_train(config):
    """Training steps beside the speed of matrix products alone, which they could at best have."""
    _, _, _, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    cuda = device.type == "cuda"
    B, T = config.device_batch_size, config.max_seq_len
    total = B * T if config.total_batch_size == -1 else config.total_batch_size
    model = GPT(GPTConfig.from_depth(config.depth, T, config.vocab_size)).to(device)
    model.init_weights()
    networks, make_objective = attach(config, model.config, device, bos=0)
    objective = make_objective(maybe_compile(model, config.compile, device))
    optimizers = model.setup_optimizers() + ([] if networks is None else networks.setup_optimizers())
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    ids = torch.randint(0, config.vocab_size, (B, T + 1), device=device)
    B_once = objective.rows_at_once(B)
    passes = accumulation_steps(total, B, T, world_size) * B // B_once
    streams = [torch.tensor([[row, 0] for row in range(B)])] if objective.keeper else []
    products = matmul_flops(device, dtype)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def gradients():
        for i in range(passes):
            rows = slice(i * B_once % B, i * B_once % B + B_once)
            with autocast(device, dtype):
                loss, _ = objective(ids[rows, :-1], ids[rows, 1:], 0.5, i, *(origins[rows] for origins in streams))
            (loss / passes).backward()
        loss.item()  # waits for the device

    def update():
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = clip_gradients(optimizers, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for p in parameters:
            p.grad = None
        (norm + parameters[-1].flatten()[0]).item()

    warm_up = [seconds_of(gradients) + seconds_of(update) for _ in range(3)]
    seconds = [(seconds_of(gradients), seconds_of(update)) for _ in range(config.steps)]
    typical = median(map(sum, seconds))
    flops = model.flops_per_token() * total * objective.work(0.5, T) / typical
    peak = peak_flops(device)
    row = {
        "precision": str(dtype).removeprefix("torch."),
        "parameters": model.num_params(),
        "rows at once": B_once,
        "first step s": warm_up[0],
        "s/step": typical,
        "optimizer %": 100 * min(update for _, update in seconds) / typical,
        "tokens/s": total / typical,
        "GFLOP/s": flops / 1e9,
        "of products": products / 1e9,
        "ratio %": 100 * flops / products,
        "MFU %": 100 * flops / peak if peak else "-",
        "memory MiB": torch.cuda.max_memory_allocated(device) / 2**20 if cuda else "-",
    }
    mc = " --mc" if config.mc else ""
    show(f"train{mc}: depth {config.depth}, T {T}, B {B}, vocabulary {config.vocab_size:,}, {device}", [row])
    return row


# ---------------------------------------------------------------------------------------------------------
# Generation


@torch.inference_mode()
def timed(step, logits, n):
    """Seconds of each of n steps, with sampling and the ids brought to the host, and the last logits."""
    seconds = []
    sampler = Sampler(logits.size(-1), logits.device, [Sampling(top_k=50, seed=row) for row in range(len(logits))])
    for _ in range(n):
        started = time.perf_counter()
        ids = sampler(logits)
        logits = step(ids)
        ids.tolist()  # waits for the device
        if logits.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds, logits


def random_model(config: GPTConfig, device):
    model = GPT(config).to(device).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return model


def bench_decode(config):
    *_, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    prompt = torch.randint(0, config.vocab_size, (config.prompt_tokens,)).tolist()
    steps = config.new_tokens
    c = GPTConfig.from_depth(config.depth, len(prompt) + steps, config.vocab_size)
    model = random_model(c, device)
    peak = gpu_of(torch.cuda.get_device_name(device)).bandwidth if device.type == "cuda" else None
    cached = 2 * c.n_layer * c.n_kv_head * (c.n_embd // c.n_head)  # numbers per token in the KV cache

    def answer(B):
        """Seconds to the first token and per later one."""
        started = time.perf_counter()
        session = CacheSession(Decoder(model, dtype, GRAPHS[config.compile]), B, steps + 1)
        logits = session.prefill(prompt)
        logits.argmax().item()  # waits for the device
        first = time.perf_counter() - started
        seconds, _ = timed(session.step, logits, steps + 1)
        return first, sum(seconds[1:]) / steps  # the first step records a CUDA graph

    rows = []
    for B in (1, 8, 32):
        read = model.num_params() - model.transformer.wte.weight.numel() + B * cached * (len(prompt) + steps / 2)
        first, each = map(min, zip(*(answer(B) for _ in range(config.repeat)), strict=True))
        bandwidth = read * dtype.itemsize / each
        rows.append(
            {
                "precision": str(dtype).removeprefix("torch."),
                "rows": B,
                "TTFT ms": first * 1e3,
                "ms/token": each * 1e3,
                "tokens/s": B / each,
                "GB/s": bandwidth / 1e9,
                "MBU %": 100 * bandwidth / peak if peak else "-",
            }
        )
    sizes = f"{len(prompt)} + {steps} tokens"
    show(f"decode: depth {config.depth}, vocabulary {config.vocab_size:,}, {sizes}, {device}", rows)


class Restless:
    """The work of `LensNet.wanted`, and when it is armed, wishes for a few blocks at random, all that may be opened."""

    def __init__(self, wanted, wishes):
        self.wanted, self.wishes, self.armed = wanted, wishes, False

    def __call__(self, asking, keys, beside):
        wanted = self.wanted(asking, keys, beside).fill_(-30)
        if self.armed:
            wanted[:, torch.randint(keys.size(1), (self.wishes,))] = 4
            self.armed = False
        return wanted


def bench_mc_infer(config):
    """What MegaContext costs beside plain decoding with as many entries in its cache: a row per length of stream."""
    *_, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    W = config.max_seq_len
    model = random_model(GPTConfig.from_depth(config.depth, W, config.vocab_size), device)
    mc = config.megacontext.resolve(W)
    networks = MCNetworks(model.config.n_embd, model.config.n_layer, mc).to(device).eval()
    lens = Restless(networks.lensnet.wanted, mc.mc_infer_allocator_max_replacements)
    networks.lensnet.wanted = lens
    decoder = Decoder(model, dtype, GRAPHS[config.compile])
    interval, rounds = mc.mc_infer_refocus_interval, -(-config.new_tokens // mc.mc_infer_refocus_interval)
    rows = []
    for N in (2 * W, config.stream_tokens):
        prompt = torch.randint(0, config.vocab_size, (N,)).tolist()
        session = MCSession(model, networks, mc, decoder=decoder)
        started = time.perf_counter()
        with torch.inference_mode():
            session.tree.append(torch.tensor([prompt], device=device))
            session.tree.store.get(0, torch.zeros(1, 1, dtype=torch.long, device=device)).tolist()
        ingestion = time.perf_counter() - started
        session.close()
        session = MCSession(model, networks, mc, decoder=decoder)
        started = time.perf_counter()
        logits = session.prefill(prompt)
        logits.argmax().item()
        first = time.perf_counter() - started

        cache = KVCache(model.config.n_layer, W, limit=W)
        decoder.extend(torch.tensor([prompt[:W]], device=device), cache)
        step = decoder.stepper(cache)
        timed(session.step, logits, interval)  # warms up, and refocuses once
        plain, own, refocus, edits = [], [], [], session.focus.records[0].edits
        for _ in range(rounds):  # by turns, so that both see the same machine
            cache.keep(torch.arange(cache.pos) < session.cache.pos)
            plain += timed(step, logits, interval)[0]
            for i in range(interval):
                lens.armed |= i == interval - 1
                before = session.focus.records[0].edits
                (seconds,), logits = timed(session.step, logits, 1)
                (own if session.focus.records[0].edits == before else refocus).append(seconds)
        edits = (session.focus.records[0].edits - edits) / len(refocus)
        total = sum(own) + sum(refocus)
        rows.append(
            {
                "tokens in tree": N,
                "entries": int(session.focus_state()["entries"]),
                "ingestion tokens/s": N / ingestion,
                "TTFT s": first,
                "plain ms/token": 1e3 * median(plain),
                "MC ms/token between": 1e3 * median(own),
                "refocus ms": 1e3 * median(refocus),
                "edits per refocus": edits,
                "MC ms/token": 1e3 * total / (rounds * interval),
                "ratio": total / sum(plain),
                "tree MiB": session.memory()["tree"] / 2**20,
                "cache MiB": session.memory()["cache"] / 2**20,
            }
        )
    precision = str(dtype).removeprefix("torch.")
    show(f"mc-infer: depth {config.depth}, budget {W}, refocus every {interval} tokens, {precision}, {device}", rows)


def main(config: Config):
    return {"train": bench_train, "decode": bench_decode, "mc-infer": bench_mc_infer}[config.benchmark](config)


if __name__ == "__main__":
    run(main, Config)
