"""What a training step with --mc costs, against the arithmetic that it contains. Started by dev/bench.py mc."""

import time

import torch

from megacontext.attention import attention_to_blocks
from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.gaussian_rope import entry_cos_sin
from megacontext.networks import MCNetworks
from megacontext.tree import build_table
from megacontext.variants import random_variants, target_length
from nanochat.common import autocast, compute_init, resolve_dtype
from nanochat.gpt import GPT, GPTConfig
from nanochat.loop import maybe_compile


def parts(model, controller, x, y, progress):
    """name → function that does one part of the arithmetic of a step, forward and backward, on prepared inputs."""
    c, (B, T), V = controller.config, x.shape, controller.config.mc_num_random_variants
    length = target_length(progress, T, c.block_size, c.mc_train_wc_length)
    context = random_variants(B * V, T, c.block_size, length, c.allocator_recent_tokens, None, x.device)
    entries, targets = context.entries(), context.targets(y.repeat_interleave(V, 0))
    with torch.no_grad():
        embeds = model.embed(x)
        table = build_table(controller.gist, embeds, c.block_size)
        inputs = table.materialize(context)
    head_dim = model.config.n_embd // model.config.n_head
    cos_sin = entry_cos_sin(entries.start, entries.span, head_dim)

    def baseline():
        model(inputs_embeds=embeds.clone().requires_grad_(), targets=y).backward()

    def variants():
        embeds = inputs.clone().requires_grad_()
        weights = torch.full(targets.shape, 1 / targets.numel(), device=x.device)
        model(inputs_embeds=embeds, cos_sin=cos_sin, targets=targets, row_weights=weights)[0].backward()

    def gistnet():
        build_table(controller.gist, embeds.clone().requires_grad_(), c.block_size).values.mean().backward()

    def lensnet():
        table = build_table(controller.gist, embeds, c.block_size)
        controller.score(table.materialize(context), entries, T).mean().backward()

    def attention():
        attention_to_blocks(model, embeds, c.block_size, old)

    old = context.old_blocks(c.allocator_recent_tokens)
    wanted = {"trunk, baseline": baseline, "trunk, variants": variants, "GistNet": gistnet}
    return {**wanted, "LensNet and its gists": lensnet, "attention": attention}


def seconds(function, device, repeat) -> float:
    """Shortest of `repeat` times."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def bench_mc(config, show):
    """One table a number of variants: seconds of each part, of their sum, of a whole step, and the ratio of the two."""
    *_, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    T, B = config.max_seq_len, config.device_batch_size
    plain = GPT(GPTConfig.from_depth(config.depth, T, config.vocab_size)).to(device)
    plain.init_weights()
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.02)
    model = maybe_compile(plain, config.compile, device)
    ids = torch.randint(0, config.vocab_size, (B, T + 1), device=device)
    x, y = ids[:, :-1], ids[:, 1:]
    rows = []
    for V in (1, 2, 4):
        mc = MCConfig(mc_num_random_variants=V).resolve(T)
        networks = MCNetworks(plain.config.n_embd, mc).to(device)
        controller = MCController(model, networks, mc, resolve_dtype(mc.mc_aux_dtype, device.type))

        def step(controller=controller):
            controller.process_batch(x, y, 0.5).loss.backward()

        with autocast(device, dtype):
            functions = {"plain": lambda: model(x, y).backward(), **parts(model, controller, x, y, 0.5)}
            functions["whole step"] = step
            best = {name: float("inf") for name in functions}
            for _ in range(1 + config.repeat):  # in turn, so that a slow moment hits them alike; the first warms up
                for name, function in functions.items():
                    best[name] = min(best[name], seconds(function, device, 1))
        plain_seconds, whole = best.pop("plain"), best.pop("whole step")
        arithmetic = sum(best.values())
        rows.append(
            {
                "variants": V,
                **{f"{name} ms": 1000 * s for name, s in best.items()},
                "sum ms": 1000 * arithmetic,
                "whole step ms": 1000 * whole,
                "whole / sum": whole / arithmetic,
                "whole / plain": whole / plain_seconds,
            }
        )
    show(f"mc: depth {config.depth}, vocabulary {config.vocab_size:,}, B {B}, T {T}, half-way, {dtype}, {device}", rows)
