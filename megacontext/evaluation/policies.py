"""
Focus policies compared at an equal budget: do they open the block with the fact that a question asks for?

Shapes: R windows of N tokens, K = block_size, E blocks of the history that may be open.

A window ends with the answer to a question; the fact is somewhere in the history, before the newest tokens. The history
is read as gists, except for E open blocks, which a policy chooses:

- recency: the newest; random; bm25: those that Okapi BM25 ranks highest for the newest tokens;
- oracle: those that contain the fact;
- lens: a refocus of LensNet and the allocator with the settings of inference, starting from recency.

For comparison: full is the whole window as tokens, gists has no open block.
"""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megacontext.reader import Reader
from megacontext.working_context import WorkingContext
from nanochat.common import UserError
from nanochat.recall import recall_documents, token_spans

MAX_DOCUMENTS_PER_WINDOW = 20
DEPTHS = 5  # bins of the heatmap


class Windows(NamedTuple):
    x: torch.Tensor  # [R, N]
    y: torch.Tensor  # [R, N], the token after each
    answer: torch.Tensor  # [R, N] bool: targets that belong to the answer
    fact: torch.Tensor  # [R, 2] first and last token of the fact

    def to(self, device):
        return Windows(*(t.to(device) for t in self))


def recall_windows(tokenizer, token_bytes, N, recent, count, like) -> Windows:
    """
    `count` windows of N tokens, each from its own document, whose fact ends before the last `recent` tokens.

    like: sizes of the documents that the model was trained on, as in source.json; longer documents have as many facts
    per character. Raises UserError if too few questions have a fact far enough back.
    """
    bos, pick, found = tokenizer.get_bos_token_id(), random.Random("windows 0"), []
    token_bytes = token_bytes.cpu()
    (text, _), *_ = recall_documents(0, 1, **like)
    chars = round(1.6 * N * len(text) / len(tokenizer.encode(text)))
    scaled = {name: like[name] * chars // like["chars"] for name in ("questions", "tables", "distractors")}
    sizes = {**like, **scaled, "chars": chars, "max_distance": -1, "times": 1}
    for text, questions in recall_documents(0, MAX_DOCUMENTS_PER_WINDOW * count, **sizes):
        ids = tokenizer.encode(text, prepend=bos)
        fits = []
        for question in questions:
            fact, answer = token_spans(ids, token_bytes, [question.fact, question.answer])
            start = answer[1] - 1 - N  # the window's inputs end with the answer's second to last token
            if 0 <= start <= fact[0] and fact[1] <= start + N - recent:
                fits.append((start, fact, answer))
        if fits:
            found.append((ids, *pick.choice(fits)))
        if len(found) == count:
            break
    else:
        raise UserError(
            f"{len(found)} of {count} windows of {N} tokens: ask for shorter ones, or for documents with more questions"
        )
    rows = []
    for ids, start, fact, answer in found:
        window = torch.tensor(ids[start : start + N + 1])
        places = torch.arange(start + 1, start + N + 1)
        is_answer = (places >= answer[0]) & (places < answer[1])
        rows.append((window[:-1], window[1:], is_answer, torch.tensor([fact[0] - start, fact[1] - 1 - start])))
    return Windows(*(torch.stack(part) for part in zip(*rows, strict=True)))


@torch.no_grad()
def recall_scores(reader: Reader, windows: Windows, open_blocks: int, seed=0) -> dict[str, tuple]:
    """
    name → (right [R] bool: whether every token of the answer has the highest logit; nll [R], nats per answer token).

    Names: the policies, "full" and "gists". All windows are read in one batch: pass as many as memory allows.
    """
    c, device = reader.config, windows.x.device
    K, (R, N) = c.block_size, windows.x.shape
    recent = max(c.allocator_recent_tokens, int(windows.answer.sum(1).max()))  # scored tokens are never in gists
    table = reader.tree(reader.embed(windows.x))
    finest = WorkingContext.finest(R, N, K)
    old = finest.old_blocks(recent)
    E = min(open_blocks, old)

    def with_open(chosen):
        """The context in which all old blocks except `chosen`, bool [R, old], are gists."""
        lod_map = finest.lod_map
        lod_map[:, :old] = (~chosen).to("cpu", torch.int8)
        return WorkingContext.from_map(lod_map, N, K)

    def best(scores):
        """Bool [R, old]: the E blocks with the highest scores [R, old]; among equals the newest."""
        order = scores.flip(1).argsort(dim=1, descending=True, stable=True)[:, :E]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, old - 1 - order, True)

    newest = torch.zeros(R, old, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    start = with_open(best(newest))
    budget = int(start.lengths().max())
    contexts = {
        "gists": with_open(torch.zeros_like(newest, dtype=torch.bool)),
        "recency": start,
        "random": with_open(best(torch.rand(R, old, generator=generator, device=device))),
        "bm25": with_open(best(bm25(windows.x, K, old, recent))),
        "oracle": with_open(best(holds(windows.fact, K, old).float())),
        "lens": reader.focus(table, start, budget),
        "full": finest,
    }
    return {name: _answers(reader, table, context, windows) for name, context in contexts.items()}


def focus_by_length(reader, tokenizer, token_bytes, lengths, count, like, open_blocks, batch_size) -> dict:
    """
    Figures for `count` windows of each length:

    "by_length": rows {"tokens", "<policy>" (share of right answers), "<policy>_nll", "gap_closed" (lens's share of the
    oracle's gain over random in accuracy; None if the oracle gains nothing), "regret" (lens's nll minus the oracle's)}.
    "depths": edges of DEPTHS bins for the position of the fact, 0 the oldest; "right": lens's share of right answers,
    [length][depth], None for a bin without windows.
    """
    device, recent = reader.device, reader.config.allocator_recent_tokens
    rows, maps = [], []
    for N in lengths:
        windows = recall_windows(tokenizer, token_bytes, N, recent, count, like).to(device)
        parts = [
            recall_scores(reader, Windows(*(t[i : i + batch_size] for t in windows)), open_blocks, seed=i)
            for i in range(0, count, batch_size)
        ]
        right = {name: torch.cat([part[name][0] for part in parts]).float() for name in parts[0]}
        nll = {name: torch.cat([part[name][1] for part in parts]) for name in parts[0]}
        row = {"tokens": N, **{name: right[name].mean().item() for name in right}}
        gap = row["oracle"] - row["random"]
        row["gap_closed"] = (row["lens"] - row["random"]) / gap if gap > 0 else None
        row["regret"] = (nll["lens"] - nll["oracle"]).mean().item()
        rows.append(row | {f"{name}_nll": nll[name].mean().item() for name in nll})
        depth = (windows.fact[:, 0] / (N - recent) * DEPTHS).long().clamp(max=DEPTHS - 1)
        bins = [right["lens"][depth == i] for i in range(DEPTHS)]
        maps.append([values.mean().item() if len(values) else None for values in bins])
    return {"by_length": rows, "depths": [i / DEPTHS for i in range(DEPTHS + 1)], "right": maps}


def _answers(reader, table, context, windows):
    cos_sin, bias = reader.positions(context), reader.key_bias(context.entries)
    x, longest, logits = table.materialize(context), int(windows.answer.sum(1).max()), []
    for row, length in enumerate(context.lengths().tolist()):  # one row at a time: logits of all need much memory
        part = slice(row, row + 1), slice(length)
        of_row = {"cos_sin": tuple(t[part] for t in cos_sin), "key_bias": None if bias is None else bias[part]}
        logits.append(reader.model(inputs_embeds=x[part], **of_row)[:, -longest:])
    logits = torch.cat(logits)
    y, answer = windows.y[:, -longest:], windows.answer[:, -longest:]
    nll = F.cross_entropy(logits.transpose(1, 2), y, reduction="none") * answer
    right = (logits.argmax(-1) == y) | ~answer
    return right.all(1), nll.sum(1) / answer.sum(1)


def holds(fact, K, old):
    """Bool [R, old]: the blocks that contain the fact [R, 2]."""
    block = torch.arange(old, device=fact.device)
    return (block >= fact[:, :1] // K) & (block <= fact[:, 1:] // K)


def bm25(x, K, old, recent):
    """Okapi BM25 [R, old], k1 = 1.2: blocks are documents of one length, the newest `recent` tokens are the query."""
    blocks = x[:, : old * K].unflatten(1, (old, K))
    query = x[:, -recent:]
    found = (blocks[:, :, :, None] == query[:, None, None, :]).sum(2)  # [R, old, recent] times a token stands there
    containing = (found > 0).sum(1, keepdim=True)
    idf = torch.log(1 + (old - containing + 0.5) / (containing + 0.5))
    first = (query[:, :, None] == query[:, None, :]).int().argmax(2) == torch.arange(recent, device=x.device)
    return (idf * found * 2.2 / (found + 1.2) * first[:, None]).sum(2)  # each token of the query counts once
