"""Focus on recall documents: the windows, the policies, and that the better choice of detail is told as such."""

import math
from collections import Counter
from dataclasses import asdict

import pytest
import torch

from megacontext.config import MCConfig
from megacontext.evaluation.figures import plot_focus
from megacontext.evaluation.policies import bm25, focus_by_length, holds, recall_scores, recall_windows
from megacontext.networks import MCNetworks
from megacontext.reader import Reader
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.recall import Sizes, recall_documents
from nanochat.tokenizer import RustBPETokenizer, count_token_bytes

POLICIES = ("recency", "random", "bm25", "lens", "oracle")

K, RECENT = 8, 16
LIKE = asdict(Sizes(chars=1200, questions=8, tables=1, distractors=2, words=6))


@pytest.fixture(scope="module")
def tools():
    texts = [text for text, _ in recall_documents(1, 40, "train", **LIKE)]
    tokenizer = RustBPETokenizer.train_from_iterator(texts, 700)
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 700, 2, 2, 2, 32))
    model.init_weights()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    config = MCConfig(block_size=K, allocator_recent_tokens=RECENT).resolve(256)
    reader = Reader(model.eval(), MCNetworks(32, 2, config).eval(), config)
    return tokenizer, count_token_bytes(tokenizer), reader


@pytest.mark.parametrize("N", [120, 240])
def test_windows_end_with_an_answer_whose_fact_they_hold(tools, N):
    tokenizer, token_bytes, _ = tools
    windows = recall_windows(tokenizer, token_bytes, N, RECENT, 12, LIKE)
    assert windows.x.shape == windows.y.shape == windows.answer.shape == (12, N)
    assert torch.equal(windows.x[:, 1:], windows.y[:, :-1])
    for x, y, answer, (first, last) in zip(*windows, strict=True):
        assert answer[-1]  # the window's last target is the answer's last token
        value = tokenizer.decode(y[answer].tolist())
        fact = tokenizer.decode(x[first : last + 1].tolist())
        prompt = tokenizer.decode(x[: -int(answer.sum()) + 1 or None].tolist())
        assert last < N - RECENT
        name = prompt.rsplit(None, 1)[-1]  # the answer comes right after the name
        assert name in fact
        assert value.strip() in fact
    again = recall_windows(tokenizer, token_bytes, N, RECENT, 12, LIKE)
    assert torch.equal(again.x, windows.x)


def test_without_recent_tokens(tools):
    """What is scored is never in a gist."""
    tokenizer, token_bytes, reader = tools
    config = MCConfig(block_size=K, allocator_recent_tokens=0).resolve(256)
    bare = Reader(reader.model, reader.networks, config)
    scores = recall_scores(bare, recall_windows(tokenizer, token_bytes, 120, 0, 4, LIKE), 2)
    assert all(nll.isfinite().all() for _, nll in scores.values())


def test_too_long_windows_are_told(tools):
    tokenizer, token_bytes, _ = tools
    with pytest.raises(UserError, match="of 4 windows of 120 tokens"):
        recall_windows(tokenizer, token_bytes, 120, 119, 4, LIKE)


def test_holds():
    fact = torch.tensor([[0, 7], [7, 8], [9, 30]])
    assert holds(fact, 8, 4).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]]


def test_bm25_against_its_formula():
    generator = torch.Generator().manual_seed(0)
    old, k1 = 6, 1.2
    x = torch.randint(0, 12, (3, old * K + RECENT), generator=generator)
    got = bm25(x, K, old, RECENT)
    for row in range(3):
        blocks = [Counter(x[row, i * K : i * K + K].tolist()) for i in range(old)]
        for i, block in enumerate(blocks):
            score = 0.0
            for token in set(x[row, -RECENT:].tolist()):
                n = sum(token in other for other in blocks)
                idf = math.log(1 + (old - n + 0.5) / (n + 0.5))
                score += idf * block[token] * (k1 + 1) / (block[token] + k1)
            assert got[row, i].item() == pytest.approx(score, rel=1e-5)


def test_each_policy_opens_as_many_blocks(tools, monkeypatch):
    tokenizer, token_bytes, reader = tools
    windows = recall_windows(tokenizer, token_bytes, 120, RECENT, 6, LIKE)
    seen = []
    monkeypatch.setattr(
        "megacontext.evaluation.policies._answers", lambda model, table, context, *_: seen.append(context)
    )
    names = list(recall_scores(reader, windows, 2))
    assert set(names) == {*POLICIES, "full", "gists"}
    contexts = dict(zip(names, seen, strict=True))
    old = (120 - RECENT) // K
    budget = old + 2 * (K - 1) + 120 - old * K
    for name in POLICIES:
        assert (contexts[name].lengths() == budget).all(), name  # an untrained lens leaves recency as it is
        contexts[name].check()
    assert (contexts["gists"].lengths() == budget - 2 * (K - 1)).all()
    opened = contexts["oracle"].lod_map[:, :old] == 0
    assert (opened | ~holds(windows.fact, K, old)).sum() >= 6 * old - 1  # a fact over three blocks has one too many
    assert torch.equal(contexts["recency"].lod_map[:, old - 2 : old], torch.zeros(6, 2, dtype=torch.int8))


def test_scores_of_a_window_against_the_model(tools):
    tokenizer, token_bytes, reader = tools
    windows = recall_windows(tokenizer, token_bytes, 120, RECENT, 6, LIKE)
    right, nll = recall_scores(reader, windows, 2)["full"]
    with torch.no_grad():
        logits = reader.model(windows.x)
    for row in range(6):
        places = windows.answer[row].nonzero()[:, 0]
        expected = torch.nn.functional.cross_entropy(logits[row, places], windows.y[row, places])
        assert nll[row].item() == pytest.approx(expected.item(), rel=1e-4)
        assert right[row].item() == bool((logits[row, places].argmax(-1) == windows.y[row, places]).all())


def test_figures_by_length(tools):
    tokenizer, token_bytes, reader = tools
    figures = focus_by_length(reader, tokenizer, token_bytes, [120, 160], 6, LIKE, 2, batch_size=4)
    assert [row["tokens"] for row in figures["by_length"]] == [120, 160]
    assert len(figures["right"]) == 2
    assert all(len(row) == len(figures["depths"]) - 1 for row in figures["right"])
    for row in figures["by_length"]:
        assert all(0 <= row[name] <= 1 for name in POLICIES)
        assert row["regret"] == pytest.approx(row["lens_nll"] - row["oracle_nll"], abs=1e-5)
    assert plot_focus(**figures).startswith(b"\x89PNG")
