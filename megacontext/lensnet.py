"""
LensNet: which blocks of the stream, however long it is, deserve detail now. The trunk asks, each block answers.

Shapes: R rows, P tokens that ask, n blocks of K tokens, D = n_embd, H = HEADS, C = KEY.

    query    of a token, from the trunk's state of it before its last layer: H vectors q_h [C] and H weights w_h, and
             how much it looks anywhere at all
    key      of a block, from the embeddings of its tokens: `layers` of attention within it, mean, head → [C]
    words    of a block: the sum of the embeddings of its tokens, and of some before it, less their mean, each as loud
             as its token is rare, projected to S = word_size numbers, of length 1; of a token: the same of the newest
             tokens, which fade with their age
    z      = bias + anywhere + Σ_h w_h · leaky_relu(q_h · key) + match · (words of the token · words of the block)

z is the logarithm of the odds that the token looks into that block for what it says, and not into none; the score is
tanh(z / 2) = 2·sigmoid(z) − 1. A key knows neither its place nor the length of the stream, so what is far is found as
what is near is. The form of the first sum is that of DeepSeek-V3.2's lightning indexer; what it is trained for, see
losses. The last term finds what shares words before anything is learned, as BM25 would: in a model that is finished
the projection *whitens* embeddings, and how loud a token is follows from how rare it is in text (see `whiten`).

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
SHARP = 8.0  # z is large where it is sure: without the factor, steps of bounded size take long to get there
LEAK = 0.1  # of ReLU: without it, all heads of all tokens may die, and then nothing is ever learned again
FADE = 0.5  # of what a token wants, per token after it
WORDS = 256  # most numbers for the words of a block: 64 do not tell the thousands of blocks of long streams apart
EPSILON = 1e-6  # of all power: directions with less than that are noise
NEWEST, NEWEST_FADE = 64, 0.92  # tokens whose words a token asks with, and the weight of each beside the next
MOST_BLOCKS = 32768  # that a session asks: a million tokens at block_size 32
COMMON = 1 / 32  # of all tokens: what is as common says nothing
FINISHED_MATCH, FINISHED_BIAS = 0.34, -0.07  # fitted to where SmolLM2-135M looks; from 0 it takes 100 steps


def word_size(n_embd) -> int:
    """S: numbers that stand for the words of a block."""
    return min(WORDS, n_embd // 2)


def key_size(n_embd) -> int:
    """C + S: numbers of a block's key with its words."""
    return KEY + word_size(n_embd)


class LensNet(nn.Module):
    """A query and a key network; `head` is "linear" or "mlp". An untrained lens has no wishes: all scores are 0."""

    def __init__(self, n_embd: int, layers=2, head="mlp"):
        super().__init__()
        self.query = nn.Linear(n_embd, HEADS * KEY, bias=False)
        # No matrices for Muon, whose steps, of one length, would make them large at once
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
        Start from a finished model: embeddings [V, D] of its tokens; how often each occurs in text, counts [V]; states
        [n, D] of tokens of text; and the ids `around` of tokens that stand around turns of a chat.

        Of states and of embeddings the mean over text is taken away: else keys of all blocks are alike, queries of all
        tokens, too. For words what is left of embeddings is multiplied by the inverse root of its covariance, then
        projected at random, which keeps products. Whatever length that gives a token, it is as loud as the logarithm of
        how much rarer it is than COMMON, by a linear function of its embedding that is fitted to all tokens. With words
        made so, untrained, blocks are found nearly as well as by BM25 (dev/LOG.md).
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
        common = p.index_fill(0, around, most)  # in a chat they are
        rarity = -torch.log(common / COMMON + 0.5 / (COMMON * counts.sum())).clamp(max=0)
        lengths = F.linear(x, projection).norm(dim=1).clamp(min=EPSILON)
        # Fitted to what text consists of, to what is rare and, as much as to the commonest token, to what stands around
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
        What tokens ask with, [..., P, D + S]: their states [..., P, D] and their words, of the NEWEST tokens up to
        them, with embeddings [..., N, D], each with NEWEST_FADE of the weight of the next. at [..., P]: where they
        stand among the N.
        """
        age = at[..., None] - torch.arange(embeds.size(-2), device=at.device)
        weights = torch.where((age >= 0) & (age < NEWEST), NEWEST_FADE ** age.clamp(0, NEWEST).float(), 0.0)
        with torch.autocast(embeds.device.type, enabled=False):
            words = self.words(weights.to(self.mean.dtype) @ self.heard(embeds))
        return torch.cat((states, words.to(states.dtype)), dim=-1)

    def keys(self, children, before):
        """Keys with words [M, C + S] of blocks, from the embeddings [M, K, D] of their tokens and of `before` them."""
        words = self.words(self.heard(torch.cat((before, children), dim=1)).sum(1))
        return torch.cat((self._key(children), words), dim=-1)

    def heard(self, embeds):
        """What is heard of tokens, float32: their embeddings [..., D] less the mean, each as loud as the token is."""
        with torch.autocast(embeds.device.type, enabled=False):
            embeds = embeds.to(self.mean.dtype)
            loud = F.relu(embeds @ self.loudness[:-1] + self.loudness[-1])
            return loud[..., None] * (embeds - self.mean)

    def words(self, heard):
        """Words [..., S] of sums [..., D] of what is heard, float32: rounded, small powers drown in large ones."""
        with torch.autocast(heard.device.type, enabled=False):
            return F.normalize(F.linear(heard, self.projection), dim=-1)

    def _key(self, children):
        cos, sin = rotary_cos_sin(torch.arange(children.size(1), device=children.device), self.encoder.head_dim)
        h = self.encoder(self.embed(children - self.mean.to(children.dtype)), (cos[:, None], sin[:, None]))
        return norm(self.head(h.mean(1)))

    def _centred(self, states):
        return norm(states) - self.state_mean.to(states.dtype)

    def forward(self, asking, keys):
        """z [R, P, n], float32, of what tokens ask with, [R, P, D + S], and keys with words [R, n, C + S] of blocks."""
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
        What tokens in a row, the newest last, want together of each block, [R, n], from asking [R, P, D + S] and keys
        [R, n, C + S]: the highest z of any of them, less FADE per token after it; float32, whatever surrounds it.
        beside: the blocks before and after one that is wanted are wanted this share as much.
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
    What the newest tokens of a session want of the blocks of its stream.

    store: of the tree, where keys stand behind the gists of level 1, of gist_size numbers. beside: see LensNet.wanted.
    The newest MOST_BLOCKS whole blocks are asked, from number `first` on, and no others: what a token costs has a
    bound, however long the stream.

    What was wanted fades with each token.
    """

    def __init__(self, lensnet, store, gist_size, beside=0.0):
        self.lensnet, self.store, self.gist_size, self.beside = lensnet, store, gist_size, beside
        self._keys, self.first = RamStore(), 0
        self.clear()

    def clear(self):
        self._values, self._end = None, 0  # what was wanted, after how many tokens

    def keys(self):
        """Of the blocks from `first` on, [n, C + S], n >= 1, those of new blocks with them."""
        self._load()
        return self._keys.all(0)[0]

    def wanted(self):
        """[n] now, of the blocks from `first` on."""
        return torch.zeros(0) if self._values is None else self._values

    def listen(self, asking, num_tokens):
        """Add what the newest tokens want, of which num_tokens − 1 is the last, from asking [P, D + S]."""
        if self.store.count(1):
            now = self.lensnet.wanted(asking[None], self.keys()[None], self.beside)[0]
            if self._values is not None:  # of all blocks but those that are new
                known = now[: len(self._values)]
                torch.maximum(known, self._values - FADE * (num_tokens - self._end), out=known)
            self._values = now
        self._end = num_tokens

    def _load(self):
        """Load the keys of new blocks. Those of the oldest are dropped by the thousand, not one by one."""
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
        The highest z, [1] on the device; None if nothing was asked. The mask [m], of blocks from `first` on, is added
        to it.
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
