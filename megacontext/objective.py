"""
The training objective: the GPT learns to read gists, GistNet to make them, LensNet to find the blocks they hide.

    embed → dense sequences:      next-token loss; where the model looks → LensNet's loss
          → compressed sequences: tree → variants → read → next-token loss

A frozen model does not learn but teaches: there the loss of compressed sequences is the Kullback-Leibler divergence
from the model's own predictions on the full text, the nats that compression costs.

Shapes: B sequences of T tokens, each dense or compressed at random; V variants of each compressed sequence; C
counterfactuals (compressed versions) of each dense sequence; P tokens that query LensNet, in the dense sequence and in
its counterfactuals; W entries, n old blocks, D = n_embd.
"""

from dataclasses import dataclass

import torch

from megacontext.config import MCConfig
from megacontext.evaluation.validation import validate
from megacontext.losses import ASKED, asked_tokens, lens_loss, looks_for_content, old_blocks_of
from megacontext.networks import MCNetworks
from megacontext.reader import Reader
from megacontext.variants import (
    Pasts,
    auto_batch_size,
    dense_share,
    past_entries,
    put_before,
    random_variants,
    step_work,
    variant_length,
)
from megacontext.working_context import old_blocks
from nanochat.common import Stopwatch


@dataclass
class MCBatchResult:
    """
    loss: to be minimized. stats: metrics for the log, detached. cached_embeddings [B, T, D]: of the tokens, for
    experiments with other working contexts. positional_caches: {session id: (cos, sin, fade)}, the positions at which
    each sequence was read: those of the entries of its V variants if it was compressed (see entry_positions), else of
    its T tokens. fade is None for dense sequences, and for all unless mc_positional is "near" or "gaussian".
    """

    loss: torch.Tensor
    stats: dict
    cached_embeddings: torch.Tensor
    positional_caches: dict


class MCObjective:
    """
    Called by the training loops as `objective(x, y, progress, seed)`; returns (loss, metrics for the log).

    model: the GPT, compiled or not. config: resolved for its context length. bos: id of BOS, an attention sink.
    keeper: the pasts of the streams, for MicroBatches; None with mc_past 0.
    """

    def __init__(self, model, networks: MCNetworks, config: MCConfig, bos: int):
        self.model, self.config, self.bos = model, config, bos
        self.reader = Reader(model, networks, config)
        self.keeper = Pasts(self.reader, config.mc_past) if config.mc_past > 0 else None

    def __call__(self, x, y, progress, seed, origins=None):
        watch = Stopwatch(x.device)
        result = self.process_batch(x, y, progress, torch.Generator().manual_seed(seed), origins=origins)
        watch.stop()
        return result.loss, {**result.stats, "mc/time_controller_ms": watch}

    def process_batch(self, x, y, progress, generator=None, session_ids=None, origins=None) -> MCBatchResult:
        """
        Losses of one micro-batch, x and y [B, T] as the loader gives them.

        progress: completed fraction of the training, which determines the variants' length. generator: of random
        numbers, on the CPU. session_ids: a name for each sequence, default 0 … B − 1. origins [B, 2]: see MicroBatches;
        without them or with mc_past 0, sequences have no past.
        """
        c, reader, (B, T) = self.config, self.reader, x.shape
        V, C, K, recent = c.mc_num_random_variants, c.mc_max_counterfactuals, c.block_size, c.allocator_recent_tokens
        length = variant_length(c, progress, T)
        share, begun = dense_share(c, progress), c.begun(progress) >= 0
        dense = int(B * share + torch.rand((), generator=generator).item())  # number of sequences, rounded at random
        order = torch.randperm(B, generator=generator)  # the dense ones first; every stream gets both roles over time
        names = [i if session_ids is None else session_ids[i] for i in order.tolist()]
        order = order.to(x.device, non_blocking=True)
        ids, x, y = x, x[order], y[order]
        caches = {name: (self.model.cos[:, :T], self.model.sin[:, :T], None) for name in names[:dense]}
        embeds = reader.embed(x)
        loss, stats = embeds.new_zeros((), dtype=torch.float32), {"mc/tree_tokens": T, "mc/wc_entries": length}

        old = old_blocks(T, K, recent)  # blocks that may be gists
        judged = bool(begun and dense and old and c.mc_lens_loss_weight > 0)  # whether LensNet learns from this batch
        far = begun and self.keeper is not None and origins is not None  # whether sequences have a past
        tables = [reader.tree(embeds[dense:])] if dense < B else []
        if dense and (judged or far):
            with torch.no_grad():
                tables.insert(0, reader.tree(embeds[:dense]))
        if dense < B:  # drawn first, so that the variants do not depend on whether LensNet learns
            variants = random_variants(V * (B - dense), T, K, length, recent, generator)
            inputs, entries = tables[-1].materialize(variants), variants.entries
            targets = variants.targets(y[dense:].repeat_interleave(V, 0))
        if far:
            gists = torch.cat([table.level(1) for table in tables])[order.argsort()].detach()
            before = self.keeper.extend(origins, ids, gists, generator)
            before = [before[i] for i in order.tolist()[dense:]]
            if dense < B:
                most = past_entries(c, T)
                inputs, entries, targets = put_before(before, K, most, inputs, entries, targets, generator)
                stats["mc/tree_tokens"] += sum(past.num_tokens for past in before) / len(before)
                stats["mc/wc_entries"] = entries.valid.sum().item() / len(inputs)
        at = None
        if judged:
            counterfactuals = random_variants(C * dense, T, K, length, recent, generator)
            tokens, asked, entry, there = asked_tokens(counterfactuals, recent, ASKED, generator)
            at = tokens.view(dense, -1).to(x.device, non_blocking=True)
        if dense and not c.mc_freeze_base:
            result = self.model(inputs_embeds=embeds[:dense], targets=y[:dense], asking=at)
            stats["mc/base_loss"], looks = result if judged else (result, None)
            loss = loss + stats["mc/base_loss"]
        elif judged:
            with torch.no_grad():
                _, looks = self.model.trunk(embeds[:dense], asking=at)

        if dense < B:
            teacher = self.taught(embeds[dense:], entries) if c.mc_freeze_base else None
            reading = reader.read_entries(inputs, entries, targets, teacher)
            loss = loss + reading.loss
            stats |= {"mc/token_loss": reading.loss, "mc/variants_total": variants.num_rows}
            stats |= by_level(entries, reading)
            cos, sin, fade = (*reading.positions, None)[:3]
            for name, i in zip(names[dense:], range(0, variants.num_rows, V), strict=True):
                caches[name] = cos[i : i + V], sin[i : i + V], None if fade is None else fade[i : i + V]

        if judged:
            values, inputs = embeds[:dense].detach(), tables[0].materialize(counterfactuals)
            compressed = reader.states(inputs, counterfactuals, entry).view(*at.shape, -1)
            states = torch.cat((looks.states, compressed), 1)
            z = reader.wants(reader.asking(states, values, at.repeat(1, 2)), reader.keys(values[:, : old * K]))
            among = old_blocks_of(at, old, K, recent)
            sinks = x[:dense] == self.bos
            sinks[:, 0] |= self.model.sink
            content = looks_for_content(looks, at, sinks, K, among)
            counted = torch.cat((asked.view(dense, -1), there.view(dense, -1)), 1).to(x.device, non_blocking=True)
            stats["mc/lens_loss"] = lens_loss(z, content.repeat(1, 2, 1), among.repeat(1, 2, 1), counted)
            loss = loss + c.mc_lens_loss_weight * stats["mc/lens_loss"]

        stats = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in stats.items()}
        return MCBatchResult(loss, stats, embeds[order.argsort()], caches)

    @torch.no_grad()
    def taught(self, embeds, entries):
        """The frozen model's states [R, W, D] at each entry's last token, from the full text, embeds [B, T, D]."""
        states, _ = self.model.trunk(embeds)
        last = (entries.start + entries.span - 1).clamp(min=0).to(states.device, non_blocking=True)
        row = torch.arange(len(last), device=states.device) // (len(last) // len(embeds))
        return states[row[:, None], last]

    def rows_at_once(self, B) -> int:
        """How many of a micro-batch's B rows go through the model at once: see auto_batch_size."""
        return auto_batch_size(B, self.config, self.model.config)

    def work(self, progress, T) -> float:
        """FLOPs of a step as a multiple of what the model alone needs for the same tokens."""
        return step_work(self.model, self.reader.networks, self.config, progress, T)

    def validate(self, batches, steps, token_bytes) -> dict:
        """Bits per byte with all tokens and with working contexts: see megacontext.evaluation.validation."""
        return validate(self.reader, batches, steps, token_bytes)


def by_level(entries, reading) -> dict:
    """Entries per row of each level, and the mean loss of the targets of entries of that level, without the past."""
    stats, (lod, start, _, valid) = {}, entries
    for level in range(int(lod.max()) + 1):
        here = (lod == level) & valid
        stats[f"mc/lod_count/{level}"] = here.sum().item() / len(lod)
        if not (here & (start >= 0)).any():
            continue
        scored = here.to(reading.nll.device, non_blocking=True) & (reading.targets >= 0)
        stats[f"mc/lod_loss/{level}"] = (reading.nll * scored).sum() / scored.sum().clamp(min=1)
    return stats
