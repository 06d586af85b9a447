"""
How much of a long context survives compression, on the same scored tokens: the newest `tail` of each sequence.

Shapes: B sequences of T tokens, K = block_size, H = T − tail tokens of history.

Losses are means over the scored tokens of a sequence, in nats per token, one value per sequence, in these contexts:

- full: all T tokens; none: the scored tokens alone, each with those before it; truncated: the last W tokens;
- sinks: the first and the last tokens, W in all (StreamingLLM, arXiv 2309.17453); bm25: the last tokens and the blocks
  of the history that BM25 finds for the scored ones, W tokens in all. Both are read without gaps in position;
- gists: a working context of W entries: as few of the history's oldest blocks as possible are gists;
- shuffled: the same with the gists of another sequence; mean: with plain means in GistNet's place;
- focus: W entries at most, with the detail where LensNet and the allocator put it.

Context gain recovered by a context c is (truncated − c) / (truncated − full): 1 for the full context, 0 for one that
is no better than truncation. With none in place of truncated it is called context kept; there the nearest block
counts most.
"""

from collections import defaultdict

import torch

from megacontext.evaluation.policies import bm25
from megacontext.reader import Reader, newest
from megacontext.tree import build_table
from megacontext.working_context import Edit, WorkingContext, old_blocks, smallest_length
from nanochat.common import UserError
from nanochat.gpt import norm

SINKS = 4  # first tokens that StreamingLLM keeps


def mean_gist(children, level):
    """The gist of an untrained GistNet: the normalized mean."""
    return norm(children.mean(dim=1))


def of_others(inputs, context):
    """Inputs [B, W, D] of a context in which each row's gists are replaced by those of the row before."""
    return inputs.roll(1, 0).where((context.entries.lod[..., None] > 0).to(inputs.device), inputs)


class Evaluator:
    """
    reader: of a model and networks in eval mode, its config resolved for T. batches: iterator of (x, y) [B, T].

    Every method reads `steps` batches and returns rows of figures.
    """

    def __init__(self, reader: Reader, batches, steps: int):
        self.reader, self.batches, self.steps = reader, batches, steps
        self.config, self.model = reader.config, reader.model
        self.tail = max(1, self.config.allocator_recent_tokens)

    # -----------------------------------------------------------------------------------------------------
    # By how much is compressed

    @torch.no_grad()
    def by_ratio(self, ratios) -> list[dict]:
        """
        A row per ratio, with the history compressed to 1 / ratio of its tokens. Ratios that even the coarsest context
        cannot reach are left out; raises UserError if none is left.
        """
        losses = defaultdict(lambda: defaultdict(list))
        for x, y in self._batches():
            T = x.size(1)
            tables = self._tables(x)
            full = self._tokens(x, y, T)
            none = self._tokens(x, y, self.tail)
            smallest = smallest_length(T, self.config.block_size, self.tail)
            for ratio in ratios:
                if (W := self.budget(T, ratio)) < smallest:
                    continue
                context = WorkingContext.initial(T, self.config.block_size, W, self.tail, len(x))
                row = losses[ratio]
                row["full"].append(full)
                row["none"].append(none)
                row["truncated"].append(self._tokens(x, y, W))
                for name, keep in (("sinks", self._sinks(x, W)), ("bm25", self._found(x, W))):
                    row[name].append(self._tokens(x.gather(1, keep), y.gather(1, keep), W))
                self._gists(row, tables, context, y)
                focused = self.reader.focus(tables["gists"], context, W)
                row["focus"].append(self._read(tables["gists"], focused, y))
        if not losses:
            raise UserError(
                f"expected a compression of {T} tokens in blocks of {self.config.block_size} to {smallest} entries or "
                f"more, got the ratios {ratios}"
            )
        return [
            {
                "ratio": ratio,
                "entries": self.budget(T, ratio),
                **_figures(losses[ratio], "truncated"),
                **_figures(losses[ratio], "none", "kept"),
            }
            for ratio in losses
        ]

    def budget(self, T, ratio) -> int:
        """Entries of a working context whose history of T − tail tokens is compressed by `ratio`."""
        return self.tail + -(-(T - self.tail) // ratio)

    # -----------------------------------------------------------------------------------------------------
    # By level, and by distance

    @torch.no_grad()
    def by_level(self) -> list[dict]:
        """A row per level that fits: the whole history at that level (an incomplete last node at finer levels)."""
        losses = defaultdict(lambda: defaultdict(list))
        for x, y in self._batches():
            tables = self._tables(x)
            full, none = self._tokens(x, y, x.size(1)), self._tokens(x, y, self.tail)
            for level, context in self._levels(x):
                row = losses[level]
                row["full"].append(full)
                row["none"].append(none)
                self._gists(row, tables, context, y)
        return [{"level": level, **_figures(row, "none")} for level, row in losses.items()]

    def _levels(self, x):
        K, T = self.config.block_size, x.size(1)
        lod_map = torch.zeros(len(x), -(-T // K), dtype=torch.int8)
        blocks, level = old_blocks(T, K, self.tail), 1
        while nodes := blocks // K ** (level - 1):
            lod_map[:, : nodes * K ** (level - 1)] = level
            yield level, WorkingContext.from_map(lod_map, T, K)
            level += 1

    @torch.no_grad()
    def by_distance(self) -> list[dict]:
        """
        A row per band of the history, each twice as wide as the next newer one: the loss when only this band is
        replaced by gists, compared with removing it ("truncated"); all other tokens stay.
        """
        losses, K = defaultdict(lambda: defaultdict(list)), self.config.block_size
        for x, y in self._batches():
            B, T = x.shape
            tables, full = self._tables(x), self._tokens(x, y, T)
            embeds = tables["gists"].values[:, :T]  # its level 0
            last, width = old_blocks(T, K, self.tail), 1
            while last > 0:
                first = max(0, last - width)
                row = losses[T - self.tail - last * K, T - self.tail - first * K]
                context = WorkingContext.finest(B, T, K).apply(Edit(b, first, last - first, 1) for b in range(B))
                row["full"].append(full)
                self._gists(row, tables, context, y)
                row["truncated"].append(self._without(embeds, y, first * K, last * K))
                last, width = first, 2 * width
        return [{"nearest": near, "farthest": far, **_figures(row, "truncated")} for (near, far), row in losses.items()]

    @torch.no_grad()
    def past(self, T) -> dict:
        """
        The loss of the second half of each sequence's last T tokens, with the past before these T as gists (in T / 8
        entries, or the minimum), with gists of another sequence ("shuffled"), and without the past ("dropped"); the
        gain of gists over "dropped" ("gain") and over "shuffled" ("told"), with standard errors.
        """
        losses, K = defaultdict(list), self.config.block_size
        for x, y in self._batches():
            N = x.size(1)
            W = max(T + T // 8, smallest_length(N, K, T))
            context, table = WorkingContext.initial(N, K, W, T, len(x)), self.reader.tree(self.reader.embed(x))
            inputs = table.materialize(context)
            dropped = self.model(x[:, -T:], y[:, -T:], loss_reduction="none").view(len(x), T)
            losses["dropped"].append(dropped[:, -(T // 2) :].mean(1))
            for name, values in (("gists", inputs), ("shuffled", of_others(inputs, context))):
                losses[name].append(newest(self.reader.read(values, context, y).nll, context, T // 2).mean(1))
        losses = {name: torch.cat(values).double() for name, values in losses.items()}
        row = {"past": N - T, "entries": int(context.lengths()[0]) - T, "sequences": len(losses["gists"])}
        row |= {name: values.mean().item() for name, values in losses.items()}
        for worse, gain, error in (("dropped", "gain", "standard_error"), ("shuffled", "told", "told_standard_error")):
            gains = losses[worse] - losses["gists"]
            row |= {gain: gains.mean().item(), error: (gains.std() / len(gains) ** 0.5).item()}
        return row

    def _without(self, embeds, y, first, last):
        """Losses [B] without the tokens [first, last); the others keep their positions."""
        keep = torch.cat((torch.arange(first), torch.arange(last, y.size(1)))).to(y.device)
        cos_sin = self.model.cos[:, keep], self.model.sin[:, keep]
        nll = self.model(inputs_embeds=embeds[:, keep], cos_sin=cos_sin, targets=y[:, keep], loss_reduction="none")
        return nll.view(len(y), -1)[:, -self.tail :].mean(1)

    # -----------------------------------------------------------------------------------------------------
    # Contexts

    def _batches(self):
        for _ in range(self.steps):
            x, y = next(self.batches)
            if len(x) < 2:
                raise UserError("expected batches of 2 sequences or more, to exchange their gists, got 1")
            yield x, y

    def _tables(self, x):
        embeds, K = self.model.embed(x), self.config.block_size
        return {
            "gists": self.reader.tree(embeds),
            "mean": build_table(mean_gist, embeds, K, self.model.sink),
        }

    def _tokens(self, x, y, last):
        """Losses [B] when only the `last` last tokens are read."""
        nll = self.model(x[:, -last:], y[:, -last:], loss_reduction="none").view(len(x), -1)
        return nll[:, -self.tail :].mean(1)

    def _sinks(self, x, W):
        """Positions [B, W] of the first and the newest tokens."""
        first = min(SINKS, W - self.tail)
        places = torch.cat((torch.arange(first), torch.arange(x.size(1) - W + first, x.size(1))))
        return places.expand(len(x), -1).to(x.device)

    def _found(self, x, W):
        """Positions [B, W] of the newest tokens and of as many blocks found by BM25 as fit beside the scored ones."""
        K, T = self.config.block_size, x.size(1)
        count = (W - self.tail) // K
        recent = W - count * K
        scores = bm25(x, K, old_blocks(T, K, recent), self.tail)
        blocks = scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort().values
        found = (blocks[..., None] * K + torch.arange(K, device=x.device)).flatten(1)
        return torch.cat((found, torch.arange(T - recent, T, device=x.device).expand(len(x), -1)), dim=1)

    def _gists(self, row, tables, context, y):
        row["gists"].append(self._read(tables["gists"], context, y))
        row["mean"].append(self._read(tables["mean"], context, y))
        mixed = of_others(tables["gists"].materialize(context), context)
        row["shuffled"].append(self._loss(mixed, context, y))

    def _read(self, table, context, y):
        return self._loss(table.materialize(context), context, y)

    def _loss(self, inputs, context, y):
        return newest(self.reader.read(inputs, context, y).nll, context, self.tail).mean(1)


def _figures(losses, worst, suffix="recovered") -> dict:
    """Mean losses, and for each context the share of full's gain over `worst` that it keeps, with standard error."""
    losses = {name: torch.cat(values).double().cpu().numpy() for name, values in losses.items()}
    figures = {"sequences": len(losses["full"]), **{name: float(values.mean()) for name, values in losses.items()}}
    for name in losses:
        if name not in ("full", worst):
            key = f"{name}_{suffix}"
            figures[key], figures[f"{key}_error"] = recovered(losses[name], losses["full"], losses[worst])
    return figures


def recovered(losses, full, worst) -> tuple[float | None, float | None]:
    """
    (share of the gain of `full` over `worst` that `losses` keeps, its standard error over sequences: delta method).

    Each argument: an array with one loss per sequence. (None, None) if full's gain is below two standard errors.
    """
    gains = worst - full
    if not gains.mean() > 2 * gains.std() / len(gains) ** 0.5:
        return None, None
    share = (worst.mean() - losses.mean()) / gains.mean()
    # Delta method: to first order the ratio's error is that of the mean of numerator − share · denominator
    return float(share), float((worst - losses - share * gains).std() / gains.mean() / len(gains) ** 0.5)
