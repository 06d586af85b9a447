"""
GPU memory that training takes, without a GPU: a step on fake tensors, of which every storage is counted.

    python dev/memory.py                  # the recipes, and the largest batches for cards of 32, 80 and 141 GB

One process with all of the optimizers' states, which several share. So a real run needs less, but for CUDA itself and
the allocator's gaps: RESERVE.
"""

import re
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megacontext.config import MCConfig
from megacontext.networks import MCNetworks
from megacontext.objective import MCObjective
from megacontext.variants import auto_batch_size
from nanochat.common import autocast
from nanochat.cross_entropy import BLOCK_ELEMENTS_GPU
from nanochat.gpt import GPT, GPTConfig
from nanochat.sharding import clip_gradients
from nanochat.training import PlainObjective

VOCAB, T = 65536, 2048
CARDS = {"32 GB": 31.3e9, "80 GB": 84.9e9, "141 GB": 150.7e9}  # what an RTX 5090, an H100 and an H200 report
RESERVE = 3e9  # CUDA's own, the libraries' workspaces, gaps between allocations
SPARED = 14  # bytes per channel, token and layer that a compiled block does not keep for backward: dev/LOG.md
RECIPES = {  # and the cards that they are for
    "run10.sh --gpu 5090": "32 GB",
    "run10.sh --gpu h100": "80 GB",
    "speedrun.sh": "80 GB",
    "run1000.sh": "80 GB",
}


def pretrains(recipe) -> tuple[int, int]:
    """(depth, device_batch_size) with which a recipe pretrains."""
    command = ["bash", *recipe.split(), "--dry-run"]
    shown = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"base_train .*?--depth=(\d+) --device_batch_size=(\d+)", shown).groups()))


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


def memory(depth, mc) -> tuple[float, float]:
    """(bytes whatever the batch, bytes per sequence of T tokens that is put through the model at once)."""
    few, more = (step_memory(depth, batch, mc, **({"mc_auto_batch": False} if mc else {})) for batch in (4, 8))
    return few - (more - few), (more - few) / 4


def rows_at_once(depth, batch, mc) -> int:
    """Sequences of a micro-batch that are put through the model at once."""
    return auto_batch_size(batch, MCConfig().resolve(T), GPTConfig.from_depth(depth, T, VOCAB)) if mc else batch


def recipe_table(needs) -> str:
    """needs(depth, batch, mc, compiled): bytes."""
    heads = "recipe", "depth", "`--device_batch_size`", "card", "plain", "`--mc`", "plain, `--compile=off`"
    rows = [heads, ["---"] * len(heads)]
    for recipe, card in RECIPES.items():
        (depth, batch), (_, eager_batch) = pretrains(recipe), pretrains(f"{recipe} --compile=off")
        takes = (
            needs(depth, batch, False, True),
            needs(depth, batch, True, False),
            needs(depth, eager_batch, False, False),
        )
        takes = [f"{bytes / 1e9:.0f} GB" for bytes in takes]
        rows.append([f"`{recipe}`", str(depth), str(batch), card, *takes[:2], f"{takes[2]} ({eager_batch})"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main():
    lines = {(depth, mc): memory(depth, mc) for depth in (12, 20, 32) for mc in (False, True)}

    def needs(depth, batch, mc, compiled=False):
        fixed, each = lines[depth, mc]
        each -= compiled * SPARED * GPTConfig.from_depth(depth, T, VOCAB).n_embd * T * depth
        return fixed + each * rows_at_once(depth, batch, mc) + RESERVE

    def largest(depth, card, mc):
        fits = [batch for batch in (1, 2, 4, 8, 16, 32, 64, 128) if needs(depth, batch, mc) <= CARDS[card]]
        return max(fits, default="none")

    print(recipe_table(needs))
    print(
        f"\n| depth | parameters | {' | '.join(f'{card}, plain | {card}, `--mc`' for card in CARDS)} |\n|{' --- |' * 8}"
    )
    for depth in (12, 20, 32):
        with torch.device("meta"):
            parameters = GPT(GPTConfig.from_depth(depth, T, VOCAB)).num_params()
        cells = [str(largest(depth, card, mc)) for card in CARDS for mc in (False, True)]
        print(f"| {depth} | {parameters / 1e6:,.0f}M | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
