"""
How much of a long context survives compression, on the same scored tokens: the newest `tail` of each sequence.

Shapes: B sequences of T tokens, K = block_size, H = T − tail tokens of history.

Losses are means over the scored tokens of a sequence, in nats per token, one value per sequence, in these contexts:

- full: all T tokens; none: the scored tokens alone, each with those before it; truncated: the last W tokens;
- sinks: the first tokens and the last ones, W in all (StreamingLLM, arXiv 2309.17453); bm25: the last ones and, as
  text, the blocks of the history that share the rarest tokens with the scored ones, W in all; both closed up;
- gists: a working context of W entries, the history's oldest blocks as gists, as few as will do;
- shuffled: the same with the gists of another sequence; mean: with plain means in GistNet's place;
- focus: the same number of entries, where LensNet and the allocator put the detail.

Context gain recovered by a context c is (truncated − c) / (truncated − full): 1 for the full context, 0 for one that
is no better than cutting the history off. Against none in truncated's place it is called context kept; there
the nearest block counts most.
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
    """What a GistNet is at its start."""
    return norm(children.mean(dim=1))


def of_others(inputs, context):
    """Inputs [B, W, D] of a context, tokens as they are, each row's gists those of the row before."""
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
        For each ratio a row: the history in 1 / ratio of its entries. What gists of one block each cannot reach is left
        out; raises UserError if that is everything.
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
    # By level, and by how long ago

    @torch.no_grad()
    def by_level(self) -> list[dict]:
        """For each level that fits a row: all of the history at that level (what is left over, one level finer)."""
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
        For each band of the history, twice as wide as the one after it, a row: what is lost when only this band is
        made into gists, against cutting it out ("truncated"), everything else staying in full.
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
        Of the last T tokens of each sequence the second half is scored, with what came before as gists (in T / 8
        entries, or as few as can be), with the gists of another sequence ("shuffled") and without any ("dropped"); the
        gain of the first over "dropped", and over "shuffled" ("told"), with their standard errors.
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
        """The loss when tokens [first, last) are cut out and the others stay where they are."""
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
                raise UserError("expected batches of 2 sequences or more, whose gists can be exchanged, got 1")
            yield x, y

    def _tables(self, x):
        embeds, K = self.model.embed(x), self.config.block_size
        return {
            "gists": self.reader.tree(embeds),
            "mean": build_table(mean_gist, embeds, K, self.model.sink),
        }

    def _tokens(self, x, y, last):
        """Losses [B] when only the last so many tokens are there."""
        nll = self.model(x[:, -last:], y[:, -last:], loss_reduction="none").view(len(x), -1)
        return nll[:, -self.tail :].mean(1)

    def _sinks(self, x, W):
        """Places [B, W] of the first tokens and the newest ones."""
        first = min(SINKS, W - self.tail)
        places = torch.cat((torch.arange(first), torch.arange(x.size(1) - W + first, x.size(1))))
        return places.expand(len(x), -1).to(x.device)

    def _found(self, x, W):
        """Places [B, W] of the blocks that BM25 finds, as many as fit beside the scored tokens, and the newest ones."""
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
    """Mean losses, and for each context the share, with its error, of what full gains over `worst` that it has."""
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

    Each an array with one loss per sequence. (None, None) where what the full context gains cannot be told from chance.
    """
    gains = worst - full
    if not gains.mean() > 2 * gains.std() / len(gains) ** 0.5:
        return None, None
    share = (worst.mean() - losses.mean()) / gains.mean()
    # To first order, the error of a ratio of means is that of the mean of what is left of its numerator
    return float(share), float((worst - losses - share * gains).std() / gains.mean() / len(gains) ** 0.5)
