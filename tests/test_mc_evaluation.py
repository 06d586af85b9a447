"""Evaluation of gists: each figure against a slow way to get it; the script and what it leaves behind."""

import json
from itertools import repeat

import numpy as np
import pytest
import torch

from megacontext.evaluation.context_gain import Evaluator, mean_gist, recovered
from megacontext.evaluation.policies import bm25
from megacontext.evaluation.reconstruction import reconstruction_accuracy
from megacontext.tree import build_table
from megacontext.working_context import WorkingContext
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.gpt import GPTConfig, norm
from nanochat.report import Report
from scripts import mc_eval
from tests.helpers import RECENT, K, T, make_model, make_objective, tokens


@pytest.fixture
def evaluator():
    reader = make_objective(make_model(), mc_positional="gaussian").reader
    networks = reader.networks.eval()
    for p in networks.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    torch.nn.init.constant_(networks.lensnet.bias, -3.0)  # so that it wants some blocks and not others
    return Evaluator(reader, repeat(tokens(B=4)), 1)


def tail_loss(model, x, y, last):
    return model(x[:, -last:], y[:, -last:], loss_reduction="none").view(len(x), -1)[:, -RECENT:].mean().item()


def closed_up(model, x, y, kept):
    """The loss of the newest tokens after no others than those at these places of each row."""
    rows = [tail_loss(model, x[r : r + 1, k], y[r : r + 1, k], len(k)) for r, k in enumerate(kept)]
    return sum(rows) / len(rows)


def found(x, W):
    """Places of the blocks of the history that BM25 puts first, as many as fit, and of the newest tokens after them."""
    count = (W - RECENT) // K
    newest = list(range(T - (W - count * K), T))
    places = []
    for scores in bm25(x, K, newest[0] // K, RECENT).tolist():
        best = sorted(range(len(scores)), key=lambda block: -scores[block])[:count]
        places.append([block * K + i for block in sorted(best) for i in range(K)] + newest)
    return places


def loss_of(evaluator, lod_row, gist, table_rows=None):
    """One row at a time, entry by entry; the gists of row r are those of table_rows[r]."""
    model, (x, y) = evaluator.model, tokens(B=4)
    context = WorkingContext.from_map(torch.tensor([lod_row], dtype=torch.int8), T, K)
    lod, start, span, _ = (t[0] for t in context.entries)
    losses = []
    for row in range(4):
        other = row if table_rows is None else table_rows[row]
        own, others = (build_table(gist, model.embed(x[r : r + 1]), K) for r in (row, other))
        pieces = [
            (own if level == 0 else others).values[0, own.offsets[level] + place // width]
            for level, place, width in zip(lod.tolist(), start.tolist(), span.tolist(), strict=True)
        ]
        sigma2, mean = (span.double() ** 2 - 1) / 12, start + (span.double() - 1) / 2
        omega = 10000 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        fade = torch.exp(-(omega**2) * sigma2[:, None] / 2)
        cos, sin = (f(mean[:, None] * omega).float()[None, :, None] for f in (torch.cos, torch.sin))
        fade = fade.repeat(1, 2).float()[None, :, None]
        logits = model(inputs_embeds=torch.stack(pieces)[None], cos_sin=(cos, sin, fade))
        losses.append(torch.nn.functional.cross_entropy(logits[0, -RECENT:], y[row, -RECENT:]).item())
    return sum(losses) / 4


@torch.no_grad()
def test_by_ratio(evaluator):
    model, (x, y) = evaluator.model, tokens(B=4)
    gist = evaluator.reader.gist
    for row in evaluator.by_ratio([2, 4]):
        W = RECENT + -(-(T - RECENT) // row["ratio"])
        assert row["entries"] == W
        assert row["sequences"] == 4
        lod_row = WorkingContext.initial(T, K, W, RECENT).lod_map[0].tolist()
        assert 1 in lod_row
        assert row["full"] == pytest.approx(tail_loss(model, x, y, T), rel=1e-5)
        assert row["truncated"] == pytest.approx(tail_loss(model, x, y, W), rel=1e-5)
        assert row["none"] == pytest.approx(tail_loss(model, x, y, RECENT), rel=1e-5)
        assert row["gists"] == pytest.approx(loss_of(evaluator, lod_row, gist), rel=1e-4)
        assert row["mean"] == pytest.approx(loss_of(evaluator, lod_row, mean_gist), rel=1e-4)
        assert row["shuffled"] == pytest.approx(loss_of(evaluator, lod_row, gist, [3, 0, 1, 2]), rel=1e-4)
        kept = [torch.cat((line[:4], line[-(W - 4) :])).tolist() for line in torch.arange(T).expand(4, -1)]
        assert row["sinks"] == pytest.approx(closed_up(model, x, y, kept), rel=1e-5)
        assert row["bm25"] == pytest.approx(closed_up(model, x, y, found(x, W)), rel=1e-5)
        share = (row["truncated"] - row["gists"]) / (row["truncated"] - row["full"])
        if row["gists_recovered"] is not None:
            assert row["gists_recovered"] == pytest.approx(share, rel=1e-6)
        share = (row["none"] - row["mean"]) / (row["none"] - row["full"])
        if row["mean_kept"] is not None:
            assert row["mean_kept"] == pytest.approx(share, rel=1e-6)


@torch.no_grad()
def test_what_blocks_cannot_reach_is_left_out(evaluator):
    """Of 56 tokens of history in blocks of 4, in nodes of 16 where there are four: 3 + 2 entries are the fewest."""
    assert [(row["ratio"], row["entries"]) for row in evaluator.by_ratio([2, 12, 14])] == [(2, 36), (12, 13)]
    with pytest.raises(UserError, match="64 tokens in blocks of 4 to 13 entries or more, got the ratios .14, 32."):
        evaluator.by_ratio([14, 32])


def of_gists(full, none, shares, error=0.02):
    shares = zip(("gists", "shuffled", "truncated"), shares, strict=True)
    return {f"{name}_kept": share for name, share in shares} | {"full": full, "none": none, "gists_kept_error": error}


def test_what_gists_keep_in_a_sentence():
    rows = [{"ratio": 8, "entries": 1046} | of_gists(3.0, 3.5, (0.794, 0.5, 0.9), 0.014)]
    assert mc_eval.what_gists_keep(rows) == (
        "Of the 0.50 nats per token that all of the history is worth, gists keep 79% (± 1) at 8 times compression, "
        "gists of another text 50%, and a window of as many entries (1,046) 90%."
    )
    rows += [{"ratio": 16, "entries": 31} | of_gists(3.0, 3.5, (0.5, -0.15, 0.66))]
    assert "keep 79 and 50% (± 2) at 8 and 16 times compression, gists of another text 50 and -15%" in (
        mc_eval.what_gists_keep(rows)
    )
    for full, shares in ((3.45, (0.5, 0.4, 0.6)), (3.3, (None, None, None))):  # too little, or not told from chance
        said = mc_eval.what_gists_keep([{"ratio": 8, "entries": 46} | of_gists(full, 3.5, shares)])
        assert f"is worth {3.5 - full:.2f} nats per token to this model, less than 0.1" in said
        assert "%" not in said


@torch.no_grad()
def test_focus_moves_detail_within_the_budget(evaluator):
    row = evaluator.by_ratio([2])[0]
    assert row["focus"] != row["gists"]
    x, _ = tokens(B=4)
    table = evaluator._tables(x)["gists"]
    before = WorkingContext.initial(T, K, row["entries"], RECENT, rows=4)
    after = evaluator.reader.focus(table, before, row["entries"])
    after.check()
    assert (after.lengths() <= row["entries"]).all()
    assert not torch.equal(after.lod_map, before.lod_map)
    for p in evaluator.reader.networks.lensnet.parameters():
        torch.nn.init.zeros_(p)
    assert torch.equal(evaluator.reader.focus(table, before, row["entries"]).lod_map, before.lod_map)


@torch.no_grad()
def test_by_level(evaluator):
    gist = evaluator.reader.gist
    rows = {row["level"]: row for row in evaluator.by_level()}
    assert set(rows) == {1, 2}  # 56 tokens of history: 14 blocks, 3 nodes of 16 tokens
    assert rows[1]["gists"] == pytest.approx(loss_of(evaluator, [1] * 14 + [0] * 2, gist), rel=1e-4)
    assert rows[2]["gists"] == pytest.approx(loss_of(evaluator, [2] * 12 + [1] * 2 + [0] * 2, gist), rel=1e-4)
    assert rows[2]["mean"] == pytest.approx(loss_of(evaluator, [2] * 12 + [1] * 2 + [0] * 2, mean_gist), rel=1e-4)


@torch.no_grad()
def test_by_distance(evaluator):
    model, (x, y) = evaluator.model, tokens(B=4)
    rows = evaluator.by_distance()
    assert [(row["nearest"], row["farthest"]) for row in rows] == [(0, 4), (4, 12), (12, 28), (28, 56)]
    lod_row = [0] * 11 + [1, 1] + [0] * 3  # tokens 44 to 51, which are 4 to 12 before the tail
    assert rows[1]["gists"] == pytest.approx(loss_of(evaluator, lod_row, evaluator.reader.gist), rel=1e-4)
    # Without the farthest band, what is left is the end of the text: rotary positions are relative
    assert rows[3]["truncated"] == pytest.approx(tail_loss(model, x, y, 28 + RECENT), rel=1e-4)


@torch.no_grad()
def test_past(evaluator):
    """
    Against each row read by itself: 48 tokens in 3 gists of LOD 2, of its own text and of another, before 16 tokens, of
    which 8 are scored.
    """
    model, (x, y) = evaluator.model, tokens(B=4)
    row = evaluator.past(16)
    assert (row["past"], row["entries"], row["sequences"]) == (48, 3, 4)
    gists, shuffled, dropped = [], [], []
    for i in range(4):
        context = WorkingContext.from_map(torch.tensor([[2] * 12 + [0] * 4], dtype=torch.int8), T, K)
        for losses, of in ((gists, i), (shuffled, i - 1)):
            tree = build_table(evaluator.reader.gist, model.embed(x[of][None]), K)
            far = tree.values[:, tree.offsets[2] : tree.offsets[2] + 3]
            inputs = torch.cat((far, model.embed(x[i : i + 1, 48:64])), dim=1)
            logits = model(inputs_embeds=inputs, cos_sin=evaluator.reader.positions(context))[0, -8:]
            losses.append(torch.nn.functional.cross_entropy(logits, y[i, -8:]))
        logits = model(x[i : i + 1, -16:])[0, -8:]
        dropped.append(torch.nn.functional.cross_entropy(logits, y[i, -8:]))
    gain = torch.stack(dropped) - torch.stack(gists)
    assert row["gists"] == pytest.approx(torch.stack(gists).mean().item(), rel=1e-4)
    assert row["gain"] == pytest.approx(gain.mean().item(), rel=1e-3, abs=1e-4)
    assert row["standard_error"] == pytest.approx(gain.std().item() / 2, rel=1e-3)
    told = torch.stack(shuffled) - torch.stack(gists)
    assert row["shuffled"] == pytest.approx(torch.stack(shuffled).mean().item(), rel=1e-4)
    assert row["told"] == pytest.approx(told.mean().item(), rel=1e-3, abs=1e-4)
    assert row["told_standard_error"] == pytest.approx(told.std().item() / 2, rel=1e-3)


def test_a_single_sequence_has_no_others(evaluator):
    evaluator.batches = repeat(tokens(B=1))
    with pytest.raises(UserError, match="2 sequences or more"):
        evaluator.by_level()


def test_recovered():
    generator = np.random.default_rng(1)
    full = generator.normal(1, 0.1, 400)
    worst = full + 0.4
    assert recovered(full, full, worst) == pytest.approx((1, 0))
    assert recovered(worst, full, worst) == pytest.approx((0, 0))
    assert recovered(full + 0.1, full, worst) == pytest.approx((0.75, 0))  # paired: that texts differ does not matter
    share, error = recovered(full + generator.normal(0.1, 0.2, 400), full, worst)
    assert share == pytest.approx(0.75, abs=4 * error)
    assert error == pytest.approx(0.2 / 0.4 / 20, rel=0.2)  # σ / gain / √n
    assert recovered(full, worst, full) == (None, None)


def test_reconstruction_tells_what_is_there():
    """Gists that hold both tokens of a block are read; those that hold the first only are half read."""
    model = make_model(GPTConfig(T, 16, 2, 2, 2, 64))
    mixer = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]

    def both(children, level):
        return norm(children[:, 0] + children[:, 1] @ mixer)

    def first(children, level):
        return children[:, 0]

    generator = torch.Generator().manual_seed(0)

    def uniform(n):
        return torch.randint(16, (n, 2), generator=generator)

    def constant(n):
        return torch.full((n, 2), 3)

    samples = {"uniform": (uniform, uniform), "constant": (constant, constant)}
    for gist, low, high in ((both, 0.9, 1.0), (first, 0.45, 0.65)):
        accuracy = reconstruction_accuracy(model, gist, samples, 2, torch.float32, 200)
        assert low <= accuracy["uniform"] <= high
        assert accuracy["constant"] == 1.0


def test_script(mc_trained, capsys):
    options = ["--model_tag=mc", "--sequences=8", "--device_batch_size=4", "--ratios=2,4", "--probe_steps=5"]
    options += ["--stream_tokens=3000"]
    mc_eval.main(parse(mc_eval.Config, [*options, "--device_type=cpu", "--dtype=fp32"]))
    out = capsys.readouterr().out
    figures = json.loads((mc_trained / "mc_eval" / "base_mc_000006.json").read_text())
    assert [row["ratio"] for row in figures["by_ratio"]] == [2, 4]
    assert figures["Sequences"] == 8
    assert all(0 <= row[name] <= 1 for row in figures["reconstruction"] for name in ("natural", "noise"))
    assert [row["tokens"] for row in figures["stream"]] == [1024, 3000]
    assert all(row["entries"] <= row["budget"] == 61 for row in figures["stream"])
    assert figures["stream"][0]["tree_mb"] < figures["stream"][1]["tree_mb"]
    assert figures["stream"][0]["cache_mb"] == figures["stream"][1]["cache_mb"]
    assert all(row["first_token_s"] > 0 and row["token_ms"] > 0 for row in figures["stream"])
    assert "| gists recovered |" in out
    section = (mc_trained / "report" / "megacontext-evaluation-base.md").read_text()
    verdict = mc_eval.what_gists_keep(figures["by_ratio"])
    assert f"\n{verdict}\n" in section
    assert verdict in out
    picture = "report/megacontext-evaluation-base-context-gain.png"
    assert f"({picture})" in section
    assert (mc_trained / "report" / picture).read_bytes().startswith(b"\x89PNG")


def test_report_shows_plots_of_sections(mc_trained, tmp_path):
    Report().log("Some section", [{"a": 1}], plots={"A plot": b"\x89PNG picture"})
    Report().generate(tmp_path)
    assert "![A plot](report/some-section-a-plot.png)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report" / "some-section-a-plot.png").read_bytes() == b"\x89PNG picture"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model_tag=d1"], "has no GistNet and LensNet"),
        (["--model_tag=mc", "--ratios=4,x"], "whole numbers"),
        (["--model_tag=mc", "--ratios=1"], "2 or more"),
        (["--model_tag=mc", "--device_batch_size=1"], "2 or more"),
        (["--model_tag=mc", "--max_seq_len=8"], "max_seq_len"),
    ],
)
def test_bad_options(mc_trained, options, message):
    with pytest.raises(UserError, match=message):
        mc_eval.main(parse(mc_eval.Config, [*options, "--device_type=cpu"]))
