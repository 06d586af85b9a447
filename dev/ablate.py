"""
Ablations of GistNet's training on associative recall, a task that means of embeddings cannot solve.

    python dev/ablate.py --base /tmp/base.pt                       # next-token loss alone, the default
    python dev/ablate.py --base /tmp/base.pt --gistnet_type mean
    python dev/ablate.py --base /tmp/base.pt --recon 0.5           # + reconstruction, kept out of the trunk
    python dev/ablate.py --base /tmp/base.pt --distill 1 --frozen  # + the logits of the full context

A document is random pairs of a key and a value; its last 32 tokens ask for some of them again. A model of two layers
learns that first (kept in the file --base, for the next ablation), then to read the pairs out of gists. Loss and
share are those of the values asked for, with all pairs as gists: 0% is a guess among all values, 100% the full context.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn as nn
import torch.nn.functional as F

from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.evaluate import mean_gist
from megacontext.layers import split_parameters
from megacontext.networks import MCNetworks
from megacontext.reading import positions, read, read_inputs
from megacontext.reconstruction import BlockDecoder
from megacontext.tree import build_table
from megacontext.variants import random_variants, target_length
from megacontext.working_context import WorkingContext
from nanochat.configurator import run
from nanochat.cross_entropy import softcap_cross_entropy
from nanochat.gpt import GPT, LOGIT_SOFTCAP, GPTConfig, norm
from nanochat.loop import muon_momentum
from nanochat.muon import Muon

TAIL, KEYS, VALUES, BATCH, D = 32, 32, 16, 64, 64
VOCAB = KEYS + VALUES


@dataclass
class Config:
    base: str = ""
    """file of the model that looks pairs up; made when it is not there"""
    base_steps: int = 1500
    """steps to train it"""
    steps: int = 400
    """steps to train with gists"""
    block_size: int = 8
    """tokens a gist"""
    blocks: int = 4
    """gists of a document"""
    frozen: bool = False
    """train GistNet alone"""
    gistnet_type: str = "transformer"
    """transformer or mean"""
    mc_positional: str = "gaussian"
    """gaussian or simple"""
    recon: float = 0.0
    """weight of reconstruction"""
    distill: float = 0.0
    """weight of the divergence from the full context's logits"""
    curriculum: bool = True
    """from few to all blocks as gists; 0 for all from the start"""
    mean_start: bool = True
    """GistNet starts as the mean; 0: with random last layers and without the mean"""
    adamw: float = 0.0
    """rate of AdamW for GistNet's matrices in Muon's place; 0 for Muon"""
    seed: int = 0
    """of everything but the base model"""


def documents(B, history, generator):
    """(x, y), each [B, history + TAIL]; y is −1 in the history, where nothing can be foretold."""
    pairs = history // 2
    keys = torch.rand(B, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (B, pairs), generator=generator) + KEYS
    asked = torch.randint(pairs, (B, TAIL // 2 + 1), generator=generator)
    told = torch.stack((keys, values), -1).flatten(1)
    tail = torch.stack((keys.gather(1, asked), values.gather(1, asked)), -1).flatten(1)[:, : TAIL + 1]
    ids = torch.cat((told, tail), 1)
    y = ids[:, 1:].clone()
    y[:, :history] = -1
    return ids[:, :-1], y


def values_loss(nll):
    """Mean over the values asked for, of losses [B, W]: an entry that is a key predicts its value."""
    return nll[:, -TAIL:][:, 0::2].mean().item()


def optimize(optimizers, steps, loss_of):
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    for step in range(steps):
        loss_of(step / steps).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * min(1, (steps - step) / (0.3 * steps))
                if "momentum" in group:
                    group["momentum"] = muon_momentum(step)
            optimizer.step()
            optimizer.zero_grad()


def optimizers_of(network, adamw):
    matrices, others = split_parameters(network)
    if adamw:
        return [torch.optim.AdamW(matrices + others, lr=adamw, betas=(0.9, 0.95), weight_decay=0)]
    chosen = [Muon(matrices, lr=0.02)] if matrices else []
    if others:
        chosen.append(torch.optim.AdamW(others, lr=0.003, betas=(0.8, 0.95), eps=1e-10, weight_decay=0))
    return chosen


def base_model(config, T, generator):
    model = GPT(GPTConfig(T, VOCAB, 2, 1, 1, D))
    model.init_weights()
    if config.base and Path(config.base).exists():
        model.load_state_dict(torch.load(config.base, weights_only=True))
        return model
    history = T - TAIL
    optimize(model.setup_optimizers(), config.base_steps, lambda _: model(*documents(BATCH, history, generator)))
    if config.base:
        torch.save(model.state_dict(), config.base)
    return model


def without_mean(gistnet):
    """The ordinary start: random last layers, and no mean that they correct."""
    for name, layer in gistnet.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith("c_proj"):
            nn.init.normal_(layer.weight, std=layer.weight.size(1) ** -0.5)
    correction = gistnet._correction
    gistnet.forward = lambda children, level: norm(correction(children, level))


def main(config: Config):
    started = time.time()
    K, history = config.block_size, config.block_size * config.blocks
    T = history + TAIL
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    model = base_model(config, T, generator)
    generator.manual_seed(config.seed + 100)
    mc = MCConfig(
        block_size=K,
        gistnet_type=config.gistnet_type,
        allocator_recent_tokens=TAIL,
        mc_num_random_variants=1,
        mc_train_wc_length=config.blocks + TAIL,
        mc_positional=config.mc_positional,
        mc_freeze_base=config.frozen,
        mc_lens_loss_weight=0,
    ).resolve(T)
    networks = MCNetworks(D, mc)
    if not config.mean_start:
        without_mean(networks.gistnet)
    networks.gistnet.mark_trained(1)
    gist = MCController(model, networks, mc).gist
    decoder = BlockDecoder(D, K) if config.recon else None
    optimizers = optimizers_of(networks.gistnet, config.adamw) + (optimizers_of(decoder, 0) if decoder else [])
    if config.frozen:
        model.requires_grad_(False)
    else:
        optimizers += model.setup_optimizers()

    def reconstruction(x, embeds):
        blocks, ids = embeds.detach().reshape(-1, K, D), x.reshape(-1, K)  # T is a multiple of K
        pick = torch.randint(len(blocks), (64,), generator=generator)
        hidden = decoder(gist(blocks[pick], 1)).flatten(0, 1)
        words = norm(model.transformer.wte.weight.detach())
        return softcap_cross_entropy(hidden, words, ids[pick].flatten(), VOCAB, LOGIT_SOFTCAP, "mean")

    def distillation(x, y, table, context):
        """(next-token loss, divergence) where there are targets."""
        entries, targets = context.entries(), context.targets(y)
        cos_sin = positions(model, entries, mc.mc_positional)
        logits = model(inputs_embeds=table.materialize(context), cos_sin=cos_sin)
        with torch.no_grad():
            full = model(x).gather(1, (entries.start + entries.span - 1)[..., None].expand(-1, -1, VOCAB))
        scored = targets >= 0
        logs = [F.log_softmax(t[scored], -1) for t in (logits, full)]
        return F.nll_loss(logs[0], targets[scored]), F.kl_div(*logs, log_target=True, reduction="batchmean")

    def loss_of(progress):
        x, y = documents(BATCH, history, generator)
        embeds = model.embed(x)
        table = build_table(gist, embeds, K)
        progress = min(1.0, 2 * progress) if config.curriculum else 1.0
        context = random_variants(BATCH, T, K, target_length(progress, T, K, mc.mc_train_wc_length), TAIL, generator)
        if config.distill:
            loss, divergence = distillation(x, y, table, context)
            loss = loss + config.distill * divergence
        else:
            reading = read(model, table, context, y, mc.mc_positional)
            loss = reading.loss
        if not config.frozen:
            loss = loss + model(inputs_embeds=embeds, targets=y)
        return loss + config.recon * reconstruction(x, embeds) if decoder else loss

    optimize(optimizers, config.steps, loss_of)
    model.eval(), networks.eval()
    generator.manual_seed(7)
    x, y = documents(256, history, generator)
    context = WorkingContext.initial(T, K, config.blocks + TAIL, TAIL, rows=256)
    with torch.no_grad():
        table = build_table(gist, model.embed(x), K)
        shuffled = table.materialize(context)
        shuffled[:, : config.blocks] = shuffled.roll(1, 0)[:, : config.blocks]
        losses = {
            "full": values_loss(model(x, y, loss_reduction="none").view(256, -1)),
            "gists": values_loss(read(model, table, context, y, mc.mc_positional).nll),
            "means in their place": values_loss(
                read(model, build_table(mean_gist, model.embed(x), K), context, y, mc.mc_positional).nll
            ),
            "gists of others": values_loss(read_inputs(model, shuffled, context, y, mc.mc_positional).nll),
        }
    guess = math.log(VALUES)
    shares = {name: (guess - loss) / (guess - losses["full"]) for name, loss in losses.items()}
    print(" | ".join(f"{name} {loss:.3f} ({100 * shares[name]:.1f}%)" for name, loss in losses.items()), end="")
    print(f" | {time.time() - started:.0f} s")


if __name__ == "__main__":
    run(main, Config)
