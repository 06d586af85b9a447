"""
MegaContext in a training script: what --mc puts in the place of the plain loss.

Shapes: B sequences of T tokens, W entries of a working context.
"""

import itertools
import math
import time

import torch
import torch.distributed as dist

from megacontext.auto_batch import variant_tokens
from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.networks import MCNetworks
from megacontext.reading import read
from megacontext.telemetry import Telemetry
from megacontext.tree import build_table
from megacontext.working_context import WorkingContext
from nanochat.common import sum_dtype


class MCObjective:
    """
    Called as `objective(x, y, progress, seed)` by the training loops, gives (loss, metrics for the log).

    model: the GPT, compiled or not. config: resolved for its context length.
    """

    def __init__(self, model, networks: MCNetworks, config: MCConfig, dtype):
        self.controller = MCController(model, networks, config, dtype)
        self.networks, self.config = networks, config
        self.telemetry, self.step = Telemetry(), lambda: None  # goes nowhere, see attach.observe
        if isinstance(model, torch._dynamo.OptimizedModule):
            torch._dynamo.config.recompile_limit = 64  # each stage of the variants' length is a shape of its own

    def __call__(self, x, y, progress, seed):
        started = time.perf_counter()
        generator = torch.Generator(x.device).manual_seed(seed)
        result = self.controller.process_batch(x, y, progress, generator)
        milliseconds = 1000 * (time.perf_counter() - started)
        self._tell(x.shape[1], result, milliseconds)
        return result.loss, {**result.stats, "mc/time_controller_ms": milliseconds}

    def _tell(self, T, result, milliseconds):
        """What this micro-batch was, as spans; numbers on the device are left there."""
        K, W, step = self.config.block_size, result.positional_cache[0].size(1), {"step": self.step()}
        nodes = {f"nodes/{lod}": T // K**lod for lod in itertools.takewhile(lambda lod: K**lod <= T, itertools.count())}
        self.telemetry.event("mc_tree_snapshot", {**step, "num_tokens": T, **nodes})
        budget = self.config.allocator_soft_max
        self.telemetry.event("working_context_snapshot", {**step, "entries": W, "budget": budget})
        self.telemetry.event("mc_timing", {**step, **result.timings, "milliseconds": milliseconds})

    def work(self, progress, T) -> float:
        """
        What the model's FLOPs for one token of training text are multiplied by: itself and the variants, a third for
        the forward pass that tells where it looks, and the two networks, of 6 FLOPs a parameter and input, GistNet
        once for each loss that teaches it.
        """
        c, nets, variants = self.config, self.networks, variant_tokens(self.config, progress, T) / T
        nodes = c.block_size / (c.block_size - 1)  # children a token of all nodes
        inputs, looks = {nets.gistnet: nodes}, 0
        if c.mc_lens_loss_weight > 0:
            looks, inputs[nets.lensnet] = 1 / 3, variants
            inputs[nets.gistnet] += 0 if c.mc_freeze_base else nodes  # gists for LensNet's loss
        params = sum(n * sum(p.numel() for p in net.parameters()) for net, n in inputs.items())
        own = 0 if c.mc_freeze_base else 1
        return own + variants + looks + 6 * params / self.controller.model.flops_per_token()

    @torch.no_grad()
    def validate(self, batches, steps, token_bytes) -> dict:
        """
        Bits per byte of the newest tokens (allocator_recent_tokens of them) in three contexts: all T tokens; a working
        context of mc_eval_soft_max_length entries, in focus as at inference; the last so many tokens. And the share of
        what the first gains over the last that the second keeps. Over all ranks.
        """
        c, controller = self.config, self.controller
        model = controller.model
        tail, exact = max(1, c.allocator_recent_tokens), sum_dtype(token_bytes.device)
        nats = {name: 0.0 for name in ("full", "mc", "truncated")}
        total_bytes = 0
        training = self.networks.training
        self.networks.eval()
        for _ in range(steps):
            x, y = next(batches)
            B, T = x.shape
            budget = min(T, c.mc_eval_soft_max_length)
            scored = token_bytes[y[:, -tail:].clamp(min=0)] * (y[:, -tail:] >= 0)
            embeds = model.embed(x)
            context = WorkingContext.initial(T, c.block_size, budget, c.allocator_recent_tokens, B, x.device)
            table = build_table(controller.gist, embeds, c.block_size)
            context = controller.focus(table, context, budget)
            losses = {
                "full": model(inputs_embeds=embeds, targets=y, loss_reduction="none"),
                "mc": read(model, table, context, y, c.mc_positional).nll,
                "truncated": model(x[:, -budget:], y[:, -budget:], loss_reduction="none"),
            }
            for name, loss in losses.items():
                nats[name] += (loss.view(B, -1)[:, -tail:] * (scored > 0)).sum(dtype=exact)
            total_bytes += scored.sum()
        self.networks.train(training)
        sums = torch.stack([*nats.values(), total_bytes.to(exact)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        full, mc, truncated = (sums[:3] / sums[3] / math.log(2)).tolist()
        gain = truncated - full
        return {
            "val/mc_bpb": mc,
            "val/mc_full_bpb": full,
            "val/mc_truncated_bpb": truncated,
            "val/mc_context_gain": (truncated - mc) / gain if gain > 0 else None,
        }
