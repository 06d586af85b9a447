"""What MegaContext costs at inference, beside plain decoding with as many entries in its cache."""

import time
from statistics import median

import torch

from megacontext.networks import MCNetworks
from megacontext.session import MCSession
from nanochat.common import compute_init, resolve_dtype
from nanochat.decode import Decoder
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.sampling import Sampler, Sampling

GRAPHS = {"auto": None, "on": True, "off": False}  # --compile → of a Decoder


class RestlessListener:
    """A listener's work, and when it is armed, wishes for a few blocks at random, all that a refocus may open."""

    def __init__(self, listener, wishes):
        self.listener, self.wishes, self.armed = listener, wishes, False

    def __call__(self, states, keys):
        wanted = self.listener(states, keys).fill_(-30)
        if self.armed:
            wanted[torch.randint(len(keys), (self.wishes,))] = 4
            self.armed = False
        return wanted


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


def bench_mc_infer(config, show):
    """`bench.py mc-infer`: a row for each of two lengths of the stream."""
    *_, device = compute_init(config.device_type)
    dtype = resolve_dtype("auto" if config.dtype == "both" else config.dtype, device.type)
    W = config.max_seq_len
    model = random_model(GPTConfig.from_depth(config.depth, W, config.vocab_size), device)
    mc = config.megacontext.resolve(W)
    networks = MCNetworks(model.config.n_embd, model.config.n_layer, mc).to(device).eval()
    lens = RestlessListener(networks.lensnet.listener(), mc.mc_infer_allocator_max_replacements)
    networks.lensnet.listener = lambda: lens
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
