"""The real path, small: text → tokenizer → base model → losses → report, by the commands that users type."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat import configurator
from nanochat.common import UserError
from scripts import base_train
from tests.helpers import TRAIN, assert_equal, call_script, run, start, until, weights


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Text of a few hundred documents, and a tokenizer."""
    root = tmp_path_factory.mktemp("flow")
    text = root / "text"
    text.mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        for i in range(0, min(len(lines), 500), 50):
            (text / f"{path.stem}_{i}.py").write_text("".join(lines[i : i + 50]), "utf-8")
    run(root / "base", "nanochat.report", "reset")
    run(root / "base", "nanochat.dataset", "--source", text)
    run(root / "base", "scripts.tok_train", "--vocab_size=515", "--max_chars", "1000000")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(root / "base"))
        yield root / "base"


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that are started: sums then have the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(prepared):
    result = run(prepared, "scripts.base_train", *TRAIN)
    assert "step 12/12" in result.stdout
    return prepared


BEFORE_MEGACONTEXT = "fcff69b07fa5e8c02072abe66578f5264779d060"


def test_flag_off_is_what_it_was_before_megacontext(trained, tmp_path):
    """The last commit without it and this one train the same model, bit for bit: losses, weights, optimizers."""
    repo = Path(__file__).parent.parent
    archive = subprocess.run(["git", "archive", BEFORE_MEGACONTEXT], cwd=repo, capture_output=True)
    if archive.returncode:
        pytest.skip(f"the history is not here: {archive.stderr.decode().strip()}")
    (tmp_path / "code").mkdir()
    subprocess.run(["tar", "-x", "-C", tmp_path / "code"], input=archive.stdout, check=True)
    for folder in ("base_data", "tokenizer"):
        shutil.copytree(trained / folder, tmp_path / "base" / folder)
    command = [sys.executable, "-m", "scripts.base_train", *TRAIN]
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "base"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path / "code", env=env, check=True, capture_output=True, timeout=300)

    def result(base_dir):
        folder = base_dir / "base_checkpoints" / "d2"
        model, optimizers, _, _ = cm.load_checkpoint(folder, 12, load_optimizer=True)
        log = (base_dir / "logs" / "base_d2.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in log]
        losses = [r[name] for r in records for name in ("train/loss", "train/grad_norm", "val/bpb") if name in r]
        assert len(losses) == 2 * 12 + 3
        return model, optimizers, losses

    assert_equal(result(tmp_path / "base"), result(trained))


def test_pipeline_and_report(trained, tmp_path, capsys):
    call_script("tok_eval", ["--download_timeout=0.01"])
    call_script("base_loss", ["--device_batch_size=2", "--split_tokens=1024", "--device_type=cpu"])
    call_script("base_eval", ["--device_type=cpu"])
    assert "eval_bundle" in capsys.readouterr().out  # no bundle here: it says how to get one
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(trained), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "nanochat.report", "generate"]
    subprocess.run(command, env=env, check=True, cwd=tmp_path, capture_output=True)
    report = (tmp_path / "report.md").read_text()
    for part in (
        "Tokenizer training",
        "Base model training",
        "Base model loss",
        "gzip -9",
        "| Metric",
        "not run",
    ):
        assert part in report
    assert list(tmp_path.glob("report/*.png"))
    metrics = [json.loads(line) for line in (trained / "logs" / "base_d2.jsonl").read_text().splitlines()]
    losses = [m["train/loss"] for m in metrics if "train/loss" in m]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 1  # it learns
    assert [m["step"] for m in metrics if "val/bpb" in m] == [0, 6, 12]


def test_again_reuses_what_is_there(trained, capsys):
    call_script("base_train", TRAIN)
    assert "already trained to step 12: nothing to do" in capsys.readouterr().out


def test_resumed_equals_unbroken(trained, capsys):
    """SIGKILL in the middle, the same command again: the same weights and optimizer state, bit for bit."""
    log = trained / "logs" / "base_killed.jsonl"
    process = start(call_script, "base_train", [*TRAIN, "--model_tag=killed"])
    until(lambda: not process.is_alive() or (log.exists() and '"step": 6, "total' in log.read_text()), 200)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed_from = cm.find_last_step(trained / "base_checkpoints" / "killed")
    assert resumed_from is not None
    assert resumed_from < 12
    call_script("base_train", [*TRAIN, "--model_tag=killed"])
    assert f"resuming from step {resumed_from}" in capsys.readouterr().out
    for kind in ("model", "optim", "state"):
        files = [trained / "base_checkpoints" / tag / f"{kind}_000012.pt" for tag in ("d2", "killed")]
        one, other = (torch.load(path, weights_only=True) for path in files)
        assert_equal(one, other)
    bpb = [
        json.loads((trained / "base_checkpoints" / tag / "meta_000012.json").read_text())["val_bpb"]
        for tag in ("d2", "killed")
    ]
    assert bpb[0] == bpb[1]


def test_other_options_are_not_mixed_into_a_run(trained):
    changed = [*TRAIN, "--matrix_lr=0.01"]
    result = run(trained, "scripts.base_train", *changed, check=False)
    assert result.returncode == 1
    assert "made with matrix_lr=0.02 (now 0.01)" in result.stderr
    assert "Traceback" not in result.stderr


def test_two_processes_equal_one(trained):
    """The same total batch: the same micro-batches, so the same model up to rounding."""
    args = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.base_train", "--"]
    run(trained, *args, *TRAIN, "--model_tag=two")
    folder = trained / "base_checkpoints" / "two"
    assert (folder / "optim_000012_rank1.pt").exists()
    one, two = weights(trained, "d2", 4), weights(trained, "two", 4)
    differ = [(one[key] - two[key]).abs().mean().item() for key in one]
    assert max(differ) < 2e-3, differ
    logs = [(trained / "logs" / f"base_{tag}.jsonl").read_text().splitlines() for tag in ("d2", "two")]
    losses = [[m["train/loss"] for m in map(json.loads, log) if "train/loss" in m] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)

    # A rank's file is missing: the step does not count; another number of processes is told so
    (folder / "optim_000012_rank1.pt").unlink()
    assert cm.find_last_step(folder) == 8
    with pytest.raises(UserError, match="written by 2 processes"):
        call_script("base_train", [*TRAIN, "--model_tag=two"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--total_batch_size=100"], "total_batch_size must be a multiple"),
        (["--num_iterations=-1", "--target_param_data_ratio=-1"], "no horizon"),
        (["--num_iterations=-1", "--target_flops=1"], "less than one step"),
        (["--device_type=tpu"], "device_type 'tpu' is not available here"),
    ],
)
def test_wrong_options_are_one_message(options, message, trained, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(trained))
    monkeypatch.setattr(sys, "argv", ["base_train", *TRAIN, "--model_tag=new", *options])
    with pytest.raises(SystemExit) as end:
        configurator.run(base_train.main, base_train.Config)
    assert end.value.code == 1
    assert message in capsys.readouterr().err


def test_nothing_prepared(base_dir):
    with pytest.raises(UserError, match="run python -m scripts.tok_train"):
        call_script("base_train", TRAIN)
    with pytest.raises(UserError, match="nanochat.dataset"):
        call_script("tok_train", [])


def test_starting_anew_keeps_the_old(prepared):
    short = [*TRAIN, "--num_iterations=1", "--eval_every=-1", "--sample_every=-1", "--model_tag=anew"]
    call_script("base_train", short)
    call_script("base_train", [*short, "--resume=0"])
    folders = sorted(p.name.split("-")[0] for p in (prepared / "base_checkpoints").glob("anew*"))
    assert folders == ["anew", "anew.old"]
