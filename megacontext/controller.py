"""
The recipe by which a GPT learns to read gists: one call a micro-batch.

    embed → tree → variants → one forward pass for all of them → losses

Shapes: B sequences of T tokens, V variants of each (R = B·V rows), W entries of the longest variant, D = n_embd.
The controller holds networks and settings, and nothing of any batch.
"""

import time
from dataclasses import dataclass, field

import torch

from megacontext.attention import attention_to_blocks
from megacontext.config import MCConfig
from megacontext.focus import Focus
from megacontext.networks import MCNetworks
from megacontext.objective import beyond_place, lens_loss, pairs_of_variants, preference_agreement, tail_nll
from megacontext.reading import positions, read
from megacontext.tree import build_table
from megacontext.variants import random_variants, target_length


@dataclass
class MCBatchResult:
    """
    loss: what to minimize. stats: tensors for the log, detached. cached_embeddings [B, T, D]: of the tokens, for
    working contexts of one's own. positional_cache: (cos, sin) of the variants, each [R, W, 1, d/2].
    positional_caches: the same a row, {session id: (cos, sin, alibi)}, alibi None: positions are rotary only.
    timings: milliseconds of the parts, as this process saw them (a GPU may still be at work).
    """

    loss: torch.Tensor
    stats: dict
    cached_embeddings: torch.Tensor
    positional_cache: tuple
    positional_caches: dict = field(default_factory=dict)
    timings: dict = field(default_factory=dict)


class Laps:
    """Names the time since the lap before, in milliseconds."""

    def __init__(self):
        self.times, self.last = {}, time.perf_counter()

    def __call__(self, name):
        now = time.perf_counter()
        self.times[name], self.last = 1000 * (now - self.last), now


class MCController:
    """config: resolved for the model's context length. dtype: precision of the two networks."""

    def __init__(self, model, networks: MCNetworks, config: MCConfig, dtype=torch.float32):
        self.model, self.networks, self.config, self.dtype = model, networks, config, dtype

    def gist(self, children, level):
        return self.networks.gist(children, level, self.dtype)

    def score(self, inputs, entries, num_tokens):
        """LensNet's scores [R, W] of what was read."""
        return self.networks.score(inputs, entries, num_tokens, self.dtype)

    def focus(self, table, context, budget, config=None):
        """The context after a refocus, as at inference, within the budget. config: other settings of the allocator."""
        device = context.lod_map.device  # of the embeddings, too; what is planned is planned on the CPU

        def lens(context):
            context = context.to(device)
            return self.score(table.materialize(context), context.entries(), context.num_tokens).float().cpu()

        return Focus(config or self.config, context.num_rows).refocus(context.to("cpu"), lens, budget).to(device)

    def process_batch(self, x, y, progress, generator=None, session_ids=None) -> MCBatchResult:
        """
        Losses of one micro-batch, x and y [B, T] as the loader gives them.

        progress: part of the training that is done, which the length of the variants follows. generator: of the
        variants, on x's device. session_ids: a name for each sequence, default 0 … B − 1.
        """
        c, (B, T), V = self.config, x.shape, self.config.mc_num_random_variants
        lap = Laps()
        embeds = self.model.embed(x)
        table = build_table(self.gist, embeds, c.block_size)
        length = target_length(progress, T, c.block_size, c.mc_train_wc_length)
        context = random_variants(B * V, T, c.block_size, length, c.allocator_recent_tokens, generator, x.device)
        top = int(context.lod_map.max())
        self.networks.gistnet.mark_trained(top)
        lap("build_ms")
        cos_sin = positions(self.model, context.entries(), c.mc_positional)
        lap("positional_ms")

        entries, inputs, _, targets, nll, variant_loss = read(self.model, table, context, y, c.mc_positional, cos_sin)
        base_loss = variant_loss.new_zeros(())
        if not c.mc_freeze_base:
            base_loss = self.model(inputs_embeds=embeds, targets=y)
        loss = base_loss + variant_loss
        stats = {"mc/token_loss": variant_loss, "mc/base_loss": base_loss, "mc/variants_total": B * V}
        stats |= self._lod_stats(context, top, entries, nll, targets)

        old = context.old_blocks(c.allocator_recent_tokens)
        if c.mc_lens_loss_weight > 0 and old > 0:
            recent = max(1, c.allocator_recent_tokens)
            lap("model_ms")
            if not c.mc_freeze_base:  # gists anew: this loss is to teach GistNet, too, and not the embeddings
                inputs = build_table(self.gist, embeds.detach(), c.block_size).materialize(context)
            scores = context.per_block(self.score(inputs, entries, T))
            lap("lens_forward_ms")
            beyond = beyond_place(attention_to_blocks(self.model, embeds, c.block_size, old))
            loss_of_lens = lens_loss(scores, beyond.repeat_interleave(V, 0), context)
            loss = loss + c.mc_lens_loss_weight * loss_of_lens
            stats["mc/lens_loss"] = loss_of_lens
            lap("lens_loss_ms")
            if V > 1:
                pairs = pairs_of_variants(B, V, c.mc_max_counterfactuals, generator, x.device)
                tail = tail_nll(nll, context.lengths(), recent)
                difference, agreement = preference_agreement(scores, context.lod_map, tail, pairs)
                stats |= {
                    "mc/adv_delta_mean": difference.abs().mean(),
                    "mc/adv_delta_p95": difference.abs().flatten().float().quantile(0.95),
                    "mc/preference_agreement": agreement,
                }
        cos, sin = cos_sin
        names = list(range(B)) if session_ids is None else session_ids
        caches = {name: (cos[i * V : i * V + V], sin[i * V : i * V + V], None) for i, name in enumerate(names)}
        stats = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in stats.items()}
        return MCBatchResult(loss, stats, embeds, cos_sin, caches, lap.times)

    @staticmethod
    def _lod_stats(context, top, entries, nll, targets):
        """Entries a row of each level up to top, and the loss of what follows a token (LOD 0) or a gist of it."""
        stats = {}
        for lod in range(top + 1):
            here = (entries.lod == lod) & entries.valid
            stats[f"mc/lod_count/{lod}"] = here.sum() / context.num_rows
            scored = here & (targets >= 0)
            stats[f"mc/lod_loss/{lod}"] = (nll * scored).sum() / scored.sum().clamp(min=1)
        return stats
