"""What a training owes to those who wait for it: nothing is lost when something fails, and it goes on exactly."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat import training
from nanochat.common import UserError
from nanochat.tokenizer import RustBPETokenizer
from nanochat.training import WATCHING, decisive, resume_step
from scripts import base_train, chat_sft, mc_train
from tests.helpers import CORE_BUNDLE, QUICK_BASE, assert_equal, call_script, log_of, write_tokenizer

BASE = [*QUICK_BASE, "--num_iterations=6", "--eval_every=-1", "--sample_every=-1"]


def train(tag, *options):
    call_script("base_train", [*BASE, f"--model_tag={tag}", *options])


def folder_of(base, tag):
    return base / "base_checkpoints" / tag


def meta_of(base, tag, step=6):
    return cm.load_meta(folder_of(base, tag), step)


@pytest.fixture(scope="module")
def half(base):
    """A run of six steps that was stopped after three."""
    train("half", "--save_every=3")
    for path in folder_of(base, "half").glob("*_000006*"):
        path.unlink()
    return base


@pytest.fixture
def stopped(half, request):
    """A copy of it under the name of the test."""
    tag = request.node.name.replace("[", "-").replace("]", "").replace("--", "-").replace("=", "-")
    shutil.copytree(folder_of(half, "half"), folder_of(half, tag))
    return tag


def failing(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


# ---------------------------------------------------------------------------------------------------------
# Saved before anything else


def test_a_failed_evaluation_costs_nothing(base, monkeypatch, capsys):
    """The same command then does what is left: the evaluation of the last step, and the report."""
    options = ["saved", "--eval_every=4", "--sample_every=6"]
    with monkeypatch.context() as patch:
        patch.setattr(base_train, "sample_texts", failing(UserError("no text came")))
        with pytest.raises(
            UserError, match=r"no text came \(in the evaluation of step 6; .* resumes from step 6 in .*saved"
        ):
            train(*options)
    assert meta_of(base, "saved")["evaluated"] is False
    model, _, meta = cm.load_model("base", "cpu", model_tag="saved")  # there for base_loss and base_eval
    assert meta["step"] == 6
    train(*options)
    assert "resuming from step 6" in capsys.readouterr().out
    assert meta_of(base, "saved")["evaluated"] is True
    bpb = [(record["step"], record["val/bpb"]) for record in log_of(base, "base", "saved") if "val/bpb" in record]
    assert [step for step, _ in bpb] == [0, 4, 6, 6]
    assert bpb[2] == bpb[3]
    assert meta_of(base, "saved")["val_bpb"] == bpb[3][1]
    assert_equal(cm.load_model("base", "cpu", model_tag="saved")[0].state_dict(), model.state_dict())
    train(*options)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [UserError("a broken shard"), torch.OutOfMemoryError("too big"), ZeroDivisionError("ours")]
)
def test_an_evaluation_that_fails_on_the_way(error, base, monkeypatch):
    """No checkpoint was due, but six steps of work are not thrown away."""
    tag = type(error).__name__
    unbroken = ["--eval_every=4", "--num_iterations=8"]
    validations = iter([False, True])
    real = training.evaluate_bpb
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate_bpb", lambda *args: failing(error)() if next(validations) else real(*args))
        with pytest.raises(ZeroDivisionError if tag == "ZeroDivisionError" else UserError, match=str(error)):
            train(tag, *unbroken)
    assert cm.complete_steps(folder_of(base, tag)) == [4]
    train(tag, *unbroken)
    if not folder_of(base, "unbroken").exists():
        train("unbroken", *unbroken)
    assert_equal(*(cm.load_checkpoint(folder_of(base, t), 8, load_optimizer=True)[1] for t in (tag, "unbroken")))
    assert meta_of(base, tag, 8)["min_val_bpb"] == meta_of(base, "unbroken", 8)["min_val_bpb"]


def test_every_stage_saves_first(base, monkeypatch):
    """SFT here; what all of them share is Training.evaluating."""
    monkeypatch.setattr(chat_sft, "evaluate", failing(UserError("the task is broken")))
    options = [
        "--tasks=local",
        "--source=base",
        "--model_tag=d1",
        "--num_iterations=2",
        "--device_type=cpu",
        "--dtype=fp32",
    ]
    options += ["--target_examples_per_step=2", "--eval_every=-1", "--eval_metrics_every=2"]
    with pytest.raises(UserError, match="the task is broken"):
        call_script("chat_sft", options)
    assert cm.find_last_step(base / "chatsft_checkpoints" / "d1") == 2
    optimizers = cm.load_checkpoint(base / "chatsft_checkpoints" / "d1", 2, load_optimizer=True)[1]
    assert {group["momentum"] for o in optimizers for group in o["param_groups"] if "momentum" in group} == {0.95}


def test_the_whole_bundle_is_checked_before_the_first_step(base):
    shutil.copytree(CORE_BUNDLE, base / "eval_bundle")
    try:
        with pytest.raises(UserError, match="--core_metric_max_per_task"):
            train("bundle", "--core_metric_every=100", "--core_metric_max_per_task=1")
        assert not folder_of(base, "bundle").exists()
        data = next((base / "eval_bundle" / "eval_data").rglob("*.jsonl"))
        data.write_text(data.read_text() + "{broken\n")
        with pytest.raises(UserError, match=f"{data.name}, line .*not valid JSON"):
            train("bundle", "--core_metric_every=100")
    finally:
        shutil.rmtree(base / "eval_bundle")


# ---------------------------------------------------------------------------------------------------------
# Weights that are numbers


def test_what_is_not_finite_replaces_nothing_good(base):
    exploding = ["--matrix_lr=1e30", "--embedding_lr=1e30", "--save_every=1", "--keep_last=1", "--warmup_ratio=0.9"]
    with pytest.raises(
        UserError, match=r"not finite at step \d, which is not saved; .* Start again with lower learning"
    ):
        train("nan", *exploding)
    steps = cm.complete_steps(folder_of(base, "nan"))
    assert len(steps) <= 1
    for step in steps:
        data = cm.load_checkpoint(folder_of(base, "nan"), step)[0]
        assert all(tensor.isfinite().all() for tensor in data.values())


def test_the_last_good_step_is_named(stopped, half, monkeypatch):
    real = base_train.Training.end_step

    def explode(self, *args):
        loss = real(self, *args)
        if self.step == 5:
            torch.nn.init.constant_(self.model.lm_head.weight, float("nan"))
        return loss

    monkeypatch.setattr(base_train.Training, "end_step", explode)
    with pytest.raises(UserError, match="step 5, which is not saved; the last good checkpoint is step 4"):
        train(stopped, "--save_every=1")
    monkeypatch.undo()
    train(stopped, "--save_every=1", "--dtype=bf16")  # rounding may change: a way to go on from there
    assert meta_of(half, stopped)["finished"]


def test_samples_of_weights_that_are_not_finite(base, monkeypatch):
    monkeypatch.setattr(base_train, "sample_texts", failing(RuntimeError("probability tensor contains inf or nan")))
    real = base_train.Training.end_step

    def explode(self, *args):
        loss = real(self, *args)
        torch.nn.init.constant_(self.model.lm_head.weight, float("inf"))
        return loss

    monkeypatch.setattr(base_train.Training, "end_step", explode)
    with pytest.raises(UserError, match="the weights are not finite at step 1"):
        train("inf", "--sample_every=1", "--num_iterations=3")


# ---------------------------------------------------------------------------------------------------------
# Going on


def losses_of(base, tag):
    """The last record of each step."""
    return {r["step"]: r["train/loss"] for r in log_of(base, "base", tag) if "train/loss" in r}


def test_a_smaller_batch_after_running_out_of_memory(stopped, half):
    """The mean over a step is the same mathematics."""
    train(stopped, "--device_batch_size=2")
    mine, unbroken = losses_of(half, stopped), losses_of(half, "half")
    assert mine.keys() == {4, 5, 6}
    assert meta_of(half, stopped)["total_training_tokens"] == 6 * 256
    assert unbroken.keys() == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("option", ["--eval_tokens=512", "--dtype=float32", "--compile=off", "--streams=2"])
def test_what_does_not_change_the_mathematics_may_change(option, stopped, half):
    train(stopped, option)
    assert meta_of(half, stopped)["finished"]


def test_an_option_that_did_not_exist_had_its_default(stopped, half):
    decisive = meta_of(half, stopped, 3)["decisive"]
    del decisive["grad_clip"], decisive["weight_decay"], decisive["mc"]
    cm.amend_meta(folder_of(half, stopped), 3, decisive=decisive)
    with pytest.raises(UserError, match=r"made with grad_clip=1.0 \(now 0.5\). Use the same options"):
        train(stopped, "--grad_clip=0.5")
    train(stopped)
    assert meta_of(half, stopped)["finished"]


def test_an_option_that_a_script_sets_was_not_set_before_it_existed(tmp_path):
    """mc_train has a limit of gists, which is none by default: a checkpoint that knows of no limit was made without."""
    config = mc_train.Config()
    settings = decisive(config)
    then = {name: value for name, value in settings.items() if name != "mc_gist_limit"}
    cm.save_checkpoint(tmp_path, 3, {}, [], {"decisive": then})
    with pytest.raises(UserError, match=r"made with mc_gist_limit=0 \(now 32\)"):
        resume_step(tmp_path, config, settings)
    config.megacontext = replace(config.megacontext, mc_gist_limit=0)
    assert resume_step(tmp_path, config, decisive(config)) == 3


def test_settings_as_they_were_kept_before(stopped, half):
    """MegaContext's options in a group of their own, None where the flag was off."""
    decisive = meta_of(half, stopped, 3)["decisive"]
    del decisive["mc"]
    cm.amend_meta(folder_of(half, stopped), 3, decisive={**decisive, "megacontext": None, "device_batch_size": 4})
    with pytest.raises(UserError, match=r"made with mc=False \(now True\)"):
        train(stopped, "--mc")
    train(stopped)


def test_settings_of_megacontext(base):
    options = [
        "--mc",
        "--mc_start=0",
        "--gistnet_deep=0",
        "--block_size=4",
        "--mc_num_random_variants=1",
        "--allocator_recent_tokens=8",
        "--num_iterations=2",
    ]
    train("mc", *options, "--save_every=1")
    for path in folder_of(base, "mc").glob("*_000002*"):
        path.unlink()
    decisive = meta_of(base, "mc", 1)["decisive"]
    assert decisive["block_size"] == 4
    options_of_then = {name: decisive[name] for name in base_train.Config.__dataclass_fields__ if name in decisive}
    del options_of_then["mc"]
    nested = {
        **options_of_then,
        "megacontext": {"block_size": 4, "mc_num_random_variants": 1, "allocator_recent_tokens": 8, "gone": 1},
    }
    cm.amend_meta(folder_of(base, "mc"), 1, decisive=nested)  # as of a version with fewer options, and another
    with pytest.raises(UserError, match=r"made with gistnet_layers=2 \(now 4\)\. Use"):
        train("mc", *options, "--gistnet_layers=4")
    train("mc", *options)
    assert meta_of(base, "mc", 2)["finished"]


def test_as_long_as_it_may_take(base, monkeypatch, capsys):
    """The number of steps follows from their speed, is said, and stays when the run is resumed at another speed."""
    now = [0.0]

    class Clock:
        seconds = 1.0  # per step: a step asks twice

        def time(self):
            now[0] += self.seconds
            return now[0]

    monkeypatch.setattr(training, "time", Clock())
    minutes = ["--num_iterations=-1", "--target_minutes=0.5", "--save_every=15"]
    train("minutes", *minutes)
    assert "30 steps take 0.5 minutes, judging by the first 20" in capsys.readouterr().out
    assert meta_of(base, "minutes", 30)["finished"]
    rates = [r["train/lrm"] for r in log_of(base, "base", "minutes") if "train/lrm" in r]
    assert rates == [base_train.lr_multiplier(step, 30, warmdown_ratio=0.2) for step in range(30)]
    Clock.seconds = 0.75
    for tag, total in (("unmeasured", 34), ("measured", 30)):  # killed before the measurement; or after it
        shutil.copytree(folder_of(base, "minutes"), folder_of(base, tag))
        for path in folder_of(base, tag).glob("*_000030*"):
            path.unlink()
        if tag == "measured":
            cm.amend_meta(folder_of(base, tag), 15, total=30)
        train(tag, *minutes)
        assert cm.find_last_step(folder_of(base, tag)) == total


def test_a_longer_run(stopped, half, capsys):
    """While the rates of both runs are the same, the longer one goes on, and is what it had been from the start."""
    longer = ["--num_iterations=12", "--save_every=3"]
    train(stopped, *longer)
    train("longer", *longer)
    assert_equal(*(cm.load_checkpoint(folder_of(half, tag), 12)[0] for tag in (stopped, "longer")))
    train(stopped, *longer)
    assert "nothing to do" in capsys.readouterr().out


def test_a_longer_run_whose_rates_differ_already(base):
    decay = ["--warmdown_ratio=0.5", "--save_every=2", "--num_iterations=8"]
    train("decay", *decay)
    longer = ["--warmdown_ratio=0.5", "--save_every=2", "--num_iterations=16"]
    with pytest.raises(
        UserError, match="step 8 of a run of 8 steps, and a run of 16 .* from step 5 on: delete .* step 4 "
    ):
        train("decay", *longer)
    for step in (6, 8):
        for path in folder_of(base, "decay").glob(f"*_{step:06d}*"):
            path.unlink()
    train("decay", *longer)  # as it was told to
    assert meta_of(base, "decay", 16)["finished"]
    with pytest.raises(UserError, match="step 16 of a run of 16 steps, and a run of 3 steps .* --resume=0"):
        train("decay", *decay[:2], "--num_iterations=3")


def test_a_checkpoint_of_nanochat_is_moved_aside_not_complained_about(base, capsys):
    """Its users know no --resume=0; a training there writes over what is in the folder."""
    folder = folder_of(base, "nano")
    folder.mkdir()
    model = cm.load_model("base", "cpu", model_tag="d1")[0]
    torch.save(model.state_dict(), folder / "model_000100.pt")
    torch.save([], folder / "optim_000100.pt")
    meta = {"step": 100, "val_bpb": 1.0, "model_config": model.config.__dict__, "user_config": {"depth": 1}}
    (folder / "meta_000100.json").write_text(json.dumps(meta))
    train("nano")
    assert "step 100 has no optimizer state to resume from exactly; starting again" in capsys.readouterr().out
    assert meta_of(base, "nano")["finished"]
    (aside,) = (base / "base_checkpoints").glob("nano.old-*")
    assert (aside / "model_000100.pt").exists()


def test_another_tokenizer_is_noticed_when_going_on(stopped, half, tmp_path):
    shutil.copytree(half / "tokenizer", tmp_path / "tokenizer")
    text = ["of all that is said in this test, nothing is of any use but as text to count pairs of letters in; " * 3]
    text += [f"{a}{b}{c}{d} " for a in "abcdefgh" for b in "xyzw" for c in "klmn" for d in "prst"]
    other = RustBPETokenizer.train_from_iterator(iter(text * 2), 600)
    assert other.get_vocab_size() == 600
    write_tokenizer(other, half)
    try:
        with pytest.raises(UserError, match="was trained with another tokenizer"):
            train(stopped)
    finally:
        shutil.rmtree(half / "tokenizer")
        shutil.copytree(tmp_path / "tokenizer", half / "tokenizer")
    train(stopped)


# ---------------------------------------------------------------------------------------------------------
# Looked at before it begins


def test_room_for_a_checkpoint(base, monkeypatch, tmp_path):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match="a checkpoint takes .* MB or more, but .*room has 0.0 MB free: make room"):
        train("room")
    assert not list(folder_of(base, "room").iterdir())


def test_a_folder_that_cannot_be_written(base):
    folder_of(base, "file").write_text("not a folder")
    with pytest.raises(UserError, match="checkpoints cannot be written to .*file"):
        train("file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_iterations=0"], "--num_iterations: expected 1 or more, or -1, got 0"),
        (["--depth=0"], "--depth: expected .*, got 0"),
        (["--depth=-3"], "--depth: expected .*, got -3"),
        (["--model_tag=a/b"], "a model_tag is a name"),
        (["--model_tag=.."], "a model_tag is a name"),
    ],
)
def test_options_out_of_bounds(options, message, base):
    with pytest.raises(UserError, match=message):
        train("bounds", *options)


def test_watching_leaves_the_mathematics_alone():
    assert not {"depth", "total_batch_size", "max_seq_len", "matrix_lr", "warmdown_ratio", "num_iterations"} & WATCHING
