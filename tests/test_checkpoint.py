"""Checkpoints under kills, full disks, damage; those of nanochat; finding and loading."""

import json
import os
import random
import signal
import subprocess
from dataclasses import asdict

import numpy as np
import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.common import UserError, atomic_write
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import RustBPETokenizer
from tests.helpers import make_model, start, write_tokenizer

CONFIG = GPTConfig(sequence_len=8, vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)


def save(folder, step, model=None, **meta):
    model = model or make_model(CONFIG)
    optimizers = [o.state_dict() for o in model.setup_optimizers()]
    meta = {"step": step, "model_config": asdict(model.config), **meta}
    cm.save_checkpoint(folder, step, model.state_dict(), optimizers, meta, [{"epoch": 0}])


def test_round_trip(tmp_path):
    model = make_model(CONFIG)
    save(tmp_path, 7, model, val_bpb=1.5)
    names = {
        "model_000007.pt",
        "optim_000007.pt",
        "state_000007.pt",
        "meta_000007.json",
        "manifest_000007.json",
    }
    assert {p.name for p in tmp_path.iterdir()} == names
    data, optimizers, meta, state = cm.load_checkpoint(tmp_path, 7, load_optimizer=True)
    assert meta["val_bpb"] == 1.5
    assert state["loader"] == [{"epoch": 0}]
    assert len(optimizers) == 2
    loaded = cm.build_model(data, meta["model_config"], "cpu")
    ids = torch.randint(0, 300, (1, 8))
    assert torch.equal(loaded(ids), model(ids))


def test_random_state_comes_back():
    state = cm.rng_state()
    first = random.random(), np.random.rand(), torch.rand(1).item()
    cm.set_rng_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def test_newest_complete_step_is_found(tmp_path):
    assert cm.find_last_step(tmp_path) is None
    for step in (5, 20, 100):
        save(tmp_path, step)
    (tmp_path / "model_notes.pt").write_bytes(b"stray")
    (tmp_path / "model_000999.pt").write_bytes(b"stray, without anything else")
    (tmp_path / ".model_000999.pt.12.tmp").write_bytes(b"left by a kill")
    assert cm.find_last_step(tmp_path) == 100
    (tmp_path / "manifest_000100.json").unlink()
    assert cm.find_last_step(tmp_path) == 20
    (tmp_path / "optim_000020.pt").unlink()
    assert cm.find_last_step(tmp_path) == 5


@pytest.mark.parametrize("kind", ["model", "optim", "state", "meta", "manifest"])
@pytest.mark.parametrize("damage", ["gone", "empty", "truncated"])
def test_a_damaged_step_is_passed_over(kind, damage, tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = cm._file(tmp_path, kind, 2)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-10])
    assert cm.find_last_step(tmp_path) == 1
    with pytest.raises(UserError, match=rf"no complete checkpoint of step 2 in .* \({path.name} (is|has) "):
        cm.load_checkpoint(tmp_path, 2)
    passed_over = []
    cm.find_last_step(tmp_path, passed_over.append)
    assert len(passed_over) == (damage != "gone" or kind != "model")  # a step without a model is none
    assert all(path.name in line for line in passed_over)


def test_a_truncated_model_is_not_called_untrained(base_dir):
    save(cm.checkpoint_root("base") / "d1", 7)
    path = cm.checkpoint_root("base") / "d1" / "model_000007.pt"
    path.write_bytes(path.read_bytes()[:1000])
    for tag in (None, "d1"):
        with pytest.raises(UserError, match=r"no complete checkpoint in .*model_000007.pt has 1,000 bytes of \d"):
            cm.load_model("base", "cpu", model_tag=tag)


def test_meta_data_can_be_amended(tmp_path):
    save(tmp_path, 1, val_bpb=None)
    cm.amend_meta(tmp_path, 1, val_bpb=1.25, evaluated=True)
    assert cm.why_incomplete(tmp_path, 1) is None
    assert cm.load_meta(tmp_path, 1)["val_bpb"] == 1.25
    assert cm.load_meta(tmp_path, 1)["step"] == 1


def test_a_manifest_that_lists_the_meta_data(tmp_path):
    """As it was once: the meta data may have been amended since."""
    save(tmp_path, 1)
    path = cm._file(tmp_path, "manifest", 1)
    entries = json.loads(path.read_text()) | {"meta_000001.json": {"bytes": 1, "sha256": "0"}}
    path.write_text(json.dumps(entries))
    assert cm.why_incomplete(tmp_path, 1) is None
    save(tmp_path, 2)
    cm.prune(tmp_path, 1)
    assert not list(tmp_path.glob("*_000001*"))


@pytest.mark.parametrize("tag", ["a/b", "..", "../d1", ".d1", "", "a b", "/tmp/x", "-d", "d\n1"])
def test_model_tags_are_names(tag, base_dir):
    with pytest.raises(UserError, match="a model_tag is a name of letters, digits"):
        cm.model_folder("base", tag)
    if tag:
        with pytest.raises(UserError, match="a model_tag is a name of letters, digits"):
            cm.load_model("base", "cpu", model_tag=tag)


@pytest.mark.parametrize("kind", ["model", "optim", "state"])
def test_a_flipped_bit_is_seen(kind, tmp_path):
    save(tmp_path, 1)
    path = cm._file(tmp_path, kind, 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name} is damaged \(its checksum differs"):
        cm.load_checkpoint(tmp_path, 1, load_optimizer=True)


def test_read_only_and_full_disk(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write the checkpoint of step 2 .*No space left.*earlier checkpoints"):
        save(tmp_path, 2)
    assert cm.find_last_step(tmp_path) == 1
    assert not list(tmp_path.glob(".*"))  # no half-written file stays


def save_for_ever(folder, model):
    for step in range(2, 20):
        save(folder, step, model)


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/bin/mount"), reason="needs to mount a small tmpfs")
def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        model = make_model(GPTConfig(8, 300, 1, 2, 2, 16))
        save(disk, 1, model)
        with pytest.raises(UserError, match="No space left"):
            save_for_ever(disk, model)
        last = cm.find_last_step(disk)
        cm.load_checkpoint(disk, last, load_optimizer=True)
    finally:
        subprocess.run(["umount", disk], check=True)


def save_twice(folder, boundary):
    """Save steps 1 and 2, and die before the file of step 2 with this number is renamed into place."""
    save(folder, 1)
    replaced, replace = 0, os.replace

    def dying_replace(*args):
        nonlocal replaced
        if replaced == boundary:
            os.kill(os.getpid(), signal.SIGKILL)
        replaced += 1
        replace(*args)

    os.replace = dying_replace
    save(folder, 2)


@pytest.mark.parametrize("boundary", [0, 2, 4, 5])
def test_killed_at_every_file(boundary, tmp_path):
    """A step has five files: a kill before any of the five renames leaves the step before."""
    process = start(save_twice, tmp_path, boundary)
    process.join(60)
    assert process.exitcode == (0 if boundary == 5 else -signal.SIGKILL)
    last = cm.find_last_step(tmp_path)
    assert last == (2 if boundary == 5 else 1)
    cm.load_checkpoint(tmp_path, last, load_optimizer=True)
    save(tmp_path, 2)  # and what the kill left behind is no obstacle
    assert cm.find_last_step(tmp_path) == 2


def test_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with atomic_write(path, "w") as file:
            file.write("half of the new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_number_of_processes(tmp_path):
    save(tmp_path, 1)
    cm.amend_meta(tmp_path, 1, world_size=8)
    with pytest.raises(UserError, match="written by 8 processes .* got 1. Launch with --nproc_per_node=8"):
        cm.load_checkpoint(tmp_path, 1, load_optimizer=True)
    cm.load_checkpoint(tmp_path, 1)  # the weights alone are for anyone


# ---------------------------------------------------------------------------------------------------------
# Models


def test_a_checkpoint_of_nanochat(tmp_path):
    """No manifest, compiled keys, bf16 embedding, and a vocabulary that was not padded."""
    model = make_model(CONFIG)
    data = {f"_orig_mod.{key}": tensor.clone() for key, tensor in model.state_dict().items()}
    for key in ("_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight"):
        data[key] = data[key][:300]
    data["_orig_mod.transformer.wte.weight"] = data["_orig_mod.transformer.wte.weight"].bfloat16()
    torch.save(data, tmp_path / "model_000650.pt")
    meta = {"step": 650, "val_bpb": 0.8, "model_config": asdict(CONFIG), "user_config": {"depth": 1}}
    (tmp_path / "meta_000650.json").write_text(json.dumps(meta))
    assert cm.find_last_step(tmp_path) == 650
    data, _, meta, _ = cm.load_checkpoint(tmp_path, 650)
    loaded = cm.build_model(data, meta["model_config"], "cpu")
    assert loaded.transformer.wte.weight.dtype == torch.float32
    ids = torch.randint(0, 300, (1, 8))
    assert loaded(ids).shape == (1, 8, 300)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(model.transformer.wte.weight.bfloat16())
    torch.testing.assert_close(loaded(ids), model(ids))


def test_weights_that_do_not_fit(tmp_path):
    data = make_model(CONFIG).state_dict()
    with pytest.raises(UserError, match="do not fit its model_config"):
        cm.build_model(data, asdict(GPTConfig(8, 300, 2, 2, 2, 16)), "cpu")
    with pytest.raises(UserError, match="model_config makes no model"):
        cm.build_model(data, {**asdict(CONFIG), "n_embd": 15}, "cpu")
    with pytest.raises(UserError, match="has window_pattern='SSSL', which this .* a newer nanochat wrote it"):
        cm.build_model(data, {**asdict(CONFIG), "window_pattern": "SSSL"}, "cpu")


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("this checkpoint was executed",))

    torch.save({"x": Evil()}, tmp_path / "model_000001.pt")
    (tmp_path / "meta_000001.json").write_text(json.dumps({"model_config": asdict(CONFIG)}))
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        cm.load_checkpoint(tmp_path, 1)
    assert "executed" not in capsys.readouterr().out


def test_load_model(base_dir, tokenizer):
    write_tokenizer(tokenizer, base_dir)
    root = cm.checkpoint_root("base")
    with pytest.raises(UserError, match="no complete checkpoint in"):
        cm.load_model("base", "cpu")
    for tag, step in [("d1", 3), ("d12", 4), ("d2", 5), ("mine", 6)]:
        save(root / tag, step)
    os.rename(root / "mine", root / "d40.old-20260101-000000")  # set aside: not to be picked
    model, _, meta = cm.load_model("base", "cpu")
    assert (meta["model_tag"], meta["step"], model.training) == ("d12", 4, False)
    _, _, meta = cm.load_model("base", "cpu", model_tag="d2")
    assert meta["step"] == 5
    model, _, _ = cm.load_model("base", "cpu", phase="train", model_tag="d1", step=3)
    assert model.training
    with pytest.raises(UserError, match="no complete checkpoint of step 9"):
        cm.load_model("base", "cpu", model_tag="d1", step=9)
    with pytest.raises(UserError, match="name another --model_tag"):
        cm.load_model("base", "cpu", model_tag="nowhere")
    with pytest.raises(UserError, match="source must be one of base, mid, sft, rl, got 'foo'"):
        cm.load_model("foo", "cpu")
    cm.save_checkpoint(cm.checkpoint_root("hf") / "tiny", 1, None, companion_data={"weight": torch.ones(1)})
    with pytest.raises(UserError, match="tiny has networks for a model of transformers: .* --hf-path"):
        cm.load_model("hf", "cpu")


def test_load_model_with_another_tokenizer(base_dir, tokenizer):
    write_tokenizer(tokenizer, base_dir)
    save(cm.checkpoint_root("base") / "d1", 1, make_model(GPTConfig(8, 299, 1, 2, 2, 16)))
    with pytest.raises(UserError, match="the tokenizer has 300 tokens but .* was trained with 299"):
        cm.load_model("base", "cpu")


def test_another_tokenizer_of_the_same_size(base_dir, tokenizer):
    write_tokenizer(tokenizer, base_dir)
    other = RustBPETokenizer.train_from_iterator(
        ["what else is there to be said, and in which other words it could be put by anyone"] * 9, 300
    )
    assert other.get_vocab_size() == tokenizer.get_vocab_size()
    folder = cm.checkpoint_root("base") / "d1"
    save(folder, 1, tokenizer=other.checksum())
    with pytest.raises(UserError, match="d1 was trained with another tokenizer than the one in"):
        cm.load_model("base", "cpu")
    write_tokenizer(other, base_dir)
    cm.load_model("base", "cpu")
    read_again = RustBPETokenizer.from_directory(base_dir / "tokenizer")
    assert read_again.checksum() == other.checksum()


def test_without_a_name_the_newest_folder(tmp_path):
    for age, name in enumerate(["new", "old"]):
        save(tmp_path / name, 1)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert cm.find_largest_model(tmp_path) == "new"
    aside = cm.set_aside(tmp_path / "new")
    assert aside.name.startswith("new.old-")
    assert cm.find_largest_model(tmp_path) == "old"
    assert cm.find_largest_model(tmp_path, companion=True) == "old"  # none has one: whoever needs it will say so


def test_prune_keeps_the_newest_and_what_is_not_ours(tmp_path):
    model = {"w": torch.zeros(2)}
    for step in (1, 2, 3, 4):
        cm.save_checkpoint(tmp_path, step, model, [{"s": step}], {"step": step})
    (tmp_path / "model_000002.pt").write_bytes(b"cut")  # not complete, so not counted and not touched
    (tmp_path / "notes.txt").write_text("mine")
    cm.prune(tmp_path, 2)
    assert cm.find_last_step(tmp_path) == 4
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in left if "000001" in name} == set()
    assert {"notes.txt", "model_000002.pt", "model_000003.pt", "optim_000004.pt"} <= left
    assert cm.why_incomplete(tmp_path, 3) is None
