"""
Does LensNet find the block that is asked for? On associative recall, through the controller and the allocator.

    python dev/focus.py --base /tmp/base.pt        # the base model of dev/ablate.py, made when it is not there

A document is eight blocks of four random pairs of a key and a value; its last eight tokens ask for pairs of one block.
The model is trained on as --mc trains it; then the last value has to be told while one block of eight is at full
detail, chosen by each policy of mc_eval.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from dev.ablate import KEYS, TAIL, VALUES, D, base_model, optimize
from dev.ablate import Config as Ablation
from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.networks import MCNetworks
from megacontext.recall import Windows, recall_scores
from nanochat.configurator import run

K, BLOCKS, RECENT = 8, 8, 8
HISTORY = K * BLOCKS


@dataclass
class Config:
    base: str = ""
    """file of the model that looks pairs up; made when it is not there"""
    steps: int = 400
    """to train"""
    device_batch_size: int = 48
    """documents a step"""
    test_documents: int = 512
    """to be asked"""
    seed: int = 0
    """of everything but the base model"""


def documents(B, generator):
    """(x, y) [B, HISTORY + RECENT], y −1 in the history; and the block [B] that is asked for."""
    pairs = HISTORY // 2
    keys = torch.rand(B, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (B, pairs), generator=generator) + KEYS
    block = torch.randint(BLOCKS, (B,), generator=generator)
    asked = block[:, None] * (K // 2) + torch.rand(B, K // 2, generator=generator).argsort(1)
    asked = torch.cat((asked, asked[:, :1]), 1)  # one key more, for the target of the last value
    told = torch.stack((keys, values), -1).flatten(1)
    tail = torch.stack((keys.gather(1, asked), values.gather(1, asked)), -1).flatten(1)[:, : RECENT + 1]
    ids = torch.cat((told, tail), 1)
    y = ids[:, 1:].clone()
    y[:, :HISTORY] = -1
    return ids[:, :-1], y, block


def main(config: Config):
    started = time.time()
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    model = base_model(Ablation(base=config.base), 32 + TAIL, generator)
    model.config.sequence_len = T = HISTORY + RECENT
    mc = MCConfig(
        block_size=K,
        allocator_recent_tokens=RECENT,
        mc_num_random_variants=2,
        mc_train_wc_length=RECENT + BLOCKS + 2 * (K - 1),
    ).resolve(T)
    networks = MCNetworks(D, mc)
    controller = MCController(model, networks, mc)

    def loss_of(progress):
        x, y, _ = documents(config.device_batch_size, generator)
        return controller.process_batch(x, y, progress, generator).loss

    optimize(model.setup_optimizers() + networks.setup_optimizers(), config.steps, loss_of)
    model.eval(), networks.eval()
    x, y, block = documents(config.test_documents, generator)
    x, y = x[:, :-1], y[:, :-1]  # the last target is the last value
    answer = torch.zeros_like(x, dtype=torch.bool)
    answer[:, -1] = True
    fact = torch.stack((block * K, block * K + K - 1), 1)
    controller.config = MCConfig(**{**vars(mc), "allocator_recent_tokens": RECENT - 1})
    scores = recall_scores(controller, Windows(x, y, answer, fact), open_blocks=1)
    right = {name: score[0].float().mean().item() for name, score in scores.items()}
    for name, share in right.items():
        print(f"{name:8} {share:.3f} right, {scores[name][1].mean().item():.3f} nats")
    gap = (right["lens"] - right["random"]) / (right["oracle"] - right["random"])
    print(f"LensNet closes {100 * gap:.0f}% of the gap from random to oracle | {time.time() - started:.0f} s")


if __name__ == "__main__":
    run(main, Config)
