"""--mc in the scripts: trained, saved, resumed, carried along; and nothing of it with the flag off."""

import json

import pytest
import torch

import nanochat.muon
from megacontext.networks import load_networks
from nanochat import checkpoint_manager as cm
from nanochat.common import UserError
from nanochat.configurator import parse
from scripts import base_train, chat_sft, mc_train, mid_train
from tests.helpers import QUICK, QUICK_BASE, WITH_MC, assert_equal, call_script, in_ranks, log_of


def train(module, *options):
    module.main(parse(module.Config, options))


def test_metrics_and_checkpoint(mc_trained):
    records = log_of(mc_trained, "base", "mc")
    steps = [record for record in records if "train/loss" in record]
    assert len(steps) == 6
    for name in ("base_loss", "token_loss", "lens_loss", "lod_loss/0", "lod_count/1", "tree_tokens", "wc_entries"):
        assert all(record[f"mc/{name}"] > 0 for record in steps), name
    for name in ("variants_total", "time_controller_ms"):
        assert all(record[f"mc/{name}"] > 0 for record in steps), name
    assert steps[-1]["mc/token_loss"] < steps[0]["mc/token_loss"]
    validations = [record for record in records if "val/bpb" in record]
    assert all("val/mc_bpb" in record and "val/mc_truncated_bpb" in record for record in validations)
    # More FLOPs than the tokens alone need: that is what runs are compared by. Beside one layer, two networks are much
    flops = steps[-1]["total_training_flops"] / steps[-1]["total_training_tokens"]
    plain = cm.build_model(
        cm.load_checkpoint(mc_trained / "base_checkpoints" / "mc", 6)[0],
        cm.load_meta(mc_trained / "base_checkpoints" / "mc", 6)["model_config"],
        "cpu",
    ).flops_per_token()
    assert 2 * plain < flops < 8 * plain
    _, _, meta = cm.load_model("base", "cpu", model_tag="mc")
    networks, config = load_networks("base", meta, "cpu")
    assert config.block_size == 4
    assert any(p.abs().sum() > 0 for p in [networks.gistnet.head.c_proj.weight])


@pytest.mark.parametrize(("step", "more"), [(3, []), (1, ["--mc_start=0.5", "--save_every=1"])])
def test_resumed_equals_unbroken(mc_trained, step, more, capsys):
    """The second time from a step at which the model still learns alone."""
    options = *QUICK_BASE, *WITH_MC, "--num_iterations=6", "--save_every=3", *more
    tags = ["alone", "alone-again"] if more else ["mc", "again"]
    folder, other = (mc_trained / "base_checkpoints" / tag for tag in tags)
    if more:
        train(base_train, *options, "--model_tag=alone")
    other.mkdir()
    for path in folder.glob(f"*_00000{step}*"):
        (other / path.name).write_bytes(path.read_bytes())
    train(base_train, *options, f"--model_tag={other.name}")
    assert f"resuming from step {step}" in capsys.readouterr().out
    for kind in ("model", "mc", "optim"):
        one, two = (torch.load(f / f"{kind}_000006.pt", weights_only=True) for f in (folder, other))
        assert_equal(one, two)


def base_train_in_float32(options):
    """Newton–Schulz in bf16 would make large differences of the rounding of gradients that are almost zero."""
    nanochat.muon.has_fast_bf16 = lambda device_type: False
    call_script("base_train", options)


def test_processes_equal_one(mc_trained):
    """
    The same steps by 2 and by 4 processes, each of which has its own dense and compressed sequences. Losses and norms
    of gradients agree; weights do so after one step, since Muon then makes as much of small gradients as of large ones.
    """
    options = [
        *QUICK_BASE,
        *WITH_MC,
        "--num_iterations=4",
        "--device_batch_size=1",
        "--eval_every=-1",
        "--save_every=1",
    ]
    tags = {1: "lone", 2: "pair", 4: "four"}
    for world, tag in tags.items():
        in_ranks(world, base_train_in_float32, [*options, f"--model_tag={tag}", "--mc_lens_loss_weight=1"])
    records = {tag: log_of(mc_trained, "base", tag) for tag in tags.values()}
    for tag in ("pair", "four"):
        lone, many = (cm.load_companion(mc_trained / "base_checkpoints" / name, 1) for name in ("lone", tag))
        assert lone.keys() == many.keys()
        for name, weight in lone.items():
            torch.testing.assert_close(many[name], weight, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        for figure, tolerance in (("train/loss", 2e-3), ("train/grad_norm", 0.05)):
            one, other = ([r[figure] for r in records[name] if figure in r] for name in ("lone", tag))
            assert len(one) == 4
            assert one[0] == pytest.approx(other[0], rel=1e-5)
            assert one == pytest.approx(other, rel=tolerance)


def test_runs_with_and_without_are_not_mixed(mc_trained):
    with pytest.raises(UserError, match="made with mc=True"):
        train(base_train, *QUICK_BASE, "--num_iterations=6", "--model_tag=mc")
    with pytest.raises(UserError, match=r"made with block_size=4 \(now 8\)"):
        train(base_train, *QUICK_BASE, *WITH_MC, "--block_size=8", "--num_iterations=6", "--model_tag=mc")


def test_a_new_model_is_not_frozen():
    with pytest.raises(UserError, match="mc_freeze_base: expected a trained model"):
        train(base_train, *QUICK_BASE, "--mc", "--mc_freeze_base", "--num_iterations=6", "--model_tag=frozen")


def test_flag_off_has_nothing_of_it(mc_trained):
    """The options of MegaContext, the flag left out: the same weights as without them, bit for bit."""
    for tag, options in (("off", []), ("off_too", [*WITH_MC[1:], "--gistnet_layers=4"])):
        train(base_train, *QUICK_BASE, *options, "--num_iterations=3", "--model_tag", tag)
    folders = [mc_trained / "base_checkpoints" / tag for tag in ("off", "off_too")]
    for kind in ("model", "optim"):
        assert_equal(*(torch.load(folder / f"{kind}_000003.pt", weights_only=True) for folder in folders))
    assert not list(folders[0].glob("mc_*"))
    assert not any(key.startswith("mc/") for record in log_of(mc_trained, "base", "off") for key in record)


def test_stages_go_on_with_the_networks(mc_trained):
    mid = ["--tasks=recall", *QUICK, "--num_iterations=2", "--eval_every=-1", "--model_tag=mc"]
    train(mid_train, *mid, *WITH_MC)
    first = cm.load_companion(mc_trained / "mid_checkpoints" / "mc", 2)
    before = cm.load_companion(mc_trained / "base_checkpoints" / "mc", 6)
    assert first.keys() == before.keys()
    assert any(not torch.equal(first[key], before[key]) for key in first)  # they learned on
    sft = ["--tasks=recall", "--device_type=cpu", "--dtype=fp32", "--num_iterations=2", "--eval_every=-1"]
    train(chat_sft, *sft, "--eval_metrics_every=-1", "--model_tag=mc")
    assert_equal(cm.load_companion(mc_trained / "chatsft_checkpoints" / "mc", 2), first)  # carried along as they are
    _, _, meta = cm.load_model("sft", "cpu", model_tag="mc")
    assert load_networks("sft", meta, "cpu")[1].block_size == 4
    with pytest.raises(UserError, match="do not fit"):
        train(mid_train, *mid, *WITH_MC, "--gistnet_layers=4", "--resume=0")
    with pytest.raises(UserError, match="--block_size: expected 4, .* got 8"):
        train(mid_train, *mid, *WITH_MC, "--block_size=8", "--resume=0")


def test_a_budget_too_small_to_sample_is_told_before_training(mc_trained):
    small = ["--model_tag=small", "--sample_every=1", "--allocator_soft_max=64", "--mc_infer_refocus_interval=60"]
    with pytest.raises(UserError, match="--allocator_soft_max: expected at least"):
        train(base_train, *QUICK_BASE, *WITH_MC, *small)
    assert not (mc_trained / "base_checkpoints" / "small").exists()


def test_attached_to_a_frozen_model(mc_trained):
    train(base_train, *QUICK_BASE, "--depth=2", "--num_iterations=3", "--model_tag=two")
    options = ["-g", "two", *QUICK, "--num_iterations=3", "--eval_every=3", *WITH_MC[1:]]
    train(mc_train, *options)
    folder = mc_trained / "base_checkpoints" / "two-mc"
    assert_equal(
        cm.load_checkpoint(folder, 3)[0], cm.load_checkpoint(mc_trained / "base_checkpoints" / "two", 3)[0]
    )  # the model is as it was
    before = cm.load_companion(folder, 3)
    assert before["gistnet.head.c_proj.weight"].any()
    assert before["gistnet.deep.head.c_proj.weight"].any()
    record = log_of(mc_trained, "base", "two-mc")[-1]
    assert "val/mc_bpb" in json.dumps(record)
    with pytest.raises(UserError, match="output_tag must differ"):
        train(mc_train, *options, "--output_tag=two")
    # model and networks can learn on together
    mid = ["--tasks=recall", *QUICK, "--num_iterations=2", "--eval_every=-1", "--model_tag=two-mc"]
    train(mid_train, *mid, "--mc")
    after = cm.load_companion(mc_trained / "mid_checkpoints" / "two-mc", 2)
    assert after.keys() == before.keys()
    assert not torch.equal(after["gistnet.deep.head.c_proj.weight"], before["gistnet.deep.head.c_proj.weight"])


def test_networks_that_learned_with_the_model_learn_on(mc_trained):
    """By mc_train, with the settings that they were made with; LensNet is not begun anew, the model stays as it is."""
    settings = parse(mc_train.Config, ["-g", "mc", "--mc_gist_limit=9"]).megacontext
    assert (settings.block_size, settings.mc_positional, settings.gistnet_type) == (4, "near", "transformer")
    assert (settings.mc_gist_limit, settings.mc_start, settings.mc_past) == (9, 0, -1)
    options = ["-g", "mc", *QUICK, "--eval_every=-1", "--allocator_recent_tokens=8"]
    train(mc_train, *options, "--num_iterations=2")
    root = mc_trained / "base_checkpoints"
    (model, networks), (same, after) = (
        (cm.load_checkpoint(root / tag, step)[0], cm.load_companion(root / tag, step))
        for tag, step in (("mc", 6), ("mc-mc", 2))
    )
    assert_equal(model, same)
    changed = {name for name in after if not torch.equal(after[name], networks[name])}
    assert "gistnet.head.c_proj.weight" in changed
    assert not any(name.startswith("lensnet") for name in changed)
    with pytest.raises(UserError, match="--block_size: expected 4, .* got 8"):
        train(mc_train, *options, "--num_iterations=2", "--output_tag=other", "--block_size=8")
