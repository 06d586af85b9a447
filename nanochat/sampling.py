"""
Sample the next token of each row of a batch; the rows may have different settings.

The order of operations is that of vLLM and transformers: penalties and biases on the logits, division by the
temperature, then top_k, top_p and min_p restrict the candidates. One candidate is drawn by the Gumbel-max trick (the
largest logit / temperature + noise), which needs no sorting and no sum. The noise is a hash of (seed, number of tokens
so far, token id), so the tokens of a row depend on its own logits and settings, not on the other rows of the batch.

Shapes: B rows, V = vocab_size.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch

from nanochat.ranges import BOUNDLESS, Amount, Fraction, Range

GREEDY = 1e-5  # temperatures below this are greedy, as in vLLM: dividing by them would overflow
NARROW = 256  # up to this top_k, the candidates are found without sorting all V logits
NUCLEUS = 1024  # likeliest tokens that top_p tries first on a CPU, before it sorts all V
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads consecutive integers over 64 bits


@dataclass(frozen=True)
class Sampling:
    """
    The sampling settings of one row; `ranges.check` says whether they can be.

    temperature: 0 is greedy. top_k: only the k likeliest tokens; 0 or None for all. top_p: only the smallest set of
    likeliest tokens with this total probability. min_p: only tokens with at least this fraction of the best token's
    probability. repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or answer.
    presence_penalty: subtracted from the logits of tokens in the answer; frequency_penalty: the same, times their
    count. logit_bias: token id → number added to its logit. seed: any integer.
    """

    temperature: Amount = 1.0
    top_k: Annotated[int | None, Range(0)] = 0
    top_p: Annotated[float, Range(1e-9, 1)] = 1.0
    min_p: Fraction = 0.0
    repetition_penalty: Annotated[float, Range(1e-9)] = 1.0
    presence_penalty: Annotated[float, Range(-BOUNDLESS)] = 0.0
    frequency_penalty: Annotated[float, Range(-BOUNDLESS)] = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 42

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def way(self):
        """The method that finds the candidates: "greedy", "narrow", "ordered", "nucleus" or "wide"."""
        if self.temperature < GREEDY:
            return "greedy"
        if self.top_k:
            return "narrow" if self.top_k <= NARROW else "ordered"
        return "nucleus" if self.top_p < 1 else "wide"


def row_seed(seed: int, row: int) -> int:
    """The seed of each of several rows that are requested with one seed; row 0 has that seed."""
    return (seed + row * GOLDEN) % 2**63


def _signed(value):
    """An integer modulo 2^64, as an int64 holds it."""
    return (value + 2**63) % 2**64 - 2**63


def _mix(x):
    """The hash of splitmix64 (Steele, Lea and Flood, 2014; constants by Vigna) for int64, which wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x >> shift).bitwise_and_((1 << 64 - shift) - 1).bitwise_xor_(x).mul_(_signed(factor))
    return (x >> 31).bitwise_and_((1 << 33) - 1).bitwise_xor_(x)


def _gumbel(hashes):
    """Gumbel(0, 1) noise, -log(-log(1 - uniform)), in float32 from int64 hashes; precise where it is large."""
    uniform = hashes.bitwise_and_(2**63 - 1).float().add_(0.5).mul_(2.0**-63).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


class _Group:
    """Rows that are sampled by one method: their indices [b], and their settings in columns [b, 1]."""

    def __init__(self, way, members, settings, vocab_size, device):
        def column(values):
            return torch.tensor(values, device=device)[:, None]

        chosen = [settings[row] for row in members]
        self.way, self.rows = way, column(members)[:, 0]
        self.width = min(max(s.top_k or vocab_size for s in chosen), vocab_size)
        self.top_k = column([s.top_k or vocab_size for s in chosen])
        self.temperature = column([float(s.temperature) for s in chosen])
        # 1 means off: the sum of all probabilities may exceed 1 by rounding
        self.top_p = column([s.top_p if s.top_p < 1 else 2.0 for s in chosen])
        self.min_p = column([float(s.min_p) for s in chosen]).log()
        self.key = _mix(column([_signed(s.seed) for s in chosen]))
        self.limits_k, self.limits_p, self.limits_min = (
            any(s.top_k not in (None, 0, self.width) for s in chosen),
            any(s.top_p < 1 for s in chosen),
            any(s.min_p > 0 for s in chosen),
        )

    def draw(self, logits, steps):
        """Sampled ids [b] from logits [b, V]; steps [b]: number of tokens so far."""
        if self.way == "greedy":
            return logits.argmax(dim=-1)
        scores, ids = self.remaining(logits)
        key = _mix(self.key + steps[:, None] * _signed(GOLDEN))
        best = (scores + _gumbel(_mix(key + ids * _signed(GOLDEN)))).argmax(dim=-1, keepdim=True)
        return ids.expand_as(scores).gather(-1, best)[:, 0]

    def remaining(self, logits):
        """The candidates: (logits / temperature, -inf for the excluded; their ids), each [b or 1, n]."""
        if self.way == "wide":
            scores, ids = logits / self.temperature, torch.arange(logits.size(-1), device=logits.device)[None]
        elif self.way == "nucleus":
            scores, ids = self._nucleus(logits / self.temperature)
        else:
            scores, ids = logits.topk(self.width, dim=-1)
            scores = scores / self.temperature
            if self.limits_k:
                ranks = torch.arange(self.width, device=logits.device)
                scores = scores.masked_fill(ranks >= self.top_k, -torch.inf)
            if self.limits_p:
                scores = scores.masked_fill(self._before(scores.softmax(dim=-1)) >= self.top_p, -torch.inf)
        if self.limits_min:
            scores = scores.masked_fill(scores < scores.amax(dim=-1, keepdim=True) + self.min_p, -torch.inf)
        return scores, ids

    @staticmethod
    def _before(probabilities):
        """The sum of the probabilities before each one, [b, n]."""
        return probabilities.cumsum(dim=-1) - probabilities

    def _nucleus(self, logits):
        total = logits.logsumexp(dim=-1, keepdim=True)
        # A GPU has sorted all of them before the host would know whether some were enough
        for width in (NUCLEUS, self.width) if logits.device.type == "cpu" else (self.width,):
            scores, ids = logits.topk(min(width, self.width), dim=-1)
            outside = self._before((scores - total).exp()) >= self.top_p
            if width < self.width and outside[:, -1].all():  # these include the whole nucleus of every row
                break
        return scores.masked_fill(outside, -torch.inf), ids


class Sampler:
    """
    Samples the next tokens of B rows, and keeps the counts of their tokens that penalties need.

    In each step call `ids = sampler(logits)`, then `sampler.observe(ids)` with the tokens that really follow, which a
    tool may have replaced. rows: Sampling of the initial rows. Rows are numbered in the order in which they are added.
    """

    def __init__(self, vocab_size, device="cpu", rows=()):
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.rows = []  # Sampling of each row
        self.steps = torch.zeros(0, dtype=torch.long, device=self.device)  # tokens observed, [B]
        self.counts = torch.zeros(
            0, vocab_size, device=self.device
        )  # of tokens in the answer, [rows with penalties, V]
        self.seen = self.counts.bool()  # whether a token is in prompt or answer
        self.groups = None  # None if they, and the tensors of the settings, do not match the rows yet
        for settings in rows:
            self.add(settings)

    def add(self, settings: Sampling, prompt=()):
        """Add a row. prompt: ids of its prompt, for the repetition penalty."""
        self.rows.append(settings)
        self.steps = torch.cat((self.steps, self.steps.new_zeros(1)))
        if settings.penalizes:
            seen = self.seen.new_zeros(1, self.vocab_size)
            seen[0, torch.tensor(list(prompt), dtype=torch.long, device=self.device)] = True
            self.seen = torch.cat((self.seen, seen))
            self.counts = torch.cat((self.counts, self.counts.new_zeros(1, self.vocab_size)))
        self.groups = None

    def keep(self, rows: list[int]):
        """Keep only these rows, in this order."""
        places = {row: place for place, row in enumerate(self._penalizing())}
        penalizing = [places[row] for row in rows if row in places]
        self.counts, self.seen = self.counts[penalizing], self.seen[penalizing]
        self.rows, self.steps = [self.rows[row] for row in rows], self.steps[rows]
        self.groups = None

    def _penalizing(self):
        return [row for row, settings in enumerate(self.rows) if settings.penalizes]

    def _prepare(self):
        """Update groups and tensors of the settings after rows have changed."""
        if self.groups is not None:
            return

        def tensor(values, dtype=torch.float32):
            return torch.tensor(values, dtype=dtype, device=self.device)

        penalizing = self._penalizing()
        self.penalizing = tensor(penalizing, torch.long)
        self.repetition, self.presence, self.frequency = (
            tensor([getattr(self.rows[row], name) for row in penalizing])[:, None]
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
        )
        biases = [(row, *bias) for row, settings in enumerate(self.rows) for bias in settings.logit_bias.items()]
        rows, ids, values = zip(*biases, strict=True) if biases else ((), (), ())
        self.bias = (tensor(rows, torch.long), tensor(ids, torch.long)), tensor(values)
        members = {}
        for row, settings in enumerate(self.rows):
            members.setdefault(settings.way(), []).append(row)
        self.groups = [_Group(*group, self.rows, self.vocab_size, self.device) for group in members.items()]

    def adjusted(self, logits):
        """Logits [B, V] after penalties and biases; the input is not modified."""
        self._prepare()
        (rows, ids), values = self.bias
        if len(self.penalizing):
            old = logits[self.penalizing]
            repeated = torch.where(old > 0, old / self.repetition, old * self.repetition)
            new = torch.where(self.seen, repeated, old) - self.frequency * self.counts
            logits = logits.index_copy(0, self.penalizing, new - self.presence * (self.counts > 0))
        return logits.index_put((rows, ids), values, accumulate=True) if len(values) else logits

    @torch.inference_mode()
    def __call__(self, logits):
        """Sampled ids [B] from logits [B, V] in float32."""
        if len(logits) != len(self.rows):
            raise ValueError(f"expected logits of {len(self.rows)} rows, got {len(logits)}")
        logits = self.adjusted(logits)
        if len(self.groups) == 1:
            return self.groups[0].draw(logits, self.steps)
        ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for group in self.groups:
            ids[group.rows] = group.draw(logits[group.rows], self.steps[group.rows])
        return ids

    @torch.inference_mode()
    def observe(self, ids):
        """Count the tokens, ids [B], that were appended to the rows."""
        self._prepare()
        self.steps = self.steps + 1
        if len(self.penalizing):
            at = torch.arange(len(self.penalizing), device=self.device), ids[self.penalizing]
            self.counts[at] += 1
            self.seen[at] = True


def logprobs(logits, ids, top=0):
    """
    Log probabilities (nats) before any sampling setting: (those of ids [B], (values, ids) of the likeliest, each
    [B, top]).
    """
    values = logits.float().log_softmax(dim=-1)
    return values.gather(-1, ids[:, None])[:, 0], values.topk(min(top, values.size(-1)), dim=-1)
