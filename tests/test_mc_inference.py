"""--mc in the scripts that generate, on a tiny model of random weights: chats without end, samples, evaluation."""

import csv
import dataclasses
import re
import shutil

import pytest
import torch

from megacontext.config import MCConfig
from megacontext.focus_strip import focus_strip
from megacontext.inference import MCInference, load_for_inference
from megacontext.networks import MCNetworks
from megacontext.session import MCSession
from nanochat import checkpoint_manager as cm
from nanochat.common import UserError
from nanochat.configurator import parse
from scripts import base_eval, base_loss, chat_cli, chat_eval
from tests.helpers import CORE_BUNDLE as BUNDLE

SETTINGS = MCConfig(block_size=4, allocator_recent_tokens=8, mc_infer_refocus_interval=4, mc_aux_dtype="fp32")
CPU = ["--device_type=cpu", "--dtype=fp32"]


@pytest.fixture(scope="module")
def trained(base):
    """The base model twice, as a base and as an SFT model, with networks beside it; "plain" has none."""
    source = base / "base_checkpoints" / "d1"
    model, _, meta, _ = cm.load_checkpoint(source, 7, "cpu")
    config = SETTINGS.resolve(64)
    torch.manual_seed(2)
    networks = MCNetworks(64, 1, config)
    with torch.no_grad():
        for p in networks.lensnet.parameters():
            p.add_(torch.randn_like(p))
    facts = {"model_config": meta["model_config"], "megacontext": dataclasses.asdict(config)}
    for stage in ("base", "chatsft"):
        folder = base / f"{stage}_checkpoints"
        cm.save_checkpoint(folder / "mc", 3, model, None, facts, companion_data=networks.state_dict())
        cm.save_checkpoint(folder / "plain", 3, model, None, {"model_config": meta["model_config"]})
    return base


def chat(monkeypatch, lines, *options):
    lines = iter(lines)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    arguments = ["-g", "mc", "--mc", "-t", "1", "-m", "20", "--seed=3", *CPU, *options]
    chat_cli.main(parse(chat_cli.Config, arguments))


def test_a_chat_beyond_the_context(trained, monkeypatch, capsys):
    """Ten times the model's 64 tokens, and one session per conversation that is never over its budget."""
    sessions = []

    class Watched(MCSession):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            sessions.append(self)

        def prefill(self, tokens):
            logits = super().prefill(tokens)
            self.longest = max(getattr(self, "longest", 0), len(tokens))
            assert self.focus_state()["entries"] <= self.budget <= 64
            return logits

    monkeypatch.setattr("megacontext.inference.MCSession", Watched)
    chat(monkeypatch, [*["spell it for me " * 5] * 12, "clear", "Hello", "quit"], "--mc_show_focus")
    out = capsys.readouterr().out
    assert "error" not in out
    assert f"working context of {sessions[0].budget} entries" in out
    assert out.replace("\n", " ").count("swap rate") == 13
    assert [session.tree is None for session in sessions] == [True, False]
    assert sessions[0].longest > 640
    assert sessions[1].longest < 64


def test_no_room_is_said_and_the_chat_goes_on(trained, monkeypatch, capsys):
    # 8 recent tokens, 3 of a block, and a few gists: enough for a short text only
    chat(monkeypatch, ["spell " * 5000, "Hello", "quit"], "--allocator_soft_max=24", "--mc_infer_refocus_interval=1")
    out = capsys.readouterr().out
    assert "error: expected room for" in out or out.count("Assistant") == 2
    assert "Goodbye!" in out


def test_without_networks_it_says_what_to_do(trained):
    for module, source in ((chat_cli, "-isft"), (chat_eval, "-isft"), (base_loss, None)):
        options = [*([source] if source else []), "--model_tag=plain", "--mc", *CPU]
        options += {chat_eval: ["--tasks=local"], chat_cli: ["--prompt=Hi"]}.get(module, [])
        with pytest.raises(UserError, match=r"plain, step 3 .*has no GistNet.*scripts\.mc_train"):
            module.main(parse(module.Config, options))


def test_by_default_a_model_with_networks(trained):
    """d1, the deepest, has none; the folder "mc" has."""
    assert cm.load_model("base", "cpu")[2]["model_tag"] == "d1"
    assert cm.load_model("base", "cpu", companion=True)[2]["model_tag"] == "mc"


def test_samples_and_loss(trained, capsys):
    options = ["--model_tag=mc", "--device_batch_size=2", "--split_tokens=256", *CPU]
    base_loss.main(parse(base_loss.Config, [*options, "--mc", "--mc_infer_refocus_interval=2"]))
    out = capsys.readouterr().out
    assert "in a working context" in out
    base_loss.main(parse(base_loss.Config, options))
    plain = capsys.readouterr().out
    assert "in a working context" not in plain
    assert plain.split("\n").count("---") == out.split("\n").count("---") == 9


def test_evaluation(trained, capsys):
    options = ["-g", "mc", "--tasks=local", "-a", "Arithmetic", "-x", "3", "-m", "8", "-n", "2", "-t", "1", *CPU]
    chat_eval.main(parse(chat_eval.Config, [*options, "--mc"]))
    assert "Arithmetic:" in capsys.readouterr().out


def test_evaluation_with_and_without(trained, capsys):
    """The same questions of long chats, both answers beside each other."""
    options = ["-g", "mc", "--tasks=memory", "-a", "Recall", "-x", "2", "-m", "4", *CPU]
    chat_eval.main(parse(chat_eval.Config, [*options, "--mc", "--compare"]))
    assert re.findall(r"^Recall.*: .*of 2\)$", capsys.readouterr().out, re.M)[1].startswith("Recall without --mc: ")
    report = (trained / "report" / "chat-evaluation-sft.md").read_text()
    assert "- Recall without --mc: " in report
    with pytest.raises(UserError, match="--compare .*: add --mc"):
        chat_eval.main(parse(chat_eval.Config, [*options, "--compare"]))
    shown = r"What did they .*?\(the end of a chat of [\d,]+ tokens\)\nwith --mc → .*?\nwithout --mc → "
    assert len(re.findall(shown + r"\(none: [\d,]+ tokens do not fit\)   \(wrong\)", report, re.S)) == 2


def test_core_metric(trained, monkeypatch):
    """Equal to plain scoring where the budget holds all there is to read; with a small one it is read all the same."""
    shutil.copytree(BUNDLE, trained / "eval_bundle")
    longest = 0

    class Watched(MCSession):
        def step(self, ids):
            nonlocal longest
            logits = super().step(ids)
            entries = self.focus_state()["entries"]
            assert entries <= self.budget
            longest = max(longest, self.num_tokens)
            return logits

    monkeypatch.setattr("megacontext.inference.MCSession", Watched)

    def results(name, *options):
        base_eval.main(parse(base_eval.Config, ["--model_tag=mc", *CPU, *options]))
        return list(csv.reader((trained / "base_eval" / f"{name}.csv").read_text().splitlines()))

    plain = results("mc_000003")
    assert longest == 0
    assert results("mc_000003_mc", "--mc", "--allocator_soft_max=4000") == plain
    small = results("mc_000003_mc", "--mc", "--allocator_soft_max=40")
    assert [row[0] for row in small] == [row[0] for row in plain]
    assert longest > 40
    assert "CORE metric" in (trained / "report" / "base-model-evaluation-with-megacontext.md").read_text()
    with pytest.raises(UserError, match="Hugging Face"):
        base_eval.main(parse(base_eval.Config, ["--mc", "--hf-path=some/model"]))


def test_options_take_the_place_of_the_checkpoints(trained):
    _, _, meta = cm.load_model("base", "cpu", model_tag="mc")
    _, config = load_for_inference("base", meta, "cpu", MCInference())
    assert config == SETTINGS.resolve(64)
    given = {
        "allocator": "stochastic_greedy",
        "allocator_sample_top_k": 2,
        "allocator_sample_temperature": 0.5,
        "allocator_soft_max": 50,
        "allocator_recent_tokens": 4,
        "allocator_expand_threshold": 0.0,
        "allocator_collapse_threshold": 0.9,
        "mc_infer_allocator_max_replacements": 2,
        "mc_infer_allocator_iterations": 3,
        "mc_infer_refocus_interval": 5,
        "mc_gist_limit": 7,
        "mc_beside": 0.25,
        "mc_tree": "disk",
        "mc_aux_dtype": "bf16",
    }
    assert given.keys() == {field.name for field in dataclasses.fields(MCInference)}
    networks, config = load_for_inference("base", meta, "cpu", MCInference(**given))
    expected = dataclasses.replace(SETTINGS.resolve(64), **given, mc_eval_soft_max_length=50 - 5)
    assert config == expected  # validation too: the budget less the tokens until the next refocus
    assert not networks.training
    with pytest.raises(UserError, match="--allocator_expand_threshold: expected from 0 to 1, got 2"):
        load_for_inference("base", meta, "cpu", MCInference(allocator_expand_threshold=2))


def test_strip():
    state = {
        "num_tokens": 27,
        "block_size": 4,
        "budget": 20,
        "entries": 12,
        "lod": [[2, 4], [1, 1], [0, 2]],
        "lod_counts": {0: 7, 1: 1, 2: 1},
        "expanded": [[4, 1, 1]],
        "collapsed": [[0, 4, 2], [90, 1, 1]],
        "swap_rate": 0.25,
    }
    strip, legend, figures = focus_strip(state).plain.split("\n")
    assert strip == "▼▼▼▼▲██"
    assert "LOD 2: 1" in legend
    for part in ("12 of 20 entries (60%)", "27 tokens", "swap rate 25.0%", "1 cell = 1 × 4 tokens"):
        assert part in figures
    strip, _, figures = focus_strip(state, width=3).plain.split("\n")
    assert strip == "▼▲█"  # of 3, 3 and 1 blocks
    assert "1 cell = 3 × 4 tokens" in figures
    million = {**state, "lod": [[3, 1024], [0, 2]] * 32}
    assert len(focus_strip(million, 100).plain.split("\n")[0]) <= 100
