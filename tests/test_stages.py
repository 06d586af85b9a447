"""The chat stages on a tiny model: midtraining, SFT, RL, evaluation, the terminal chat."""

import io
import json
import os
import re
import shutil
import signal
import sys
import time

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat import report
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.tokenizer import RustBPETokenizer
from scripts import chat_cli, chat_eval, chat_rl, chat_sft, mid_train, prepare
from tasks.customjson import CustomJSON
from tests.helpers import assert_equal, in_ranks, log_of, start, until

COMMON = ["--tasks=local", "--device_type=cpu", "--dtype=fp32"]
MID = [*COMMON, "--device_batch_size=2", "--total_batch_size=256", "--num_iterations=12", "--eval_tokens=256"]
MID += ["--eval_every=4", "--save_every=3"]
SFT = [*COMMON, "--device_batch_size=4", "--target_examples_per_step=8", "--num_iterations=12", "--eval_steps=2"]
SFT += ["--eval_every=4", "--eval_metrics_every=12", "--eval_metrics_max_problems=2", "--save_every=3"]
RL = [*COMMON, "--num_iterations=12", "--examples_per_step=2", "--num_samples=4", "--device_batch_size=2"]
RL += ["--max_new_tokens=6", "--eval_every=12", "--eval_examples=2", "--save_every=3"]
STAGES = {"mid": (mid_train, MID), "sft": (chat_sft, SFT), "rl": (chat_rl, RL)}


def run(stage, *options):
    module, defaults = STAGES[stage]
    module.main(parse(module.Config, [*defaults, *options]))


@pytest.fixture(scope="module")
def trained(base):
    for stage in STAGES:
        run(stage)
    return base


def test_stages_train(trained):
    mid = [record["train/loss"] for record in log_of(trained, "mid") if "train/loss" in record]
    assert len(mid) == 12
    assert mid[-1] < mid[0] - 0.5
    bpb = [record["val/bpb"] for record in log_of(trained, "mid") if "val/bpb" in record]
    assert len(bpb) == 4  # steps 0, 4, 8, 12
    assert bpb[-1] < bpb[0]
    sft = [record["val/loss"] for record in log_of(trained, "sft") if "val/loss" in record]
    assert sft[-1] < sft[0]
    rl = log_of(trained, "rl")
    assert [record["step"] for record in rl if "pass@2" in record] == [0, 12]
    assert all(0 <= record["train/reward"] <= 1 for record in rl if "train/reward" in record)
    for name in ("midtraining", "chat-sft", "chat-rl"):
        assert (trained / "report" / f"{name}.md").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_equals_unbroken(stage, trained, capsys):
    """SIGKILL in the middle, the same command again: bit for bit what an unbroken run gives."""
    source = {"mid": "base", "sft": "mid", "rl": "sft"}[stage]
    folder = trained / cm.SOURCES[source]
    if not (folder / "killed").exists():
        (folder / "killed").symlink_to(folder / "d1")
    log = trained / "logs" / f"{stage}_killed.jsonl"
    process = start(run, stage, "--model_tag=killed")
    until(lambda: not process.is_alive() or (log.exists() and '"step": 5, "total' in log.read_text()), 120)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    target = trained / cm.SOURCES[stage]
    if (target / "killed").is_symlink():
        pytest.fail("the stage wrote into another model's folder")
    reached = cm.find_last_step(target / "killed")
    assert reached is not None
    assert reached < 12
    run(stage, "--model_tag=killed")
    assert f"resuming from step {reached}" in capsys.readouterr().out
    for kind in ("model", "optim", "state"):
        files = [target / tag / f"{kind}_000012.pt" for tag in ("d1", "killed")]
        assert_equal(*(torch.load(path, weights_only=True) for path in files))
    if stage != "rl":  # the next stage starts from the unbroken model
        for path in (target / "killed").iterdir():
            path.unlink()
        (target / "killed").rmdir()
    run(stage)
    assert "already trained to step 12: nothing to do" in capsys.readouterr().out


def test_another_parent_is_noticed(trained):
    """A stage that was trained from other weights is not taken for one trained from these."""
    folder = trained / "mid_checkpoints" / "d1"
    decisive = cm.load_meta(folder, 12)["decisive"]
    cm.amend_meta(folder, 12, decisive={**decisive, "parent": {**decisive["parent"], "weights": "0" * 64}})
    with pytest.raises(UserError, match="made with parent="):
        run("mid")
    cm.amend_meta(folder, 12, decisive=decisive)


def test_two_processes_share_the_conversations(trained):
    """The same step over two processes gives the same model, up to rounding."""
    (trained / "mid_checkpoints" / "two").symlink_to(trained / "mid_checkpoints" / "d1")
    in_ranks(2, run, "sft", "--model_tag=two")
    logs = [log_of(trained, "sft", tag) for tag in ("d1", "two")]
    one, two = ([record["train/loss"] for record in log if "train/loss" in record] for log in logs)
    assert one == pytest.approx(two, rel=2e-3)


def test_no_trained_token_is_no_nan(trained, tmp_path, monkeypatch):
    """Conversations whose answer is beyond the context: nothing to learn from, and no NaN."""
    long = {"role": "user", "content": "far too long " * 100}
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join([json.dumps([long, {"role": "assistant", "content": "so?"}])] * 3))
    monkeypatch.setattr(chat_sft, "sft_mixture", lambda which: CustomJSON(path))
    (trained / "mid_checkpoints" / "nothing").symlink_to(trained / "mid_checkpoints" / "d1")
    run("sft", "--model_tag=nothing", "--num_iterations=2", "--device_batch_size=1", "--eval_metrics_every=-1")
    weights = [cm.load_checkpoint(trained / cm.SOURCES[s] / "nothing", n)[0] for s, n in (("mid", 12), ("sft", 2))]
    assert_equal(*weights)  # nothing was learned, and nothing became NaN
    assert [r["train/loss"] for r in log_of(trained, "sft", "nothing") if "train/loss" in r] == [0, 0]


def test_evaluation_and_its_report(trained, capsys):
    chat_eval.main(parse(chat_eval.Config, ["-i", "sft", "--tasks=local", "-x", "12", "-m", "8", "-d", "fp32"]))
    out = capsys.readouterr().out
    assert "Arithmetic: " in out
    assert "ChatCORE: " in out
    report = (trained / "report" / "chat-evaluation-sft.md").read_text()
    assert "Who are you?" in report
    assert "ChatCORE" in report
    assert report.index("ChatCORE") < report.index("temperature")  # what was measured comes first
    assert "gistnet" not in report
    assert "megacontext" not in report
    chat_eval.main(parse(chat_eval.Config, ["-i", "mid", "--tasks=local", "-x", "12", "-m", "8"]))
    shown = [(trained / "report" / f"chat-evaluation-{source}.md").read_text() for source in ("sft", "mid")]
    sums, others = (re.findall(r"```text\n(.*)", text.partition("### Arithmetic")[2]) for text in shown)
    assert len(set(sums)) == 3 + 3  # of two tasks
    assert sums != others  # each stage shows others
    capsys.readouterr()
    chat_eval.main(parse(chat_eval.Config, ["-i", "rl", "-a", "Arithmetic", "--tasks=local", "-x=2", "-m=4"]))
    assert "ChatCORE" not in capsys.readouterr().out  # not over a part of the tasks
    with pytest.raises(UserError, match="unknown task Chess"):
        chat_eval.main(parse(chat_eval.Config, ["-a", "Chess", "--tasks=local"]))


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("mid", ["--total_batch_size=100"], "total_batch_size must be a multiple"),
        ("mid", ["--max_seq_len=100000"], "max_seq_len must be at most"),
        ("mid", ["--model_tag=absent"], "no complete checkpoint"),
        ("sft", ["--source=nowhere"], "source must be one of"),
        ("sft", ["--step=3000"], "no complete checkpoint of step 3000"),
        ("rl", ["--init_lr_frac=0.5"], "made with init_lr_frac=0.05"),
    ],
)
def test_wrong_options(stage, options, message, trained):
    with pytest.raises(UserError, match=message):
        run(stage, *options)


@pytest.mark.parametrize(
    "option", ["--num_samples=0", "--max_new_tokens=0", "--batch_size=0", "--temperature=-1", "--top_k=-1"]
)
def test_options_of_chat_eval(option, trained):
    with pytest.raises(UserError, match=option.split("=")[0].strip("-")):
        chat_eval.main(parse(chat_eval.Config, ["--tasks=local", option]))


def test_an_evaluation_keeps_the_tasks_that_are_done(trained, monkeypatch):
    """The second of two fails: the report has the first."""
    calls = []

    def evaluate(*args, **options):
        calls.append(args[0])
        if len(calls) == 2:
            raise UserError("the second task is broken")
        return real(*args, **options)

    real = chat_eval.evaluate
    monkeypatch.setattr(chat_eval, "evaluate", evaluate)
    with pytest.raises(UserError, match="second task is broken"):
        chat_eval.main(parse(chat_eval.Config, ["-i", "mid", "--tasks=local", "-x", "2", "-m", "4"]))
    assert report.Report().figures("chat-evaluation-mid")["data"]["Arithmetic"] >= 0


def test_a_cache_folder_of_nanochat_trains_on(trained, tmp_path, monkeypatch, capsys):
    """As it left them: a pickled tokenizer, models without checksums, its own midtraining to train over, its report."""
    base = tmp_path / "nanochat"
    (base / "tokenizer").mkdir(parents=True)
    shutil.copy(trained / "tokenizer" / "tokenizer.pkl", base / "tokenizer")
    torch.save(torch.full((600,), 7), base / "tokenizer" / "token_bytes.pt")  # nanochat's counts were wrong
    for name in ("base_data", "identity_conversations.jsonl"):
        (base / name).symlink_to(trained / name)
    (base / "report").mkdir()
    (base / "report" / "midtraining.md").write_text("## Midtraining\n\n- loss: 2.5\n")
    for source in ("base", "mid"):
        folder = base / cm.SOURCES[source] / "d1"
        folder.mkdir(parents=True)
        weights, _, meta, _ = cm.load_checkpoint(trained / "base_checkpoints" / "d1", 7)
        torch.save({f"_orig_mod.{name}": weight for name, weight in weights.items()}, folder / "model_000700.pt")
        torch.save([{}, {}], folder / "optim_000700.pt")
        facts = {"step": 700, "val_bpb": 1.0, "model_config": meta["model_config"], "user_config": {"depth": 1}}
        (folder / "meta_000700.json").write_text(json.dumps(facts))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    run("mid")  # no --resume=0: its users know none
    assert "starting again; the earlier checkpoints are now in" in capsys.readouterr().out
    bpb, right = (next(r["val/bpb"] for r in log_of(folder, "mid") if "val/bpb" in r) for folder in (base, trained))
    assert bpb == right
    run("sft")
    chat_eval.main(parse(chat_eval.Config, ["-i", "sft", "--tasks=local", "-x", "1", "-m", "4", "--model_step=12"]))
    monkeypatch.chdir(tmp_path)
    report.main(report.Config("generate"))
    assert "Chat SFT" in (tmp_path / "report.md").read_text()


def test_full_without_data_stops_at_once(trained):
    with pytest.raises(UserError, match="SmolTalk|smoltalk|smol-smoltalk|HF_HUB_OFFLINE"):
        run("mid", "--tasks=full", "--model_tag=d1")


def test_prepare_counts_what_there_is(trained, capsys):
    prepare.main(parse(prepare.Config, ["--tasks=local"]))
    out = capsys.readouterr().out
    assert "evaluation, Arithmetic: 256 conversations" in out
    assert "midtraining: 22,002 conversations" in out  # 12,000 + 8,000 + 2,000, and the identity file twice
    with pytest.raises(UserError):
        prepare.main(parse(prepare.Config, ["--tasks=full"]))


# ---------------------------------------------------------------------------------------------------------
# The terminal chat


def test_one_answer(trained, capsys):
    arguments = ["-i", "mid", "-p", "Who are you?", "-t", "0", "-m", "5", "-d", "fp32"]
    chat_cli.main(parse(chat_cli.Config, arguments))
    first = capsys.readouterr().out
    chat_cli.main(parse(chat_cli.Config, arguments))
    assert capsys.readouterr().out == first


def prompts_of(monkeypatch):
    """The conversations that are answered from now on, as lists of messages."""
    seen, real = [], RustBPETokenizer.render_for_completion

    def prompt(self, conversation):
        seen.append(list(conversation["messages"]))
        return real(self, conversation)

    monkeypatch.setattr(RustBPETokenizer, "render_for_completion", prompt)
    return seen


def test_a_pipe_is_one_message(trained, monkeypatch, capsys):
    seen = prompts_of(monkeypatch)
    for piped in (b"Who are you?\r\n\nTell me.\n", "Wer\nbist du, Jörg?".encode("utf-16")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        chat_cli.main(parse(chat_cli.Config, ["-m", "3"]))
    expected = ["Who are you?\r\n\nTell me.", "Wer\nbist du, Jörg?"]
    assert seen == [[{"role": "user", "content": text}] for text in expected]
    for piped, message in ((b" \n", "expected a message"), (b"a\n\xe9", "standard input:2: expected UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        with pytest.raises(UserError, match=message):
            chat_cli.main(parse(chat_cli.Config, []))


def test_a_conversation(trained, monkeypatch, capsys):
    lines = iter(["Hello", "", "x " * 200, "clear", "Hello", "quit"])
    seen = prompts_of(monkeypatch)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat_cli.main(parse(chat_cli.Config, ["-t", "0", "-m", "3"]))
    roles = [[message["role"] for message in messages] for messages in seen]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"]]
    out = capsys.readouterr().out
    assert "the conversation has" in out  # the long one is refused, and the chat goes on
    assert "A new conversation." in out
    assert "Goodbye!" in out


def test_interrupt_stops_the_answer_only(trained, monkeypatch, capsys):
    lines = iter(["Hello", "quit"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    real = chat_cli.stream_parts

    def interrupted(tokenizer, columns):
        for n, piece in enumerate(real(tokenizer, columns)):
            if n == 2:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            yield piece

    monkeypatch.setattr(chat_cli, "stream_parts", interrupted)
    chat_cli.main(parse(chat_cli.Config, ["-t", "1.5", "-k", "0", "--seed=1"]))
    out = capsys.readouterr().out
    assert "(stopped)" in out
    assert "Goodbye!" in out
