"""
How much a gist retains of its tokens: a decoder is trained to reconstruct the block from it, position by position.

Shapes: M blocks of K tokens, D = n_embd, V = vocab_size.
"""

import torch
import torch.nn as nn

from megacontext.gistnet import Encoder, init_linear, split_parameters
from nanochat.common import autocast
from nanochat.cross_entropy import softcap_cross_entropy
from nanochat.gpt import LOGIT_SOFTCAP, norm
from nanochat.muon import Muon

HEAD_DIM = 64
BLOCKS, TEST_BLOCKS = 64, 512  # per step of training, and of the test
LAYERS = 2
MATRIX_LR, OTHER_LR = 0.02, 0.003


class BlockDecoder(nn.Module):
    """Gists [M, D] → [M, K, D]: all positions at once, so that no token is predicted from the one before it."""

    def __init__(self, n_embd: int, block_size: int):
        super().__init__()
        self.place = nn.Parameter(torch.randn(block_size, n_embd))
        self.scale = nn.Parameter(torch.zeros(block_size, n_embd))
        self.encoder = Encoder(LAYERS, n_embd, HEAD_DIM)
        init_linear(self)

    def forward(self, gists):
        return self.encoder(norm(gists[:, None] * (1 + self.scale) + self.place))


def reconstruction_accuracy(model, gist_fn, samples, block_size, dtype, steps) -> dict:
    """
    Share of tokens that a decoder, trained on frozen gists of level 1, reconstructs correctly.

    gist_fn(children [M, K, D], level) -> [M, D or more], whose first D channels are read. samples: name → (training
    sampler, test sampler), functions n -> ids [n, K] on the model's device; training uses equal parts of each. Returns
    name → accuracy.
    """
    device, D = model.get_device(), model.config.n_embd
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        decoder = BlockDecoder(D, block_size).to(device)
    matrices, others = split_parameters(decoder)
    optimizers = [Muon(matrices, lr=MATRIX_LR), torch.optim.AdamW(others, lr=OTHER_LR, weight_decay=0.0)]
    with torch.no_grad():
        words = norm(model.transformer.wte.weight).float()  # the decoder's head: the embeddings that gists are made of

    def read(ids):
        with torch.no_grad():
            gists = gist_fn(model.embed(ids), 1)[:, :D]
        with autocast(device, dtype):
            return decoder(gists).float()

    for step in range(steps):
        ids = torch.cat([sample(BLOCKS // len(samples)) for sample, _ in samples.values()])
        hidden = read(ids).flatten(0, 1)
        loss = softcap_cross_entropy(hidden, words, ids.flatten(), model.config.vocab_size, LOGIT_SOFTCAP, "mean")
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = (MATRIX_LR if optimizer is optimizers[0] else OTHER_LR) * min(1, 2 * (1 - step / steps))
            optimizer.step()
            optimizer.zero_grad()

    accuracies = {}
    with torch.no_grad():
        for name, (_, sample) in samples.items():
            ids = sample(TEST_BLOCKS)
            best = (read(ids) @ words.T)[..., : model.config.vocab_size].argmax(-1)
            accuracies[name] = (best == ids).float().mean().item()
    return accuracies
