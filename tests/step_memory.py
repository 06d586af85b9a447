"""
GPU memory that training takes, without a GPU: a step on fake tensors, of which every storage is counted.

One process with all of the optimizers' states, which several share. So a real run needs less, but for CUDA itself and
the allocator's gaps: RESERVE.
"""

import weakref
from contextlib import nullcontext
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megacontext.config import MCConfig
from megacontext.networks import MCNetworks
from megacontext.objective import MCObjective
from nanochat.common import autocast
from nanochat.cross_entropy import BLOCK_ELEMENTS_GPU
from nanochat.gpt import GPT, GPTConfig
from nanochat.sharding import clip_gradients
from nanochat.training import PlainObjective

VOCAB, T = 65536, 2048
RESERVE = 3e9  # CUDA's own, the libraries' workspaces, gaps between allocations


class Storages(TorchDispatchMode):
    """
    Counts the bytes of all storages that operations make, as long as they live. peak: the most at once.

    Operations on no fake tensor are done for real: working contexts are planned with their values.
    """

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak, self.all_fake = {}, 0, 0, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        with nullcontext() if fake or self.all_fake else unset_fake_temporarily():
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
            self.live[key] = weakref.ref(storage, lambda _: self.drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def drop(self, key, size):
        del self.live[key]
        self.now -= size


def step_memory(depth, batch, mc=False, tokens=T, vocab=VOCAB, **options) -> int:
    """Most bytes at once in the second step of pretraining with micro-batches of `batch` sequences."""
    storages, device = Storages(), torch.device("cpu")  # fake tensors on the CPU keep what those on a GPU keep
    blocks = mock.patch.dict("nanochat.cross_entropy.BLOCK_ELEMENTS", cpu=BLOCK_ELEMENTS_GPU)
    fast = mock.patch("nanochat.muon.has_fast_bf16", return_value=True)
    with FakeTensorMode(allow_non_fake_inputs=True), storages, blocks, fast:
        model = GPT(GPTConfig.from_depth(depth, tokens, vocab))
        wte = model.transformer.wte
        wte.weight = torch.nn.Parameter(wte.weight.bfloat16())  # as on a GPU
        optimizers, objective = model.setup_optimizers(), PlainObjective(model)
        if mc:
            config = MCConfig(mc_aux_dtype="bf16", **options).resolve(tokens)
            networks = MCNetworks(model.config.n_embd, model.config.n_layer, config)
            optimizers += networks.setup_optimizers()
            objective = MCObjective(model, networks, config, bos=0)
        x = torch.zeros(objective.rows_at_once(batch), tokens, dtype=torch.long)
        storages.all_fake = False
        origins = torch.tensor([[stream, 0] for stream in range(len(x))])  # no text begins: each has a past
        text = {"origins": origins} if mc else {}
        for _ in range(2):
            storages.peak = storages.now
            for _ in range(2):  # micro-batches: the second one meets the gradients of the first
                with autocast(device, torch.bfloat16):
                    loss, _ = objective(x, x, 0.0, seed=0, **text)
                loss.backward()
                del loss, _
            clip_gradients(optimizers, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
    return storages.peak
