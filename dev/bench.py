"""
Benchmarks. Each prints a table and one JSON line. Compare figures of the same run only: machines are noisy.

    python dev/bench.py train --depth 4 [--mc 1]         # training steps: tokens/s, share of the peak
    python dev/bench.py loss --vocab_size 65536          # our cross-entropy beside others
    python dev/bench.py decode --depth 4                 # time to the first token and per token, memory bandwidth
    python dev/bench.py mc-infer --depth 4               # with MegaContext: per token beside plain decoding, refocus
"""

import importlib.util
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from dev.bench_infer import GRAPHS, bench_mc_infer, random_model, timed
from megacontext.attach import attach
from megacontext.config import MCConfig
from nanochat.common import autocast, compute_init, peak_flops, resolve_dtype
from nanochat.configurator import group, run
from nanochat.cross_entropy import softcap_cross_entropy
from nanochat.decode import Decoder
from nanochat.gpt import GPT, LOGIT_SOFTCAP, GPTConfig
from nanochat.gpus import gpu_of
from nanochat.kv_cache import CacheSession
from nanochat.loop import accumulation_steps, maybe_compile
from nanochat.ranges import Count, Range
from nanochat.sharding import clip_gradients


@dataclass
class Config:
    benchmark: str = ""
    """train, loss, decode or mc-infer; also as the first word"""
    vocab_size: Count = 8192
    """tokens"""
    repeat: Count = 3
    """repetitions, of which the fastest counts"""
    device_batch_size: Count = 8
    """train, loss: B"""
    max_seq_len: Count = 512
    """train, loss: T; mc-infer: entries of the working context"""
    total_batch_size: Count = -1
    """train: tokens per step; -1 for B × T"""
    depth: Annotated[int, Range(1, 1000)] = 4
    """train, loss, decode, mc-infer: layers"""
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
    """auto, bf16 or fp32; for train and decode also both, for a comparison"""
    compile: Literal["auto", "on", "off"] = "auto"
    """train: compile the model, auto, on or off; decode, mc-infer: the same for CUDA graphs"""
    megacontext: Annotated[MCConfig, group] = field(default_factory=MCConfig)
    """train: these options have an effect with --mc only"""


def best(repeat, function) -> float:
    """Shortest of `repeat` times, in seconds."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


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
    return 2 * n**3 / best(20, product)


def bench_train(config):
    """Training steps beside the speed of matrix products alone, which they could at best have."""
    rows = []
    for name in ["fp32", "bf16"] if config.dtype == "both" else [config.dtype]:
        _, _, _, world_size, device = compute_init(config.device_type)
        dtype = resolve_dtype(name, device.type)
        cuda = device.type == "cuda"
        B, T = config.device_batch_size, config.max_seq_len
        total = B * T if config.total_batch_size == -1 else config.total_batch_size
        accumulation = accumulation_steps(total, B, T, world_size)
        model = GPT(GPTConfig.from_depth(config.depth, T, config.vocab_size)).to(device)
        model.init_weights()
        networks, make_objective = attach(config, model.config, device, bos=0)
        objective = make_objective(maybe_compile(model, config.compile, device))
        optimizers = model.setup_optimizers() + ([] if networks is None else networks.setup_optimizers())
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        ids = torch.randint(0, config.vocab_size, (B, T + 1), device=device)
        B_once = objective.rows_at_once(B)
        streams = [torch.tensor([[row, 0] for row in range(B)])] if objective.keeper else []
        products = matmul_flops(device, dtype)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)

        passes = accumulation * B // B_once

        def gradients(objective=objective, ids=ids, dtype=dtype, passes=passes, B_once=B_once, streams=streams):
            for i in range(passes):
                rows = slice(i * B_once % len(ids), i * B_once % len(ids) + B_once)
                with autocast(ids.device, dtype):
                    loss, _ = objective(ids[rows, :-1], ids[rows, 1:], 0.5, i, *(origins[rows] for origins in streams))
                (loss / passes).backward()
            return loss.item()  # waits for the device

        def update(optimizers=optimizers, parameters=parameters):
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            norm = clip_gradients(optimizers, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            for p in parameters:
                p.grad = None
            return (norm + parameters[-1].flatten()[0]).item()

        start = [best(1, gradients) + best(1, update) for _ in range(3)]
        seconds = [(best(1, gradients), best(1, update)) for _ in range(config.steps)]
        typical = sorted(map(sum, seconds))[len(seconds) // 2]
        flops = model.flops_per_token() * total * objective.work(0.5, T) / typical
        peak = peak_flops(device)
        rows.append(
            {
                "precision": str(dtype).removeprefix("torch."),
                "parameters": model.num_params(),
                "rows at once": B_once,
                "first step s": start[0],
                "s/step": typical,
                "optimizer %": 100 * min(update for _, update in seconds) / typical,
                "tokens/s": total / typical,
                "GFLOP/s": flops / 1e9,
                "of products": products / 1e9,
                "ratio %": 100 * flops / products,
                "MFU %": 100 * flops / peak if peak else "-",
                "memory MiB": torch.cuda.max_memory_allocated(device) / 2**20 if cuda else "-",
            }
        )
    mc = " --mc" if config.mc else ""
    show(f"train{mc}: depth {config.depth}, T {T}, B {B}, vocabulary {config.vocab_size:,}, {device}", rows)
    return rows


def bench_loss(config):
    """Ours, torch's own on all logits at once, and liger-kernel's where it is installed; forward and backward."""
    *_, device = compute_init(config.device_type)
    dtype = resolve_dtype("auto" if config.dtype == "both" else config.dtype, device.type)
    c = GPTConfig.from_depth(config.depth, config.max_seq_len, config.vocab_size)
    N, V = config.device_batch_size * config.max_seq_len, c.vocab_size
    x = torch.randn(N, c.n_embd, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, c.n_embd, device=device) * c.n_embd**-0.5).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    weights = torch.full((N,), 1 / N, device=device)

    def ours():
        return softcap_cross_entropy(x, weight, targets, V, LOGIT_SOFTCAP, row_weights=weights)[0]

    def plain():
        logits = LOGIT_SOFTCAP * torch.tanh((x @ weight.to(dtype).T).float() / LOGIT_SOFTCAP)
        return torch.nn.functional.cross_entropy(logits, targets)

    ways = {"ours": ours, "torch": plain}
    if device.type == "cuda":
        ways["torch, compiled"] = torch.compile(plain, dynamic=False)
        if importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss(softcap=LOGIT_SOFTCAP)
            ways["liger-kernel"] = lambda: liger(weight.to(dtype), x, targets)
    rows = []
    for name, way in ways.items():

        def once(way=way):
            x.grad = weight.grad = None
            with autocast(device, dtype):
                loss = way()
            loss.backward()
            return loss.item(), weight.grad[0, 0].item()  # waits for the device

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            loss, _ = once()
            seconds = best(config.repeat, once)
        except torch.OutOfMemoryError:
            loss = seconds = float("nan")
        flops = 6 * N * V * c.n_embd / seconds
        memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else "-"
        rows.append({"way": name, "loss": loss, "ms": 1e3 * seconds, "GFLOP/s": flops / 1e9, "memory MiB": memory})
    show(f"loss: {N:,} rows of {c.n_embd}, vocabulary {V:,}, {dtype}, {device}", rows)


def bench_decode(config):
    *_, device = compute_init(config.device_type)
    prompt = torch.randint(0, config.vocab_size, (config.prompt_tokens,)).tolist()
    steps = config.new_tokens
    c = GPTConfig.from_depth(config.depth, len(prompt) + steps, config.vocab_size)
    model = random_model(c, device)
    peak = gpu_of(torch.cuda.get_device_name(device)).bandwidth if device.type == "cuda" else None
    rows = []
    for precision in ["fp32", "bf16"] if config.dtype == "both" else [config.dtype]:
        dtype = resolve_dtype(precision, device.type)
        cached = 2 * c.n_layer * c.n_kv_head * (c.n_embd // c.n_head)  # numbers per token in the KV cache

        def answer(B, dtype=dtype):
            """Seconds to the first token and per later one."""
            started = time.perf_counter()
            session = CacheSession(Decoder(model, dtype, GRAPHS[config.compile]), B, steps + 1)
            logits = session.prefill(prompt)
            logits.argmax().item()  # waits for the device
            first = time.perf_counter() - started
            seconds, _ = timed(session.step, logits, steps + 1)
            return first, sum(seconds[1:]) / steps  # the first step records a CUDA graph

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
    show(
        f"decode: depth {config.depth}, vocabulary {config.vocab_size:,}, {len(prompt)} + {steps} tokens, {device}",
        rows,
    )


def main(config: Config):
    benchmarks = {
        "train": bench_train,
        "loss": bench_loss,
        "decode": bench_decode,
        "mc-infer": lambda config: bench_mc_infer(config, show),
    }
    if config.benchmark not in benchmarks:
        raise SystemExit(f"error: name a benchmark, one of {', '.join(benchmarks)}; got {config.benchmark!r}")
    return benchmarks[config.benchmark](config)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--benchmark={sys.argv[1]}"
    run(main, Config)
