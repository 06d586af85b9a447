"""What a training step with --mc costs, against the arithmetic that it contains. Started by dev/bench.py mc."""

import time

import torch

from megacontext.config import MCConfig
from megacontext.losses import ASKED, asked_tokens, lens_loss, looks_for_content, old_blocks_of
from megacontext.networks import MCNetworks
from megacontext.objective import MCObjective
from megacontext.variants import DENSE_SHARE, random_variants, target_length
from nanochat.common import autocast, compute_init, resolve_dtype
from nanochat.gpt import GPT, GPTConfig
from nanochat.loop import maybe_compile


def parts(model, objective, x, y, progress):
    """name → function that does one part of the arithmetic of a step, forward and backward, on prepared inputs."""
    c, reader, (B, T) = objective.config, objective.reader, x.shape
    dense = int(DENSE_SHARE * B)
    length = target_length(progress, T, c.block_size, c.mc_train_wc_length)

    def variants_of(rows):
        return random_variants(rows, T, c.block_size, length, c.allocator_recent_tokens)

    read, judged = variants_of(c.mc_num_random_variants * (B - dense)), variants_of(c.mc_max_counterfactuals * dense)
    with torch.no_grad():
        embeds = reader.embed(x)
        inputs = reader.tree(embeds[dense:]).materialize(read)

        tokens, asked, places, there = (t.to(x.device) for t in asked_tokens(judged, c.allocator_recent_tokens, ASKED))
        per_row, counted = tokens.view(dense, -1), torch.cat((asked.view(dense, -1), there.view(dense, -1)), 1)
        _, looks = model.trunk(embeds[:dense], asking=per_row)
        old = old_blocks_of(
            per_row, judged.old_blocks(c.allocator_recent_tokens), c.block_size, c.allocator_recent_tokens
        )
        blocks = embeds[:dense, : old.size(2) * c.block_size]
        content = looks_for_content(looks, per_row, x[:dense] == objective.bos, c.block_size, old)

    def dense_rows():
        model(inputs_embeds=embeds[:dense].clone().requires_grad_(), targets=y[:dense]).backward()

    def compressed_rows():
        reader.read(inputs.clone().requires_grad_(), read, y[dense:]).loss.backward()

    def gistnet():
        reader.tree(embeds[dense:].clone().requires_grad_()).values.mean().backward()

    def counterfactuals():
        with torch.no_grad():
            reader.states(reader.tree(embeds[:dense]).materialize(judged), judged, places)

    def lensnet():
        z = reader.wants(looks.states.repeat(1, 2, 1), reader.keys(blocks))
        lens_loss(z, content.repeat(1, 2, 1), old.repeat(1, 2, 1), counted).backward()

    def attention():
        looks_for_content(looks, per_row, x[:dense] == objective.bos, c.block_size, old)

    wanted = {"dense rows": dense_rows, "compressed rows": compressed_rows, "GistNet": gistnet}
    return {**wanted, "counterfactuals": counterfactuals, "LensNet": lensnet, "attention": attention}


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
    """One row per number of variants: seconds of each part, their sum, a whole step, and the ratio of the two."""
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
        objective = MCObjective(model, networks, mc, bos=0)

        def step(objective=objective):
            objective.process_batch(x, y, 0.5).loss.backward()

        with autocast(device, dtype):
            functions = {"plain": lambda: model(x, y).backward(), **parts(model, objective, x, y, 0.5)}
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
