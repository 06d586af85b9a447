"""
The reader: a GPT together with GistNet and LensNet, and every computation that needs them.

    tokens → embed → tree → working context → read, score, focus

Training, sessions and evaluation each hold one Reader and call the networks through it (sessions' LensNet also through
lensnet.Demand).

Shapes: B streams of N tokens, R rows of working contexts (several per stream), W entries (padded at the end),
K = block_size, D = n_embd.
"""

from typing import NamedTuple

import torch

from megacontext.config import MCConfig
from megacontext.focus_allocator import Focus
from megacontext.networks import MCNetworks
from megacontext.tree import Table, before, build_table, tokens_of_blocks
from megacontext.working_context import damping
from nanochat.common import autocast, resolve_dtype
from nanochat.gpt import cos_sin_at


class Reading(NamedTuple):
    """
    The model's result for R working contexts. Only `loss` has a gradient.

    loss: to be minimized, the mean over rows of each row's mean nll. nll [R, W]: the loss of each entry's target in
    nats, 0 without a target. targets [R, W]: the token to predict, −1 for none. positions: the entries'
    (cos, sin, fade) or (cos, sin), see entry_positions.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    targets: torch.Tensor
    positions: tuple[torch.Tensor, ...]


ASKING = 16  # newest tokens of a prompt that query LensNet
MOST = 1 - 2**-24  # largest score, below 1, so that a threshold of 1 opens nothing


def score(wanted):
    """LensNet's scores tanh(z / 2) of logits z [..., n], on the CPU, clamped to (−1, 1): float32 would round to ±1."""
    return torch.tanh(wanted.float() / 2).clamp(-MOST, MOST).cpu()


def newest(values, context, tail):
    """From values [R, W], those of each row's last `tail` entries, [R, tail]; rows differ in length."""
    index = context.lengths()[:, None] - tail + torch.arange(tail)
    return values.gather(1, index.to(values.device, non_blocking=True))


class Reader:
    """
    model: a GPT, ours or a Llama, compiled or not. config: resolved for its context length. The two networks run in the
    precision of mc_aux_dtype, whatever autocast surrounds them.
    """

    def __init__(self, model, networks: MCNetworks, config: MCConfig):
        self.model, self.networks, self.config = model, networks, config
        self.device = model.get_device()
        self.dtype = resolve_dtype(config.mc_aux_dtype, self.device.type)

    @property
    def deep(self) -> int:
        """Channels that each gist has beyond its D, for later layers: see DeepGists."""
        deep = self.networks.gistnet.deep
        return 0 if deep is None else deep.width

    def embed(self, ids):
        """Embeddings [B, N, D] of token ids [B, N]: level 0 of a tree."""
        return self.model.embed(ids)

    def embed_for_decoding(self, ids):
        """The same in float32 despite a surrounding autocast, for the Decoder, which rounds: a session's level 0."""
        with autocast(self.device, torch.float32):
            return self.embed(ids)

    def gist(self, children, level):
        """Gists [M, D + deep] of a level from their children [M, K, D or more], whose first D channels count."""
        children = children[..., : self.model.config.n_embd]
        with autocast(self.device, self.dtype):
            return self.networks.gistnet(self._suited(children), level)

    def node(self, children, level):
        """
        What sessions store: `gist`, and at level 1, where children come behind the tokens before them, the block's
        LensNet key after it: [M, D + deep + C].
        """
        children = children[..., : self.model.config.n_embd]
        gists = self.gist(children[:, -self.config.block_size :], level)
        return gists if level > 1 else torch.cat((gists, self.block_keys(children).to(gists.dtype)), dim=-1)

    def tree(self, embeds) -> Table:
        """The tree over embeddings [B, N, D], all levels in one table."""
        return build_table(self.gist, embeds, self.config.block_size, self.model.sink)

    def keys(self, embeds):
        """LensNet's keys [B, n, C] of the n complete blocks in embeddings [B, N, D]."""
        index = tokens_of_blocks(0, embeds.size(1) // self.config.block_size, self.config.block_size)
        blocks = embeds[:, index.to(embeds.device, non_blocking=True)]
        return self.block_keys(blocks.flatten(0, 1)).unflatten(0, blocks.shape[:2])

    def block_keys(self, children):
        """LensNet's keys [M, C] of blocks; children [M, before + K, D]: embeddings, the preceding tokens first."""
        K = self.config.block_size
        earlier, children = self._suited(children).split((before(K), K), dim=1)
        with autocast(self.device, self.dtype):
            return self.networks.lensnet.keys(children, earlier)

    @torch.no_grad()
    def states(self, inputs, context, at):
        """States [R, P, D] before the last layer at entries `at` [R, P] of a context with inputs [R, W, D]."""
        states = self.model.states(inputs, self.positions(context), self.key_bias(context.entries))
        return states.gather(1, at.to(self.device, non_blocking=True)[..., None].expand(-1, -1, states.size(-1)))

    def asking(self, states, embeds, at):
        """The inputs of LensNet's query network, [..., P, D + S], for P tokens: see LensNet.asking."""
        return self.networks.lensnet.asking(states, embeds, at)

    def wants(self, asking, keys):
        """LensNet's logits z [R, P, n] for query inputs [R, P, D + S] and block keys [R, n, C]."""
        with autocast(self.device, self.dtype):
            return self.networks.lensnet(self._suited(asking), keys)

    def wanted(self, asking, keys):
        """One logit z per block, [R, n], for all query inputs [R, P, D + S] of a row: see LensNet.wanted."""
        return self.networks.lensnet.wanted(asking, keys, self.config.mc_beside)

    def positions(self, context, at=None):
        """The rotary positions of a context's entries, or of those with index `at` [R, n]: see entry_positions."""
        return self.positions_of(context.entries, at)

    def positions_of(self, entries, at=None):
        """The rotary positions of entries, or of those with index `at` among them."""
        mode = self.config.mc_positional
        entries = self.placed(entries).at(at).to(self.device)
        return entry_positions(entries.start, entries.span, self.model.frequencies, mode)

    def placed(self, entries, num_tokens=None):
        """The entries with the positions they take for `start` and `span`: see as_positions."""
        c, T = self.config, self.model.config.sequence_len
        return as_positions(entries, c.mc_positional, T, c.mc_gist_limit, num_tokens)

    def key_bias(self, entries):
        """The bias [B, W] on the attention scores of entries as keys, see damping; None without mc_gist_limit."""
        if not self.config.mc_gist_limit:
            return None
        gists = entries.valid & (entries.lod > 0)
        bias = gists * damping(gists.sum(1, keepdim=True), self.config.mc_gist_limit)
        return bias.to(self.device, non_blocking=True)

    def read(self, inputs, context, y) -> Reading:
        """
        Put a working context through the model.

        inputs [R, W, D]: `Table.materialize(context)` or a replacement. y [B, N]: the token that follows each position
        (−1 for none); row r of the context belongs to stream r // (R / B).
        """
        targets = context.targets(y.repeat_interleave(context.num_rows // len(y), 0))
        return self.read_entries(inputs, context.entries, targets)

    def read_entries(self, inputs, entries, targets, teacher=None) -> Reading:
        """
        `read` for entries [R, W], inputs [R, W, D] and targets [R, W], which may come from several trees. teacher
        [R, W, D]: see `GPT.forward`; with it and a gradient, nll and loss are divergences from the teacher.
        """
        positions = self.positions_of(entries)
        counts = (targets >= 0).sum(1, keepdim=True).clamp(min=1)
        weights = (counts.float().mean() / counts).expand_as(targets)  # all 1 if equal: the plain loss, exactly
        loss, nll = self.model(
            inputs_embeds=inputs,
            cos_sin=positions,
            key_bias=self.key_bias(entries),
            targets=targets,
            row_weights=weights,
            teacher=teacher,
        )
        return Reading(loss / counts.sum(), nll.view_as(targets), targets, positions)

    def focus(self, table, context, budget):
        """The context after refocusing as a session does after a prompt, within the budget."""
        focus, embeds = Focus(self.config, context.num_rows), table.level(0)[..., : self.model.config.n_embd]
        embeds = embeds.repeat_interleave(context.num_rows // len(embeds), 0)
        asking = min(ASKING, context.num_tokens, max(1, self.config.allocator_recent_tokens))  # which stay tokens
        keys, newest = self.keys(embeds), torch.arange(-asking, 0)
        at = (context.num_tokens + newest).to(self.device).expand(context.num_rows, -1)
        for i in range(self.config.mc_infer_allocator_iterations):
            entries = context.lengths()[:, None] + newest
            states = self.states(table.materialize(context), context, entries.clamp(min=0))
            wanted = self.wanted(self.asking(states, embeds, at), keys)
            edited = focus.refocus(context, score(wanted), budget, again=i > 0, eager=True)
            if edited is context:
                break
            context = edited
        return context

    def _suited(self, x):
        return x.float() if self.dtype == torch.float32 else x  # embeddings are bf16 on GPUs


# ---------------------------------------------------------------------------------------------------------
# Where entries are: rotary positions, and Gaussian RoPE


def near_from(num_tokens, T) -> int:
    """
    The first token that is near, in the mode "near": of a stream of up to T tokens all are, of a longer one the newest
    T/4 to T/2, so that this seldom changes.
    """
    step = max(1, T // 4)
    return 0 if num_tokens <= T else -(-(num_tokens - T // 2) // step) * step


def as_positions(entries, mode, T, gist_limit=0, num_tokens=None):
    """
    The entries with the first position of each for `start`, and for `span` how many positions it takes.

    "near": entries that begin in the newest tokens (see near_from) are where they are in the stream, those before them
    one after another, one position each; so beyond T tokens no entry is further away than T / 2 and their number,
    whatever it covers. "rank": all one after another. Other modes: all where they are in the stream.

    T: the model's context length. gist_limit: positions that all gists of a row take together in the mode "rank", at
    most: of more gists, several in turn share one. 0 for no limit. num_tokens: length of the stream at the time for
    which positions are wanted; None for the end of the entries.
    """
    if mode not in ("near", "rank"):
        return entries
    _, start, span, valid = entries
    ranks = torch.arange(start.size(1)).expand_as(start)
    if mode == "near":
        end = int((start + span).where(valid, 0).max())
        far = valid & (start < near_from(end if num_tokens is None else num_tokens, T))
        if not far.any():
            return entries
        near = start.where(valid & ~far, end).amin(1, keepdim=True)
        return entries._replace(
            start=(near + ranks - far.sum(1, keepdim=True)).where(far, start), span=span.where(~far, 1)
        )
    if gist_limit:
        gists = (entries.lod > 0).long()
        earlier = gists.cumsum(1) - gists
        sharing = (-(-gists.sum(1, keepdim=True) // gist_limit)).clamp(min=1)
        ranks = ranks - earlier + -(-earlier // sharing)
    return entries._replace(start=ranks, span=torch.ones_like(span))


def entry_positions(start, span, frequencies, mode="gaussian"):
    """
    (cos, sin, fade) of entries that take `span` positions from `start` on, both [B, W]; all are float32.

    Gaussian RoPE: an entry over n tokens from s on stands at the position μ = s + (n − 1)/2, with the variance
    σ² = (n² − 1)/12 of a uniform choice from its span. The expected rotation by a normally distributed position is the
    rotation by μ times a fade that depends on the frequency ω:

        E[cos ωp] = cos(ωμ)·exp(−ω²σ²/2)        E[sin ωp] = sin(ωμ)·exp(−ω²σ²/2)        p ~ N(μ, σ²)

    (real and imaginary part of the normal distribution's characteristic function). Low frequencies survive and high
    ones fade, so a gist is vague about where it is. A single token has σ = 0: it is rotated as in the plain model and
    not faded. The model normalizes queries and keys after the rotation, which would undo the fade: so that is a factor
    of its own, applied last. Rotation keeps norms and commutes with the fade.

    frequencies: the model's. cos and sin [B, W, 1, d/2] are bit for bit those of the plain model where span is 1; fade
    [B, W, 1, d] is 1 there. The modes "rank" and "simple" give (cos, sin): the centre of the span, without a fade. Both
    are what `GPT.forward(cos_sin=…)` takes.

    σ is limited to 1/ω of the slowest frequency, so that no key fades completely. Exact up to positions of 2^52.
    """
    device = start.device
    if device.type == "mps":  # which has no float64
        start, span = start.cpu(), span.cpu()
    mean = start.double() + (span.double() - 1) / 2
    cos, sin = (t.view(*start.shape, 1, -1).to(device) for t in cos_sin_at(mean.flatten(), frequencies))
    if mode in ("rank", "simple"):
        return cos, sin
    variance = torch.minimum((span.double() ** 2 - 1) / 12, frequencies.abs().min() ** -2)
    fade = torch.exp(-(frequencies**2) * variance[..., None, None] / 2).float().to(device)
    return cos, sin, torch.cat((fade, fade), dim=-1)
