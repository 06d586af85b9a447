"""
LensNet: scores which blocks of a stream are wanted in detail now, by queries of tokens and keys of blocks.

Shapes: R rows, P querying tokens, n blocks of K tokens, D = n_embd, H = HEADS, C = KEY, S = word_size.

    query    of a token, from the trunk's state before the last layer: H vectors q_h [C], H weights w_h, and a bias
             `anywhere`: how much the token looks into any block at all
    key      of a block, from its token embeddings: `layers` of attention within the block, mean, head → [C]
    words    of a block: the weighted sum of the centred embeddings of its tokens and of some before it, projected to S
             numbers and normalized; rare tokens weigh more. Of a token: the same over the newest tokens, with weights
             that decay with age
    z      = SHARP · (bias + anywhere + Σ_h w_h · leaky_relu(q_h · key) / √C + match · (token's words · block's words))

z is the log-odds that the token looks into that block for its content, rather than into none; the score is
tanh(z / 2) = 2·sigmoid(z) − 1. Keys do not depend on the block's position or the length of the stream, so far blocks
are found like near ones. The sum over heads has the form of DeepSeek-V3.2's lightning indexer; its training target is
in losses. The last term finds shared words without training, as BM25 does: for a trained model the projection *whitens*
embeddings, and a token's weight follows from its rarity in text (see `whiten`).

Parameters: about 12·layers·WIDTH² + WIDTH·D and, for the mlp head, 4·WIDTH·(WIDTH + C), for keys; (C + 1)·H·D for
queries and D for `anywhere`; the projection is not trained.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from megacontext.gistnet import Encoder, Head, init_linear
from megacontext.tree import RamStore
from nanochat.gpt import norm, rotary_cos_sin

WIDTH = 128  # of the encoder
KEY = 64
HEADS = 8
HEAD_DIM = 32
SHARP = 8.0  # scales z: without it, optimizer steps of bounded size take long to reach large logits
LEAK = 0.1  # slope of the leaky ReLU below 0: with a plain ReLU all heads may die, and learning stops for good
FADE = 0.5  # decrease of a token's z per later token
WORDS = 256  # largest size of a block's words: 64 numbers cannot distinguish the thousands of blocks of long streams
EPSILON = 1e-6  # fraction of the total variance below which a direction counts as noise
NEWEST, NEWEST_FADE = 64, 0.92  # tokens whose words are in a query, and each one's weight relative to the next
MOST_BLOCKS = 32768  # newest blocks that a session scores: a million tokens at block_size 32
COMMON = 1 / 32  # frequency at which a token's weight reaches 0
FINISHED_MATCH, FINISHED_BIAS = 0.34, -0.07  # fitted to where SmolLM2-135M looks; from 0 it takes 100 steps


def word_size(n_embd) -> int:
    """S: size of the words of a block."""
    return min(WORDS, n_embd // 2)


def key_size(n_embd) -> int:
    """C + S: size of a block's key with its words."""
    return KEY + word_size(n_embd)


class LensNet(nn.Module):
    """A query and a key network; `head` is "linear" or "mlp". Untrained, it gives the score 0 to every block."""

    def __init__(self, n_embd: int, layers=2, head="mlp"):
        super().__init__()
        self.query = nn.Linear(n_embd, HEADS * KEY, bias=False)
        # Parameters, not nn.Linear, so that AdamW trains them: Muon's steps of fixed size would make them large at once
        self.weigh, self.anywhere = nn.Parameter(torch.empty(HEADS, n_embd)), nn.Parameter(torch.empty(n_embd))
        self.bias = nn.Parameter(torch.empty(1))
        self.match = nn.Parameter(torch.empty(1))
        self.register_buffer("mean", torch.empty(n_embd))
        self.register_buffer("state_mean", torch.empty(n_embd))
        self.register_buffer("loudness", torch.empty(n_embd + 1))
        self.register_buffer("projection", torch.empty(word_size(n_embd), n_embd))
        self.embed = nn.Linear(n_embd, WIDTH, bias=False)
        self.encoder = Encoder(layers, WIDTH, HEAD_DIM)
        self.head = Head(head, WIDTH, KEY)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Fill the parameters in place (the network may have been made on the meta device)."""
        init_linear(self)
        nn.init.normal_(self.head.c_proj.weight, std=self.head.c_proj.weight.size(1) ** -0.5)
        for p in (self.weigh, self.bias, self.match, self.anywhere, self.mean, self.state_mean, self.loudness):
            nn.init.zeros_(p)
        self.loudness[-1] = 1.0
        nn.init.orthogonal_(self.projection)

    @torch.no_grad()
    def whiten(self, embeddings, counts, states, around):
        """
        Initialize for a trained model. embeddings [V, D]: of its tokens; counts [V]: how often each occurs in text;
        states [n, D]: of tokens of text; around: ids of tokens that surround the turns of a chat.

        The mean over text is subtracted from states and embeddings: otherwise all keys, and all queries, are alike. For
        words, centred embeddings are multiplied by the inverse square root of their covariance, then projected at
        random, which nearly preserves dot products. A token's contribution then has the length log(COMMON / its
        frequency), 0 for common ones; a linear function of the embedding, fitted to all tokens, predicts it. With these
        words, untrained, blocks are found nearly as well as by BM25 (dev/LOG.md).
        """
        p = counts.double() / counts.sum()
        mean = p @ embeddings.double()
        x = embeddings.double() - mean
        covariance = x.mT @ (p[:, None] * x)
        power, directions = torch.linalg.eigh(covariance)
        root = directions * (power.clamp(min=0) + EPSILON * power.sum()).rsqrt()
        chance = torch.randn(self.projection.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        projection = (root @ torch.linalg.qr(chance.mT)[0].to(root.device)).mT
        most = p.max().item()
        common = p.index_fill(0, around, most)  # in a chat these are common
        rarity = -torch.log(common / COMMON + 0.5 / (COMMON * counts.sum())).clamp(max=0)
        lengths = F.linear(x, projection).norm(dim=1).clamp(min=EPSILON)
        # Weights of the fit: 1 + V · frequency; the tokens around turns together weigh as much as the commonest one
        weights = (1 + len(p) * p.index_fill(0, around, most / max(1, len(around)))).sqrt()[:, None]
        features = F.pad(embeddings.double(), (0, 1), value=1.0)
        fit = torch.linalg.lstsq(weights * features, weights * (rarity / lengths)[:, None]).solution
        self.loudness.copy_(fit[:, 0])
        self.mean.copy_(mean)
        self.state_mean.copy_(norm(states.float()).mean(0))
        self.projection.copy_(projection)
        self.match.fill_(FINISHED_MATCH)
        self.bias.fill_(FINISHED_BIAS)

    def asking(self, states, embeds, at):
        """
        Query inputs [..., P, D + S] of P tokens: their states [..., P, D], and the words of the NEWEST tokens up to
        each, every token weighted NEWEST_FADE relative to the next. embeds [..., N, D]: embeddings of the text; at
        [..., P]: indices of the P tokens in it.
        """
        age = at[..., None] - torch.arange(embeds.size(-2), device=at.device)
        weights = torch.where((age >= 0) & (age < NEWEST), NEWEST_FADE ** age.clamp(0, NEWEST).float(), 0.0)
        with torch.autocast(embeds.device.type, enabled=False):
            words = self.words(weights.to(self.mean.dtype) @ self.heard(embeds))
        return torch.cat((states, words.to(states.dtype)), dim=-1)

    def keys(self, children, before):
        """Keys with words [M, C + S] of blocks; children [M, K, D], before: embeddings of their and earlier tokens."""
        words = self.words(self.heard(torch.cat((before, children), dim=1)).sum(1))
        return torch.cat((self._key(children), words), dim=-1)

    def heard(self, embeds):
        """Centred embeddings [..., D] in float32, each scaled by its token's weight (`loudness`)."""
        with torch.autocast(embeds.device.type, enabled=False):
            embeds = embeds.to(self.mean.dtype)
            loud = F.relu(embeds @ self.loudness[:-1] + self.loudness[-1])
            return loud[..., None] * (embeds - self.mean)

    def words(self, heard):
        """Words [..., S] from sums [..., D] of `heard`. In float32: in bf16, small components vanish beside large."""
        with torch.autocast(heard.device.type, enabled=False):
            return F.normalize(F.linear(heard, self.projection), dim=-1)

    def _key(self, children):
        cos, sin = rotary_cos_sin(torch.arange(children.size(1), device=children.device), self.encoder.head_dim)
        h = self.encoder(self.embed(children - self.mean.to(children.dtype)), (cos[:, None], sin[:, None]))
        return norm(self.head(h.mean(1)))

    def _centred(self, states):
        return norm(states) - self.state_mean.to(states.dtype)

    def forward(self, asking, keys):
        """z [R, P, n] in float32, from query inputs [R, P, D + S] and the blocks' keys with words [R, n, C + S]."""
        states, asked = asking.tensor_split((self.mean.numel(),), dim=-1)
        h = self._centred(states)
        q = self.query(h).unflatten(-1, (HEADS, KEY))
        keys, words = keys[..., :KEY], keys[..., KEY:]
        found = F.leaky_relu(torch.einsum("rphc,rnc->rphn", q, keys.to(q.dtype)), LEAK).float() / KEY**0.5
        z = (F.linear(h, self.weigh.to(h.dtype)).float()[..., None] * found).sum(2) + self.bias.float()
        z = z + F.linear(h, self.anywhere[None].to(h.dtype)).float()
        return SHARP * (z + self.match.float() * (asked.float() @ words.float().mT))

    @torch.no_grad()
    def wanted(self, asking, keys, beside=0.0):
        """
        One z per block, [R, n], for P consecutive tokens with query inputs [R, P, D + S], the newest last, and keys
        [R, n, C + S]: the highest z of any token, minus FADE per later token. Always in float32. beside: where z > 0,
        both neighbours of a block get at least this fraction of it.
        """
        with torch.autocast(asking.device.type, enabled=False):
            z = self(asking.float(), keys.float())
        age = torch.arange(z.size(1) - 1, -1, -1, device=z.device)
        z = (z - FADE * age[:, None]).amax(1)
        around = F.pad(beside * z.clamp(min=0), (1, 1))
        around = torch.maximum(around[:, :-2], around[:, 2:])
        return torch.where(around > 0, torch.maximum(z, around), z)


class Demand:
    """
    How much the recent tokens of a session want each block of its stream: running values of z.

    store: the tree's; its level-1 rows are gists of gist_size numbers followed by LensNet's keys. beside: see
    LensNet.wanted. Only about the newest MOST_BLOCKS complete blocks are scored, from number `first` on, which bounds
    the cost per token for any length of stream.

    Values decrease by FADE per token.
    """

    def __init__(self, lensnet, store, gist_size, beside=0.0):
        self.lensnet, self.store, self.gist_size, self.beside = lensnet, store, gist_size, beside
        self._keys, self.first = RamStore(), 0
        self.clear()

    def clear(self):
        self._values, self._end = None, 0  # z per block, and the number of tokens at its last update

    def keys(self):
        """Keys [n, C + S] of the blocks from `first` on, n >= 1, including new blocks."""
        self._load()
        return self._keys.all(0)[0]

    def wanted(self):
        """The current z of the blocks from `first` on, [n]."""
        return torch.zeros(0) if self._values is None else self._values

    def listen(self, asking, num_tokens):
        """Update z with the query inputs [P, D + S] of the newest tokens, the last of which is num_tokens − 1."""
        if self.store.count(1):
            now = self.lensnet.wanted(asking[None], self.keys()[None], self.beside)[0]
            if self._values is not None:  # of all blocks but those that are new
                known = now[: len(self._values)]
                torch.maximum(known, self._values - FADE * (num_tokens - self._end), out=known)
            self._values = now
        self._end = num_tokens

    def _load(self):
        """Load the keys of new blocks; drop those of the oldest, MOST_BLOCKS / 8 or more at a time."""
        blocks, known = self.store.count(1), self.first + self._keys.count(0)
        if blocks - self.first > MOST_BLOCKS + MOST_BLOCKS // 8:
            first = blocks - MOST_BLOCKS
            kept = self._keys.all(0)[:, first - self.first :].clone() if known > first else None
            self._values = None if self._values is None or kept is None else self._values[first - self.first :]
            self._keys, self.first, known = RamStore(), first, max(first, known)
            if kept is not None:
                self._keys.append(0, kept)
        if blocks > known:
            index = torch.arange(known, blocks, device=self.store.device)[None]
            self._keys.append(0, self.store.get(1, index)[..., self.gist_size :].float())

    def most(self, mask):
        """
        The highest sum of z and mask [m], both of blocks from `first` on: [1] on the device; None before any query.
        """
        n = 0 if self._values is None else min(len(mask), len(self._values))
        return (self._values[:n] + mask[:n]).amax(0, keepdim=True) if n else None

    def truncate(self, blocks):
        """Forget the blocks from this number on."""
        if blocks < self.first:
            self._keys, self.first = RamStore(), 0
            self.clear()
            return
        kept = min(blocks - self.first, self._keys.count(0))
        self._keys.truncate(0, kept)
        if self._values is not None:
            self._values = self._values[:kept]

    def snapshot(self):
        return self._values, self._end, self.first  # which are never written to

    def restore(self, snapshot):
        values, self._end, first = snapshot
        self._values = values if first == self.first else None
